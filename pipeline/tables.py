"""``python -m pipeline.tables``: NVIDIA's published tables with our own figures beside them, cell by cell.

Without a name it lists the tables, what has been measured of each and the command that measures the rest.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.publish import publish_text
from pipeline.bert.config import shape_of
from pipeline.config import load_recipe
from pipeline.errors import ConfigError, run_command
from pipeline.report import page
from pipeline.report.facts import gather
from pipeline.report.published import Cell, Value, cells_of, definitions, in_words, of_bench, of_inference, of_run
from pipeline.run.family import runs_of
from pipeline.run.files import to_write
from pipeline.words import columns, number


def values_of(source: Path, shape: Mapping[str, int]) -> list[Value]:
    """Figures of a run, of a family of runs, or of the JSON of a benchmark; of models of another shape none."""
    if source.is_dir():
        facts = [gather(run, held=False) for run in runs_of(source)]
        return [value for each in facts if shape_of(each.recipe.model) == shape for value in of_run(each)]
    try:
        figures = json.loads(source.read_text(encoding="utf-8"))
        rows, device, model = figures["rows"], figures["environment"], figures["model"]
        place = in_words(device)
        values = [value for row in rows for value in of_bench(row, place, source.name)]
        values += of_inference(rows, place, source.name)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}; name a run, a family or the JSON of a benchmark") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: neither a run nor the JSON of a benchmark ({error!r})") from None
    return values if model == shape else []


# -------------------------------------------------------------------- the command


def main() -> int:
    options = parser().parse_args()
    tables = definitions()
    if options.name and options.name not in tables:
        raise ConfigError(f"no table {options.name!r}; choose from {', '.join(tables)}")
    if options.page:
        print("\n".join(reproduce()))
        return 0
    shape = shape_of(load_recipe(options.recipe).model)
    values = [value for source in options.sources for value in values_of(source, shape)]
    names = [options.name] if options.name else list(tables)
    filled = {name: cells_of(name, values) for name in names}
    if options.csv:
        publish_text(options.csv, csv_of(filled))
    if options.html:
        publish_text(options.html, html_of(filled))
    if options.name:
        print("\n".join([tables[options.name]["title"], *for_terminal(filled[options.name]), ""]))
        print("\n".join([*remarks(filled[options.name]), *(f"measure it: {command}" for command in lacking(filled))]))
        return 0
    lines = [
        (name, tables[name]["title"], f"{sum(c.ours is not None for c in cells)} of {len(cells)}")
        for name, cells in filled.items()
    ]
    print("\n".join(columns([("table", "what", "measured"), *lines])))
    print("\n".join(("to measure the rest:", *lacking(filled)) if lacking(filled) else ()))
    return 0


def lacking(tables: Mapping[str, Sequence[Cell]]) -> list[str]:
    """The commands that measure what is still empty, each once."""
    commands: dict[str, None] = {}
    for name, cells in tables.items():
        empty = [f"{cell.line} {cell.column}" for cell in cells if cell.ours is None]
        for expression, command in definitions()[name]["measure"].items():
            if any(re.search(expression, place) for place in empty):
                commands[command] = None
    return list(commands)


def grid(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """The page's columns, and each of its lines with measured, published and ratio of every cell in words.

    The words are empty where nothing was measured or the table has no such cell.
    """
    places = {(cell.line, cell.column): cell for cell in cells}
    names, lines = list(dict.fromkeys(cell.column for cell in cells)), dict.fromkeys(cell.line for cell in cells)
    return names, [(line, [figures(places.get((line, name))) for name in names]) for line in lines]


def figures(cell: Cell | None) -> list[str]:
    rounded = ((cell.ours, 4), (cell.theirs, 5), (cell.ratio, 4)) if cell else ((None, 0),) * 3
    return ["" if figure is None else number(figure, digits) for figure, digits in rounded]


def for_terminal(cells: Sequence[Cell]) -> list[str]:
    """Three columns for each of the page's."""
    names, lines = grid(cells)
    head = ["", *(word for name in names for word in (name, "published", "ratio"))]
    rows = [[line, *(word for cell in row for word in cell)] for line, row in lines]
    return columns([head, *rows], right=range(1, len(head)))


def remarks(cells: Sequence[Cell]) -> Iterator[str]:
    """What is to be said of cells, each sentence once with the cells that it is about."""
    about: dict[str, list[str]] = {}
    for cell in cells:
        if cell.note and not cell.note.startswith("computed from"):
            about.setdefault(cell.note, []).append(f"{cell.line} {cell.column}")
    for note, places in about.items():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield f"* {', '.join(places[:3])}{more}: {note}"


def csv_of(tables: Mapping[str, Sequence[Cell]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", "line", "column", "measured", "published", "ratio", "note"))
    for name, cells in tables.items():
        writer.writerows((name, c.line, c.column, c.ours, c.theirs, c.ratio, c.note) for c in cells)
    return text.getvalue()


def html_of(tables: Mapping[str, Sequence[Cell]]) -> str:
    sections = []
    for name, cells in tables.items():
        names, lines = grid(cells)
        rows = [[line, *(in_one(*cell) for cell in row)] for line, row in lines]
        notes = [page.note(line.removeprefix("* ")) for line in remarks(cells)]
        table = page.table(["", *names], rows, numeric=range(1, len(names) + 1))
        sections.append(page.section(definitions()[name]["title"], table, *notes))
    title = page.tag("h1", "Published tables, measured again")
    how = page.note("measured / published = ratio; – where nothing was measured")
    return page.document("Published tables", page.STYLE, title, how, *sections)


def in_one(ours: str, theirs: str, ratio: str) -> str:
    """A cell's three figures together."""
    return f"{ours or '–'} / {theirs}{f' = {ratio}' if ratio else ''}" if theirs else ""


def reproduce() -> Iterator[str]:
    """docs/reproduce.md."""
    yield "# The published tables, measured again\n"
    yield "Written by `python -m pipeline.tables --page`. GPU-hours and disk are for the page's own hardware."
    yield "`python -m pipeline.tables NAME --from RUN FILE …` prints a table with what was measured.\n"
    yield "| table | what | GPU-hours | disk, GB |\n|---|---|---|---|"
    for name, table in definitions().items():
        yield f"| `{name}` | {table['title']} | {table['gpu_hours']:,} | {table['disk_gb']} |"
    for name, table in definitions().items():
        yield "\n".join((f"\n## {name}\n", "```", *table["measure"].values(), "```"))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.tables", description=__doc__)
    add = options.add_argument
    add("name", nargs="?", help="a table (default: list them all)")
    add("--from", dest="sources", type=Path, nargs="+", default=[], metavar="RUN|FILE", help="what was measured")
    add("--recipe", default="bert_large", help="whose model's figures count (default: bert_large, the page's)")
    add("--csv", type=to_write, metavar="FILE", help="write the cells there")
    add("--html", type=to_write, metavar="FILE", help="write the tables there")
    add("--page", action="store_true", help="print docs/reproduce.md")
    return options


if __name__ == "__main__":
    run_command(main)
