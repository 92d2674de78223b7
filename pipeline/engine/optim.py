"""LAMB with apex FusedLAMB's semantics, and AdamW, behind one small interface.

On the CPU the work goes through each tensor in chunks that stay in cache; on other devices it uses PyTorch's
list operations. Neither changes the gradients it reads.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.config import OptimizerConfig
from pipeline.errors import CheckpointError, ConfigError, EnvironmentFault

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


class Optimizer(ABC):
    """Adam's two moments for named parameters; a subclass says what is done with them.

    ``betas`` and ``eps`` are Adam's; ``weight_decay`` is decoupled and 0 for names of biases and LayerNorm;
    ``bias_correction=False`` gives BERT's original Adam.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.decay = {name: weight_decay if decays(name) else 0.0 for name in self.parameters}
        self.exp_avg = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()}
        self.finished_steps = 0
        self.foreach = any(p.device.type != "cpu" for p in self.parameters.values())
        self._scratch = torch.empty(0)

    def step(self, learning_rate: float, *, max_grad_norm: float, grad_norm: float | None = None) -> float:
        """Update the parameters from their ``grad`` and return the global gradient norm before clipping.

        Gradients are read as if divided by max(1, norm / ``max_grad_norm``) (0: no clipping). ``grad_norm``
        saves computing the norm again. With a norm that is not finite nothing changes, nor the step count.
        A parameter without gradient is left as it is.
        """
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        norm = global_norm(self._gradients(names)) if grad_norm is None else grad_norm
        if not math.isfinite(norm):
            return norm
        self.finished_steps += 1
        clip = 1.0 / max(1.0, norm / max_grad_norm) if max_grad_norm > 0 else 1.0
        with torch.no_grad():
            self._update(names, self._factors(learning_rate, clip))
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
        """Forget all moments and steps."""
        for moments in (self.exp_avg, self.exp_avg_sq):
            for tensor in moments.values():
                tensor.zero_()
        self.finished_steps = 0

    def _gradients(self, names: Sequence[str]) -> list[Tensor]:
        return [grad for name in names if (grad := self.parameters[name].grad) is not None]

    def _factors(self, learning_rate: float, clip: float) -> Factors:
        first = second = 1.0
        if self.bias_correction:
            first = 1 - self.betas[0] ** self.finished_steps
            second = math.sqrt(1 - self.betas[1] ** self.finished_steps)
        return Factors(learning_rate, clip, self.eps * second, second / first)

    def _update(self, names: Sequence[str], factors: Factors) -> None:
        """Apply one step to the named parameters."""
        if not self.foreach:
            for name in names:
                self._update_tensor(name, factors)
        elif names:
            self._update_list(names, factors)

    @abstractmethod
    def _update_tensor(self, name: str, factors: Factors) -> None:
        """One tensor on the CPU, chunk by chunk."""

    @abstractmethod
    def _update_list(self, names: Sequence[str], factors: Factors) -> None:
        """All tensors with PyTorch's list operations."""

    def _flat(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parameter, gradient and moments of one name as 1-D tensors over the same storage."""
        parameter, grad = self.parameters[name], self.parameters[name].grad
        assert grad is not None
        return (
            parameter.detach().view(-1),
            grad.detach().reshape(-1),
            self.exp_avg[name].view(-1),
            self.exp_avg_sq[name].view(-1),
        )

    def _workspace(self, like: Tensor, elements: int) -> Tensor:
        """A reused 1-D buffer; a fresh one of this size would cost a page fault per 4 KiB at every step."""
        if self._scratch.numel() < elements or self._scratch.dtype != like.dtype:
            self._scratch = torch.empty(elements, dtype=like.dtype)
        return self._scratch[:elements]

    def _moments(self, grad: Tensor, m: Tensor, v: Tensor, clip: float) -> None:
        b1, b2 = self.betas
        m.mul_(b1).add_(grad, alpha=(1 - b1) * clip)
        v.mul_(b2).addcmul_(grad, grad, value=(1 - b2) * clip * clip)

    def _moments_list(self, names: Sequence[str], clip: float) -> tuple[list[Tensor], list[Tensor]]:
        """Update all moments; returns the first moments and the roots of the second ones."""
        b1, b2 = self.betas
        m, v = [self.exp_avg[name] for name in names], [self.exp_avg_sq[name] for name in names]
        grads = self._gradients(names)
        torch._foreach_mul_(m, b1)
        torch._foreach_add_(m, grads, alpha=(1 - b1) * clip)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, value=(1 - b2) * clip * clip)
        return m, list(torch._foreach_sqrt(v))


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    def _update_tensor(self, name: str, factors: Factors) -> None:
        flat = self._flat(name)
        keep = 1 - factors.learning_rate * self.decay[name]
        for p, grad, m, v in _chunks(*flat):
            self._moments(grad, m, v, factors.clip)
            root = torch.sqrt(v, out=self._workspace(p, p.numel())).add_(factors.eps)
            p.mul_(keep).addcdiv_(m, root, value=-factors.learning_rate * factors.unbias)

    def _update_list(self, names: Sequence[str], factors: Factors) -> None:
        m, roots = self._moments_list(names, factors.clip)
        torch._foreach_add_(roots, factors.eps)
        parameters = [self.parameters[name].detach() for name in names]
        torch._foreach_mul_(parameters, [1 - factors.learning_rate * self.decay[name] for name in names])
        torch._foreach_addcdiv_(parameters, m, roots, value=-factors.learning_rate * factors.unbias)


class Lamb(Optimizer):
    """LAMB (You et al. 2020) as NVIDIA's apex FusedLAMB computes it.

    Gradients are clipped to a global norm before the moments; u = mhat / (sqrt(vhat) + eps) + decay * p; the
    step is lr * |p| / |u| * u for each tensor, with ratio 1 where either norm is 0. ``variant="apex"`` uses
    the ratio only where weight decay applies (biases and LayerNorm get plain Adam), ``"nvlamb"`` everywhere.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], *, variant: str = "apex", **options: Any
    ) -> None:
        super().__init__(named_parameters, **options)
        if variant not in ("apex", "nvlamb"):
            raise ConfigError(f"lamb_variant {variant!r} is unknown; choose apex or nvlamb")
        self.variant = variant

    def _adapts(self, name: str) -> bool:
        return self.variant == "nvlamb" or self.decay[name] != 0

    def _update_tensor(self, name: str, factors: Factors) -> None:
        # The direction is kept without its factor `unbias`: decay is divided by it, the step size multiplied.
        flat = self._flat(name)
        decay = self.decay[name] / factors.unbias
        direction = self._workspace(flat[0], flat[0].numel())
        parameter_square = direction_square = 0.0
        for p, grad, m, v, u in _chunks(*flat, direction):
            self._moments(grad, m, v, factors.clip)
            torch.div(m, torch.sqrt(v, out=u).add_(factors.eps), out=u)
            if decay:
                u.add_(p, alpha=decay)
            if self._adapts(name):
                parameter_square += _square_sum(p)
                direction_square += _square_sum(u)
        scale = _trust(math.sqrt(parameter_square), math.sqrt(direction_square), factors.unbias)
        flat[0].add_(direction, alpha=-factors.learning_rate * scale)

    def _update_list(self, names: Sequence[str], factors: Factors) -> None:
        m, roots = self._moments_list(names, factors.clip)
        torch._foreach_add_(roots, factors.eps)
        u = list(torch._foreach_div(m, roots))
        del roots
        parameters = [self.parameters[name].detach() for name in names]
        decayed = [i for i, name in enumerate(names) if self.decay[name]]
        if decayed:
            alpha = self.decay[names[decayed[0]]] / factors.unbias
            torch._foreach_add_([u[i] for i in decayed], [parameters[i] for i in decayed], alpha=alpha)
        norms = torch.stack([*torch._foreach_norm(parameters), *torch._foreach_norm(u)]).tolist()
        scales = [
            _trust(p, d, factors.unbias) if self._adapts(name) else factors.unbias
            for name, p, d in zip(names, norms[: len(names)], norms[len(names) :], strict=True)
        ]
        torch._foreach_mul_(u, [-factors.learning_rate * scale for scale in scales])
        torch._foreach_add_(parameters, u)


def _trust(parameter_norm: float, direction_norm: float, unbias: float) -> float:
    """What the direction is multiplied by: |p| / |u|, or ``unbias`` alone where the ratio is not defined."""
    return parameter_norm / direction_norm if parameter_norm > 0 and direction_norm > 0 else unbias


class ApexLamb(Lamb):
    """NVIDIA's CUDA kernel of the same update. It leaves the update, not the gradient, in ``grad``."""

    def __init__(self, fused_lamb: type[Any], named_parameters: Iterable[tuple[str, Parameter]], **options: Any):
        super().__init__(named_parameters, **options)
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if self.decay[name] == decay],
                "weight_decay": decay,
            }
            for decay in sorted(set(self.decay.values()))
        ]
        self._fused = fused_lamb(
            groups,
            betas=self.betas,
            eps=self.eps,
            bias_correction=self.bias_correction,
            use_nvlamb=self.variant == "nvlamb",
        )
        for name, p in self.parameters.items():  # the kernel then works on our moments
            self._fused.state[p] = {"exp_avg": self.exp_avg[name], "exp_avg_sq": self.exp_avg_sq[name]}

    def step(self, learning_rate: float, *, max_grad_norm: float, grad_norm: float | None = None) -> float:
        """As ``Optimizer.step``; the kernel computes the norm that it clips by itself."""
        self._fused.defaults["max_grad_norm"] = max_grad_norm or math.inf
        return super().step(learning_rate, max_grad_norm=max_grad_norm, grad_norm=grad_norm)

    def _update(self, names: Sequence[str], factors: Factors) -> None:
        for group in self._fused.param_groups:
            group.update(lr=factors.learning_rate, step=self.finished_steps - 1)
        self._fused.step()


def apex_fused_lamb() -> type[Any] | None:
    """NVIDIA apex's FusedLAMB, or None where it cannot run.

    PyPI's ``apex`` is an unrelated web package that imports without error, so nothing named apex is imported
    unless NVIDIA's compiled extension ``amp_C`` is there and CUDA can be used.
    """
    if not torch.cuda.is_available():
        return None
    try:
        importlib.import_module("amp_C")  # first: it fails where apex is not NVIDIA's
        fused_lamb: type[Any] = importlib.import_module("apex.optimizers").FusedLAMB
    except (ImportError, AttributeError):
        return None
    return fused_lamb


def build(name: str, backend: str, named_parameters: Iterable[tuple[str, Parameter]], **options: Any) -> Optimizer:
    """The optimizer ``name`` (lamb | adamw) on ``backend`` (auto | torch | apex).

    ``options`` are those of the class. ``auto`` takes apex for lamb where it is NVIDIA's and CUDA is there.
    Raises ConfigError for unknown names, EnvironmentFault when apex is asked for and cannot run.
    """
    if name not in ("lamb", "adamw"):
        raise ConfigError(f"optimizer {name!r} is unknown; choose lamb or adamw")
    if backend not in ("auto", "torch", "apex"):
        raise ConfigError(f"optimizer.backend {backend!r} is unknown; choose auto, torch or apex")
    if name == "adamw":
        if backend == "apex":
            raise ConfigError("optimizer.backend = apex has lamb only; take auto or torch with adamw")
        return AdamW(named_parameters, **options)
    fused_lamb = apex_fused_lamb() if backend != "torch" else None
    if fused_lamb is not None:
        return ApexLamb(fused_lamb, named_parameters, **options)
    if backend == "apex":
        raise EnvironmentFault(
            "optimizer.backend = apex needs CUDA and NVIDIA's apex (built with amp_C; the package named apex "
            "on PyPI is another one): install it or take backend = auto"
        )
    return Lamb(named_parameters, **options)


def of_config(config: OptimizerConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
    """The optimizer that a configuration describes."""
    options = dataclasses.asdict(config)
    name, backend, variant = options.pop("name"), options.pop("backend"), options.pop("variant")
    return build(name, backend, named_parameters, **options, **({"variant": variant} if name == "lamb" else {}))
