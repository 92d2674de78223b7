"""``python -m pipeline.tables``: NVIDIA's published tables with our own figures beside them, cell by cell.

Without a name it lists the tables, what has been measured of each and the command that measures it. A figure stands in
a cell only where all that defines the cell is equal; where nothing was measured the cell is empty.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import statistics
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.publish import publish_text
from pipeline.batch import BatchPlan
from pipeline.errors import ConfigError, run_command
from pipeline.report import page
from pipeline.report.facts import Facts, gather
from pipeline.report.published import published
from pipeline.run.rundir import RunDir
from pipeline.words import columns, is_number

DEFINING = ("measured", "metric", "statistic", "nodes", "gpus_per_node", "precision", "micro_batch", "accumulation")
INFERENCE = {"task": "squad", "seq_len": 384, "batch": 32, "engine": "pipeline", "part": "end_to_end"}
RATIOS = {"speedup": "speed-up", "scaling": "scaling"}


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
        return all(row[name] in ("", getattr(self, name)) or _best(name, row) for name in DEFINING)


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
    return tomllib.loads(Path(__file__).with_name("tables.toml").read_text(encoding="utf-8"))


def cells_of(name: str, values: Sequence[Value]) -> list[Cell]:
    """The cells of a table, line by line, the derived ones last."""
    table = definitions()[name]
    cells = []
    for row in published():
        if row["table"] == name:
            found = found_for(row, values)
            notes = [row["hardware"] or "machine not stated", found.place if found else ""]
            notes += [row["statistic"] if row["statistic"].startswith("best") else ""]
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


# -------------------------------------------------------------------- what was measured


def values_of(source: Path, recipe: str) -> list[Value]:
    """Figures of a run or of the JSON of ``bench train`` or ``bench infer``; ``recipe`` names the model that counts."""
    if source.is_dir():
        run = RunDir(source)
        return list(_of_run(gather(run, held=False))) if run.settings["recipe"]["name"] == recipe else []
    try:
        figures = json.loads(source.read_text(encoding="utf-8"))
        rows, device = figures["rows"], figures.get("environment", figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{source}: neither a run nor the JSON of bench train or bench infer ({error})") from None
    place = ", ".join(str(device[key]) for key in ("device", "torch", "cuda", "driver") if device.get(key))
    return [value for row in rows if (value := _of_row(row, recipe, place)) is not None]


def _of_row(row: Mapping[str, Any], recipe: str, place: str) -> Value | None:
    if row.get("variant") == "ours" and row.get("recipe") == recipe:
        return Value(row["phase"], "throughput", row["sequences_per_s"], nodes="1", gpus_per_node=str(row["gpus"]),
                     precision=row["precision"], micro_batch=str(row["micro_batch"]),
                     accumulation=str(row["accumulation"]), place=place)  # fmt: skip
    if INFERENCE.items() <= row.items():
        return Value("squad", "inference", row["sequences_per_s"], nodes="1", gpus_per_node="1",
                     precision=row["precision"], micro_batch="32", place=place)  # fmt: skip
    return None


def _of_run(facts: Facts) -> Iterator[Value]:
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
        if is_number(rate := facts.throughput.get(phase.name)):
            yield Value(phase.name, "throughput", rate, precision=precision, place=place, **where, **shape)
        if facts.account and phase.name in facts.account.stages:
            hours += facts.account.stages[phase.name].allocated_s / 3600
        if phase is facts.phases[-1] and all(finished):
            common = {"precision": precision, "place": place, **where}
            if is_number(loss := phase.last("loss")):
                yield Value("pretraining", "final_loss", loss, **common)
            yield Value("pretraining", "time_to_train", hours, **common)
    for task, record in facts.scores.items():
        if (machine := machine_of(facts, task)) is not None:
            yield from _of_task(task, record, machine, facts, place)


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


# -------------------------------------------------------------------- the command


def main() -> int:
    options = parser().parse_args()
    tables = definitions()
    if options.name and options.name not in tables:
        raise ConfigError(f"no table {options.name!r}; choose from {', '.join(tables)}")
    if options.page:
        print("\n".join(reproduce()))
        return 0
    values = [value for source in options.sources for value in values_of(source, options.recipe)]
    names = [options.name] if options.name else list(tables)
    found = {name: cells_of(name, values) for name in names}
    if options.csv:
        publish_text(options.csv, csv_of(found))
    if options.html:
        publish_text(options.html, html_of(found))
    if options.name:
        print("\n".join([tables[options.name]["title"], *columns([HEAD, *map(shown, found[options.name])])]))
        notes = dict.fromkeys(cell.note for cell in found[options.name])
        print("\n".join([*(f"* {note}" for note in notes), f"measure it: {tables[options.name]['command']}"]))
        return 0
    lines = [
        (name, tables[name]["title"], f"{sum(c.ours is not None for c in cells)} of {len(cells)}")
        for name, cells in found.items()
    ]
    print("\n".join(columns([("table", "what", "measured"), *lines])))
    print("\n".join(f"{name}: {tables[name]['command']}" for name in tables))
    return 0


HEAD = ("line", "column", "measured", "published", "ratio")


def shown(cell: Cell) -> list[str]:
    """A cell as words of a line; empty where nothing was measured."""
    figures = (cell.ours, cell.theirs, cell.ratio)
    return [cell.line, cell.column, *("" if value is None else f"{value:,.4g}" for value in figures)]


def csv_of(found: Mapping[str, Sequence[Cell]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", *HEAD, "note"))
    for name, cells in found.items():
        writer.writerows((name, c.line, c.column, c.ours, c.theirs, c.ratio, c.note) for c in cells)
    return text.getvalue()


def html_of(found: Mapping[str, Sequence[Cell]]) -> str:
    titles = definitions()
    sections = []
    for name, cells in found.items():
        table = page.table((*HEAD, "on"), [[*shown(cell), cell.note] for cell in cells], numeric=(2, 3, 4))
        sections.append(page.section(titles[name]["title"], table))
    return page.document("Published tables", page.STYLE, page.tag("h1", "Published tables, measured again"), *sections)


def reproduce() -> Iterator[str]:
    """docs/reproduce.md."""
    yield "# The published tables, measured again\n"
    yield "Written by `python -m pipeline.tables --page`. GPU-hours and disk are for the page's own hardware."
    yield "`python -m pipeline.tables NAME --from RUN FILE …` prints a table with what was measured.\n"
    yield "| table | what | GPU-hours | disk, GB |\n|---|---|---|---|"
    for name, table in definitions().items():
        yield f"| `{name}` | {table['title']} | {table['gpu_hours']:,} | {table['disk_gb']} |"
    for name, table in definitions().items():
        yield f"\n## {name}\n\n```\n{table['command']}\n```"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.tables", description=__doc__)
    add = options.add_argument
    add("name", nargs="?", help="a table (default: list them all)")
    add("--from", dest="sources", type=Path, nargs="+", default=[], metavar="RUN|FILE", help="what was measured")
    add("--recipe", default="bert_large", help="whose figures count (default: bert_large, the page's model)")
    add("--csv", type=Path, metavar="FILE", help="write the cells there")
    add("--html", type=Path, metavar="FILE", help="write the tables there")
    add("--page", action="store_true", help="print docs/reproduce.md")
    return options


if __name__ == "__main__":
    run_command(main)
