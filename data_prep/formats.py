"""What a file is by its first bytes, and the bytes of a compressed one: gz, bz2, xz and zst are read as they are."""

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.errors import DataError

BOMB_BYTES, BOMB_RATIO = 1 << 28, 1000  # no text shrinks a thousandfold over 256 MB
COMPRESSIONS = {b"BZh": "bz2", b"\x1f\x8b": "gz", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
END = 1 << 62  # of a range that ends with its file, however long that is once unpacked
_FOREIGN = {
    b"%PDF": "a PDF document: convert it, for example with pdftotext",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as plain text",
    b"{\\rtf": "an RTF document: save it as plain text",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x7fELF": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x89HDF": "an HDF5 file",
    b"\xff\xfe\0\0": "UTF-32 text; only UTF-8 is read: convert it with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16 text; only UTF-8 is read: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; only UTF-8 is read: convert it with iconv -f UTF-16 -t UTF-8",
}
_HTML = (b"<!doctype html", b"<html")
_NULS = 0.02  # share of a text; in UTF-16 every blank and line end has one


def head_of(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file as it lies on the disk."""
    with open(path, "rb") as file:
        return file.read(size)


def compression(path: Path) -> str:
    """ "bz2", "gz", "xz", "zst" or "" by the file's first bytes."""
    head = head_of(path, 6)
    return next((kind for mark, kind in COMPRESSIONS.items() if head.startswith(mark)), "")


def refuse_foreign(path: Path, *, inside: bool = True) -> None:
    """Raise DataError naming what the file is, when it is no text and nothing that holds text for us.

    A compressed one is judged by what it holds, unless not ``inside``.
    """
    if what := _foreign(path, inside):
        raise DataError(f"{path} is {what}")


def _foreign(path: Path, inside: bool) -> str:
    head = head_of(path)
    if head.startswith(b"PK\x03\x04"):
        return _zip_content(path)
    if compression(path):
        head = _unpacked_head(path) if inside else b""
    for mark, what in _FOREIGN.items():
        if head.startswith(mark):
            return what
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return "an HTML page: take its text out, for example with html2text"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head.count(0) > 4 + _NULS * len(head) and not head.startswith(b"PAR1"):
        return "no text, or UTF-16 text without its mark; only UTF-8 is read: try iconv -f UTF-16LE -t UTF-8"
    return ""


def _zip_content(path: Path) -> str:
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if "word/document.xml" in names:
            return "a Word document (docx): save it as plain text"
        if "META-INF/container.xml" in names:
            return "an EPUB book: convert it to plain text, for example with pandoc"
        if "content.xml" in names:
            return "an OpenDocument file (odt): save it as plain text"
    return "a zip archive: unpack it"


def _unpacked_head(path: Path) -> bytes:
    """The first bytes of what a file holds; none where it is damaged, which is said when it is read."""
    with suppress(DataError), opened(path) as file:
        return file.read(512)
    return b""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it is compressed; the place in it counts unpacked bytes.

    Reading raises DataError for a truncated or damaged file, a decompression bomb, or zst without `zstandard`.
    """
    with open(path, "rb") as raw:
        kind = compression(path)
        if not kind:
            yield raw
        else:
            yield io.BufferedReader(_Unpacked(path, raw, _decompressed(path, raw, kind)), 1 << 20)


def _decompressed(path: Path, raw: BinaryIO, kind: str) -> Any:
    if kind == "gz":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bz2":
        return _Streams(raw, bz2.BZ2Decompressor)
    if kind == "xz":
        return _Streams(raw, lzma.LZMADecompressor)
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} is a zst file: pip install zstandard, or unpack it with unzstd") from None
    return _Streams(raw, zstandard.ZstdDecompressor().decompressobj)


class _Streams:
    """Compressed streams one after the other, zeros behind them: the readers of bz2 and lzma take other bytes behind a
    stream for the end of the file, that of zstandard a truncated stream.
    """

    def __init__(self, raw: BinaryIO, begin: Callable[[], Any]) -> None:
        self.raw, self.begin = raw, begin
        self.stream: Any = None
        self.pending = b""

    def read(self, _size: int) -> bytes:
        while data := self.pending or self.raw.read(1 << 12):
            data, self.pending = data if self.stream else data.lstrip(b"\0"), b""
            if not data:
                continue
            self.stream = self.stream or self.begin()
            unpacked: bytes = self.stream.decompress(data)
            if self.stream.eof:
                self.pending, self.stream = self.stream.unused_data, None
            if unpacked:
                return unpacked
        if self.stream is not None:
            raise EOFError("the last stream has no end")
        return b""


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, raw: BinaryIO, stream: Any) -> None:
        self.path, self.raw, self.stream, self.given = path, raw, stream, 0
        self.left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.given

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.left or memoryview(self.stream.read(len(buffer)))
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
            raise DataError(
                f"{self.path}: damaged or truncated {compression(self.path)} data near byte {self.raw.tell()} "
                f"({error}): fetch it again"
            ) from None
        if self.given > BOMB_BYTES and self.given > BOMB_RATIO * self.raw.tell():
            raise DataError(f"{self.path}: {self.raw.tell()} bytes unpack to over {self.given >> 20} MB: a bomb")
        data, self.left = data[: len(buffer)], data[len(buffer) :]
        self.given += len(data)
        buffer[: len(data)] = data
        return len(data)


def _zstd_error() -> type[Exception]:
    try:
        return importlib.import_module("zstandard").ZstdError  # type: ignore[no-any-return]
    except ImportError:
        return EOFError
