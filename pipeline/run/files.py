"""Reading and writing the small files of a run folder, whatever somebody has put in their place."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_prep.publish import APPEND, open_plain, plain
from pipeline.errors import StorageError, of_server
from pipeline.words import is_number

OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
T = TypeVar("T")
MOST_JSON_BYTES, MOST_LINES_BYTES, LONGEST_LINE = 1 << 23, 1 << 27, 1 << 18
NONE_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EEXIST}  # or something that is not ours
DIGEST = re.compile("[0-9a-f]{64}")
# What stands under these names in any file of ours, or is left out: readers need not ask again.
TEXTS = {*("line", "cause", "host", "event", "launch", "fingerprint")}
FIGURES = {*("loss", "mlm_loss", "nsp_loss", "learning_rate", "grad_norm", "step_s", "unigram_loss")}  # also not finite
WHOLE = ("world_size", "nodes", "version")
NUMBERS = {
    **dict.fromkeys(("time", "since", "started", "finished", "duration_s", "step", "attempt", "pid"), 2.0**53),
    **dict.fromkeys(WHOLE, 2**20),
}  # and the largest that can be honest: up to 2 ** 53 floats count exactly

SERVER_S = 600.0  # so long a file server that went away is waited for; then the attempt ends with 76
CLOCK_S = time.time() - time.monotonic()  # when this process began, by its own clock from then on


def to_write(word: str, advice: str = "name a file elsewhere") -> Path:
    """A file that a command is to write, for argparse; its folder is made. StorageError, before any work."""
    path = Path(word)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path} is a folder, or its folder takes no files; {advice}")
    return path


def now() -> float:
    """Unix time that goes on evenly through this process and its children, though the machine's clock is set anew."""
    return CLOCK_S + time.monotonic()


def as_shared(folder: Path) -> None:
    """Where the group may write into a run (``--share group``), it may write what this process makes from now on."""
    with contextlib.suppress(OSError):
        if os.stat(folder).st_mode & stat.S_IWGRP:
            os.umask(0o002)


@contextlib.contextmanager
def masked(bits: int) -> Iterator[None]:
    """What is made in there does not get these bits of its mode, whatever the umask."""
    previous = os.umask(bits)
    os.umask(previous | bits)
    try:
        yield
    finally:
        os.umask(previous)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file or it holds something else."""
    return read_json_of(path)[0]


def read_json_of(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """As ``read_json``, and whether the file is this user's and nobody else may write it."""
    try:
        with open_plain(path, MOST_JSON_BYTES) as file:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.geteuid() and not status.st_mode & OF_OTHERS
            return parsed(file.read()), own
    except OSError as error:
        if error.errno in NONE_THERE:
            return None, False
        raise  # a server that fails must not make a finished stage look unfinished


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a kill or a full disk left unfinished is dropped."""
    try:
        with open_plain(path, MOST_LINES_BYTES) as file:
            lines = [*lines_of(file)]
    except FileNotFoundError:
        return []
    try:
        records = json.loads(f"[{b','.join(lines).decode()}]")  # a third faster than line by line
    except (ValueError, RecursionError):
        records = []
    if len(records) != len(lines):
        records = [record for line in lines if (record := parsed(line)) is not None]
    return [_sound(record) for record in records if isinstance(record, dict)]


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The finished lines of a file, but for those that are longer than any of ours."""
    for line in file:
        if line.endswith(b"\n") and len(line) <= LONGEST_LINE:
            yield line


def parsed(text: bytes) -> dict[str, Any] | None:
    """The object that a JSON text says, without members that are not what their names say; None for anything else."""
    try:
        record = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return _sound(record) if isinstance(record, dict) else None


def _sound(record: dict[str, Any]) -> dict[str, Any]:
    for key in [key for key, fits in _checks(tuple(record)) if not fits(record[key])]:
        del record[key]
    return record


@functools.lru_cache(1 << 8)
def _checks(keys: tuple[str, ...]) -> list[tuple[str, Callable[[Any], bool]]]:
    """What members of these names must fulfil; lines of a file mostly have the same."""
    return [(key, fits) for key in keys if (fits := _kind(key)) is not None]


@functools.lru_cache(1 << 10)
def _kind(key: str) -> Callable[[Any], bool] | None:
    """Whether a value can stand under this name; None where any can."""
    if (largest := NUMBERS.get(key)) is not None:
        kinds = (int,) if key in WHOLE else (int, float)
        return lambda value: type(value) in kinds and -largest <= value <= largest
    if key in FIGURES or key.startswith(("eval_", "tokens_", "sequences_")):
        return lambda value: type(value) is float or is_number(value)
    if key == "code":  # of an exit, or the digest of the code that a run runs
        return lambda value: bool(DIGEST.fullmatch(value)) if type(value) is str else type(value) is int
    return (lambda value: type(value) is str) if key in TEXTS else None


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line with a single write, so that lines of several processes never mix.

    What a full disk cut off is ended by a line feed when the next one comes. Raises OSError.
    """
    line = (json.dumps(record) + "\n").encode()
    descriptor = plain(path, APPEND)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def patiently(work: Callable[[], T], say: Callable[[str], None], asked: Callable[[], bool] = lambda: False) -> T:
    """What ``work`` gives, tried again while a file server is away; raises what it raised after ten minutes, or when
    ``asked`` to stop.
    """
    since, pause_s = None, 1.0
    while True:
        began = time.monotonic()
        try:
            return work()
        except Exception as error:
            failed = time.monotonic()
            if not of_server(error) or asked() or (since is not None and failed - since > SERVER_S >= failed - began):
                raise
            if since is None or failed - began > SERVER_S:  # it had come back in between
                since, pause_s = failed, 1.0
                say(f"{str(error)[:300]}; waiting up to {SERVER_S:.0f} s for the file server")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 10.0)


def appeared(look: Callable[[], T | None], timeout_s: float) -> T | None:
    """What ``look`` finds once it is there, for one that waits alone; None after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while (value := look()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return value
