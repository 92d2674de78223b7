"""The bytes of a large export, plain or compressed, in parts that can be read apart and must fit together.

A bz2 export of many streams (Wikipedia's "multistream" files) and a plain one are cut where a stream or a page
begins; of a single compressed stream the text is.
"""

import bz2
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep import formats
from data_prep.errors import DataError
from data_prep.formats import BOMB_BYTES, BOMB_RATIO

CHUNK = 1 << 18
STREAM_BYTES_PER_H = 5.5e9  # of bz2, 4.2 times as much text: what one core unpacks
PAGE = re.compile(rb"<page>")
STREAM = re.compile(rb"BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)")


@dataclass
class Seam:
    """Where a part really began and ended; neighbours must agree, else bytes were lost between them."""

    first: int | None = None
    stop: int | None = None


def refuse_unreadable(path: Path) -> None:
    """Raise DataError for an empty file, and for another format, named for what it is."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: fetch it again")
    formats.refuse_foreign(path, inside=False)  # expat reads UTF-16, too


def is_one_stream(path: Path) -> bool:
    """Whether the file must be unpacked from its beginning: a compressed one whose streams are not cut at pages."""
    kind = formats.compression(path)
    return bool(kind) and not (kind == "bz2" and _streams_hold_pages(path))


def pieces(path: Path, out: Path, piece_bytes: int, processes: int) -> Iterator[tuple[Path, int, int]]:
    """Cut the text of a file of one stream, wherever a page begins after `piece_bytes`, into exports of their own.

    Gives (file in `out`, where its text begins, where it ends); the caller removes the file. The cuts are the same
    whatever unpacks the stream.
    """
    text, window, last = unpacked(path, processes), b"", False
    begin = end = 0
    while not last:
        name = out / f".{path.name}.{begin:013d}.piece.tmp"
        with open(name, "wb") as file:
            file.write(b"<mediawiki>" if begin else b"")
            while True:
                page = window.find(b"<page>", max(0, begin + piece_bytes - end))
                if page >= 0 and end + page > begin:
                    file.write(window[:page] + b"</mediawiki>")
                    window, end = window[page:], end + page
                    break
                done = len(window) - 5  # a mark may be cut by the end of the window
                if done > 0:
                    file.write(window[:done])
                    window, end = window[done:], end + done
                if not (more := next(text, b"")):
                    file.write(window)
                    end, last = end + len(window), True
                    break
                window += more
        yield name, begin, end
        begin = end


def unpacked(path: Path, processes: int) -> Iterator[bytes]:
    """The text of a file of one stream; a bz2 one by several processes where indexed_bzip2 is installed."""
    if processes < 2 or not is_unpacked_in_parallel(path):
        yield from chunks(path, 0, path.stat().st_size, Seam())
        return
    given, size = 0, path.stat().st_size
    try:
        with importlib.import_module("indexed_bzip2").open(str(path), parallelization=processes) as file:
            while data := file.read(CHUNK):
                given += len(data)
                if given > BOMB_BYTES and given > BOMB_RATIO * size:
                    raise DataError(f"{path}: {size} bytes unpack to over {given >> 20} MB: a bomb")
                yield data
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path}: damaged or truncated bz2 data ({str(error)[:200]}): fetch it again") from None


def is_unpacked_in_parallel(path: Path) -> bool:
    """Whether the file is bz2 and the package is there that unpacks one stream by several processes."""
    return formats.compression(path) == "bz2" and importlib.util.find_spec("indexed_bzip2") is not None


def chunks(path: Path, start: int, end: int, seam: Seam) -> Iterator[bytes]:
    """Uncompressed bytes of the part whose streams or pages begin in [start, end); `seam` is filled in.

    Raises DataError (file and byte named) for a truncated or damaged file, trailing junk or a decompression bomb.
    """
    kind = formats.compression(path)
    if kind not in ("", "bz2"):
        seam.first, seam.stop = 0, path.stat().st_size
        with formats.opened(path) as unpacked:
            yield from iter(lambda: unpacked.read(CHUNK), b"")
        return
    with open(path, "rb") as file:
        seam.first = 0 if start == 0 else _find(file, STREAM if kind == "bz2" else PAGE, start, end)
        if seam.first is None:
            return
        if kind == "bz2":
            yield from _streams(path, file, seam.first, end, seam)
        else:
            seam.stop = _find(file, PAGE, end, path.stat().st_size)
            if seam.stop is None:
                seam.stop = path.stat().st_size
            file.seek(seam.first)
            left = seam.stop - seam.first
            while left:
                data = file.read(min(CHUNK, left))
                if not data:
                    raise DataError(f"{path} became shorter while it was read")
                left -= len(data)
                yield data


def check_seams(path: Path, seams: list[tuple[int | None, int | None]]) -> None:
    """Raise DataError unless the parts of `path`, in order, leave no gap."""
    expected = 0
    for first, stop in seams:
        if first is not None and stop is not None:
            if first != expected:
                raise DataError(f"{path}: bytes {expected} to {first} hold no readable page: fetch the file again")
            expected = stop
    if expected != path.stat().st_size:
        raise DataError(f"{path}: byte {expected} onwards holds no readable page: fetch the file again")


def _find(file: BinaryIO, mark: re.Pattern[bytes], start: int, end: int) -> int | None:
    """Offset of the first `mark` that begins in [start, end)."""
    file.seek(start)
    position, tail = start, b""
    while position - len(tail) < end and (data := file.read(CHUNK)):
        window = tail + data
        if match := mark.search(window):
            offset = position - len(tail) + match.start()
            return offset if offset < end else None
        tail = window[-9:]  # a mark has at most ten bytes
        position += len(data)
    return None


def _streams(path: Path, file: BinaryIO, position: int, end: int, seam: Seam) -> Iterator[bytes]:
    """Decompress bz2 streams from `position` until one begins at or after `end`, or the file ends."""
    size = path.stat().st_size
    file.seek(position)
    pending, first, given = b"", position, 0
    while position < min(end, size):
        decompressor, fed = bz2.BZ2Decompressor(), 0
        while not decompressor.eof:
            data = b""
            if decompressor.needs_input:
                data = pending or file.read(CHUNK)
                pending = b""
                if not data:
                    raise DataError(
                        f"{path} is truncated: the bz2 stream at byte {position} has no end, the file has {size} "
                        "bytes: fetch it again"
                    )
                fed += len(data)
            try:
                out = decompressor.decompress(data, CHUNK)
            except OSError:
                raise DataError(
                    f"{path}: damaged data, or junk, in the bz2 stream at byte {position} (before byte "
                    f"{position + fed} of {size}): fetch it again"
                ) from None
            given += len(out)
            read = position + fed - first  # over all streams: a bomb may be many small ones
            if given > BOMB_BYTES and given > BOMB_RATIO * read:
                raise DataError(f"{path}: {read} bytes at byte {first} unpack to over {given >> 20} MB: a bomb")
            if out:
                yield out
        pending = decompressor.unused_data
        position += fed - len(pending)
    seam.stop = position


def _streams_hold_pages(path: Path) -> bool:
    """Whether the file is cut into streams between pages: a header stream, then streams that begin with a page."""
    with open(path, "rb") as file:
        second = _find(file, STREAM, 4, 1 << 22)
        if second is None:
            return False
        file.seek(second)
        try:
            start = bz2.BZ2Decompressor().decompress(file.read(1 << 20), CHUNK)
        except OSError:
            return False
        return start.lstrip().startswith(b"<page>")
