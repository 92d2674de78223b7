"""Labelled files to tables of texts and classes: tab-separated as GLUE has them, CSV, and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError

Classes = NDArray[np.int64]
Row = tuple[int, list[str]]  # a line's number in the file, from 1, and its cells
USUAL = ("text", "sentence")  # names of a text column that need not be given
MOST_LABELS = 1000  # more are no classes


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a file holds: ``text`` names one or two columns, class i is called ``labels[i]`` (none: those of the file).

    ``header`` gives the columns of a file whose first line does not name ``text``.
    """

    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The rows of one file: its texts by column, classes ``[N]``, and each row's line in the file, from 1."""

    texts: tuple[list[str], ...]
    classes: Classes | None
    lines: list[int]
    labels: tuple[str, ...] = ()


def read_table(path: Path, columns: Columns, *, labelled: bool = True) -> Table:
    """Read a file by its ending: .csv, .jsonl, else tab-separated, where quotes have no meaning.

    DataError names file, line, what was found and what is expected. ``labelled=False`` needs no label column.
    """
    needed = (*columns.text, columns.label) if labelled else columns.text
    rows = list(_rows(path, needed, columns.header))
    numbers = [number for number, _ in rows]
    texts = tuple([cells[index] for _, cells in rows] for index in range(len(columns.text)))
    if not labelled:
        return Table(texts, None, numbers, columns.labels)
    row_labels = [cells[-1] for _, cells in rows]
    if "" in row_labels:
        number = numbers[row_labels.index("")]
        raise DataError(f"{path}:{number}: {columns.label!r} is empty; label this row or leave it out")
    labels = columns.labels or _distinct(path, columns.label, row_labels)
    number_of = {label: number for number, label in enumerate(labels)}
    for number, label in zip(numbers, row_labels, strict=True):
        if label not in number_of:
            more = f" and {len(labels) - 20} more" if len(labels) > 20 else ""
            expected = ", ".join(labels[:20])
            raise DataError(f"{path}:{number}: label {label!r} is unknown; expected one of {expected}{more}")
    return Table(texts, np.array([number_of[label] for label in row_labels], np.int64), numbers, tuple(labels))


def text_columns(path: Path, label: str) -> tuple[str, ...]:
    """The text column of a file where nobody names it: a usual name, else the only one beside the labels."""
    names = list(_names(path))
    others = [name for name in names if name != label]
    usual = [name for name in USUAL if name in names]
    if not usual and len(others) != 1:
        raise DataError(f"{path}: which columns are the text? name one or two by --text; found {', '.join(names)}")
    return ((usual or others)[0],)


def _distinct(path: Path, column: str, labels: list[str]) -> tuple[str, ...]:
    """The classes of a file, numbers by their size."""
    distinct = set(labels)
    alike = {label.strip().casefold(): label for label in distinct}
    for label in distinct - set(alike.values()):
        twin = alike[label.strip().casefold()]
        raise DataError(f"{path}: labels {label!r} and {twin!r} of column {column!r} differ in case or blanks alone")
    if not 2 <= len(distinct) <= MOST_LABELS:
        raise DataError(f"{path}: column {column!r} holds {len(distinct)} different labels; needed 2 to {MOST_LABELS}")
    numeric = all(label.isdecimal() for label in distinct)
    return tuple(sorted(distinct, key=lambda label: (int(label), label) if numeric else (0, label)))


def _rows(path: Path, needed: tuple[str, ...], header: tuple[str, ...]) -> Iterator[Row]:
    """The ``needed`` cells of every row."""
    if path.suffix.lower() == ".jsonl":
        for number, record in _objects(path):
            for name in needed:
                if name not in record:
                    raise DataError(
                        f"{path}:{number}: key {name!r} is missing; found {', '.join(map(repr, _told(record)))}"
                    )
            yield number, [_cell(path, number, name, record[name]) for name in needed]
        return
    rows = _separated(path)
    line, first = next(rows)
    headed = not header or set(needed) <= set(first)  # CoLA's test file has a header, its others have none
    names = first if headed else list(header)
    for name in needed:
        if name not in names:
            raise DataError(f"{path}:1: column {name!r} is missing; found {', '.join(map(repr, _told(names)))}")
        if names.count(name) > 1:
            raise DataError(f"{path}:1: {names.count(name)} columns are called {name!r}; call all but one otherwise")
    places = [names.index(name) for name in needed]
    number = line
    for number, cells in rows if headed else ((line, first), *rows):
        if len(cells) != len(names):
            raise DataError(f"{path}:{number}: {len(cells)} cells; expected {len(names)}: {', '.join(_told(names))}")
        yield number, [cells[place] for place in places]
    if headed and number == line:
        raise DataError(f"{path}:{line}: no examples below the header")


def _told(names: Iterable[str]) -> list[str]:
    """Names of columns for an error, some and cut: a file that is no table may have a line of megabytes for one."""
    return [name[:40] for name in list(names)[:8]]


def _names(path: Path) -> list[str]:
    """The names of a file's columns."""
    return list(next(_objects(path))[1]) if path.suffix.lower() == ".jsonl" else next(_separated(path))[1]


def _separated(path: Path) -> Iterator[Row]:
    """Lines of cells, the first the header; those of CSV may be quoted and hold line ends."""
    if path.suffix.lower() == ".json":
        raise DataError(f"{path}: a .json file is no table; write it as JSON lines (.jsonl), CSV or TSV")
    if path.suffix.lower() != ".csv":
        yield from ((number, line.split("\t")) for number, line in _lines(path))
        return
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO("\n".join(line for _, line in _lines(path)), newline=""), strict=True)
    before = 0
    try:
        for cells in reader:
            if cells:
                yield before + 1, cells
            before = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}:{before + 1}: {error}") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file, one a line."""
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no character
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        yield number, record


def _cell(path: Path, number: int, name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return json.dumps(value)
    raise DataError(f"{path}:{number}: {name!r} is {type(value).__name__}; expected a text or a whole number")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file with or without byte-order mark; only LF and CRLF end one, blank last ones do not
    count.
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; expected labelled examples")
    for number, line in enumerate(data.rstrip(b"\r\n").split(b"\n"), 1):
        try:
            yield number, line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from None
