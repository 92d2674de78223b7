"""The checkpoints of a stage over all its attempts: the newest good one, saving in the background, rotation.

Attempts form one history: each records in ``attempt.json`` the attempt and step that it went on from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import differences
from pipeline.engine.checkpoint_folder import (
    MANIFEST,
    Checkpoint,
    is_permanent,
    is_whole,
    label,
    owner_of,
    read,
    read_manifest,
    remove,
    save,
    step_folder,
    verify,
)
from pipeline.errors import CheckpointError, PipelineError, StorageError, of_server
from pipeline.run.files import read_json

if TYPE_CHECKING:
    from pipeline.engine.staging import Values

__all__ = ["Checkpoint", "read", "save", "step_folder"]  # of one folder, by the name of this module too

RETRY_S = 1.0  # between two tries of something that the file system refused


class Saver:
    """One writer thread with a reused staging buffer, for the checkpoints of one attempt.

    Weights and optimizer state are tensors or arrays by name. Those on a GPU are copied while the loop goes on, so
    that `before_update` must come before whatever changes them.

    After each checkpoint all but the newest ``keep`` and the permanent ones are deleted. A save that the file
    system refuses is tried a second time; then ``warn`` is told in one line, training goes on and the next save
    tries again (and is silent if it fails too). Any other error (a tensor that is not finite, a newer attempt) is
    raised by the next call. ``saved`` is called when a checkpoint is safely on disk. ``stall_s`` and ``write_s``
    are the seconds that the last save held up the loop, and took.
    """

    def __init__(
        self,
        attempt_dir: Path,
        *,
        keep: int = 2,
        warn: Callable[[str], None] = print,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        from pipeline.engine.staging import Staging  # torch: `pipeline.checkpoints` does without

        self.attempt_dir, self.keep, self.warn, self.saved = attempt_dir, keep, warn, saved
        self.stall_s = self.write_s = 0.0
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._owner = owner_of(attempt_dir)
        self._failed = 0  # saves in a row that the file system refused
        self._has_history = False

    def prepare(self, *, weights: Values, optimizer: Values) -> None:
        """Take the memory for copies of this state, in the background: else the first save would wait for it.

        Only shapes and dtypes count.
        """

        def take() -> None:
            with suppress(MemoryError, RuntimeError):  # torch's for memory; the first save tries again, and says so
                self._staging.prepare({"weights": weights, "optimizer": optimizer})

        self._join()
        self._thread = threading.Thread(target=take, name="checkpoint", daemon=True)
        self._thread.start()

    def before_update(self) -> None:
        """Keep what changes the state next from overtaking the copies; the host does not wait."""
        self._staging.hold()

    def save(self, *, step: int, weights: Values, optimizer: Values, **fields: Any) -> Path:
        """Copy the state and write it in the background; returns the folder where it will be.

        ``fields`` are the other ones of ``checkpoint.save``. What lies on the CPU may change as soon as this
        returns. An earlier save that is still writing is waited for.
        """
        begin = time.monotonic()
        self._join()
        if self._error is not None and not isinstance(self._error, StorageError):
            raise self._error
        self._error = None
        if not self._has_history:
            with suppress(StorageError):
                self._has_history = _resumed_from(self.attempt_dir) is not None
                if not self._has_history:
                    raise CheckpointError(f"{self.attempt_dir} has no attempt.json: its checkpoints could not be found")
        self._staging.copy({"weights": weights, "optimizer": optimizer})
        self._thread = threading.Thread(target=self._write, args=(step, fields), name="checkpoint", daemon=True)
        self._thread.start()
        self.stall_s = time.monotonic() - begin
        return step_folder(self.attempt_dir, step)

    def wait(self) -> None:
        """Wait until the last save is on disk; raises its error, StorageError when the state could not be saved."""
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, fields: dict[str, Any]) -> None:
        begin = time.monotonic()
        try:
            self._write_twice(step=step, owner=self._owner, **self._staging.wait(), **fields)
            if self._failed:
                self._tell(f"checkpoint step {step} is saved, after {self._failed} that were not")
            self._failed = 0
            with suppress(OSError):
                self.saved()
            try:
                rotate(self.attempt_dir, self.keep)
            except (StorageError, OSError) as error:
                self._tell(f"older checkpoints were not deleted: {error}")
        except StorageError as error:
            self._error = error
            self._failed += 1
            if self._failed == 1:
                self._tell(f"{error}; training goes on and the next save tries again")
        except BaseException as error:  # handed to the loop: a thread has nobody to raise to
            self._error = error
        self.write_s = time.monotonic() - begin

    def _write_twice(self, **state: Any) -> None:
        try:
            save(self.attempt_dir, **state)
        except StorageError:
            time.sleep(RETRY_S)
            save(self.attempt_dir, **state)

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # the log may lie on the disk that is full
            self.warn(line)


def newest_verified(
    stage_dir: Path, say: Callable[[str], None], *, tensors: Iterable[str] = ("weights", "optimizer")
) -> Checkpoint | None:
    """The newest checkpoint of the stage's history that verifies, or None where none was ever saved.

    What is passed over is named through ``say``. Raises CheckpointError when checkpoints exist and none can be
    used: a run never starts again from nothing by itself. A file system that does not answer is asked a second
    time; then a checkpoint that it does not give is passed over like a bad one, and StorageError is raised where
    it gives none, or its server is away.
    """
    tensors = tuple(tensors)
    try:
        saved, lines = _newest(stage_dir, tensors, bad=CheckpointError)
    except (StorageError, OSError) as error:
        if of_server(error):
            raise
        time.sleep(RETRY_S)
        try:
            saved, lines = _newest(stage_dir, tensors, bad=(CheckpointError, StorageError))
        except OSError as error:
            raise StorageError(f"{stage_dir}: its checkpoints cannot be read: {error}") from error
    for line in lines:
        say(line)
    return saved


def _newest(
    stage_dir: Path, tensors: tuple[str, ...], bad: type[PipelineError] | tuple[type[PipelineError], ...]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that reading does not find ``bad``, and what to say about those passed over."""
    faults: list[tuple[int, PipelineError]] = []
    lines = []
    for folder in lineage(stage_dir):
        if not (folder / MANIFEST).exists():
            lines.append(f"{label(folder)} has no manifest (its save was cut short) and is passed over")
            continue
        try:
            checkpoint = read(folder, tensors=tensors)
        except bad as error:
            if of_server(error):
                raise
            faults.append((step_of(folder), error))
            continue
        for step, fault in faults:
            instead = f"using step {checkpoint.step} of attempt {checkpoint.attempt} instead"
            lines.append(f"{fault}; {instead} ({step - checkpoint.step} steps redone)")
        return checkpoint, lines
    if not faults:
        _refuse_orphans(stage_dir)
        return None, lines
    more = f" (and {len(faults) - 1} older)" if len(faults) > 1 else ""
    unread = [fault for _, fault in faults if isinstance(fault, StorageError)]
    if unread:
        raise StorageError(
            f"{stage_dir.name}: no checkpoint can be read: {unread[0]}{more}; start again when the file system answers"
        )
    raise CheckpointError(
        f"{stage_dir.name}: no checkpoint can be used: {faults[0][1]}{more}; restore one, or delete "
        f"{stage_dir / 'attempts'} to start this stage again from nothing"
    )


def _refuse_orphans(stage_dir: Path) -> None:
    """Raise CheckpointError when checkpoints lie in attempts whose history cannot be told any more."""
    for path in _attempts(stage_dir):
        if _resumed_from(path) is None and any((folder / MANIFEST).exists() for folder in _step_folders(path)):
            raise CheckpointError(
                f"{stage_dir.name}: attempt {int(path.name)} has checkpoints but no readable attempt.json; restore "
                f'it ({{"resumed_from": null}} for a first attempt), or delete {path} to start without it'
            )


def lineage(stage_dir: Path) -> Iterator[Path]:
    """Step folders of the stage's one consistent history, newest first.

    It starts at the newest attempt that has an ``attempt.json`` and goes on where that one resumed from; what
    another job wrote beside it, or after it was succeeded, does not belong.
    """
    attempts = {int(path.name): path for path in _attempts(stage_dir)}
    origins = {number: _resumed_from(path) for number, path in attempts.items()}
    number = max((n for n in origins if origins[n] is not None), default=0)
    newest: int | None = None
    while number in attempts:
        for folder in sorted(_step_folders(attempts[number]), key=step_of, reverse=True):
            if newest is None or step_of(folder) <= newest:
                yield folder
        origin = origins[number]
        if not origin or origin["attempt"] >= number:
            return
        number, newest = origin["attempt"], origin["step"]


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing all `differences` of a checkpoint's identity from that of this training."""
    if differing := differences(found, wanted):
        raise CheckpointError(
            f"the checkpoint belongs to another training: {'; '.join(differing)}; give back the old values or use a "
            f"new run directory"
        )


def listing(run_dir: Path, *, check: bool = False) -> list[dict[str, Any]]:
    """All checkpoints of a run: ``{"stage", "step", "attempt", "verified", "digest"}`` by stage and age.

    ``verified`` is None unless ``check`` reads and hashes every file; a bad one also has ``"fault"``, a line.
    """
    rows = []
    stages = run_dir.glob("stages/*")
    for folder in (f for stage in stages for path in _attempts(stage) for f in _step_folders(path)):
        if not (folder / MANIFEST).exists():
            continue
        row: dict[str, Any] = {
            "stage": folder.parents[2].name,
            "step": step_of(folder),
            "attempt": int(folder.parent.name),
            "verified": None,
            "digest": None,
        }
        try:
            row["digest"] = read_manifest(folder)["digest"]
            if check:
                verify(folder)
                row["verified"] = True
        except CheckpointError as error:
            row |= {"verified": False if check else None, "fault": str(error)}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["stage"], row["attempt"], row["step"]))


def rotate(attempt_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints of this attempt's history, the best and the permanent ones.

    Remains of saves that were cut short go too. Nothing happens in an attempt that a newer one has succeeded.
    Raises StorageError, before anything is deleted, where the file system does not say what is whole.
    """
    stage_dir = attempt_dir.parent.parent
    number = int(attempt_dir.name)
    attempts = _attempts(stage_dir)  # listed once: a newer attempt may begin while this goes on, and is not ours
    history = [folder for folder in lineage(stage_dir) if is_whole(folder)]
    succeeded = any(int(path.name) > number for path in attempts)
    if succeeded or not history or history[0].parent != attempt_dir:
        return
    try:
        best = (read_manifest(history[0]).get("best") or {}).get("step")
    except CheckpointError:  # a newer attempt has just deleted it: it rotates now
        return
    kept = [*history[:keep], *(folder for folder in history if step_of(folder) == best)]
    old = [folder for path in attempts for folder in _step_folders(path) if folder not in kept]
    for folder in [folder for folder in old if not is_permanent(folder)]:
        remove(folder)


def _attempts(stage_dir: Path) -> list[Path]:
    return [path for path in stage_dir.glob("attempts/*") if path.name.isdecimal() and not path.is_symlink()]


def _step_folders(attempt_dir: Path) -> list[Path]:
    """Those of the attempt itself: rotation deletes in them, and a link may lead to another run's."""
    folders = [path for path in attempt_dir.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return [folder for folder in folders if not folder.is_symlink()]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _resumed_from(attempt_dir: Path) -> dict[str, int] | None:
    """Where an attempt went on from; {} for a start from nothing, None where that is not recorded.

    Raises StorageError where the file system does not say.
    """
    try:
        record = (read_json(attempt_dir / "attempt.json") or {})["resumed_from"]
        return {} if record is None else {"attempt": int(record["attempt"]), "step": int(record["step"])}
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    except OSError as error:
        raise StorageError(f"{attempt_dir / 'attempt.json'} cannot be read: {error.strerror}") from error
