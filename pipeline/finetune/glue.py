"""Classification of texts and pairs of texts: GLUE's tasks (Wang et al. 2019) as data, one's own, and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config import ClassifyConfig, FinetuneConfig
from pipeline.finetune.options import SQUAD
from pipeline.finetune.samples import Samples, join
from pipeline.finetune.squad import Encode, encode_each, read_squad
from pipeline.finetune.table import Classes, Columns, Table, read_table, text_columns


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


def macro_f1(predicted: Classes, labels: Classes) -> float:
    """The mean of every class's F1, in percent."""
    return float(np.mean([f1(predicted == c, labels == c) for c in np.union1d(predicted, labels)]))


METRICS: dict[str, Callable[[Classes, Classes], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "mean": mean_of_accuracy_and_f1,
    "matthews": matthews,
}


@dataclass(frozen=True, kw_only=True)
class Task(Columns):
    """The columns of a file, and what counts: the first of ``metrics`` ranks runs."""

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


def own_task(config: ClassifyConfig, file: Path, labels: tuple[str, ...]) -> Task:
    """The task of anybody's ``file``: the columns that the configuration names, the classes of a trained model's
    ``labels`` or else those of the file.
    """
    task = Task(text=config.text or text_columns(file, config.label), label=config.label, labels=labels,
                metrics=("accuracy", "macro_f1"))  # fmt: skip
    return replace(task, labels=read_table(file, task).labels) if not labels else task


def check(*, task: str, config: FinetuneConfig, train: Path, eval: Path, **others: object) -> None:
    """DataError for a file that is not what ``task``, SQuAD's too, is read from."""
    for path in (train, eval):
        if task == SQUAD:
            read_squad(path, version_2=config.version_2)
        else:
            read_table(path, TASKS[task])


def build_samples(table: Table, encode: Encode, max_seq_len: int, *, cls: int, sep: int) -> Samples:
    """Samples of at most ``max_seq_len`` tokens: the longer text of a pair is cut first, ties cut the second."""
    pieces = [encode_each(encode, column) for column in table.texts]
    if len(pieces) == 1:
        kept = [[max_seq_len - 2] * len(pieces[0])]
    else:
        first, second = (np.array([len(piece) for piece in column]) for column in pieces)
        room = max_seq_len - 3
        of_first = np.minimum(first, np.maximum(room - second, (room + 1) // 2))
        kept = [of_first.tolist(), (room - of_first).tolist()]
    cut = [
        [piece[:length] for piece, length in zip(column, lengths, strict=True)]
        for column, lengths in zip(pieces, kept, strict=True)
    ]
    return join(cut, cls=cls, sep=sep, targets=table.classes)
