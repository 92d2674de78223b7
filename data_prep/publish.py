"""Files appear whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

SEAL = "manifest_sha256"
WRITE, APPEND = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDWR | os.O_CREAT | os.O_APPEND


def plain(path: Path, flags: int) -> int:
    """The descriptor of a file in a folder into which others may write. OSError where something else lies in its place.

    They could plant a pipe, which would be waited for, or a device, which never ends; and, where we write, a link, by
    which we would change another file of our own.
    """
    follow = 0 if flags == os.O_RDONLY else os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | follow | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if follow and error.errno == errno.ELOOP:
            raise OSError(errno.EEXIST, "a link lies there, take it away", str(path)) from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EEXIST, "no plain file lies there, take it away", str(path))


def open_plain(path: Path, most_bytes: int = 1 << 62) -> BufferedReader:
    """A file of such a folder to read in bytes. OSError where it is none, or has more bytes."""
    file = os.fdopen(plain(path, os.O_RDONLY), "rb")
    if os.fstat(file.fileno()).st_size <= most_bytes:
        return file
    file.close()
    raise OSError(errno.EEXIST, f"not a plain file of at most {most_bytes >> 20} MB", str(path))


@contextmanager
def publishing(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """Give a binary handle whose content becomes ``path`` when the block ends without an exception.

    On any exception the temporary file is removed and an older ``path`` stays untouched. An ``OSError`` (full
    disk, quota, read-only) leaves with ``filename`` set, so that the caller's one line can name the file; that of a
    full disk says how many MB were needed (``size`` bytes, else more than were written) and are free.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        # not mkstemp: its 0600 would hide the file from a project group that the umask lets in
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        written = 0
        with suppress(OSError):
            written = temporary.stat().st_size
            os.unlink(temporary)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
            if error.errno == errno.ENOSPC:
                needed = f"over {written / 1e6:.1f}" if size is None else f"{size / 1e6:.1f}"
                free = shutil.disk_usage(path.parent).free
                error.strerror = f"{error.strerror} ({needed} MB needed, {free / 1e6:.1f} MB free)"
        raise


def sync_folder(folder: Path) -> None:
    """Make names created or renamed in ``folder`` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` as ``path``, whole or not at all."""
    with publishing(path, len(data)) as file:
        file.write(data)


def publish_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    publish_bytes(path, text.encode("utf-8"))


def publish_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline; NaN and infinity are refused (ValueError)."""
    publish_text(path, as_json(value))


def as_json(value: Any) -> str:
    """The text that `publish_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def publish_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """As `publish_json`, with the key ``manifest_sha256`` that `is_sealed` compares with the rest."""
    publish_json(path, {**value, SEAL: _seal(value)})


def is_sealed(value: object) -> bool:
    """Whether ``value`` is what `publish_sealed` wrote, unchanged."""
    return isinstance(value, dict) and value.get(SEAL) == _seal(value)


def _seal(value: Mapping[str, Any]) -> str:
    return json_sha256({key: item for key, item in value.items() if key != SEAL})


def json_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 of ``value`` as JSON with sorted keys: what identities and seals are made of."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in pieces."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed writers left in ``folder``; no writer may be at work there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
