"""Every path of a run, and the small files that hold its state: done marks, attempts, verdicts, events.

A run holds no absolute path. State is files written atomically: a reader sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shlex
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.publish import APPEND, open_plain, plain, publish_json
from pipeline.errors import CAUSES, Cause, ConfigError, InUseError, StorageError
from pipeline.run.files import NONE_THERE, appeared, append_jsonl, now, read_json, read_jsonl
from pipeline.words import is_number

SETTINGS = {"recipe": dict, "profile": dict, "corpora": dict, "data_dir": str}  # of run.json, in every version
NEWEST = 8  # attempts among which that of a launch is, should others have begun at the same time
FLOCK = struct.Struct("hhqqi4x")  # C's struct flock: type, whence, start, length, pid
BEGINNING_S = 30.0  # a stage's folder is begun in milliseconds


@dataclass(frozen=True)
class Attempt:
    """One start of a stage: a numbered folder that only this start writes into.

    What the files of one that has a successor (``past``) say is read once in a process.
    """

    path: Path
    past: bool = field(default=False, compare=False)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def _record(self, name: str) -> dict[str, Any] | None:
        record = self._known.get(name) or read_json(self.path / name)
        if self.past and record is not None:
            self._known[name] = record
        return record

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def owner(self) -> dict[str, Any]:
        return self._record("owner.json") or {}

    @property
    def job_id(self) -> str:
        """The Slurm job that made this attempt; of the local runner something that is no job's."""
        owner = self.owner
        return str(owner["job_id"] if "job_id" in owner else owner.get("launch", "")).partition("-")[0]  # 0.1.0: launch

    @property
    def lost_script(self) -> bool:
        """Whether the batch script was killed under this attempt, as the step beside it noted (``slurm/job.sh``)."""
        # not Path.is_file, which raises where the name that stands in owner.json is too long for one
        return os.path.isfile(self.path.parents[3] / "jobs" / f"{self.job_id}.{self.owner.get('restart', 0)}.killed")

    @property
    def verdict(self) -> dict[str, Any] | None:
        """``code``, ``cause``, ``line``, ``rank``, ``host``, ``time``; None while nobody has judged."""
        record = self._record("verdict.json")
        return None if record is None else {"cause": CAUSES.get(record.get("code", 1), "defect"), **record}

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @functools.cached_property
    def all_lines(self) -> list[dict[str, Any]]:
        """The attempt's metric lines, read once. Raises OSError where they cannot be."""
        return read_jsonl(self.metrics)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The attempt's metric lines; none where the file cannot be read."""
        try:
            return self.all_lines
        except OSError:
            return []

    @property
    def resumed_from(self) -> int | None:
        """The step from which this start went on, 0 for the beginning; None where that is not (yet) on record."""
        record = self._record("attempt.json")
        origin = None if record is None else (record.get("resumed_from") or {"step": 0})
        step = origin.get("step") if isinstance(origin, dict) else None
        return int(step) if is_number(step) else None

    @property
    def span(self) -> tuple[float, float] | None:
        """Unix times of the beginning and of the last sign of life; None where the beginning is not on record."""
        began = self.owner.get("time")
        if not is_number(began):
            return None
        logged = next((line["time"] for line in reversed(self.lines) if is_number(line.get("time"))), began)
        ended = (self.verdict or {}).get("time")
        return began, max([began, logged, *([ended] if is_number(ended) else [])])

    def write_verdict(self, code: int, line: str, rank: int, cause: Cause | None = None) -> bool:
        """Write the attempt's verdict; False when a rank that failed earlier has done so.

        On a disk that takes nothing the verdict is the process's exit code alone.
        """
        cause = cause or CAUSES.get(code, "defect")
        record: dict[str, Any] = {"code": code, "cause": cause, "line": line, "rank": rank}
        record |= {"host": socket.gethostname(), "time": now()}
        try:
            descriptor = os.open(self.path / "verdict.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except OSError:
            return True
        with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
            json.dump(record, file)
        return True


Until = Callable[[Callable[[], Attempt | None]], Attempt | None]


@functools.lru_cache(1 << 14)
def _past(path: Path, inode: int) -> Attempt:
    """The attempt of this folder; another that has taken its name has another inode."""
    del inode
    return Attempt(path, past=True)


@dataclass(frozen=True)
class StageDir:
    """``RUN/stages/NAME``: a stage's outputs, attempts and done mark."""

    path: Path

    @property
    def done(self) -> dict[str, Any] | None:
        return read_json(self.path / "done.json")

    @property
    def begun(self) -> dict[str, Any] | None:
        """stage.json: the fingerprint and configuration with which this folder was begun."""
        return read_json(self.path / "stage.json")

    def mark_done(self, record: Mapping[str, Any]) -> None:
        """Write the done mark. InUseError when its ``attempt`` has been succeeded by a newer one, which will."""
        attempts = self.attempts
        if attempts and record.get("attempt", attempts[-1].number) < attempts[-1].number:
            raise InUseError(
                f"attempt {attempts[-1].number} ({describe_owner(attempts[-1].owner)}) has taken over from attempt "
                f"{record['attempt']} of {self.path.name}; this one does not mark it done"
            )
        publish_json(self.path / "done.json", dict(record))

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """One process at a time looks whether this folder is current, moves it aside and begins it anew.

        A process that stopped in there, or a file system without locks, keeps nobody longer than 30 seconds.
        """
        with os.fdopen(plain(self.path.parent.parent / "begin.lock", APPEND), "ab") as file:
            deadline = time.monotonic() + BEGINNING_S
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
                except OSError:  # no locks here
                    break
            yield

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        folder = self.path / "attempts"
        numbered = []
        if folder.is_dir():
            with os.scandir(folder) as entries:
                numbered = sorted((e.name, e.inode()) for e in entries if re.fullmatch("[0-9]{4,9}", e.name))
        past = [_past(folder / name, inode) for name, inode in numbered[:-1]]
        return [*past, *(Attempt(folder / name) for name, _ in numbered[-1:])]

    def new_attempt(self, launch: str, **place: str | int) -> Attempt:
        """Take the next attempt number by creating its folder, which only one process can.

        ``place``: ``job_id``, ``restart`` and ``step`` of a start by Slurm, for ``owner.json``.
        """
        folder = self.path / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        number = self.attempts[-1].number + 1 if self.attempts else 1
        while True:
            attempt = Attempt(folder / f"{number:04d}")
            try:
                attempt.path.mkdir()
            except FileExistsError:
                number += 1
                continue
            publish_json(
                attempt.path / "owner.json",
                {"launch": launch, **place, "host": socket.gethostname(), "pid": os.getpid(), "time": now()},
            )
            return attempt

    def join_attempt(self, launch: str, until: Until = lambda look: appeared(look, 60.0)) -> Attempt | None:
        """The attempt that rank 0 of the same launch took; None when it does not appear in time.

        ``until`` waits for what a look finds: an attempt whose owner is known to be another is not looked at again
        while the folder is the same. Rank 0 may yet move an older one aside, and its own number stands there, too.
        """
        others: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # by the state of the folder

        def look() -> Attempt | None:
            with contextlib.suppress(FileNotFoundError):  # none yet, or moved aside just now
                status = os.stat(self.path / "attempts")
                known = others[status.st_ino, status.st_mtime_ns]
                for attempt in reversed(self.attempts[-NEWEST:]):
                    if attempt.number not in known and (owner := attempt.owner):
                        if owner.get("launch") == launch:
                            return attempt
                        known.add(attempt.number)
            return None

        return until(look)

    def metrics(self) -> list[dict[str, Any]]:
        """Metric lines of all attempts in order of step, the last attempt's line where steps repeat."""
        lines: dict[tuple[int, bool, bool], dict[str, Any]] = {}
        for attempt in self.attempts:
            for line in attempt.all_lines:
                lines[line["step"], "loss" in line, "eval_mlm_loss" in line] = line
        return [lines[key] for key in sorted(lines)]

    def move_aside(self) -> Path | None:
        """Move outputs of an older fingerprint to ``RUN/old``; nothing is ever overwritten."""
        if not self.path.exists():
            return None
        folder = self.path.parent.parent / "old"
        folder.mkdir(exist_ok=True)
        number = 1
        while (target := folder / f"{self.path.name}-{number}").exists():
            number += 1
        os.rename(self.path, target)
        return target


@dataclass(frozen=True)
class RunDir:
    """One directory that holds everything of one training."""

    path: Path

    @property
    def word(self) -> str:
        """Its path as one word of a command to type, which is no option."""
        return shlex.quote(str(self.path.absolute() if str(self.path).startswith("-") else self.path))

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def stage(self, name: str) -> StageDir:
        return StageDir(self.path / "stages" / name)

    @property
    def settings(self) -> dict[str, Any]:
        """run.json: resolved recipe and profile, versions, commit, data files. ConfigError when it is not a run."""
        settings = read_json(self.path / "run.json")
        if settings is None:
            raise ConfigError(
                f"{self.path}: not a run (no readable run.json); start one with "
                f"python -m pipeline.submit --recipe R --cluster C --run {self.word}"
            )
        return self.checked(settings)

    @property
    def whole_settings(self) -> dict[str, Any]:
        """As ``settings``; ConfigError where one that every run has is missing."""
        return self.checked(self.settings, whole=True)

    def checked(self, settings: dict[str, Any], *, whole: bool = False) -> dict[str, Any]:
        """What was read of run.json; ConfigError where a part is of another kind than ours, or missing in the whole."""
        odd = [key for key, kind in SETTINGS.items() if not isinstance(settings.get(key, kind()), kind)]
        odd += [key for key in SETTINGS if whole and key not in settings]
        corpora = {} if odd else dict(settings.get("corpora") or {})
        odd += [f"corpora.{name}" for name, facts in corpora.items() if not isinstance(facts, dict)]
        if odd:
            where = self.path / "run.json"
            raise ConfigError(f"{where}: damaged: {', '.join(odd)} missing or of another kind; bring back a copy of it")
        return settings

    @property
    def data_dir(self) -> Path:
        """Where the corpora lie; kept relative to the run."""
        return self.path / str(self.settings["data_dir"])

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    def event(self, name: str, **facts: Any) -> None:
        append_jsonl(self.path / "events.jsonl", {"time": now(), "event": name, **facts})

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "events.jsonl")

    @property
    def cancel_request(self) -> Path:
        return self.path / "cancel"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for one runner. InUseError names the process that holds it already."""
        path = self.path / "lock"
        try:
            descriptor = plain(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            raise StorageError(
                f"{self.path}: you may read this run, not change it; --share group lets others"
            ) from None
        try:
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            except BlockingIOError:
                if _locked_by(descriptor) == fcntl.F_RDLCK:  # none of ours: those that run write, those that look ask
                    raise InUseError(f"{path} is locked by a process that only reads it: take the file away") from None
                raise InUseError(
                    f"{self.path}: {describe_owner(self._holder())} is using this run; wait for it, or stop it with "
                    f"python -m pipeline.cancel {self.word}"
                ) from None
            os.ftruncate(descriptor, 0)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether a runner holds the run now. Reading suffices for the question, and asking locks nothing."""
        try:
            with open_plain(self.path / "lock") as file:
                return _locked_by(file.fileno()) == fcntl.F_WRLCK
        except OSError as error:
            if error.errno not in (*NONE_THERE, errno.EACCES):
                raise
        return False

    @property
    def held_since(self) -> float:
        """When the newest holder took the run, in seconds since 1970."""
        return float((read_json(self.path / "lock") or {}).get("time", 0.0))

    def _holder(self, patience_s: float = 2.0) -> dict[str, Any]:
        """Who holds the run: what the lock says, once its newest holder has had time to write it."""
        deadline = time.monotonic() + patience_s
        while True:
            owner = read_json(self.path / "lock") or {}
            gone = owner.get("host") == socket.gethostname() and not Path(f"/proc/{owner.get('pid')}").exists()
            if (owner and not gone) or time.monotonic() > deadline:
                return {} if gone else owner
            time.sleep(0.01)


def _locked_by(descriptor: int) -> int:
    """Which lock of somebody else an open file bears: F_WRLCK, F_RDLCK or F_UNLCK."""
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return int(FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0])


def describe_owner(owner: Mapping[str, Any] | None) -> str:
    """An owner of a run or an attempt for people: process, host and since when."""
    owner = owner or {}
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["time"]))
        return f"process {owner['pid']} on {owner['host']}, since {since}"
    except (KeyError, TypeError):
        return "an unknown process"
