"""What `bench gpu` measures: invented samples, a model on the device, and one micro-batch and step of it.

The one place of the benchmark that names the model, the layout of micro-batches and the optimizer.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.bert import dropout, packing, regions
from pipeline.bert.config import BertConfig
from pipeline.bert.heads import BertForPreTraining, initialised, pretraining_loss_sums
from pipeline.config import OptimizerConfig, restore
from pipeline.engine import optim
from pipeline.engine.backend import of_config
from pipeline.engine.cast import CastWeights
from pipeline.engine.precision import autocast_for
from pipeline.engine.reduce import GradientBuffer
from pipeline.errors import EnvironmentFault
from pipeline.node.device import claimed, driver_version, why_no_gpu

Ints = NDArray[np.int64]
PHASES = {"phase1": (128, 256), "phase2": (512, 128)}  # seq_len and micro-batch: those of GPUs of 80 GB
LARGE = BertConfig(
    vocab_size=30528, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    hidden_act="tanh",
)  # fmt: skip
TINY = BertConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=128, hidden_act="tanh",
)  # fmt: skip


@dataclass(frozen=True)
class Levers:
    """What makes a step fast, each to be switched off alone."""

    layout: str = "stream"  # or rows, padded
    compiled: bool = True
    cast: str = "step"  # weights are cast once for all micro-batches of a step, or for every micro-batch
    precision: str = "bf16"


@dataclass(frozen=True)
class Samples:
    """Some samples end to end: ``tokens [T]``, ``lengths``, ``b_start`` and ``nsp [N]``, masked ``places [K]`` and
    their ``labels [K]``."""

    seq_len: int
    tokens: Ints
    lengths: Ints
    b_start: Ints
    nsp: Ints
    places: Ints
    labels: Ints


def invent(count: int, seq_len: int, vocab_size: int, seed: int, lengths_like: Ints | None = None) -> Samples:
    """Random samples as long as real ones: at 128 two thirds full (mean 109), else log-normal around half of it.

    With ``lengths_like`` their lengths are drawn from those.
    """
    dice = np.random.default_rng(seed)
    if lengths_like is not None:
        lengths = dice.choice(lengths_like, count)
    elif seq_len <= 128:
        lengths = np.where(dice.random(count) < 0.66, seq_len, dice.integers(16, seq_len, count))
    else:
        lengths = np.clip(dice.lognormal(np.log(0.43 * seq_len), 0.8, count), 20, seq_len).astype(np.int64)
    most = 20 if seq_len <= 128 else 80
    masked = np.clip(np.rint(lengths * 0.15).astype(np.int64), 1, most)
    starts = np.cumsum(lengths) - lengths
    places = [
        start + np.sort(dice.choice(np.arange(1, length - 1), share, replace=False))
        for start, length, share in zip(starts, lengths, masked, strict=True)
    ]
    tokens = dice.integers(10, vocab_size, lengths.sum())
    return Samples(
        seq_len, tokens, lengths, lengths // 2, dice.integers(0, 2, count), np.concatenate(places),
        dice.integers(10, vocab_size, masked.sum()),
    )  # fmt: skip


def layouts(device: torch.device) -> list[str]:
    """The layouts that this device can compute, the one that training uses first."""
    return ["stream", "rows", "padded"] if device.type == "cuda" else ["rows", "padded"]


def laid_out(samples: Samples, layout: str) -> dict[str, NDArray[np.int32]]:
    """The arrays of a micro-batch on the host: the batch's, ``masked_index``, ``labels`` and ``nsp``."""
    arrays = packing.layout(
        samples.tokens, samples.lengths, samples.b_start, samples.seq_len, getattr(packing, layout.upper())
    )
    more = {"masked_index": arrays["slot"][samples.places], "labels": samples.labels, "nsp": samples.nsp}
    return {**arrays, **{name: np.asarray(values, np.int32) for name, values in more.items()}}


def placed(samples: Samples, layout: str, device: torch.device) -> dict[str, Tensor]:
    """`laid_out` on the device."""
    arrays = laid_out(samples, layout)
    return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}


@functools.cache
def starting_weights(config: BertConfig) -> dict[str, Tensor]:
    """Random weights on the CPU, the same everywhere."""
    with torch.device("meta"):
        model = BertForPreTraining(config)
    model.to_empty(device="cpu")
    return dict(initialised(model, torch.Generator().manual_seed(1)).state_dict())


def model_on(device: torch.device, config: BertConfig) -> BertForPreTraining:
    """A model with the `starting_weights`, training."""
    with torch.device("meta"):
        model = BertForPreTraining(config)
    model.to_empty(device=device)
    model.load_state_dict(starting_weights(replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)))
    return model.train()


class Subject:
    """A model, its gradients and its optimizer on a device, with some levers; ``samples`` are its micro-batches."""

    def __init__(
        self, device: torch.device, config: BertConfig, levers: Levers, samples: Sequence[Samples], *, backend: str = ""
    ) -> None:
        self.device, self.config, self.levers, self.samples = device, config, levers, samples
        self.model = model_on(device, config)
        self.compiled = regions.compile_regions(device if levers.compiled else torch.device("cpu"))
        self.autocast = functools.partial(autocast_for, levers.precision, device)
        self.gradients = GradientBuffer(list(self.model.parameters()))
        self.cast = CastWeights(self.model, self.gradients, self.autocast())
        self.optimizer = build_optimizer(self.model, backend, self.gradients) if backend else None
        self.batches = [placed(each, levers.layout, device) for each in samples]

    def losses(self, index: int, key: int = 0) -> tuple[Tensor, Tensor]:
        """MLM and NSP loss of one micro-batch, means over its masked tokens and samples; inside `autocast`."""
        dropout.keyed(1, "bench", key, index)
        tensors = self.batches[index]
        mlm_sum, nsp_sum = losses_of(self.model, tensors, self.samples[index].seq_len)
        return mlm_sum / len(tensors["labels"]), nsp_sum / len(tensors["nsp"])

    def micro_batch(self, index: int, key: int = 0) -> Tensor:
        """Forward and backward; gradients are added to those that are there. Returns the loss."""
        mlm_loss, nsp_loss = self.losses(index, key)
        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward((mlm_loss + nsp_loss) / len(self.batches))
        return (mlm_loss + nsp_loss).detach()

    def accumulate(self, indices: Sequence[int], key: int = 0) -> list[Tensor]:
        """Some micro-batches as in one step, with the weights cast once or for each. Returns their losses."""
        losses = []
        with contextlib.ExitStack() as around:
            if self.levers.cast == "step":
                around.enter_context(self.autocast())
                around.enter_context(self.cast)
            for index in indices:
                with contextlib.nullcontext() if self.levers.cast == "step" else self.autocast():
                    losses.append(self.micro_batch(index, key))
        return losses

    def step(self, number: int, learning_rate: float = 1e-3) -> float:
        """One optimizer step over all micro-batches; returns the gradients' norm."""
        assert self.optimizer is not None
        self.gradients.zero_()
        self.accumulate(range(len(self.batches)), number)
        return self.optimizer.step(learning_rate, max_grad_norm=1.0)

    def digest(self) -> str:
        """All bits of weights and moments as one number."""
        assert self.optimizer is not None
        parts = [*self.model.parameters(), *self.optimizer.exp_avg.values(), *self.optimizer.exp_avg_sq.values()]
        total = sum(int(part.detach().view(torch.int32).sum(dtype=torch.int64)) for part in parts)
        return f"{total & (1 << 64) - 1:016x}"


def losses_of(model: nn.Module, tensors: Mapping[str, Any], seq_len: int) -> tuple[Tensor, Tensor]:
    """MLM and NSP loss of a micro-batch that was `laid_out`, as sums; inside autocast."""
    mlm_logits, nsp_logits = model(packing.Batch.of({**tensors, "seq_len": seq_len}), tensors["masked_index"])
    with torch.autocast(mlm_logits.device.type, enabled=False):
        return pretraining_loss_sums(mlm_logits, tensors["labels"], nsp_logits, tensors["nsp"])


def build_optimizer(model: BertForPreTraining, backend: str, gradients: GradientBuffer) -> optim.Optimizer:
    """LAMB with the published settings, which are the defaults, on ``backend`` (torch or apex)."""
    config = restore(OptimizerConfig, {"backend": backend}, "the benchmark")
    return of_config(config, model.named_parameters(), gradients)


def device_for(tiny: bool) -> torch.device:
    """The GPU, claimed as training does; the CPU with ``tiny`` where there is none."""
    if torch.cuda.is_available():
        return claimed(torch.device("cuda", 0))
    if tiny:
        return torch.device("cpu")
    raise EnvironmentFault(why_no_gpu(torch.version.cuda, driver_version()))


def best(device: torch.device, **changes: Any) -> Levers:
    """The levers that training uses on this device."""
    return replace(Levers(layouts(device)[0], compiled=device.type == "cuda"), **changes)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[int], object], device: torch.device, spend_s: float, *, group: int = 4) -> float:
    """Seconds of one call of ``work(number)``: the median of groups of calls, after one call to warm up."""
    work(0)
    synchronise(device)
    times: list[float] = []
    end = time.perf_counter() + spend_s
    number = 0
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        began = time.perf_counter()
        for _ in range(group):
            work(number)
            number += 1
        synchronise(device)
        times.append((time.perf_counter() - began) / group)
        if time.perf_counter() > end + spend_s:  # much slower than hoped
            break
    return float(np.median(times))
