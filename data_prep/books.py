"""Text files to documents: a folder of books, documents between blank lines, a sentence a line, WikiExtractor's."""

import html
import itertools
import operator
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from data_prep import formats
from data_prep.document import CONTROL, STOPS, WIDE_STOPS, Document, Tally, content_id, plain, printable
from data_prep.errors import DataError

PIECE = 1 << 20
LONG_LINE = 200  # characters; text with such lines was not wrapped by hand
LINES_BYTES = 64_000  # of text without any sign of documents make one
SENTENCES_A_LINE = 0.6  # share of the lines that end as sentences; of text wrapped by hand it is about a tenth
REPAIRS = (
    "byte_order_marks_removed",
    "carriage_returns_read_as_line_ends",
    "control_characters_removed",
    "texts_read_as_windows_1252",
    "rows_with_fewer_cells_than_the_header",
)
NO_BOOKS = (
    "readme* licen[cs]e* copying* *sums *sums.txt *.md5 *.sha1 *.sha256 *.sha512 *.csv *.tsv *.json *.log *.jpg *.png"
)
# what the code pages of western and central Europe have in common, and French and Scandinavian letters
WINDOWS_1252 = re.compile("[\x00-\x7f…‘’“”•–—\xa0§©«°»®·ÀÁÂÄÅÆÇÈÉÊËÍÎÏÑÓÔÖØÙÚÛÜßàáâäåæçèéêëíîïñóôöøùúûüŒœ£¡¿]*")
_ENDS_SENTENCE = re.compile(rf"[{STOPS}{WIDE_STOPS}][\"'”’»)\]`]*\s*$")
_DOC = re.compile(rb"<doc\b[^>]*+>")
_MARKUP = {  # what begins so is no prose
    re.compile(rb"<mediawiki\b"): "a MediaWiki export: name it in data.wikipedia; --text knows it by .xml",
    re.compile(rb"<\?xml\b"): "XML: take its text out",
    re.compile(rb'\[?\s*\{\s*"[^"]*"\s*:'): "JSON: name lines of it in data.jsonl; --text knows them by .jsonl",
    re.compile(rb"PAR1"): "a Parquet file: name it in data.jsonl; --text knows it by .parquet",
}
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def book_files(folder: Path) -> list[Path]:
    """All books below `folder`, in the order of their names, without what `left_out` names.

    Raises DataError when there is none, and for what is no file of this folder: a link that leads out of it, nowhere
    or to a folder, a pipe, a device.
    """
    files, top = [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        linked = path.is_symlink()
        if is_hidden(path, folder) or (path.is_dir() and not linked) or _is_no_book(path):
            continue
        if not path.is_file():
            raise DataError(f"{path} is no regular file and leads to none: remove it from the folder of books")
        if linked and not path.resolve().is_relative_to(top):
            raise DataError(f"{path} leads out of {folder}, to {path.resolve()}: copy the file, or remove the link")
        files.append(path)
    if not files:
        raise DataError(f"{folder} holds no file: put one text file per book there")
    return files


def left_out(folder: Path) -> list[str]:
    """Files below `folder` that are no books: hidden ones, README and licence, tables, checksums, pictures."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and (is_hidden(path, folder) or _is_no_book(path))
    )


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a name below `folder` begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_no_book(path: Path) -> bool:
    return any(fnmatch(path.name.lower(), pattern) for pattern in NO_BOOKS.split())


def form(path: Path) -> str:
    """How documents lie in a text file: "docs" (WikiExtractor's), "lines" (a sentence a line, no blank line), "text".

    Judged by the first MiB. Raises DataError for what is no text (a PDF, an archive, HTML, XML, JSON).
    """
    formats.refuse_foreign(path)
    with formats.opened(path) as file:
        head = file.read(PIECE).removeprefix(b"\xef\xbb\xbf").lstrip()
    if _DOC.match(head):
        return "docs"
    if what := next((what for mark, what in _MARKUP.items() if mark.match(head)), ""):
        raise DataError(f"{path} is {what}")
    lines = head.decode(errors="replace").replace("\r\n", "\n").strip().split("\n")
    return "lines" if all(map(str.strip, lines)) and _sentence_a_line(lines) else "text"


def _sentence_a_line(lines: list[str]) -> bool:
    return len(lines) > 1 and sum(map(bool, map(_ENDS_SENTENCE.search, lines))) >= SENTENCES_A_LINE * len(lines)


def book_documents(path: Path, folder: Path, tally: Tally) -> Iterator[Document]:
    """What a file of a folder of books holds: the articles of WikiExtractor, else one book."""
    if form(path) == "docs":
        source = f"{folder.name}/{path.relative_to(folder)}"
        yield from extracted_documents(path, 0, formats.END, tally, name=folder.name, source=source)
    elif (document := book(path, folder, tally)) is not None:
        yield document


def book(path: Path, folder: Path, tally: Tally) -> Document | None:
    """One file as one document; None (counted) when it is over the limit or has no letter.

    Blank lines separate paragraphs, the lines of a paragraph are joined. A book without blank lines stays one
    document: one paragraph, or one a line where lines are long or sentences. Raises DataError for invalid UTF-8.
    """
    name = str(path.relative_to(folder))
    tally.counts["articles"] += 1
    with formats.opened(path) as file:
        data = file.read(int(tally.limit) + 1)
    if len(data) > tally.limit:
        tally.skip_too_large(name)
        return None
    text = decode(data, path, 0, tally)
    text = counted(text, tally).replace("\r\n", "\n").replace("\r", "\n").strip()
    parts = BLANK_LINE.split(text)
    if len(parts) == 1 and "\n" in text:
        tally.counts["books_without_blank_lines"] += 1
        lines = text.split("\n")
        parts = lines if _sentence_a_line(lines) or any(len(line) > LONG_LINE for line in lines) else parts
    paragraphs = (" ".join(part.split()) for part in parts)
    return document(path.stem, folder.name, f"{folder.name}/{name}", "\n".join(paragraphs), tally)


def line_documents(path: Path, start: int, end: int, tally: Tally) -> Iterator[Document]:
    """Documents of about 64 kB of a file that has a sentence a line and no sign of documents, each line a paragraph.

    `start` and `end` are multiples of LINES_BYTES, so that any parts give the same documents.
    """
    with formats.opened(path) as file:
        lines = ((offset // LINES_BYTES, pieces) for offset, _, pieces in lines_of(file, start, end, tally.limit))
        for number, group in itertools.groupby(lines, key=operator.itemgetter(0)):
            tally.counts["articles"] += 1
            where = f"{path.name} at byte {number * LINES_BYTES}"
            lines_here = [pieces for _, pieces in group]
            for _ in range(lines_here.count([])):
                tally.skip_too_large(f"a line of {where}")
                tally.counts["articles"] += 1
            data = b"".join(itertools.chain.from_iterable(lines_here))
            text = counted(decode(data, path, number * LINES_BYTES, tally), tally)
            if paragraph := document("", path.name, "", text, tally, where=where):
                yield paragraph


def extracted_documents(
    path: Path, start: int, end: int, tally: Tally, *, name: str = "", source: str = ""
) -> Iterator[Document]:
    """Articles of WikiExtractor whose ``<doc id title>`` line begins in bytes [start, end); each line a paragraph.

    Raises DataError for an article without an end, and for text between two of them.
    """
    total, ended = 0, False
    rows: list[str] | None = None
    attributes: dict[str, str] = {}
    with formats.opened(path) as file:
        for offset, size, pieces in lines_of(file, start, end, tally.limit, past_end=True):
            line = decode(b"".join(pieces), path, offset, tally).strip()
            if rows is not None and line.startswith('<doc id="'):
                break
            if rows is None and line.startswith("<doc ") and offset < end:
                rows, total = [], 0
                attributes = {key: html.unescape(value) for key, value in _ATTRIBUTE.findall(line)}
            elif line == "</doc>" and rows is not None:
                tally.counts["articles"] += 1
                title = attributes.get("title", "")
                if total > tally.limit:
                    tally.skip_too_large(title)
                elif article := document(
                    title,
                    source or path.name,
                    f"{name or path.stem}-{attributes.get('id', offset)}",
                    counted(html.unescape("\n".join(rows[rows[:1] == [title] :])), tally),
                    tally,
                ):
                    yield article
                rows, ended = None, True
            elif rows is not None:
                total += size
                rows += [line] if total <= tally.limit else []
            elif ended and line and not line.startswith("<doc "):
                raise DataError(f"{path}: text at byte {offset}, outside of any <doc>: make it again")
            elif offset >= end and (line or not ended):
                return
    if rows is not None:
        raise DataError(f"{path}: the <doc> of {printable(attributes.get('title', ''))!r} has no </doc>: make it again")


def text_documents(path: Path, start: int, end: int, tally: Tally) -> Iterator[Document]:
    """Documents between blank lines of one file whose blank line lies in bytes [start, end).

    The lines of a document are joined to one paragraph. Memory is bounded by one document of the allowed size.
    """
    with formats.opened(path) as file:
        for offset, size, pieces in _blocks(file, start, end, tally.limit):
            tally.counts["articles"] += 1
            if size > tally.limit:
                tally.skip_too_large(f"{path.name} at byte {offset}")
                continue
            text = " ".join(counted(decode(b"".join(pieces), path, offset, tally), tally).split())
            book = document("", path.name, "", text, tally, where=f"{path.name} at byte {offset}")
            if book:
                yield book


def document(title: str, source: str, key: str, text: str, tally: Tally, *, where: str = "") -> Document | None:
    text = plain(text)
    if not any(map(str.isalpha, text)):
        tally.skip("no letters", where or title)
        return None
    clean_title = "".join(c for c in title if c.isprintable())
    return Document(plain(key) or content_id(source, text), clean_title, source, text)


def counted(text: str, tally: Tally) -> str:
    """`text` as it is; what `plain` takes out of it is counted."""
    for key, count in zip(REPAIRS[1:3], (text.count("\r"), len(CONTROL.findall(text))), strict=True):
        if count:
            tally.counts[key] += count
    return text


def decode(data: bytes, path: Path, offset: int, tally: Tally) -> str:
    """UTF-8 text without a byte order mark (counted), or Windows-1252 where the bytes leave no doubt (counted).

    DataError naming file and byte for anything else.
    """
    skip = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
    if skip:
        tally.counts[REPAIRS[0]] += 1
    try:
        return data[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        if (text := _windows_1252(data)) is not None:
            tally.counts[REPAIRS[3]] += 1
            return text
        raise DataError(
            f"{path}: invalid UTF-8 at byte {offset + skip + error.start} (0x{data[skip + error.start]:02x}): convert "
            "the file, for example with iconv -f LATIN1 -t UTF-8"
        ) from None


def _windows_1252(data: bytes) -> str | None:
    """The text, if no byte sequence is UTF-8 and few bytes are beyond ASCII, all of them usual letters or marks."""
    high = sum(byte > 127 for byte in data)
    if not high or high > 0.2 * len(data) or re.search(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}", data):
        return None
    text = data.decode("cp1252", errors="replace")
    return text if WINDOWS_1252.fullmatch(text) else None


def lines_of(
    file: BinaryIO, start: int, end: int, limit: float, *, past_end: bool = False
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


def _blocks(file: BinaryIO, start: int, end: int, limit: float) -> Iterator[tuple[int, int, list[bytes]]]:
    """(offset, size, pieces) of runs of lines that are not blank; pieces are incomplete when size is over `limit`.

    A run belongs to the range in which the blank line before it begins (the first run of the file: to the first
    range), so that every run is read by exactly one part.
    """
    block: list[bytes] = []
    at, size, ours = start, 0, start == 0
    for offset, length, pieces in lines_of(file, start, end, limit, past_end=True):
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
