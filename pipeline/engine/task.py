"""What the engine asks of anything that is trained. Pretraining and fine-tuning are tasks; the engine knows neither.

A task is addressed by the number of a batch and the index of a micro-batch in it, so that what a step computes never
depends on the ranks. Batches are numbered without end; epochs are the task's own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bert.heads import Model
from pipeline.config import OptimizerConfig, Precision
from pipeline.engine.ranks import Ranks

Array = NDArray[np.int32] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is trained; intervals are in steps, and ``None`` means never (checkpoints: by the clock)."""

    steps: int
    seed: int
    micro_batch: int  # samples
    precision: Precision
    reduction: Literal["fast", "tree"]
    loss_mean: Literal["global", "micro"] = "global"
    optimizer: OptimizerConfig
    learning_rate: float
    warmup: float  # share of all steps
    schedule: Literal["poly", "linear", "constant", "cosine", "wsd"]
    max_grad_norm: float
    log_every: int = 1
    say_every: int = 10  # a line for people
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    best_by: str | None = None  # the held-out figure whose lowest value says which checkpoint is the result
    evaluate_first: bool = False  # before the first step: what the starting weights know
    first_step: int = 0  # steps that were made before, elsewhere


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the host.

    ``ids [N]`` name its samples. ``arrays`` go to the device, all in one copy; ``sizes`` are plain numbers that the
    forward needs and must not read back from the device. ``counts`` are this micro-batch's own (see `Task.counts`).
    """

    ids: NDArray[np.int64]
    arrays: Mapping[str, Array]
    counts: Sequence[int]
    sizes: Mapping[str, int] = field(default_factory=dict)


class Task(Protocol):
    """One thing to train: a pretraining phase, or one seed of a fine-tuning task."""

    settings: Settings
    losses_named: tuple[str, ...]  # the k losses whose sum is minimised
    counts_named: tuple[str, ...]  # the counts; the first k divide the losses, the last is the number of tokens

    def model(self) -> Model:
        """A model on the CPU with the weights that training begins from."""

    def optimizer(self) -> Mapping[str, Tensor] | None:
        """The state of the optimizer that training begins from, as `Optimizer.state`; None: a fresh one."""

    def size(self, batch: int) -> int:
        """Samples of batch number ``batch``."""

    def counts(self, batch: int, indices: range) -> Sequence[int]:
        """Counts of these micro-batches together, from the index alone; zeros for an empty range."""

    def read(self, batch: int, index: int) -> MicroBatch:
        """One micro-batch; called from the feed's thread."""

    def losses(self, model: Model, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        """The k losses of one micro-batch as fp32 sums on the device, without waiting for it."""

    def evaluate(self, model: Model, ranks: Ranks) -> Mapping[str, Any]:
        """Held-out figures, the same on every rank; called by all ranks together."""

    def in_words(self, figures: Mapping[str, Any]) -> str:
        """What `evaluate` found, in a line for people."""

    def identity(self) -> Mapping[str, Any]:
        """What must be equal for a checkpoint to be gone on from, beside what the engine itself adds.

        Configurations are put in as they are, so that their `science` is compared field by field, defaults absent.
        """

    def finish(self, model: Model, ranks: Ranks) -> Mapping[str, Any]:
        """Called by all ranks after the last step; returns the stage's result beside step and checkpoint."""
