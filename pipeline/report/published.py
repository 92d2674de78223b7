"""NVIDIA's published BERT results (published.csv) beside a run's own, where the two measure the same thing."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, Recipe
from pipeline.words import is_number, number

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SCHEDULE = {"phase1": (128, 65536, 7038), "phase2": (512, 32768, 1563)}  # seq_len, global_batch, steps
OFFICIAL = {"squad": ("SQuAD v1.1", 10570), "mrpc": ("MRPC", 408), "sst2": ("SST-2", 872)}  # evaluation examples
MACHINES = {"dgx_a100_80g": "DGX A100 80GB", "dgx1_32g": "DGX-1 V100 32GB"}  # by cluster profile
PRECISIONS = {"bf16": "fp16"}  # both are the 16-bit column of the published tables


Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Measured:
    """What a run has to compare; None or missing where it has not got there."""

    final_loss: float | None
    hours: float | None  # of both phases, waiting left out
    throughput: Mapping[str, float]  # sequences/s by stage: the phases, squad
    scores: Mapping[str, Mapping[str, Any]]  # scores.json by stage
    inference: Mapping[str, Any]  # result of the stage: rows and device
    cluster: str
    nodes: int


@dataclass(frozen=True)
class Comparison:
    """Rows (what, this run, published, on what), and sentences on what is and what is not comparable."""

    rows: list[Row]
    sentences: list[str]


def compare(recipe: Recipe, measured: Measured) -> Comparison:
    """The published values that a run may be held against, and the reasons for those that it may not."""
    if not _has_shape(recipe.model, LARGE):
        return Comparison([], [_other_model(recipe)])
    rows: list[Row] = []
    sentences: list[str] = []
    for part in (_loss, _throughput, _scores, _inference):
        found, said = part(recipe, measured)
        rows += found
        sentences += said
    return Comparison(rows, sentences)


def _has_shape(model: ModelConfig, shape: Mapping[str, int]) -> bool:
    return all(getattr(model, key) == value for key, value in shape.items())


def _other_model(recipe: Recipe) -> str:
    model = recipe.model
    if _has_shape(model, BASE):
        return (
            "Nothing here stands beside a published row: NVIDIA published results for BERT-large only, and this run "
            "trained a model of BERT-base's shape (12 layers, hidden size 768)."
        )
    return (
        "Nothing in this report is comparable with NVIDIA's published results: those are for BERT-large (24 layers, "
        f"hidden size 1024) on English Wikipedia with the official task data; recipe {recipe.name} trains "
        f"{model.num_hidden_layers} layers of hidden size {model.hidden_size}. Losses of models with different "
        "vocabularies cannot be compared at all; within this run, the unigram loss is the yardstick."
    )


def published() -> list[dict[str, str]]:
    """The rows of published.csv: one value each, misprints of the source corrected."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _select(**wanted: str) -> list[dict[str, str]]:
    return [row for row in published() if all(row[key] == value for key, value in wanted.items())]


def _machine_rows(recipe: Recipe, cluster: str, **wanted: str) -> list[dict[str, str]]:
    """Published throughputs on the machine of a cluster profile in the recipe's precision."""
    precision = PRECISIONS.get(recipe.train.precision, recipe.train.precision)
    return _select(metric="throughput", hardware=MACHINES.get(cluster, "none"), precision=precision, **wanted)


def _mean_and_deviation(measured: str, metric: str) -> str:
    (mean,) = _select(measured=measured, metric=metric, statistic="mean")
    (deviation,) = _select(measured=measured, metric=metric, statistic="deviation")
    return f"{mean['value']} ± {deviation['value']}"


def _loss(recipe: Recipe, measured: Measured) -> tuple[list[Row], list[str]]:
    if any(phase.start for phase in recipe.phases.values()):
        return [], ["Training loss and time are not comparable: this run started from weights that others trained."]
    if list(recipe.phases) != list(SCHEDULE):
        names = " and ".join(recipe.phases)
        return [], [f"Training loss and time are not comparable: this run has {names}, the published one two phases."]
    for (name, phase), (seq_len, global_batch, steps) in zip(recipe.phases.items(), SCHEDULE.values(), strict=True):
        if (phase.seq_len, phase.global_batch, phase.steps) != (seq_len, global_batch, steps):
            return [], [
                f"Training loss and time are not comparable: {name} ran {phase.steps} steps of {phase.global_batch:,} "
                f"samples of length {phase.seq_len}, the published run {steps} of {global_batch:,} of length {seq_len}."
            ]
    if not is_number(measured.final_loss):
        return [], ["There is no final training loss yet to put beside the published one."]
    (best,) = _select(metric="final_loss", statistic="best of 5 seeds")
    single = [_in_words(row) for row in _select(metric="final_loss", statistic="single run")]
    shown = (
        f"{_mean_and_deviation('pretraining', 'final_loss')} over 5 seeds, best {best['value']}; {', '.join(single)}"
    )
    rows: list[Row] = [("Final training loss, nats", number(measured.final_loss), shown, "32 × DGX A100 80GB")]
    said = [
        "The loss is comparable only on the same text: the published runs used English Wikipedia alone, 90 % of its "
        "articles, and masked each sample once and for all."
    ]
    if (MACHINES.get(measured.cluster), measured.nodes) == ("DGX A100 80GB", 32) and is_number(measured.hours):
        hours = ", ".join(map(_in_words, _select(measured="pretraining", metric="time_to_train")))
        rows.append(("Pretraining, hours", number(measured.hours), hours, "32 × DGX A100 80GB"))
    else:
        said.append("Hours of pretraining are not comparable: the published ones are for 32 × DGX A100 80GB.")
    return rows, said


def _in_words(row: Mapping[str, str]) -> str:
    return f"{row['value']} ({row['precision']})"


def _throughput(recipe: Recipe, measured: Measured) -> tuple[list[Row], list[str]]:
    machine = MACHINES.get(measured.cluster)
    if machine is None:
        return [], [
            "Throughput is not comparable: the published machines are "
            f"{' and '.join(MACHINES.values())}, and cluster profile {measured.cluster} is neither."
        ]
    precision = PRECISIONS.get(recipe.train.precision, recipe.train.precision)
    rows, missing = [], []
    for name, value in measured.throughput.items():
        phase = recipe.phases.get(name)
        nodes, gpus = (measured.nodes, "8") if phase else (1, "1")  # a task is fine-tuned on one GPU
        where = f"{nodes} × {machine}" if phase else f"one GPU of a {machine}"
        found = _machine_rows(recipe, measured.cluster, measured=name, nodes=str(nodes), gpus_per_node=gpus)
        if found and (phase is None or phase.seq_len == SCHEDULE[name][0]):
            shown = " and ".join(number(float(row["value"])) for row in found)
            rows.append((f"{name}, training sequences/s (median)", number(value), shown, f"{where}, {precision}"))
        else:
            missing.append(f"No published {name} throughput on {where} in {precision}.")
    if any(row[0].startswith("phase") for row in rows):
        missing.append(
            "Throughput counts whole sequences, so the distribution of sample lengths matters: the published phase 2 "
            "sorted samples into bins of 64 tokens, this run packs them without padding."
        )
    return rows, missing


def _inference(recipe: Recipe, measured: Measured) -> tuple[list[Row], list[str]]:
    """SQuAD at length 384 and batch 32 on one A100; any other measurement is not comparable."""
    rows: list[Row] = []
    found = measured.inference.get("rows")
    device = str(measured.inference.get("device", ""))
    for own in found if isinstance(found, list) else []:
        if not isinstance(own, Mapping) or own.get("engine") != "pipeline" or not is_number(own.get("sequences_per_s")):
            continue
        precision = PRECISIONS.get(str(own.get("precision")), str(own.get("precision")))
        same = (own.get("task"), own.get("seq_len"), own.get("batch")) == ("squad", 384, 32) and "A100" in device
        for row in _select(measured="squad", metric="inference", precision=precision) if same else []:
            part = str(own.get("part")).replace("_", " ")
            rows.append((f"SQuAD inference, sequences/s, {part}", number(own["sequences_per_s"]), row["value"],
                         f"one {device}, batch 32, {precision}"))  # fmt: skip
    if rows:
        return rows, [
            "The published inference rate includes copies to the GPU and the conversion of results, not tokenising: "
            "it lies between a forward pass and end to end."
        ]
    if not found:
        return [], []
    return [], [
        f"Inference on {device or 'an unknown device'} is not comparable: the published rates are for SQuAD at "
        "length 384 and batch 32 on one A100 80GB."
    ]


def _scores(recipe: Recipe, measured: Measured) -> tuple[list[Row], list[str]]:
    rows, sentences = [], []
    for task, found in measured.scores.items():
        if task not in OFFICIAL:
            continue
        name, examples = OFFICIAL[task]
        if found.get("dataset") != name or found.get("examples") != examples:
            sentences.append(
                f"{found.get('dataset')}: not comparable, it was scored on {number(found.get('examples'))} examples "
                f"and is not the official evaluation set of {examples:,} that the published scores are for."
            )
            continue
        for metric, value in (found.get("mean") or found["scores"]).items():
            if _select(measured=task, metric=metric, statistic="mean"):
                best = _select(measured=task, metric=metric, statistic="best of 10 seeds")
                shown = f"{_mean_and_deviation(task, metric)} over 10 seeds" + (
                    f", best {best[0]['value']}" if best else ""
                )
                seeds = len(found.get("seeds") or [1])
                own = f"{number(value)} ({seeds} seed{'s' if seeds > 1 else ''})"
                rows.append((f"{name}, {metric.replace('_', ' ')} in percent", own, shown, "8 × A100 80GB, fp16"))
    return rows, sentences
