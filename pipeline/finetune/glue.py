"""GLUE-format TSV files to samples, and the scores of GLUE tasks (Wang et al. 2019), described as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from pipeline.finetune.samples import Samples, join
from pipeline.finetune.squad import Encode

Classes = NDArray[np.int64]


def accuracy(predicted: Classes, labels: Classes) -> float:
    """Percent of equal classes."""
    return 100 * float((predicted == labels).mean())


def f1(predicted: Classes, labels: Classes) -> float:
    """F1 of class 1 in percent; 0 when neither has any."""
    hits = int(((predicted == 1) & (labels == 1)).sum())
    total = int((predicted == 1).sum() + (labels == 1).sum())
    return 200 * hits / total if total else 0.0


def mean_of_accuracy_and_f1(predicted: Classes, labels: Classes) -> float:
    """MRPC's score in GLUE's table, in percent."""
    return (accuracy(predicted, labels) + f1(predicted, labels)) / 2


def matthews(predicted: Classes, labels: Classes) -> float:
    """Matthews correlation of classes 0 and 1, times 100; 0 when either is constant."""
    spread = float(predicted.std() * labels.std())
    covariance = float((predicted * labels).mean() - predicted.mean() * labels.mean())
    return 100 * covariance / spread if spread else 0.0


METRICS: dict[str, Callable[[Classes, Classes], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mean": mean_of_accuracy_and_f1,
    "matthews": matthews,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file format and what counts: ``text`` names one or two columns, the first of ``metrics`` ranks runs.

    ``header`` gives the columns of a file whose first line does not name ``text``. Class i is called ``labels[i]``.
    """

    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] = ()
    metrics: tuple[str, ...]


TASKS = {
    "mrpc": Task(text=("#1 String", "#2 String"), label="Quality", metrics=("accuracy", "f1", "mean")),
    "sst2": Task(text=("sentence",), label="label", metrics=("accuracy", "f1")),
    "cola": Task(
        text=("sentence",),
        label="label",
        header=("source", "label", "star", "sentence"),
        metrics=("matthews", "accuracy"),
    ),
    "mnli": Task(
        text=("sentence1", "sentence2"),
        label="gold_label",
        labels=("contradiction", "entailment", "neutral"),
        metrics=("accuracy",),
    ),
}


@dataclass(frozen=True)
class Table:
    """The rows of one file: its texts by column, classes ``[N]``, and each row's line in the file, from 1."""

    texts: tuple[list[str], ...]
    classes: Classes | None
    lines: list[int]


def read_table(path: Path, task: Task, *, labelled: bool = True) -> Table:
    """Read a tab-separated file, in which quotes have no meaning and every line has as many cells as the first.

    DataError names file, line, what was found and what is expected. ``labelled=False`` needs no label column.
    """
    lines = _lines(path)
    first = lines[0].split("\t")
    headed = not task.header or set(task.text) <= set(first)  # CoLA's test file has a header, its others have none
    header = first if headed else list(task.header)
    needed = (*task.text, task.label) if labelled else task.text
    for name in needed:
        if name not in header:
            found = ", ".join(map(repr, header))
            raise DataError(f"{path}:1: column {name!r} is missing; found {found}")
    begin = int(headed)
    rows = [line.split("\t") for line in lines[begin:]]
    if not rows:
        raise DataError(f"{path}:{len(lines)}: no examples below the header")
    for number, row in enumerate(rows, begin + 1):
        if len(row) != len(header):
            expected = ", ".join(header)
            raise DataError(f"{path}:{number}: {len(row)} cells; expected {len(header)}: {expected}")
    texts = tuple([row[header.index(name)] for row in rows] for name in task.text)
    numbers = list(range(begin + 1, begin + 1 + len(rows)))
    classes = None
    if labelled:
        found_labels = [row[header.index(task.label)] for row in rows]
        for number, label in zip(numbers, found_labels, strict=True):
            if label not in task.labels:
                raise DataError(
                    f"{path}:{number}: label {label!r} is unknown; expected one of {', '.join(task.labels)}"
                )
        classes = np.array([task.labels.index(label) for label in found_labels], np.int64)
    return Table(texts, classes, numbers)


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file with or without byte-order mark; only LF and CRLF end a line, blank last ones are none."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; expected tab-separated examples")
    lines = []
    for number, line in enumerate(data.rstrip(b"\r\n").split(b"\n"), 1):
        try:
            lines.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from None
    return lines


def build_samples(table: Table, encode: Encode, max_seq_len: int, *, cls: int, sep: int) -> Samples:
    """Samples of at most ``max_seq_len`` tokens: the longer text of a pair is cut first, ties cut the second."""
    pieces = []
    for column in table.texts:
        ids, offsets = encode(column)
        pieces.append(np.split(ids.astype(np.int64), offsets[1:-1]))
    if len(pieces) == 1:
        cut = [piece[: max_seq_len - 2] for piece in pieces[0]]
        return join(cut, None, cls=cls, sep=sep, targets=table.classes)
    first, second = (np.array([len(piece) for piece in column]) for column in pieces)
    room = max_seq_len - 3
    kept = np.minimum(first, np.maximum(room - second, (room + 1) // 2))
    a = [piece[:length] for piece, length in zip(pieces[0], kept.tolist(), strict=True)]
    b = [piece[:length] for piece, length in zip(pieces[1], (room - kept).tolist(), strict=True)]
    return join(a, b, cls=cls, sep=sep, targets=table.classes)
