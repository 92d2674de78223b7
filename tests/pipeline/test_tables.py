"""Published tables: every value is found by exactly what defines it, and by nothing else."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import shlex
import statistics
from pathlib import Path

import pytest

from pipeline.bert.config import LARGE, shape_of
from pipeline.config import load_recipe
from pipeline.report.published import (
    DEFINING,
    OFFICIAL,
    SECONDS,
    Value,
    cells_of,
    definitions,
    is_ratio,
    place_of,
    published,
)
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir
from pipeline.tables import values_of
from support.reporting import begin, finish, start, train
from support.running import ROOT, call

ROWS = published()
MEASURED = [row for row in ROWS if not is_ratio(row)]


def seeds_of(row: dict[str, str]) -> list[int]:
    """The seeds whose figures a row's statistic is made of."""
    word, *rest = row["statistic"].split()
    return [int(rest[0])] if word == "seed" else list(range(int(rest[1]))) if rest[0] == "of" else [7]


def values_for(row: dict[str, str], factor: float = 1.0, **changes: str) -> list[Value]:
    """Figures with a row's definition, a seed each, whose every statistic but the deviation is the row's value."""
    told = {name: row[name] for name in DEFINING} | changes
    value = factor * float(row["value"]) * SECONDS.get(row["unit"], 1.0)
    return [Value(**told, value=value, seed=seed, source="run", place="GPU, torch") for seed in seeds_of(row)]


def cell_at(row: dict[str, str], values: list[Value]):
    return next(cell for cell in cells_of(row["table"], values) if (cell.line, cell.column) == place_of(row))


def test_every_table_is_defined_and_every_value_stands_in_one():
    assert len(definitions()) == 14
    assert {row["table"] for row in ROWS} == set(definitions())
    assert sum(row["reading"] != "DGX-1 recipe" for row in ROWS) == 204  # the second reading tells the same values
    places = [(row["table"], *place_of(row)) for row in ROWS]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("row", MEASURED, ids=["-".join((row["table"], *place_of(row))) for row in MEASURED])
def test_a_value_is_found_by_its_definition_and_by_no_other(row):
    found = cell_at(row, values_for(row, 2.0)).ours
    assert found == pytest.approx(0.0 if row["statistic"].startswith("deviation") else 2.0 * float(row["value"]))
    for name in filter(row.get, DEFINING):
        cell = cell_at(row, values_for(row, **{name: "another"}))
        assert cell.ours is None
        assert f"{name} another for {row[name]}" in cell.note or name in ("measured", "metric")
    for missing in range(len(seeds_of(row))):
        values = values_for(row)
        del values[missing]
        assert cell_at(row, values).ours is None


@pytest.mark.parametrize("name", definitions())
def test_ratios_between_cells_are_those_that_are_published(name):
    cells = cells_of(name, [])
    assert {place_of(row) for row in ROWS if row["table"] == name} <= {(cell.line, cell.column) for cell in cells}
    assert all(cell.ours is None and cell.ratio is None and cell.theirs is not None for cell in cells)
    values = [value for row in MEASURED if row["table"] == name for value in values_for(row, 2.0)]
    ratios = [cell for cell in cells_of(name, values) if cell.column.startswith(("speed-up", "scaling"))]
    assert len(ratios) >= sum(is_ratio(row) for row in ROWS if row["table"] == name)
    for cell in ratios:
        assert cell.ratio == pytest.approx(1.0, rel=6e-3)  # the page rounds and cuts


def test_seeds_have_their_statistics_each_once_and_the_best_is_the_best():
    row = next(row for row in MEASURED if row["table"] == "stability-pretraining")
    losses = [1.26, 1.265, 1.304, 1.256, 1.242]
    runs = [dataclasses.replace(values_for(row)[0], seed=seed, value=loss) for seed, loss in enumerate(losses)]
    cells = {cell.line: cell.ours for cell in cells_of("stability-pretraining", [*runs, runs[0]])}
    assert cells["mean of 5 seeds"] == pytest.approx(statistics.fmean(losses))
    assert cells["deviation of 5 seeds"] == pytest.approx(statistics.stdev(losses))
    best = next(row for row in MEASURED if row["table"] == "accuracy-mrpc" and row["statistic"] == "best of 10 seeds")
    scores = [dataclasses.replace(value, value=80.0 + value.seed % 7) for value in values_for(best)]
    assert cell_at(best, scores).ours == 86.0


def test_seeds_of_other_precisions_are_not_mixed():
    """The page leaves the precision of its five seeds open; ours are still five of one kind."""
    row = next(
        row for row in MEASURED if row["table"] == "stability-pretraining" and row["statistic"].startswith("mean")
    )
    runs = [dataclasses.replace(value, precision="fp16", value=1.0) for value in values_for(row)]
    other = [dataclasses.replace(value, precision="tf32", value=3.0) for value in values_for(row)]
    assert cell_at(row, [*runs, *other]).ours == 3.0
    assert cell_at(row, [*runs, other[0]]).ours == 1.0
    assert cell_at(row, [*runs[:4], other[4]]).ours is None


def test_a_time_of_several_seeds_is_their_median_and_the_last_run_counts():
    row = next(row for row in MEASURED if row["table"] == "accuracy-squad" and row["metric"] == "time_to_train")
    value = values_for(row)[0]
    own = [dataclasses.replace(value, seed=seed, value=3600.0 * seed, source="new") for seed in (1, 2, 4)]
    cell = cell_at(row, [dataclasses.replace(value, seed=9), *own])
    assert cell.ours == 2.0
    assert "median of 3 seeds" in cell.note


def test_sixteen_bits_share_a_column_and_are_told_apart():
    row = next(row for row in MEASURED if row["table"] == "inference-a100" and row["precision"] == "fp16")
    assert cell_at(row, values_for(row, precision="bf16")).note.startswith("bf16; ")
    assert not cell_at(row, values_for(row)).note.startswith("bf16")


# -------------------------------------------------------------------- what runs and benchmarks hold


def bench(path: Path, rows: list[dict[str, object]], **model: int) -> Path:
    place = {"device": "H100", "torch": "2.13", "cuda": "13.0", "driver": "580"}
    path.write_text(json.dumps({"rows": rows, "environment": place, "model": {**LARGE, **model}}))
    return path


def throughputs(*tables: str) -> list[dict[str, object]]:
    """The rows that the benchmarks would write on the page's machine."""
    rows: list[dict[str, object]] = []
    for row in MEASURED:
        if row["table"] in tables:
            told = {key: row[key] for key in ("precision", "seq_len", "lengths", "micro_batch", "accumulation")}
            if row["metric"] == "inference":
                told |= {"task": row["measured"], "batch": row["micro_batch"], "engine": "pipeline", "part": "forward"}
            else:
                kind = "task" if row["measured"] == "squad" else "phase"
                told |= {kind: row["measured"], "variant": "ours", "nodes": row["nodes"], "gpus": row["gpus_per_node"]}
            rows.append({**told, "sequences_per_s": 2.0 * float(row["value"])})
    return rows


def published_run(path: Path, precision: str, seeds: dict[str, list[int]], seed: int = 0) -> Path:
    """A run of the page's recipe on its 32 nodes, with a machine-readable trace of everything that it measured."""
    micro_batches = {"fp16": (256, 32), "tf32": (128, 16)}[precision]
    settings = [f"train.precision={precision}", f"train.seed={seed}"]
    settings += [f"phase{n}.micro_batch={micro_batch}" for n, micro_batch in enumerate(micro_batches, 1)]
    for task, micro_batch in {"squad": 32, "mrpc": 16, "sst2": 128}.items():
        settings += [f"{task}.precision={precision}", f"{task}.micro_batch={micro_batch}"]
        settings += [f"{task}.seeds={seeds[task]}"] if task in seeds else []
    chain = begin(path, "bert_large", "dgx_a100_80g", *settings)
    for phase, steps in {"phase1": 7038, "phase2": 1563}.items():
        train(start(chain, phase, 256), phase, steps - 20, steps, None, steps)
        finish(chain, phase, {"step": steps})
    for task, own in seeds.items():
        for name in [f"{task}-{each}" for each in own] if len(own) > 1 else [task]:
            train(start(chain, name, 8), name, 1, 10, None, 10)
            finish(chain, name, {})
        scores = {"accuracy": 88.0} if task != "squad" else {"exact_match": 84.0, "f1": 91.0}
        dataset, examples = OFFICIAL[task]
        config = chain.stages[task].config["config"]
        record = {"dataset": dataset, "examples": examples, "scores": scores, "precision": precision}
        record |= {"batch": config.batch, "micro_batch": config.micro_batch, "max_seq_len": config.max_seq_len}
        spread = {key: {name: value + each / 10 for name, value in scores.items()} for each, key in enumerate(own)}
        record["seeds"] = [{"seed": key, "scores": value} for key, value in spread.items()]
        (chain.run.stage(task).path).mkdir(parents=True, exist_ok=True)
        (chain.run.stage(task).path / "scores.json").write_text(json.dumps(record))
        finish(chain, task, record)
    return path


def test_results_fill_every_cell_of_every_table(tmp_path: Path):
    ten = list(range(10))
    family = tmp_path / "family"
    begin(family.joinpath("data"), "bert_large", "dgx_a100_80g")
    for seed in range(5):
        published_run(family / f"seed-{seed}", "fp16", {}, seed)
    mixed = published_run(tmp_path / "fp16", "fp16", {"squad": ten, "mrpc": list(range(100)), "sst2": ten})
    other = published_run(tmp_path / "tf32", "tf32", {"squad": [1], "mrpc": [1], "sst2": [1]})
    names = [name for name in definitions() if "accuracy" not in name and "stability" not in name]
    sources = [family, mixed, other, bench(tmp_path / "bench.json", throughputs(*names))]
    done = call("tables", "--from", *sources, "--csv", tmp_path / "all.csv", "--html", tmp_path / "all.html")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "all.csv", newline="") as text:
        cells = list(csv.DictReader(text))
    assert [cell for cell in cells if not cell["measured"]] == []
    assert len(cells) == len(ROWS) + 1  # and the speed-up of inference, which is not published
    with pytest.raises(AssertionError):  # the page's every misprint is a remark
        assert not [cell for cell in cells if "is printed" in cell["note"]]
    assert "H100, torch 2.13, cuda 13.0, driver 580; published: DGX A100 80GB, container pytorch:21.11-py3" in {
        cell["note"] for cell in cells
    }


def test_a_run_elsewhere_fills_nothing_and_says_what_differs(tmp_path: Path):
    run = published_run(tmp_path / "run", "fp16", {"squad": [0]})
    told = json.loads((run / "run.json").read_text())
    told["recipe"]["train"]["precision"] = "fp32"
    told["recipe"]["squad"]["micro_batch"] = 16
    (run / "run.json").write_text(json.dumps(told))
    values = values_of(run, LARGE)
    assert not [cell for cell in cells_of("scaling-a100", values) if cell.ours]
    assert "precision fp32 for fp16" in next(c.note for c in cells_of("scaling-a100", values) if c.column == "fp16")
    assert values_of(run, {**LARGE, "num_hidden_layers": 12}) == []


def test_the_bench_fills_its_cells_and_only_those_of_the_model(tmp_path: Path):
    row = {"variant": "ours", "phase": "phase1", "precision": "fp16", "gpus": 8, "micro_batch": 256, "accumulation": 32}
    file = bench(tmp_path / "train.json", [{**row, "seq_len": 128, "sequences_per_s": 9000.0, "lengths": "invented"}])
    assert values_of(file, shape_of(load_recipe("tiny").model)) == []
    assert values_of(bench(tmp_path / "narrow.json", [], hidden_size=512), LARGE) == []
    done = call("tables", "pretraining-a100", "--from", file)
    assert done.returncode == 0, done.stderr
    assert "9,000      4,591   1.96" in done.stdout
    assert "lengths invented" in done.stdout
    (tmp_path / "wrong.json").write_text('{"rows": 3}')
    wrong = call("tables", "--from", tmp_path / "wrong.json")
    assert wrong.returncode == 2
    assert "neither a run nor the JSON" in wrong.stderr
    assert "absent.json: No such file" in call("tables", "--from", tmp_path / "absent.json").stderr
    assert "choose from" in call("tables", "nonsense").stderr


COMMANDS = list(dict.fromkeys(command for table in definitions().values() for command in table["measure"].values()))


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".bench " in command])
def test_a_benchmark_that_is_printed_is_understood(command: str):
    name, *words = shlex.split(command)[3:]
    parser = importlib.import_module(f"pipeline.bench.{name}").parser()
    options, rest = parser.parse_known_args(words)
    assert options.out
    assert rest == (["--data", "DATA"] if name == "scaling" else [])


@pytest.mark.slow
def test_jobs_that_are_printed_would_be_sent(tmp_path: Path):
    for name, precision in (("large", "fp16"), ("large-tf32", "tf32")):
        run = published_run(tmp_path / "runs" / name, precision, {})
        chain = Chain.of(RunDir(run))
        for stage in ("extract", "shard", "samples_128", "samples_512", "export"):
            finish(chain, stage, {})
    for command in COMMANDS:
        module, *words = shlex.split(command.replace(" runs/", f" {tmp_path}/runs/"))[2:]
        if module == "pipeline.submit":
            done = call("submit", *words, "--dry-run")
            assert done.returncode == 0, (command, done.stderr)


def test_the_page_of_commands_is_current():
    done = call("tables", "--page")
    assert done.stdout == (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
