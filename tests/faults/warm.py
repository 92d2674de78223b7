"""Imported by the parent of all trials: torch and one finished training, so that a fork has nothing left to load."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
from pathlib import Path

import torch

from faults import checkpoints, traced, training
from pipeline.engine import checkpoint

torch.set_num_threads(1)
checkpoint.RETRY_S = 0.01
thread = threading.Thread
with tempfile.TemporaryDirectory(prefix="warm-") as folder, contextlib.redirect_stdout(io.StringIO()):
    samples = training.make_samples(Path(folder) / "samples")
    training.train(Path(folder) / "run", samples, steps=2)
    training.train(Path(folder) / "run", samples, steps=2)
    for _ in range(2):  # from nothing, and from a checkpoint
        checkpoints.history(traced.Shared(Path(folder) / "numbers"), folder + "/history")
threading.Thread = thread  # type: ignore[misc]  # `history` saves in the foreground; other trials do not
