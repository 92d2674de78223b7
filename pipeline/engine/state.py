"""What a training consists of between two steps, where it begins, and how it goes into a checkpoint and out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.publish import publish_json
from pipeline.bert.heads import Model
from pipeline.engine import checkpoint
from pipeline.engine.optim import Optimizer
from pipeline.engine.precision import LossScale
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import Task
from pipeline.node.distributed import peers_named
from pipeline.node.job import Job
from pipeline.run.files import now

# Fields of an identity: same science, other bits.
CHANGEABLE = ("threads", "micro_batch", "code", "torch", "cpu", "compiled")


class TrainingState:
    """Model, optimizer, loss scale, and how far they are.

    ``step`` updates were made of ``samples`` samples, and ``skipped`` batches of them made none.
    """

    def __init__(
        self, model: Model, optimizer: Optimizer, scale: LossScale | None, identity: Mapping[str, Any]
    ) -> None:
        self.model, self.optimizer, self.scale, self.identity = model, optimizer, scale, dict(identity)
        self.step = self.skipped = self.samples = 0
        self.saved = ""  # the newest checkpoint, relative to the stage's folder
        self.best: dict[str, Any] | None = None  # attempt, step and value of the best one, where that is asked

    @property
    def batches(self) -> int:
        """Batches consumed so far: the position in the data."""
        return self.step + self.skipped

    def advance(self, samples: int) -> None:
        """An update was made of so many samples."""
        self.step += 1
        self.samples += samples
        if self.scale is not None:
            self.scale.good()

    def skip(self, samples: int) -> None:
        """A batch made no update."""
        self.skipped += 1
        self.samples += samples

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and moments: what must be the same on every rank, bit for bit."""
        yield from self.model.parameters()
        yield from self.optimizer.exp_avg.values()
        yield from self.optimizer.exp_avg_sq.values()

    def named(self) -> dict[str, dict[str, Tensor]]:
        """``weights`` and ``optimizer`` by name, not copied."""
        optimizer = self.optimizer.state()
        if self.scale is not None:
            scale = [self.scale.scale, self.scale.good_steps, self.skipped]
            optimizer["loss_scale"] = torch.tensor(scale, dtype=torch.float64)
        return {"weights": self.model.state_dict(), "optimizer": optimizer}

    def restore(self, saved: checkpoint.Checkpoint, batch_size: int) -> None:
        """Take over a verified checkpoint of this training, whose first batch has ``batch_size`` samples."""
        self.load_weights(saved)
        optimizer = {name: torch.from_numpy(value) for name, value in saved.optimizer.items()}
        scale = optimizer.pop("loss_scale", None)
        self.step, self.samples = saved.step, saved.sample_position
        self.skipped = 0
        if self.scale is not None and scale is not None:
            self.scale.scale, self.scale.good_steps = float(scale[0]), int(scale[1])
            # Version 0.1.0 kept the position alone; all its batches were of one size.
            self.skipped = int(scale[2]) if len(scale) > 2 else saved.sample_position // batch_size - saved.step
        self.optimizer.load(optimizer)
        self.best = saved.best
        self.saved = f"attempts/{saved.attempt:04d}/{saved.folder.name}"

    def share(self, ranks: Ranks) -> None:
        """Give what rank 0 has restored to the others: one of them reads a checkpoint, however many there are."""
        if ranks.group is None:
            return
        scale = self.scale and (self.scale.scale, self.scale.good_steps)
        own = (self.step, self.skipped, self.samples, self.saved, self.best, self.optimizer.finished_steps, scale)
        first = ranks.gather(own)[0]
        self.step, self.skipped, self.samples, self.saved, self.best, self.optimizer.finished_steps, scale = first
        if self.scale is not None:
            self.scale.scale, self.scale.good_steps = scale
        for tensor in self.tensors():
            dist.broadcast(tensor.detach(), 0, group=ranks.group)

    def check(self, identity: Mapping[str, Any]) -> None:
        """CheckpointError where a checkpoint's identity is that of another training."""
        fixed = [{key: each[key] for key in each if key not in CHANGEABLE} for each in (identity, self.identity)]
        checkpoint.check_identity(*fixed)

    def changes(self, saved: checkpoint.Checkpoint) -> list[str]:
        """Lines about differences that a checkpoint may have: the same science, other bits."""
        return [
            f"{key} was {saved.identity.get(key)}, is {self.identity.get(key)} from step {saved.step} on: "
            f"results are no longer the same bit for bit"
            for key in CHANGEABLE
            if saved.identity.get(key) != self.identity.get(key)
        ]

    def load_weights(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights alone, of this training or of the phase before."""
        checkpoint.check_identity({"model": saved.model}, {"model": self.model.config})
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in saved.weights.items()})


def begin(state: TrainingState, job: Job, ranks: Ranks, task: Task, *, again: bool = False) -> None:
    """Continue from the newest verified checkpoint of this stage, else from the task's starting weights.

    ``again``: in the middle of an attempt, whose beginning is on record already.
    """
    saved = None
    if job.rank == 0:
        saved = job.patiently(lambda: checkpoint.newest_verified(job.out, job.say))
    if job.rank == 0 and not again:
        record = {"resumed_from": {"attempt": saved.attempt, "step": saved.step} if saved else None, "time": now()}
        job.patiently(lambda: publish_json(job.attempt.path / "attempt.json", record))
    ranks.meet("beginning")  # rank 0 may have waited long for the file server
    with peers_named(job):
        identity = ranks.gather(saved.identity if saved else None)[0]
    if identity is not None:
        state.check(identity)  # by every rank: all say the same
        if saved is not None:
            for line in state.changes(saved):
                job.say(line)
            state.restore(saved, task.size(0))
        with peers_named(job):
            state.share(ranks)
        job.say(f"continues at step {state.step} (saved by attempt {int(state.saved.split('/')[1])})")
        return
    state.step, state.skipped = task.settings.first_step, 0
    state.samples = sum(task.size(batch) for batch in range(state.step))
    state.best = None
    state.optimizer.reset()
    if (moments := task.optimizer()) is not None:
        state.optimizer.load(moments)
    if again:
        state.model.load_state_dict(task.model().state_dict())
