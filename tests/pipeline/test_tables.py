"""Published tables: every value is found by exactly what defines it, and by nothing else."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from pipeline.report.published import DEFINING, Value, cells_of, definitions, found_for, published
from pipeline.tables import values_of
from support.running import ROOT, call

ROWS = published()


def of(row: dict[str, str], factor: float = 1.0) -> Value:
    """A figure with a row's definition; what the row leaves open is left open."""
    told = {name: row[name] for name in DEFINING}
    told["statistic"] = "single run" if told["statistic"].startswith("best") else told["statistic"]
    return Value(**told, value=factor * float(row["value"]), place="GPU, torch")


def test_every_table_is_defined_and_every_value_stands_in_one():
    assert len(definitions()) == 14
    assert {row["table"] for row in ROWS} == set(definitions())


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['table']}-{number}" for number, row in enumerate(ROWS)])
def test_a_value_is_found_by_its_definition_and_by_no_other(row):
    value = of(row)
    assert found_for(row, [value]) == value
    for name in DEFINING:
        if row[name] and not (name == "statistic" and row[name].startswith("best")):
            assert found_for(row, [dataclasses.replace(value, **{name: "another"})]) is None


@pytest.mark.parametrize("name", definitions())
def test_figures_fill_every_cell_with_their_ratios(name):
    empty = cells_of(name, [])
    assert empty
    assert all(cell.ours is None and cell.ratio is None and cell.theirs is not None for cell in empty)
    own = [of(row, 2.0) for row in ROWS if row["table"] == name]
    for cell in cells_of(name, own):
        derived = cell.note.startswith("computed")
        assert cell.ratio == pytest.approx(1.0 if derived else 2.0)
        assert derived or "GPU, torch" in cell.note


def test_seeds_that_are_runs_of_their_own_have_mean_and_deviation():
    losses = [1.26, 1.265, 1.304]
    runs = [Value("pretraining", "final_loss", loss, place=f"seed-{n}") for n, loss in enumerate(losses)]
    cells = {cell.column: cell.ours for cell in cells_of("stability-pretraining", runs)}
    assert cells["final_loss mean"] == pytest.approx(statistics.fmean(losses))
    assert cells["final_loss deviation"] == pytest.approx(statistics.stdev(losses))


def test_the_bench_fills_its_cells_and_only_those_of_the_model(tmp_path: Path):
    row = {"variant": "ours", "phase": "phase1", "precision": "fp16", "gpus": 8, "micro_batch": 256, "accumulation": 32}
    figures = {"rows": [{**row, "sequences_per_s": 9000.0, "recipe": "bert_large"}], "environment": {"device": "H100"}}
    file = tmp_path / "train.json"
    file.write_text(json.dumps(figures))
    assert values_of(file, "tiny") == []
    outputs = ("--csv", tmp_path / "t.csv", "--html", tmp_path / "t.html")
    done = call("tables", "pretraining-a100", "--from", file, *outputs)
    assert done.returncode == 0, done.stderr
    assert "9,000     4,591      1.96" in done.stdout
    with open(tmp_path / "t.csv", newline="") as text:
        measured = [line for line in csv.DictReader(text) if line["measured"]]
    assert [(line["line"], line["column"]) for line in measured] == [("phase1 8 GPUs", "fp16")]
    assert "H100" in measured[0]["note"]
    assert "<td" in (tmp_path / "t.html").read_text()
    wrong = call("tables", "--from", tmp_path / "t.csv")
    assert wrong.returncode == 2
    assert "neither a run nor the JSON" in wrong.stderr
    assert "choose from" in call("tables", "nonsense").stderr


def test_the_page_of_commands_is_current():
    done = call("tables", "--page")
    assert done.stdout == (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
