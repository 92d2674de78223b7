"""Plain text and JSON lines to documents: a folder of books, a file of documents between blank lines, or JSONL."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.document import CONTROL, Document, Tally, content_id, plain, printable
from data_prep.errors import DataError

PIECE = 1 << 20
LONG_LINE = 200  # characters; text with such lines was not wrapped by hand
REPAIRS = ("byte_order_marks_removed", "carriage_returns_read_as_line_ends", "control_characters_removed")
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def book_files(folder: Path) -> list[Path]:
    """All files below `folder`, in the order of their names; hidden ones are left out.

    Raises DataError when there is none, and for what is no file of this folder: a link that leads out of it, nowhere
    or to a folder, a pipe, a device.
    """
    files, top = [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        linked = path.is_symlink()
        if any(p.startswith(".") for p in path.relative_to(folder).parts) or (path.is_dir() and not linked):
            continue
        if not path.is_file():
            raise DataError(f"{path} is no regular file and leads to none: remove it from the folder of books")
        if linked and not path.resolve().is_relative_to(top):
            raise DataError(f"{path} leads out of {folder}, to {path.resolve()}: copy the file, or remove the link")
        files.append(path)
    if not files:
        raise DataError(f"{folder} holds no file: put one text file per book there")
    return files


def book(path: Path, folder: Path, *, max_document_mb: float, tally: Tally) -> Document | None:
    """One file as one document; None (counted) when it is over the limit or has no letter.

    Blank lines separate paragraphs, the lines of a paragraph are joined. A book without blank lines stays one
    document: one paragraph, or one a line where lines are long. Raises DataError for invalid UTF-8.
    """
    name = str(path.relative_to(folder))
    tally.counts["articles"] += 1
    if path.stat().st_size > max_document_mb * 1e6:
        _too_large(tally, name, max_document_mb)
        return None
    text = _decode(path.read_bytes(), path, 0, tally)
    text = _counted(text, tally).replace("\r\n", "\n").replace("\r", "\n").strip()
    parts = BLANK_LINE.split(text)
    if len(parts) == 1 and "\n" in text:
        tally.counts["books_without_blank_lines"] += 1
        lines = text.split("\n")
        parts = lines if any(len(line) > LONG_LINE for line in lines) else parts
    paragraphs = (" ".join(part.split()) for part in parts)
    return _document(path.stem, folder.name, f"{folder.name}/{name}", "\n".join(paragraphs), tally)


def text_documents(path: Path, start: int, end: int, *, max_document_mb: float, tally: Tally) -> Iterator[Document]:
    """Documents between blank lines of one file whose blank line lies in bytes [start, end).

    The lines of a document are joined to one paragraph. Memory is bounded by one document of the allowed size.
    """
    limit = int(max_document_mb * 1e6)
    with open(path, "rb") as file:
        for offset, size, pieces in _blocks(file, start, end, limit):
            tally.counts["articles"] += 1
            if size > limit:
                _too_large(tally, f"{path.name} at byte {offset}", max_document_mb)
                continue
            text = " ".join(_counted(_decode(b"".join(pieces), path, offset, tally), tally).split())
            made = _document("", path.name, "", text, tally, where=f"{path.name} at byte {offset}")
            if made:
                yield made


def json_documents(path: Path, start: int, end: int, *, max_document_mb: float, tally: Tally) -> Iterator[Document]:
    """Objects with `text` (and perhaps `id`, `title`) whose lines begin in bytes [start, end).

    Raises DataError naming file and line for anything else on a line; blank lines are allowed.
    """
    limit = int(max_document_mb * 1e6)
    with open(path, "rb") as file:
        for offset, size, pieces in _lines(file, start, end, 8 * limit):
            if pieces and not b"".join(pieces).strip():
                continue
            tally.counts["articles"] += 1
            title, number, text = f"{path.name} at byte {offset}", None, ""
            if size <= 8 * limit:  # JSON escapes may take six bytes for one
                row = _row(b"".join(pieces), path, offset, tally)
                text, title, number = row["text"], row.get("title") or title, row.get("id")
            if size > 8 * limit or len(text.encode(errors="replace")) > limit:
                _too_large(tally, title, max_document_mb)
                continue
            key = "" if number is None else f"{path.stem}-{number}"
            made = _document(row.get("title") or "", path.name, key, plain(_counted(text, tally)), tally, where=title)
            if made:
                yield made


def _document(title: str, source: str, key: str, text: str, tally: Tally, *, where: str = "") -> Document | None:
    text = plain(text)
    if not any(map(str.isalpha, text)):
        tally.skip("no letters", where or title)
        return None
    clean_title = "".join(c for c in title if c.isprintable())
    return Document(plain(key) or content_id(source, text), clean_title, source, text)


def _too_large(tally: Tally, title: str, max_document_mb: float) -> None:
    tally.skip(f"over max_document_mb ({max_document_mb:g})", title)


def _counted(text: str, tally: Tally) -> str:
    """`text` as it is; what `plain` takes out of it is counted."""
    for key, found in zip(REPAIRS[1:], (text.count("\r"), len(CONTROL.findall(text))), strict=True):
        if found:
            tally.counts[key] += found
    return text


def _decode(data: bytes, path: Path, offset: int, tally: Tally) -> str:
    """UTF-8 text without a byte order mark (counted); DataError naming file and byte for anything else."""
    skip = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
    if skip:
        tally.counts[REPAIRS[0]] += 1
    try:
        return data[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte {offset + skip + error.start} (0x{data[skip + error.start]:02x}): convert "
            "the file, for example with iconv -f LATIN1 -t UTF-8"
        ) from None


def _row(line: bytes, path: Path, offset: int, tally: Tally) -> dict[str, Any]:
    fault = ""
    try:
        row = json.loads(_decode(line, path, offset, tally))
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            fault = 'no object with a string "text"'
        elif not isinstance(row.get("title") or "", str):
            fault = '"title" is not a string'
        elif not isinstance(row.get("id", 0), str | int):
            fault = '"id" is neither a string nor a number'
        else:
            return row
    except (ValueError, RecursionError) as error:
        fault = f"not JSON ({printable(str(error))})"
    raise DataError(f'{path}:{_line_number(path, offset)}: {fault}; every line must be {{"text": …}}')


def _line_number(path: Path, offset: int) -> int:
    number, left = 1, offset
    with open(path, "rb") as file:
        while left and (data := file.read(min(PIECE, left))):
            number += data.count(b"\n")
            left -= len(data)
    return number


def _lines(
    file: BinaryIO, start: int, end: int, limit: int, *, past_end: bool = False
) -> Iterator[tuple[int, int, list[bytes]]]:
    """(offset, size, pieces) of the lines that begin in [start, end); a line over `limit` comes without pieces.

    With `past_end` the lines after `end` follow, too, unless no line begins in the range.
    """
    if start:
        file.seek(start - 1)
        while piece := file.readline(PIECE):
            if piece.endswith(b"\n"):
                break
            if file.tell() >= end:
                return
    offset = file.tell()
    while (past_end or offset < end) and (piece := file.readline(PIECE)):
        pieces, size = [piece], len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
            size += len(piece)
            if size <= limit:
                pieces.append(piece)
        yield offset, size, pieces if size <= limit else []
        offset += size


def _blocks(file: BinaryIO, start: int, end: int, limit: int) -> Iterator[tuple[int, int, list[bytes]]]:
    """(offset, size, pieces) of runs of lines that are not blank; pieces are incomplete when size is over `limit`.

    A run belongs to the range in which the blank line before it begins (the first run of the file: to the first
    range), so that every run is read by exactly one part.
    """
    block: list[bytes] = []
    at, size, ours = start, 0, start == 0
    for offset, length, pieces in _lines(file, start, end, limit, past_end=True):
        if length <= limit and not b"".join(pieces).strip():
            if size:
                yield at, size, block
            block, size, ours = [], 0, offset < end
        elif ours:
            at = at if size else offset
            size += length
            if size <= limit:
                block += pieces
        if offset >= end and not ours:
            return
    if size:
        yield at, size, block
