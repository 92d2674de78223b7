"""What the loop needs to know of a task: its samples, its model, its loss, and how outputs become scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.bert.config import BertConfig
from pipeline.bert.heads import BertForQuestionAnswering, BertForSequenceClassification, Model
from pipeline.bert.tokenizer import Tokenizer
from pipeline.config import ClassifyConfig, FinetuneConfig
from pipeline.engine.ranks import Ranks
from pipeline.finetune import glue, squad
from pipeline.finetune.baselines import majority, naive_bayes
from pipeline.finetune.options import SQUAD
from pipeline.finetune.samples import Samples
from pipeline.finetune.squad_answers import answer_questions, basic_tokenizer
from pipeline.finetune.squad_metric import score
from pipeline.finetune.table import Table, read_table

Outputs = Any  # what the model's forward returns
Logits = NDArray[np.float32]
Ints = NDArray[np.int64]


class SquadProblem:
    """Extractive question answering."""

    metric = "f1"  # the score that ranks runs
    head = "qa_outputs."  # the prefix of the task head's parameters
    labels: tuple[str, ...] = ()  # names of the classes, if any

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.references: dict[str, list[str]] | None = None

    def new_model(self, config: BertConfig) -> Model:
        """A model whose outputs `loss_sum` and `rows` understand."""
        return BertForQuestionAnswering(config)

    def _features(self, data: squad.Squad, *, training: bool) -> tuple[list[squad.Feature], list[str]]:
        encoder = self.tokenizer.encoder
        cls, sep = encoder.vocabulary.special["cls"], encoder.vocabulary.special["sep"]
        return squad.build_features(data, encoder.encode, self.config, cls=cls, sep=sep, training=training)

    def read_train(self, path: Path) -> tuple[Samples, dict[str, int], list[str]]:
        """Samples with targets, counts to report, and the ids of examples that cannot be trained on."""
        data = squad.read_squad(path, version_2=self.config.version_2)
        features, skipped = self._features(data, training=True)
        counts = {
            "train_examples": len(data.questions) - len(skipped),
            "skipped_train_examples": len(skipped),
            "train_features": len(features),
        }
        return _samples(features, [(feature.start, feature.end) for feature in features]), counts, skipped

    def read_eval(self, path: Path, *, labelled: bool) -> tuple[Samples, dict[str, int]]:
        """Samples to predict, and counts to report; `judge` refers to the last file read."""
        data = squad.read_squad(path, version_2=self.config.version_2, answers=labelled)
        samples = self.ask(data)
        if labelled:
            self.references = data.references()
        return samples, {"examples": len(data.questions), "eval_features": len(samples)}

    def ask(self, data: squad.Squad) -> Samples:
        """Samples of questions to answer, which `judge` then refers to."""
        self.data = data
        self.references = None
        self.features, _ = self._features(data, training=False)
        return _samples(self.features, None)

    def loss_sum(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Sum of the losses of N samples, fp32."""
        start, end = outputs
        first = functional.cross_entropy(start.float(), targets[:, 0], reduction="sum")
        return (first + functional.cross_entropy(end.float(), targets[:, 1], reduction="sum")) / 2

    def rows(self, outputs: Outputs) -> Tensor:
        """Outputs as ``[N, L, 2]``: start and end logits by token."""
        return torch.stack(outputs, dim=-1)

    def widths(self, samples: Samples) -> Ints:
        """How many logits each sample has ``[N]``."""
        return 2 * samples.lengths

    def shaped(self, logits: Logits) -> Logits:
        """The logits of one sample, flat, as `judge` takes them."""
        return logits.reshape(-1, 2)

    def judge(self, logits: Sequence[Logits], ranks: Ranks) -> tuple[dict[str, Any], dict[str, float]]:
        """``(files, scores)`` from each sample's logits: JSON by file name, percent by metric (if labelled).

        The ranks share the work; every one returns the same.
        """
        basic = basic_tokenizer(lowercase=self.tokenizer.lowercase, strip_accents=self.tokenizer.strip_accents)
        every, count = self.data.questions, len(self.data.questions)
        own = every[ranks.rank * count // ranks.world_size : (ranks.rank + 1) * count // ranks.world_size]
        asked = {question.id for question in own}
        windows = [i for i, feature in enumerate(self.features) if feature.question.id in asked]
        part = answer_questions(
            squad.Squad(self.data.contexts, own),
            [self.features[i] for i in windows],
            ((logits[i][:, 0], logits[i][:, 1]) for i in windows),
            self.config,
            vocabulary=self.tokenizer.encoder.vocabulary.tokens,
            basic=basic,
        )
        answers: dict[str, str] = {}
        n_best: dict[str, list[dict[str, Any]]] = {}
        for some_answers, some_n_best in ranks.gather(part):
            answers |= some_answers
            n_best |= some_n_best
        files = {"predictions.json": answers, "nbest_predictions.json": n_best}
        if self.references is None:
            return files, {}
        return files, score(answers, self.references, version_2=self.config.version_2)

    def baselines(self, train: Path) -> dict[str, dict[str, float]]:
        """Scores on the last file judged of what needs no model, learnt from ``train``; none where there is no such."""
        return {}


def _samples(features: Sequence[squad.Feature], targets: list[tuple[int, int]] | None) -> Samples:
    pieces = [feature.tokens for feature in features]
    return Samples.of(pieces, [feature.b_start for feature in features], targets)


class GlueProblem:
    """Classification of texts or pairs of them, by the methods of `SquadProblem`; predictions are keyed by the line in
    the file, from 1.
    """

    head = "classifier."

    def __init__(self, task: glue.Task, config: FinetuneConfig, tokenizer: Tokenizer, own: Sequence[str] = ()) -> None:
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.metric, self.labels = task.metrics[0], task.labels
        spelt = [name if name in task.labels else name.lower() for name in own]
        known = sorted(spelt) == sorted(task.labels)  # a model trained elsewhere may have them in another order
        self.order = [spelt.index(label) for label in task.labels] if known else list(range(len(task.labels)))

    def new_model(self, config: BertConfig) -> Model:
        return BertForSequenceClassification(config, len(self.task.labels))

    def _samples(self, table: Table) -> Samples:
        encoder = self.tokenizer.encoder
        cls, sep = encoder.vocabulary.special["cls"], encoder.vocabulary.special["sep"]
        return glue.build_samples(table, encoder.encode, self.config.max_seq_len, cls=cls, sep=sep)

    def read_train(self, path: Path) -> tuple[Samples, dict[str, int], list[str]]:
        samples = self._samples(read_table(path, self.task))
        return samples, {"train_examples": len(samples)}, []

    def read_eval(self, path: Path, *, labelled: bool) -> tuple[Samples, dict[str, int]]:
        samples = self.ask(read_table(path, self.task, labelled=labelled))
        return samples, {"examples": len(samples)}

    def ask(self, table: Table) -> Samples:
        """Samples of rows to classify, which `judge` then refers to."""
        self.table = table
        return self._samples(table)

    def loss_sum(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float(), targets, reduction="sum")

    def rows(self, outputs: Outputs) -> Tensor:
        """Outputs as ``[N, labels]``, in the order of the task's labels."""
        logits: Tensor = outputs[:, self.order]
        return logits

    def widths(self, samples: Samples) -> Ints:
        return np.full(len(samples), len(self.task.labels))

    def shaped(self, logits: Logits) -> Logits:
        return logits

    def judge(self, logits: Sequence[Logits], ranks: Ranks) -> tuple[dict[str, Any], dict[str, float]]:
        stacked = np.stack(logits)
        predicted = stacked.argmax(axis=1)
        chances = np.exp(stacked - stacked.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        labels, lines = self.task.labels, list(map(str, self.table.lines))
        by_line = {line: labels[label] for line, label in zip(lines, predicted.tolist(), strict=True)}
        detailed = {
            line: {"text": list(texts), "label": by_line[line], "probabilities": dict(zip(labels, each, strict=True))}
            for line, each, *texts in zip(lines, chances.tolist(), *self.table.texts, strict=True)
        }
        return {"predictions.json": by_line, "detailed_predictions.json": detailed}, self._scores(predicted)

    def _scores(self, predicted: Ints) -> dict[str, float]:
        classes = self.table.classes
        return {} if classes is None else {m: glue.METRICS[m](predicted, classes) for m in self.task.metrics}

    def baselines(self, train: Path) -> dict[str, dict[str, float]]:
        table = read_table(train, self.task)
        assert table.classes is not None
        known, asked = (list(map(" ".join, zip(*each.texts, strict=True))) for each in (table, self.table))
        predicted = {
            "majority": majority(table.classes, len(asked)),
            "bag_of_words": naive_bayes(known, table.classes, asked),
        }
        return {name: self._scores(labels) for name, labels in predicted.items()}


Problem = SquadProblem | GlueProblem


def problem_of(
    task: str, config: FinetuneConfig, tokenizer: Tokenizer, file: Path | None = None, labels: tuple[str, ...] = ()
) -> Problem:
    """The `Problem` of a task's name; one's own is described by its ``file`` (see `glue.own_task`)."""
    if task == SQUAD:
        return SquadProblem(config, tokenizer)
    if isinstance(config, ClassifyConfig):
        assert file is not None
        return GlueProblem(glue.own_task(config, file, labels), config, tokenizer)
    return GlueProblem(glue.TASKS[task], config, tokenizer, labels)
