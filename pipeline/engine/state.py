"""What a training consists of between two steps, where it begins, and how it goes into a checkpoint and out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_prep.publish import publish_json
from pipeline.bert.heads import BertForPreTraining, initialised
from pipeline.bert.weights import load_start
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint_folder import MANIFEST
from pipeline.engine.optim import Optimizer
from pipeline.engine.precision import LossScale
from pipeline.node.distributed import Group, peers_named
from pipeline.node.job import Job

CHANGEABLE = ("threads", "micro_batch", "code", "torch", "cpu")  # fields of an identity: same science, other bits


class TrainingState:
    """Model, optimizer, loss scale, and how far they are: ``step`` updates and ``skipped`` batches without one."""

    def __init__(
        self, model: BertForPreTraining, optimizer: Optimizer, scale: LossScale | None, identity: Mapping[str, Any]
    ) -> None:
        self.model, self.optimizer, self.scale, self.identity = model, optimizer, scale, dict(identity)
        self.step = self.skipped = 0
        self.saved = ""  # the newest checkpoint, relative to the stage's folder

    @property
    def batches(self) -> int:
        """Global batches consumed so far: the position in the data."""
        return self.step + self.skipped

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and moments: what must be the same on every rank, bit for bit."""
        yield from self.model.parameters()
        yield from self.optimizer.exp_avg.values()
        yield from self.optimizer.exp_avg_sq.values()

    def arrays(self) -> dict[str, dict[str, NDArray[Any]]]:
        """``weights`` and ``optimizer`` by name, sharing memory with the tensors on a CPU."""
        optimizer = as_arrays(self.optimizer.state())
        if self.scale is not None:
            optimizer["loss_scale"] = np.array([self.scale.scale, self.scale.good_steps], np.float64)
        return {"weights": as_arrays(self.model.state_dict()), "optimizer": optimizer}

    def restore(self, found: checkpoint.Checkpoint, global_batch: int) -> None:
        """Take over a verified checkpoint of this training."""
        checkpoint.check_identity(self._fixed(found.identity), self._fixed(self.identity))
        self.load_weights(found)
        optimizer = {name: torch.from_numpy(value) for name, value in found.optimizer.items()}
        scale = optimizer.pop("loss_scale", None)
        if self.scale is not None and scale is not None:
            self.scale.scale, self.scale.good_steps = float(scale[0]), int(scale[1])
        self.optimizer.load(optimizer)
        self.step = found.step
        self.skipped = found.sample_position // global_batch - found.step
        self.saved = f"attempts/{found.attempt:04d}/{found.folder.name}"

    def changes(self, found: checkpoint.Checkpoint) -> list[str]:
        """Lines about differences that a checkpoint may have: the same science, other bits."""
        return [
            f"{key} was {found.identity.get(key)}, is {self.identity[key]} from step {found.step} on: "
            f"results are no longer the same bit for bit"
            for key in CHANGEABLE
            if found.identity.get(key) != self.identity[key]
        ]

    def load_weights(self, found: checkpoint.Checkpoint) -> None:
        """Take over the weights alone, of this training or of the phase before."""
        checkpoint.check_identity({"model": found.model}, {"model": self.model.config.to_dict()})
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in found.weights.items()})

    @staticmethod
    def _fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in identity.items() if key not in CHANGEABLE}


def begin(
    state: TrainingState, job: Job, group: Group, device: torch.device, *, global_batch: int, seed: int, vocab: Path,
    start: Path | None, again: bool = False,
) -> None:  # fmt: skip
    """Continue from the newest verified checkpoint of this stage, else from ``start``, else from random weights.

    ``start`` is a checkpoint of the phase before, a Hugging Face folder or NVIDIA's ``.pt``. ``again``: in the
    middle of an attempt, whose beginning is on record already.
    """
    stage_dir = job.run.stage(job.stage).path
    found = checkpoint.newest_verified(stage_dir, job.say) if job.rank == 0 else None
    chosen = torch.tensor([found.attempt, found.step] if found else [0, 0], device=device)
    if group is not None:
        with peers_named(job):
            dist.broadcast(chosen, 0, group=group)
    attempt, step = chosen.tolist()
    if attempt and found is None:
        found = checkpoint.read(stage_dir / "attempts" / f"{attempt:04d}" / f"step-{step:08d}")
    if job.rank == 0 and not again:
        resumed = {"attempt": attempt, "step": step} if attempt else None
        publish_json(job.attempt.path / "attempt.json", {"resumed_from": resumed})
    if found is not None:
        for line in state.changes(found):
            job.say(line)
        state.restore(found, global_batch)
        job.say(f"continues at step {step} (saved by attempt {attempt})")
        return
    state.step = state.skipped = 0
    state.optimizer.reset()
    if start is None:
        initialised(state.model, torch.Generator().manual_seed(seed))
    elif (start / MANIFEST).exists():
        state.load_weights(checkpoint.read(start, tensors=("weights",)))
        job.say(f"starts from the weights of {start.parent.parent.parent.name}")
    else:
        state.model.load_state_dict(load_start(start, state.model.config, vocab))
        job.say(f"starts from the weights of {start.name}")


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as NumPy arrays, sharing memory on the CPU."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
