"""NVIDIA's published BERT results (published.csv, in the tables of published.toml) and what fits their cells.

A figure stands in a cell only where all that defines the cell is equal; where nothing was measured the cell is empty.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batch import BatchPlan
from pipeline.config import ModelConfig, Recipe
from pipeline.report.facts import Facts
from pipeline.words import is_number

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OFFICIAL = {"squad": ("SQuAD v1.1", 10570), "mrpc": ("MRPC", 408), "sst2": ("SST-2", 872)}  # evaluation examples
SCHEDULE = {"phase1": (128, 65536, 7038), "phase2": (512, 32768, 1563)}  # seq_len, global_batch, steps
DEFINING = ("measured", "metric", "statistic", "nodes", "gpus_per_node", "precision", "micro_batch", "accumulation")
RATIOS = {"speedup": "speed-up", "scaling": "scaling"}


SIXTEEN_BITS = {"bf16": "fp16"}  # both stand in the page's 16-bit column; the cell says which it was


@dataclass(frozen=True)
class Value:
    """One figure with all that defines it (`DEFINING`, as in published.csv) and what it was measured on."""

    measured: str
    metric: str
    value: float
    statistic: str = "single run"
    nodes: str = ""
    gpus_per_node: str = ""
    precision: str = ""
    micro_batch: str = ""
    accumulation: str = ""
    place: str = ""

    def fits(self, row: Mapping[str, str]) -> bool:
        """Whether this is what a published row says; what the row leaves open is open."""
        own = {**vars(self), "precision": SIXTEEN_BITS.get(self.precision, self.precision)}
        return all(row[name] in ("", own[name]) or _best(name, row) for name in DEFINING)


def _best(name: str, row: Mapping[str, str]) -> bool:
    """A single run of ours stands beside the best of several, which is said in the cell."""
    return name == "statistic" and row[name].startswith("best of")


@dataclass(frozen=True)
class Cell:
    """``ours`` and ``theirs``, or a ratio of two cells of either."""

    line: str
    column: str
    ours: float | None
    theirs: float | None
    note: str

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.ours is not None and self.theirs else None


def definitions() -> dict[str, dict[str, Any]]:
    """The tables by name: title, what makes lines and columns, what is derived, command and cost."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


def cells_of(name: str, values: Sequence[Value]) -> list[Cell]:
    """The cells of a table, line by line, the derived ones last."""
    table = definitions()[name]
    cells = []
    for row in published():
        if row["table"] == name:
            found = found_for(row, values)
            notes = [row["hardware"] or "machine not stated", found.place if found else ""]
            notes += [row["statistic"] if row["statistic"].startswith("best") else ""]
            notes += [found.precision if found and found.precision in SIXTEEN_BITS else ""]
            line = " ".join(_told(key, row[key]) for key in table["lines"])
            column = " ".join(row[key] for key in table["columns"])
            cells.append(Cell(line, column, found.value if found else None, float(row["value"]), _notes(notes)))
    return [*cells, *(cell for kind in table["derived"] for cell in derived(kind, cells))]


def found_for(row: Mapping[str, str], values: Sequence[Value]) -> Value | None:
    """The last of ``values`` that is what a row says; mean and deviation also of several runs of one seed each."""
    own = [value for value in values if value.fits(row)]
    if own or row["statistic"] not in SPREAD:
        return own[-1] if own else None
    singles = [value for value in values if value.fits({**row, "statistic": "single run"})]
    if len(singles) < 2:
        return None
    value = SPREAD[row["statistic"]]([each.value for each in singles])
    return dataclasses.replace(singles[0], value=value, place=f"{len(singles)} runs")


SPREAD: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "deviation": statistics.stdev}


def _told(key: str, value: str) -> str:
    unit = {"gpus_per_node": "GPU", "nodes": "node"}.get(key)
    return f"{value} {unit}{'s' * (value != '1')}" if unit else value


def _notes(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def derived(kind: str, cells: Sequence[Cell]) -> Iterator[Cell]:
    """``speedup``: fp16 over the other precision of a line (times the other way round); ``scaling``: over the first
    line of the same phase."""
    for cell in cells:
        if kind == "speedup" and cell.column.endswith("fp16"):
            rest = cell.column.removesuffix("fp16")
            other = next(c for c in cells if c.line == cell.line and c is not cell and c.column.startswith(rest)
                         and not c.column.endswith("fp16"))  # fmt: skip
            above, below = (other, cell) if "time" in cell.column else (cell, other)
        elif kind == "scaling":
            same = (cell.column, cell.line.split()[0])
            above, below = cell, next(c for c in cells if (c.column, c.line.split()[0]) == same)
        else:
            continue
        ours = above.ours / below.ours if above.ours and below.ours else None
        theirs = above.theirs / below.theirs if above.theirs and below.theirs else None
        if kind == "scaling" or "accuracy" not in cell.column:
            yield Cell(cell.line, f"{RATIOS[kind]} {cell.column}", ours, theirs, "computed from the cells")


def published() -> list[dict[str, str]]:
    """The rows of published.csv: one value each, misprints of the source corrected."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------- what a run has measured


def of_run(facts: Facts) -> Iterator[Value]:
    """Loss, hours and throughput of pretraining; scores and throughput of the tasks, by the ranks that really ran."""
    versions = facts.settings.get("versions") or {}
    place = _notes([facts.name, f"torch {versions['torch']}" if versions.get("torch") else ""])
    finished, hours = [], 0.0
    for phase in facts.phases:
        machine = machine_of(facts, phase.name)
        config = phase.config
        finished.append(phase.last("step") == config.steps and machine is not None)
        if machine is None or config.micro_batch is None:
            continue
        ranks, where = machine
        plan = BatchPlan(config.global_batch, config.micro_batch, ranks)
        shape = {"micro_batch": str(plan.micro_batch), "accumulation": str(plan.accumulation)}
        precision = facts.recipe.train.precision
        equal = SCHEDULE.get(phase.name, (0, 0, 0))
        finished[-1] &= (config.seq_len, config.global_batch, config.steps) == equal and not config.start
        if config.seq_len == equal[0] and is_number(rate := facts.throughput.get(phase.name)):
            yield Value(phase.name, "throughput", rate, precision=precision, place=place, **where, **shape)
        if facts.account and phase.name in facts.account.stages:
            hours += facts.account.stages[phase.name].allocated_s / 3600
        if len(finished) == len(SCHEDULE) == len(facts.phases) and all(finished):
            common = {"precision": precision, "place": place, **where}
            if is_number(loss := phase.last("loss")):
                yield Value("pretraining", "final_loss", loss, **common)
            yield Value("pretraining", "time_to_train", hours, **common)
    for task, record in facts.scores.items():
        official = (record.get("dataset"), record.get("examples")) == OFFICIAL.get(task)
        if official and (machine := machine_of(facts, task)) is not None:
            yield from _of_task(task, record, machine, facts, place)
    inference = facts.results.get("inference") or {}
    rows = inference.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and (value := of_inference(row, str(inference.get("device")))) is not None:
            yield value


INFERENCE = {"task": "squad", "seq_len": 384, "batch": 32, "engine": "pipeline", "part": "end_to_end"}


def of_inference(row: Mapping[str, Any], place: str) -> Value | None:
    """A row of the inference benchmark, if it is what was published."""
    if INFERENCE.items() <= row.items() and is_number(rate := row.get("sequences_per_s")):
        return Value("squad", "inference", rate, nodes="1", gpus_per_node="1", precision=str(row.get("precision")),
                     micro_batch="32", place=place)  # fmt: skip
    return None


def _of_task(
    task: str, record: Mapping[str, Any], machine: tuple[int, dict[str, str]], facts: Facts, place: str
) -> Iterator[Value]:
    ranks, where = machine
    micro_batch, batch = int(record.get("micro_batch") or 0), int(record.get("batch") or 0)
    if not micro_batch or not batch:
        return
    plan = BatchPlan(batch, micro_batch, ranks)
    common = {"precision": str(record.get("precision")), "micro_batch": str(plan.micro_batch),
              "accumulation": str(plan.accumulation), "place": place, **where}  # fmt: skip
    several = len(record.get("seeds") or []) > 1
    for statistic, scores in (("mean", record.get("mean")), ("deviation", record.get("deviation"))) if several else (
        ("single run", record.get("scores")),):  # fmt: skip
        for metric, value in (scores or {}).items():
            if is_number(value):
                yield Value(task, metric, value, statistic, **common)
    if is_number(rate := facts.throughput.get(task)):
        yield Value(task, "throughput", rate, **common)


def machine_of(facts: Facts, stage: str) -> tuple[int, dict[str, str]] | None:
    """Ranks that a stage ran on, and as nodes and GPUs of each; None where it ran on different ones."""
    worlds = {event.get("world_size") for event in facts.events
              if event.get("event") == "started" and event.get("stage") == stage}  # fmt: skip
    if len(worlds) != 1 or not isinstance(ranks := worlds.pop(), int) or ranks < 1:
        return None
    each = facts.profile.gpus_per_node or ranks
    return ranks, {"nodes": str(max(1, ranks // each)), "gpus_per_node": str(min(ranks, each))}


def has_shape(model: ModelConfig, shape: Mapping[str, int]) -> bool:
    return all(getattr(model, key) == value for key, value in shape.items())


def other_model(recipe: Recipe) -> str:
    model = recipe.model
    if has_shape(model, BASE):
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
