"""NVIDIA's published BERT results (published.csv, in the tables of published.toml) and what fits their cells.

A figure stands in a cell only where all that defines the cell is equal; where nothing was measured the cell is empty,
and its note says what came nearest and in what it differs.
"""

from __future__ import annotations

import csv
import functools
import operator
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.batch import BatchPlan
from pipeline.bert.config import shape_of
from pipeline.config import Recipe
from pipeline.report.curves import median_of
from pipeline.report.facts import Facts
from pipeline.words import is_number, number

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OFFICIAL = {"squad": ("SQuAD v1.1", 10570), "mrpc": ("MRPC", 408), "sst2": ("SST-2", 872)}  # evaluation examples
SCHEDULE = {"phase1": (128, 65536, 7038), "phase2": (512, 32768, 1563)}  # seq_len, global_batch, steps
DEFINING = ("measured", "metric", "nodes", "gpus_per_node", "precision", "seq_len", "lengths", "micro_batch",
            "accumulation")  # fmt: skip
SIXTEEN_BITS = {"bf16": "fp16"}  # both stand in the page's 16-bit column; the cell says which it was
SOFTWARE = "container pytorch:21.11-py3"  # of all that is published
SECONDS = {"hours": 3600.0}  # of a unit of time


@dataclass(frozen=True)
class Value:
    """One figure with all that defines it (`DEFINING`, as in published.csv), its source and the machine's description.

    Times are in seconds. ``seed`` tells the repetitions of a training apart.
    """

    measured: str
    metric: str
    value: float
    nodes: str = ""
    gpus_per_node: str = ""
    precision: str = ""
    seq_len: str = ""
    lengths: str = ""  # "real", or "full": padded to seq_len
    micro_batch: str = ""
    accumulation: str = ""
    seed: int | None = None
    source: str = ""
    place: str = ""

    def differs(self, row: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """What of a published row's definition is another here, as (ours, the row's); what the row leaves open is."""
        own = vars(self)
        also = {"precision": SIXTEEN_BITS.get(self.precision)}
        return {name: (own[name], row[name]) for name in DEFINING if row[name] not in ("", own[name], also.get(name))}


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


@functools.cache
def definitions() -> dict[str, dict[str, Any]]:
    """The tables by name: title, what makes lines, what is derived, command and cost."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


@functools.cache
def published() -> list[dict[str, str]]:
    """The rows of published.csv: one value each, misprints of the source corrected and told in ``note``."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------- cells


def cells_of(name: str, values: Sequence[Value]) -> list[Cell]:
    """The cells of a table, line by line, the ratios between cells last."""
    rows = {place_of(row): row for row in published() if row["table"] == name}
    measured = [cell_of(row, values) for row in rows.values() if not is_ratio(row)]
    cells = list(measured)
    for kind in definitions()[name]["derived"]:
        for above, below, place in RATIOS[kind](measured):
            ours = above.ours / below.ours if above.ours and below.ours else None
            printed = rows.get(place)
            computed = above.theirs / below.theirs if above.theirs and below.theirs else None
            note = (printed["note"] or "computed from the cells") if printed else "computed, it is not published"
            cells.append(Cell(*place, ours, float(printed["value"]) if printed else computed, note))
    return cells


def place_of(row: Mapping[str, str]) -> tuple[str, str]:
    """Line and column of a published value in its table."""
    words = {"gpus_per_node": "GPU", "nodes": "node"}
    lines = [(row[key], words.get(key)) for key in definitions()[row["table"]]["lines"]]
    line = " ".join(f"{value} {unit}{'s' * (value != '1')}" if unit else value for value, unit in lines)
    metric = "" if row["metric"] in ("throughput", "inference") else row["metric"]
    precision = "" if row["table"].startswith("stability") else row["precision"]
    return line, f"{metric} {precision}".strip()


def is_ratio(row: Mapping[str, str]) -> bool:
    """Whether a published value follows from others: a speed-up, a scaling."""
    return row["unit"] == "x"


def cell_of(row: Mapping[str, str], values: Sequence[Value]) -> Cell:
    """A published value beside what fits it."""
    theirs, (line, column) = float(row["value"]), place_of(row)
    unit = SECONDS.get(row["unit"], 1.0)
    tried = [chosen_of(row["statistic"], alike) for alike in fitting(row, values)] or [([], "")]
    chosen, remark = next((each for each in tried if each[0]), tried[0])
    if not chosen:
        return Cell(line, column, None, theirs, notes(row["note"], remark or nearest(row, values)))
    figures = [value.value / unit for value in chosen]
    match row["statistic"].split()[0]:
        case "mean":
            ours = statistics.fmean(figures)
        case "deviation":
            ours = statistics.stdev(figures)
        case "best":
            ours = min(figures) if row["metric"] == "final_loss" else max(figures)
        case _:
            ours = statistics.median(figures)
    on = {value.place for value in chosen}
    own = {value.precision for value in chosen} & set(SIXTEEN_BITS)
    where = f"{row['hardware'] or 'machine not stated'}, {SOFTWARE}"
    return Cell(line, column, ours, theirs, notes(*own, remark, *sorted(on), f"published: {where}", row["note"]))


def fitting(row: Mapping[str, str], values: Sequence[Value]) -> list[dict[int | None, Value]]:
    """What fits a row by seed, of one seed the last; apart what differs where the row is open, the last first."""
    groups: dict[object, dict[int | None, Value]] = {}
    for value in values:
        if not value.differs(row):
            kind = operator.attrgetter(*DEFINING)(value)
            groups[kind] = groups.pop(kind, {}) | {value.seed: value}
    return list(reversed(groups.values()))


def chosen_of(statistic: str, alike: Mapping[int | None, Value]) -> tuple[list[Value], str]:
    """Those of the figures that make a ``statistic``, and what is to be said of them; none where some are missing.

    ``seed 3`` is that seed, ``mean of 10 seeds`` takes the first ten, ``single run`` the source that came last, the
    median of its seeds where it has several.
    """
    seeds = sorted(seed for seed in alike if seed is not None)
    word, _, rest = statistic.partition(" ")
    if word == "seed":
        return [alike[seed] for seed in seeds if seed == int(rest)], ""
    if statistic == "single run":
        last = [value for value in alike.values() if value.source == list(alike.values())[-1].source]
        return last, f"median of {len(last)} seeds" if len(last) > 1 else ""
    needed = int(rest.split()[1])
    if len(seeds) < needed:
        return [], f"{len(seeds)} of {needed} seeds" if seeds else ""
    return [alike[seed] for seed in seeds[:needed]], statistic


def nearest(row: Mapping[str, str], values: Sequence[Value]) -> str:
    """What was measured of the same and differs least, and how."""
    same = [value for value in values if (value.measured, value.metric) == (row["measured"], row["metric"])]
    if not same:
        return ""
    closest = min(same, key=lambda value: len(value.differs(row)))
    how = ", ".join(f"{name} {ours or 'unknown'} for {theirs}" for name, (ours, theirs) in closest.differs(row).items())
    value = number(closest.value / SECONDS.get(row["unit"], 1.0))
    return f"{closest.source} has {value}{f' with {how}' if how else ''}"


def notes(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def speed_ups(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell, tuple[str, str]]]:
    """fp16 over the other precision of the line; of times the other way round."""
    for cell in cells:
        rest = cell.column.removesuffix("fp16")
        if rest != cell.column and rest in ("", "time_to_train "):
            other = next(c for c in cells if c.line == cell.line and c is not cell and c.column[:-4] == rest)
            yield *((other, cell) if rest else (cell, other)), (cell.line, f"speed-up {cell.column}")


def scalings(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell, tuple[str, str]]]:
    """A line over the one on fewest GPUs, of the same phase or task and the same reading of the page."""
    firsts: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        measured, _, _, *reading = cell.line.split(" ", 3)
        first = firsts.setdefault((" ".join([measured, *reading]), cell.column), cell)
        yield cell, first, (cell.line, f"scaling {cell.column}")


RATIOS = {"speed-up": speed_ups, "scaling": scalings}


# -------------------------------------------------------------------- what a run has measured


def of_run(facts: Facts) -> Iterator[Value]:
    """Batches, loss, time and throughput of pretraining; scores, time and throughput of the tasks, seed by seed.

    Each by the ranks that really ran. Time to train is that of the steps which count, waiting for their data included:
    neither start-up nor evaluation nor checkpoints.
    """
    finished: list[Value] = []
    for phase in facts.phases:
        machine = machine_of(facts, phase.name)
        config = phase.config
        if machine is None or config.micro_batch is None:
            continue
        batch = Value(
            phase.name,
            "global_batch",
            config.global_batch,
            precision=facts.recipe.train.precision,
            seq_len=str(config.seq_len),
            seed=facts.recipe.train.seed,
        )
        batch = on(batch, facts, phase.name, machine, config.micro_batch)
        yield batch
        if is_number(rate := phase.median("sequences_per_s")):
            yield replace(batch, metric="throughput", value=rate, lengths="real")
        equal = (config.seq_len, config.global_batch, config.steps) == SCHEDULE.get(phase.name) and not config.start
        if equal and phase.last("step") == config.steps:
            finished.append(batch)
    # All phases as the page has them: its whole training, loss and time.
    if len(finished) == len(SCHEDULE) == len(facts.phases):
        loss, took = facts.phases[-1].last("loss"), [facts.training_s(phase.name) for phase in facts.phases]
        by_phase: dict[str, Any] = {  # as 128+512; once what is the same in both
            name: "+".join(dict.fromkeys(getattr(each, name) for each in finished))
            for name in ("seq_len", "nodes", "gpus_per_node", "micro_batch", "accumulation")
        }
        whole = replace(batch, measured="pretraining", **by_phase)
        if is_number(loss):
            yield replace(whole, metric="final_loss", value=loss)
        if all(took):
            yield replace(whole, metric="time_to_train", value=sum(filter(None, took)))
    for task, record in facts.scores.items():
        if (record.get("dataset"), record.get("examples")) == OFFICIAL.get(task):
            yield from of_task(task, record, facts)
    inference = facts.results.get("inference") or {}
    yield from of_inference(inference.get("rows"), str(inference.get("device")), facts.name)


def on(value: Value, facts: Facts, stage: str, machine: tuple[int, int, int], micro_batch: int) -> Value:
    """A whole batch with how it was shared on the nodes, GPUs and ranks of ``machine``."""
    nodes, gpus, ranks = machine
    plan = BatchPlan(int(value.value), micro_batch, ranks)
    return replace(
        value,
        nodes=str(nodes),
        gpus_per_node=str(gpus),
        micro_batch=str(plan.micro_batch),
        accumulation=str(plan.accumulation),
        source=facts.name,
        place=notes(facts.name, in_words(facts.made.get(stage, {}))),
    )


def in_words(machine: Mapping[str, Any]) -> str:
    """Device and versions of what measured: ``NVIDIA H100, torch 2.9, cuda 13.0``."""
    known = {key: str(machine[key]) for key in ("device", "torch", "cuda", "driver") if machine.get(key)}
    return ", ".join(value if key == "device" else f"{key} {value}" for key, value in known.items())


def of_task(task: str, record: Mapping[str, Any], facts: Facts) -> Iterator[Value]:
    """A task's scores, time and throughput, each seed by itself."""
    micro_batch, batch = int(record.get("micro_batch") or 0), int(record.get("batch") or 0)
    for each in record.get("seeds") or []:
        seed, scores = each.get("seed"), each.get("scores") or {}
        name = f"{task}-{seed}" if f"{task}-{seed}" in facts.chain.stages else task
        machine = machine_of(facts, name)
        if machine is None or not micro_batch or not batch:
            continue
        known = Value(task, "", batch, precision=str(record.get("precision")), seq_len=str(record.get("max_seq_len")))
        known = on(replace(known, seed=seed), facts, name, machine, micro_batch)
        for metric, value in {**scores, "time_to_train": facts.training_s(name)}.items():
            if is_number(value) and value > 0:
                yield replace(known, metric=metric, value=value)
        if is_number(rate := median_of(facts.tuning.get(task, {}).get(name, []), "sequences_per_s")):
            yield replace(known, metric="throughput", value=rate, lengths="real")


def of_inference(rows: object, place: str, source: str) -> Iterator[Value]:
    """The inference benchmark's rows of the kind that is published: from tokens to logits, every sequence full."""
    for row in rows if isinstance(rows, list) else ():
        kind = isinstance(row, Mapping) and (row.get("engine"), row.get("part")) == ("pipeline", "forward")
        if kind and is_number(rate := row.get("sequences_per_s")):
            yield Value(str(row.get("task")), "inference", rate, nodes="1", gpus_per_node="1",
                        precision=str(row.get("precision")), seq_len=str(row.get("seq_len")),
                        lengths=str(row.get("lengths")), micro_batch=str(row.get("batch")), place=place,
                        source=source)  # fmt: skip


def of_bench(row: Mapping[str, Any], place: str, source: str) -> Iterator[Value]:
    """A row of ``bench train``, ``bench finetune`` or ``bench scaling``."""
    if row.get("variant") == "ours" and row.get("mode", "train") == "train" and is_number(row.get("sequences_per_s")):
        invented = "lengths invented, distributed as real ones" if row.get("lengths") == "invented" else ""
        yield Value(
            str(row.get("task") or row.get("phase")),
            "throughput",
            row["sequences_per_s"],
            nodes=str(row.get("nodes", 1)),
            gpus_per_node=str(row["gpus"]),
            precision=str(row["precision"]),
            seq_len=str(row["seq_len"]),
            lengths="full" if row.get("lengths") == "full" else "real",
            micro_batch=str(row["micro_batch"]),
            accumulation=str(row["accumulation"]),
            source=source,
            place=notes(place, invented),
        )


def machine_of(facts: Facts, stage: str) -> tuple[int, int, int] | None:
    """Nodes, GPUs of each and ranks that a stage ran on; None where it ran on different ones."""
    worlds = facts.worlds(stage)
    if len(worlds) != 1:
        return None
    ranks = worlds[0]
    each = facts.profile.gpus_per_node or ranks
    return max(1, ranks // each), min(ranks, each), ranks


def other_model(recipe: Recipe) -> str:
    model = recipe.model
    if shape_of(model) == BASE:
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
