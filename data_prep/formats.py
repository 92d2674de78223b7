"""What a file is by its first bytes, and the bytes of a compressed one: gz, bz2, xz and zst are read as they are."""

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
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
    b"\xff\xfe": "UTF-16 text; only UTF-8 is read: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; only UTF-8 is read: convert it with iconv -f UTF-16 -t UTF-8",
}
_HTML = (b"<!doctype html", b"<html")


def head_of(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file as it lies on the disk."""
    with open(path, "rb") as file:
        return file.read(size)


def compression(path: Path) -> str:
    """ "bz2", "gz", "xz", "zst" or "" by the file's first bytes."""
    head = head_of(path, 6)
    return next((kind for mark, kind in COMPRESSIONS.items() if head.startswith(mark)), "")


def refuse_foreign(path: Path) -> None:
    """Raise DataError naming what the file is, when it is no text and nothing that holds text for us."""
    if what := _foreign(path):
        raise DataError(f"{path} is {what}")


def _foreign(path: Path) -> str:
    head = head_of(path)
    for mark, what in _FOREIGN.items():
        if head.startswith(mark):
            return what
    if head.startswith(b"PK\x03\x04"):
        return _zip_content(path)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return "an HTML page: take its text out, for example with html2text"
    if head[257:262] == b"ustar" or _holds_tar(path):
        return "a tar archive: unpack it"
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


def _holds_tar(path: Path) -> bool:
    kind = compression(path)
    if kind:
        with suppress(DataError, OSError, EOFError, zlib.error, lzma.LZMAError, _zstd_error()), open(path, "rb") as raw:
            return bytes(_decompressed(path, raw, kind).read(512)[257:262]) == b"ustar"
    return False


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
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} is a zst file: pip install zstandard, or unpack it with unzstd") from None
    return _Zst(raw, zstandard.ZstdDecompressor())


class _Zst:
    """Frames of zstandard one after the other; its own reader takes a truncated one for the end."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self.raw, self.decompressor = raw, decompressor
        self.frame: Any = None
        self.pending = b""

    def read(self, _size: int) -> bytes:
        while data := self.pending or self.raw.read(1 << 13):
            self.frame = self.frame or self.decompressor.decompressobj()
            unpacked: bytes = self.frame.decompress(data)
            self.pending = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
            if unpacked:
                return unpacked
        if self.frame is not None:
            raise EOFError("the last frame has no end")
        return b""


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, raw: BinaryIO, stream: Any) -> None:
        self.path, self.raw, self.stream, self.given = path, raw, stream, 0
        self.left = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.given

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.left or self.stream.read(len(buffer))
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
