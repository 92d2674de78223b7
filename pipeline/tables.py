"""``python -m pipeline.tables``: NVIDIA's published tables with our own figures beside them, cell by cell.

Without a name it lists the tables, what has been measured of each and the command that measures it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import publish_text
from pipeline.errors import ConfigError, run_command
from pipeline.report import page
from pipeline.report.facts import gather
from pipeline.report.published import Cell, Value, cells_of, definitions, of_inference, of_run
from pipeline.run.rundir import RunDir
from pipeline.words import columns


def values_of(source: Path, recipe: str) -> list[Value]:
    """Figures of a run or of the JSON of ``bench train`` or ``bench infer``; ``recipe`` names the model that counts."""
    if source.is_dir():
        run = RunDir(source)
        return list(of_run(gather(run, held=False))) if run.settings["recipe"]["name"] == recipe else []
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
    return of_inference(row, place)


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
