"""LAMB with apex FusedLAMB's semantics, and AdamW, behind one small interface.

On the CPU LAMB goes through each tensor in chunks that stay in cache, and AdamW is PyTorch's fused kernel; on other
devices both go through all tensors at once, end to end in flat buffers.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.bert.regions import region
from pipeline.engine.reduce import ALIGN, GradientBuffer
from pipeline.errors import CheckpointError

# Elements per chunk on the CPU. 512 KiB of each operand fits a core's L2, and the float32 norm of a chunk is
# good to 5e-7 where PyTorch's norm of a whole 23M-element tensor is off by 1e-3.
CHUNK = 131_072
NO_DECAY = ("bias", "gamma", "beta", "LayerNorm")


class Factors(NamedTuple):
    """The numbers of one step that are the same for all tensors."""

    learning_rate: float
    clip: float  # multiplies every gradient
    eps: float  # already multiplied by the root of the second moment's bias correction
    unbias: float  # multiplies m / (sqrt(v) + eps)


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this name (biases and LayerNorm are exempt)."""
    return not any(part in name for part in NO_DECAY)


def _chunks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same ``CHUNK`` elements of several 1-D tensors of one length, chunk by chunk."""
    for start in range(0, flat[0].numel(), CHUNK):
        yield tuple(tensor[start : start + CHUNK] for tensor in flat)


def _square_sum(flat: Tensor) -> float:
    """Sum of squares of a flat CPU tensor: float32 inside a chunk, float64 between chunks, in order."""
    return math.fsum(float(torch.linalg.vector_norm(part)) ** 2 for (part,) in _chunks(flat))


def global_norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all elements of all tensors, combined in the order given, so the same each time."""
    if not tensors:
        return 0.0
    if tensors[0].device.type == "cpu":
        return math.sqrt(sum(_square_sum(tensor.detach().reshape(-1)) for tensor in tensors))
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return float(torch.stack(list(norms)).double().norm())


class Flat:
    """Weights and both moments, each end to end in one buffer laid out like the gradients.

    The parameters become views of ``weight``. Every tensor fills whole lines of `ALIGN` elements, the rest of its
    last one with zeros; ``owner [lines]`` is its number and ``sizes`` its elements with that rest. ``decay`` and
    ``adapts`` (0 or 1) say per tensor how it is treated.
    """

    def __init__(self, gradients: GradientBuffer, decay: Sequence[float], adapts: Sequence[float]) -> None:
        self.gradient = gradients.flat
        self.weight, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(gradients.flat) for _ in range(3))
        dtype, device = self.weight.dtype, self.weight.device
        self.decay, self.adapts = (torch.tensor(values, dtype=dtype, device=device) for values in (decay, adapts))
        sizes = np.diff([*(start for start, _ in gradients.spans), len(gradients.flat)])
        self.sizes: list[int] = sizes.tolist()
        owner = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes // ALIGN)
        self.owner = torch.from_numpy(owner).to(self.weight.device)
        self.spans = gradients.spans
        for parameter, view in zip(gradients.parameters, self.views(self.weight, gradients.parameters), strict=True):
            parameter.data = view.copy_(parameter.detach())

    def views(self, flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
        """The tensors of which ``flat`` is made, in the shapes of ``like``."""
        return [flat[start:stop].view_as(p) for p, (start, stop) in zip(like, self.spans, strict=True)]


@region
def direction(
    gradient: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    owner: Tensor,
    decay: Tensor,
    clip: Tensor,
    eps: Tensor,
    betas: tuple[float, float],
) -> Tensor:
    """Update the moments in place and return m / (sqrt(v) + eps) + decay * p; all in one pass.

    The first four are ``[lines, ALIGN]``; ``decay`` is that of each line's ``owner``, ``clip`` multiplies the gradient.
    """
    clipped = gradient * clip
    exp_avg.mul_(betas[0]).add_(clipped, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(clipped, clipped, value=1 - betas[1])
    return exp_avg / (exp_avg_sq.sqrt() + eps) + decay.index_select(0, owner).unsqueeze(1) * weight


class Optimizer(ABC):
    """Adam's two moments for named parameters; a subclass says what is done with them.

    ``betas`` and ``eps`` are Adam's; ``weight_decay`` is decoupled and 0 for names of biases and LayerNorm.
    ``gradients`` hold the ``grad`` of these parameters, in this order; a device other than the CPU needs it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        gradients: GradientBuffer | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.betas, self.eps = betas, eps
        self.decay = {name: weight_decay if decays(name) else 0.0 for name in self.parameters}
        self.exp_avg = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
        self.finished_steps = 0
        self.flat: Flat | None = None
        if any(p.device.type != "cpu" for p in self.parameters.values()):
            if gradients is None:
                raise TypeError("on a GPU an optimizer needs the GradientBuffer of its parameters")
            self.use(gradients)

    def use(self, gradients: GradientBuffer) -> None:
        """Keep weights and moments in flat buffers beside those of the gradients, as a GPU wants them."""
        like = list(self.parameters.values())
        assert all(map(operator.is_, like, gradients.parameters)), "other parameters, or in another order"
        self.flat = Flat(gradients, list(self.decay.values()), [self._adapts(name) for name in self.parameters])
        self.exp_avg = dict(zip(self.parameters, self.flat.views(self.flat.exp_avg, like), strict=True))
        self.exp_avg_sq = dict(zip(self.parameters, self.flat.views(self.flat.exp_avg_sq, like), strict=True))

    def step(self, learning_rate: float, *, max_grad_norm: float) -> float:
        """Update the parameters from their ``grad`` and return the global gradient norm before clipping.

        Gradients are read as if divided by max(1, norm / ``max_grad_norm``) (0: no clipping), and may be left so.
        With a norm that is not finite nothing changes, nor the step count. A parameter without gradient is left as it
        is.
        """
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        norm = global_norm(self._gradients(names))
        if not math.isfinite(norm):
            return norm
        self.finished_steps += 1
        clip = 1.0 / max(1.0, norm / max_grad_norm) if max_grad_norm > 0 else 1.0
        first = 1 - self.betas[0] ** self.finished_steps
        second = math.sqrt(1 - self.betas[1] ** self.finished_steps)
        with torch.no_grad():
            self._update(names, Factors(learning_rate, clip, self.eps * second, second / first))
        return norm

    def state(self) -> dict[str, Tensor]:
        """The state by name, not copied: ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and int64 ``step`` []."""
        state = {f"exp_avg.{name}": tensor for name, tensor in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": tensor for name, tensor in self.exp_avg_sq.items()}
        return state | {"step": torch.tensor(self.finished_steps, dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises CheckpointError, before anything changes, unless names and shapes match."""
        own = self.state()
        wrong = [f"missing {key}" for key in own if key not in state]
        wrong += [f"unknown {key}" for key in state if key not in own]
        wrong += [
            f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(f"optimizer state does not fit the model: {'; '.join(wrong[:3])}{more}")
        for key, tensor in own.items():
            tensor.copy_(state[key])
        self.finished_steps = int(state["step"])

    def reset(self) -> None:
        for moments in (self.exp_avg, self.exp_avg_sq):
            for tensor in moments.values():
                tensor.zero_()
        self.finished_steps = 0

    def _gradients(self, names: Sequence[str]) -> list[Tensor]:
        return [grad for name in names if (grad := self.parameters[name].grad) is not None]

    def _update(self, names: Sequence[str], factors: Factors) -> None:
        if self.flat is not None:
            self._update_flat(self.flat, factors)
        else:
            self._update_tensors(names, factors)

    @abstractmethod
    def _update_tensors(self, names: Sequence[str], factors: Factors) -> None:
        """As `_update`, of tensors on the CPU."""

    def _adapts(self, name: str) -> bool:
        """Whether the trust ratio |p| / |u| scales this tensor's direction u, as in LAMB."""
        return False

    def _update_flat(self, flat: Flat, factors: Factors) -> None:
        """All tensors at once, nothing read back: Adam's direction, its trust ratios, the step."""
        gradient, weight, exp_avg, exp_avg_sq = (
            buffer.view(-1, ALIGN) for buffer in (flat.gradient, flat.weight, flat.exp_avg, flat.exp_avg_sq)
        )
        clip, eps = (torch.full_like(flat.decay[0], value) for value in (factors.clip, factors.eps))
        decay = flat.decay / factors.unbias
        u = direction(gradient, weight, exp_avg, exp_avg_sq, flat.owner, decay, clip, eps, self.betas)
        p_norm, u_norm = (
            torch.stack(torch._foreach_norm(torch.split(each.view(-1), flat.sizes))) for each in (weight, u)
        )
        defined = (flat.adapts > 0) & (p_norm > 0) & (u_norm > 0)
        scale = torch.where(defined, p_norm / u_norm, factors.unbias)
        weight.addcmul_(u, scale.index_select(0, flat.owner).unsqueeze(1), value=-factors.learning_rate)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    def _update_tensors(self, names: Sequence[str], factors: Factors) -> None:
        # what torch.optim.AdamW(fused=True) calls: one pass; it writes the clipped gradients back
        step = torch.tensor(float(self.finished_steps))
        for decay in dict.fromkeys(self.decay.values()):
            group = [name for name in names if self.decay[name] == decay]
            torch._fused_adamw_(
                [self.parameters[name] for name in group],
                self._gradients(group),
                [self.exp_avg[name] for name in group],
                [self.exp_avg_sq[name] for name in group],
                [],
                [step] * len(group),
                lr=factors.learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=torch.tensor(1 / factors.clip),
            )


class Lamb(Optimizer):
    """LAMB (You et al. 2020) as NVIDIA's apex FusedLAMB computes it.

    Gradients are clipped to a global norm before the moments; u = mhat / (sqrt(vhat) + eps) + decay * p; the
    step is lr * |p| / |u| * u for each tensor, with ratio 1 where either norm is 0. ``variant="apex"`` uses
    the ratio only where weight decay applies (biases and LayerNorm get plain Adam), ``"nvlamb"`` everywhere.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        variant: Literal["apex", "nvlamb"] = "apex",
        **options: Any,
    ) -> None:
        self.variant = variant
        self._scratch = torch.empty(0)
        super().__init__(named_parameters, **options)

    def _adapts(self, name: str) -> bool:
        return self.variant == "nvlamb" or self.decay[name] != 0

    def _update_tensors(self, names: Sequence[str], factors: Factors) -> None:
        (b1, b2), clip = self.betas, factors.clip
        for name, gradient in zip(names, self._gradients(names), strict=True):
            weight, grad = self.parameters[name].detach().view(-1), gradient.reshape(-1)
            moments = self.exp_avg[name].view(-1), self.exp_avg_sq[name].view(-1)
            # The direction is kept without its factor `unbias`: decay is divided by it, the step size multiplied.
            decay = self.decay[name] / factors.unbias
            direction = self._workspace(weight)
            weight_square = direction_square = 0.0
            for p, g, m, v, u in _chunks(weight, grad, *moments, direction):
                m.mul_(b1).add_(g, alpha=(1 - b1) * clip)
                v.mul_(b2).addcmul_(g, g, value=(1 - b2) * clip * clip)
                torch.div(m, torch.sqrt(v, out=u).add_(factors.eps), out=u)
                if decay:
                    u.add_(p, alpha=decay)
                if self._adapts(name):
                    weight_square += _square_sum(p)
                    direction_square += _square_sum(u)
            is_defined = weight_square > 0 and direction_square > 0
            scale = math.sqrt(weight_square) / math.sqrt(direction_square) if is_defined else factors.unbias
            weight.add_(direction, alpha=-factors.learning_rate * scale)

    def _workspace(self, like: Tensor) -> Tensor:
        """A reused 1-D buffer; a fresh one of this size would cost a page fault per 4 KiB at every step."""
        if self._scratch.numel() < like.numel() or self._scratch.dtype != like.dtype:
            self._scratch = torch.empty(like.numel(), dtype=like.dtype)
        return self._scratch[: like.numel()]
