"""TensorBoard event files beside metrics.jsonl, which stays the record: a failing disk costs curves, never training."""

from __future__ import annotations

import io
import os
import socket
import time as clock
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

GROUPS = {
    "train": ("loss", "mlm_loss", "nsp_loss"),
    "heldout": ("eval_mlm_loss", "eval_mlm_accuracy", "eval_nsp_accuracy", "eval_mask_gain", "unigram_loss"),
    "optimizer": ("learning_rate", "grad_norm", "loss_scale", "skipped"),
    "speed": ("sequences_per_s", "tokens_per_s", "step_s"),
}
"""TensorBoard shows tags of one group together; figures that are not named here go to ``other``."""
JUDGED_BY = ("train/loss", "heldout/mlm_loss", "heldout/mask_gain", "scores/accuracy", "scores/f1")
"""What TensorBoard's table of hyper-parameters shows beside them."""


class Board:
    """Writes one attempt's scalars into a stage's ``folder``; ``tensorboard --logdir RUN`` shows the stage as one run.

    TensorBoard reads the files of a folder as one run in order of their names. Each attempt's file begins with
    SessionLog.START at its first step, at which readers drop what earlier attempts wrote from there on, so a curve
    goes on over attempts and shows each step once (tensorboard's EventAccumulator, ``_CheckForRestartAndMaybePurge``).
    It goes on from ``after_step``; ``settings`` are the hyper-parameters.
    The library is imported here, before the first step; the file appears with the first figures. What goes wrong is
    said once through ``warn``, and nothing is written from then on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after_step: int = 0,
        settings: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.after_step, self.warn = folder, after_step, warn
        self.settings = dict(_flat(settings or {}))
        self.file: io.FileIO | None = None
        self.failed = False
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError as error:
            self._fail(error)
            return
        self._events, self._summaries, self._records, self._hparams = event_pb2, summary_pb2, RecordWriter, hparams

    def add(self, step: int, values: Mapping[str, Any], time: float) -> None:
        """Write the numbers among ``values``, such as a metric line with its ``spent_s``; ``time`` is Unix time."""
        numbers = dict(scalars(values))
        if self.failed or not numbers:
            return
        try:
            if self.file is None:
                self._begin(time)
            make = self._summaries.Summary
            summary = make(value=[make.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
            self._write(self._events.Event(wall_time=time, step=step, summary=summary))
        except (OSError, ValueError) as error:
            self._fail(error)

    def close(self) -> None:
        """Close the file; further figures are not written."""
        self.failed = True
        if self.file is not None:
            self.file.close()  # unbuffered: nothing is left to write

    def _begin(self, time: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{clock.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = io.FileIO(self.folder / name, "a")
        self._write(self._events.Event(wall_time=time, file_version="brain.Event:2"))
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(self._events.Event(wall_time=time, step=self.after_step + 1, session_log=started))
        judged = dict.fromkeys(JUDGED_BY, 0.0)
        for summary in self._hparams(self.settings, judged)[:2] if self.settings else ():  # type: ignore[no-untyped-call]
            self._write(self._events.Event(wall_time=time, summary=summary))

    def _write(self, event: Any) -> None:
        assert self.file is not None
        record = io.BytesIO()
        self._records(record).write(event.SerializeToString())
        self.file.write(record.getbuffer())  # one write: a kill leaves whole records, or one that readers drop

    def _fail(self, error: Exception) -> None:
        self.close()
        self.warn(f"no more TensorBoard curves ({type(error).__name__}: {error}); metrics.jsonl is not affected")


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that has a value, those of a table as ``table.setting``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            yield before + name, value if isinstance(value, bool | int | float | str) else str(value)


def scalars(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(tag, value) of every number, NaN and infinity included."""
    tagged = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tagged += [(f"{key}/{part}", float(item)) for part, item in value.items() if _is_scalar(item)]
        elif _is_scalar(value) and key not in ("step", "attempt", "time", "since"):
            group = next((name for name, keys in GROUPS.items() if key in keys), "other")
            tagged.append((f"{group}/{key.removeprefix('eval_')}", float(value)))
    return tagged


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
