"""Records with a text to documents: JSON lines, CSV and TSV with a named column, Parquet."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import formats
from data_prep.books import PIECE, REPAIRS, counted, decode, document, lines_of
from data_prep.document import Document, Tally, printable
from data_prep.errors import DataError


def json_documents(path: Path, start: int, end: int, tally: Tally, column: str = "text") -> Iterator[Document]:
    """Objects with the key `column` (and perhaps `id`, `title`) whose lines begin in bytes [start, end).

    Raises DataError naming file and line for anything else on a line; blank lines are allowed.
    """
    longest = 8 * tally.limit  # JSON escapes may take six bytes for one
    with formats.opened(path) as file:
        for offset, size, pieces in lines_of(file, start, end, longest):
            if pieces and not b"".join(pieces).strip():
                continue
            where = f"{path.name} at byte {offset}"
            if size > longest:
                tally.counts["articles"] += 1
                tally.skip_too_large(where)
                continue
            row = _row(b"".join(pieces), path, offset, column, tally)
            yield from _record(path, row, column, where, tally)


def _row(line: bytes, path: Path, offset: int, column: str, tally: Tally) -> dict[str, Any]:
    fault = ""
    try:
        row = json.loads(decode(line, path, offset, tally))
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            fault = f'no object with a string "{column}"'
        elif not isinstance(row.get("title") or "", str):
            fault = '"title" is not a string'
        elif not isinstance(row.get("id", 0), str | int):
            fault = '"id" is neither a string nor a number'
        else:
            return row
    except (ValueError, RecursionError) as error:
        fault = f"not JSON ({printable(str(error))})"
    raise DataError(f'{path}:{_line_number(path, offset)}: {fault}; every line must be {{"{column}": …}}')


def _line_number(path: Path, offset: int) -> int:
    number, left = 1, offset
    with formats.opened(path) as file:
        while left and (data := file.read(min(PIECE, left))):
            number += data.count(b"\n")
            left -= len(data)
    return number


def kind(path: Path) -> str:
    """ "json", "table" (CSV, TSV) or "parquet", by the file's first bytes and its name."""
    formats.refuse_foreign(path)
    if formats.head_of(path, 4) == b"PAR1":
        return "parquet"
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    return "table" if suffixes & {".csv", ".tsv"} else "json"


def look(path: Path, column: str, max_document_mb: float) -> None:
    """DataError for records that begin with what cannot be read."""
    match kind(path):
        case "json":
            next(json_documents(path, 0, formats.END, Tally(max_document_mb), column), None)
        case "table":
            next(table_documents(path, Tally(max_document_mb), column), None)
        case _:
            _column(path, list(parquet_file(path).schema_arrow.names), column)


def table_documents(path: Path, tally: Tally, column: str) -> Iterator[Document]:
    """Rows of a CSV or TSV file (``.tsv``: tabs) whose header names `column`, and perhaps ``id`` and ``title``."""
    csv.field_size_limit(sys.maxsize)
    with formats.opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
        try:
            _column(path, list(rows.fieldnames or []), column)
            for row in rows:
                where = f"{path.name} line {rows.line_num}"
                header, lacking = len(rows.fieldnames or []), list(row.values()).count(None)
                if None in row or row[column] is None:
                    cells = header - lacking + len(row.get(None, []))
                    raise csv.Error(f"{cells} cells where the header names {header}; quote them")
                if lacking:
                    tally.counts[REPAIRS[4]] += 1
                yield from _record(path, row, column, where, tally)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}:{rows.reader.line_num}: {printable(str(error), 120)}: write it again as UTF-8 CSV"
            ) from None


def parquet_documents(path: Path, start: int, end: int, tally: Tally, column: str) -> Iterator[Document]:
    """Rows of the row groups [start, end) of a Parquet file with a text `column`, and perhaps ``id`` and ``title``."""
    file = parquet_file(path)
    names = list(file.schema_arrow.names)
    _column(path, names, column)
    wanted = [column, *(name for name in ("id", "title") if name in names)]
    number = sum(file.metadata.row_group(group).num_rows for group in range(start))
    for rows in batches(path, file, wanted, list(range(start, end))):
        for row in rows:
            number += 1
            where = f"{path.name} row {number}"
            if not isinstance(row[column] or "", str):
                raise DataError(f"{path} row {number}: column {column!r} is no text but {type(row[column]).__name__}")
            yield from _record(path, row, column, where, tally)


def parquet_file(path: Path) -> Any:
    """A Parquet file, opened; DataError without pyarrow, or where it is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is a Parquet file: pip install pyarrow, or write it as JSON lines") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {printable(str(error))}") from None


def batches(
    path: Path, file: Any, columns: list[str], groups: list[int] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Rows of a Parquet file, some at a time; DataError where it is damaged or holds text that is not UTF-8."""
    from pyarrow import ArrowException

    rows = file.iter_batches(batch_size=1024, row_groups=groups, columns=columns)
    while True:
        try:
            batch = next(rows, None)
            values = [] if batch is None else batch.to_pylist()
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # of the disk; pyarrow's own have no number
                raise
            raise DataError(f"{path} is damaged ({printable(str(error))}): fetch or write it again") from None
        if batch is None:
            return
        yield values


def _column(path: Path, names: list[str], column: str) -> None:
    if column not in names:
        raise DataError(
            f"{path} has no column {column!r}: it has {', '.join(map(printable, names[:20]))}; name the one with the "
            "text with data.text_column"
        )
    if names.count(column) > 1:
        raise DataError(f"{path} has {names.count(column)} columns {column!r}: call the one with the text otherwise")


def _record(path: Path, row: dict[str, Any], column: str, where: str, tally: Tally) -> Iterator[Document]:
    tally.counts["articles"] += 1
    text, title = row[column] or "", str(row.get("title") or "")
    if len(text.encode(errors="replace")) > tally.limit:
        tally.skip_too_large(title or where)
        return
    key = "" if row.get("id") is None else f"{path.stem}-{row['id']}"
    if parsed := document(title, path.name, key, counted(text, tally), tally, where=title or where):
        yield parsed
