"""``bench scaling``: a table's rows are those published, and are measured, kept and cancelled as runs of one family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.bench import scaling
from pipeline.errors import ConfigError
from pipeline.report.published import published
from pipeline.tables import values_of
from support.reporting import begin
from support.running import SMALL, TWO_PHASES, call, one_line, states

A100 = ["--recipe", "bert_large", "--cluster", "dgx_a100_80g", "--nodes", "1,2,4,8,16,32", "--precision", "tf32,fp16"]


def asked_rows(path: Path, *words: str) -> list[scaling.Row]:
    _, asked = scaling.rows_asked(*scaling.parser().parse_known_args(["--run", str(path), *A100, *words]))
    return scaling.with_scaling([scaling.planned_row(one) for one in asked])


@pytest.mark.slow
def test_the_rows_are_those_of_the_published_table(tmp_path: Path) -> None:
    keys = ("phase", "precision", "nodes", "gpus", "micro_batch", "accumulation")
    theirs = ("measured", "precision", "nodes", "gpus_per_node", "micro_batch", "accumulation")
    table = {
        tuple(row[key] for key in theirs)
        for row in published()
        if (row["table"], row["metric"]) == ("scaling-a100", "throughput")
    }
    found = asked_rows(tmp_path / "rows")
    assert {tuple(str(row[key]) for key in keys) for row in found} == table
    assert len(found) == len(table) == 24
    for row in found:  # a strong scaling: the same samples a step on all of them
        assert row["batch_per_gpu"] * row["nodes"] * row["gpus"] == row["global_batch"]
    smaller = asked_rows(tmp_path / "rows", "--micro-batch", "tf32=64,phase2.tf32=8,fp16=32")
    assert {(row["phase"], row["precision"], row["micro_batch"]) for row in smaller} == {
        ("phase1", "tf32", 64), ("phase2", "tf32", 8), ("phase1", "fp16", 32), ("phase2", "fp16", 32),
    }  # fmt: skip
    assert not (tmp_path / "rows").exists()


def test_what_the_rows_cost_and_the_limit(tmp_path: Path) -> None:
    words = ["--run", str(tmp_path / "rows"), *A100, "--phase", "phase1", "--time", "5"]
    _, asked = scaling.rows_asked(*scaling.parser().parse_known_args(words))
    said = scaling.budget(asked, 84.0)  # 63 nodes, 2 precisions, 8 GPUs, 5 minutes
    assert said.startswith("12 of 12 rows to measure, at most 5,040 GPU-minutes by their time limits, about ")
    with pytest.raises(ConfigError, match=r"0 are spent and --max-gpu-hours 83 allows 4,980"):
        scaling.budget(asked, 83.0)


def test_mistakes_are_told_at_once(tmp_path: Path) -> None:
    words = ["--run", tmp_path / "rows", "--recipe", SMALL, "--cluster", "local"]
    done = call("bench", "scaling", *words, "--nodes", "1", "--phase", "phase3", "--precision", "fp99", "--steps", "0")
    assert done.returncode == 2
    assert [line.split(":")[-2].split()[0] for line in done.stderr.splitlines()] == [
        "--phase",
        "--precision",
        "--steps",
    ]
    wide = call("bench", "scaling", *words, "--nodes", "1,16,32", "--data", tmp_path)
    assert wide.returncode == 2
    for ranks, batch in ((16, 12), (32, 12), (16, 6), (32, 6)):
        assert f"{ranks} ranks cannot share a global_batch of {batch}" in wide.stderr
    one_line(call("bench", "scaling", "--run", tmp_path / "rows", "-p", "gpu"), 2, "-p gpu", "--nodes")
    assert not (tmp_path / "rows").exists()


def test_other_runs_are_no_rows(tmp_path: Path) -> None:
    begin(tmp_path / "data", TWO_PHASES, "local")
    begin(tmp_path / "seed-0", TWO_PHASES, "local")
    with pytest.raises(ConfigError, match="seed-0: no row of a scaling table"):
        scaling.main(["--run", str(tmp_path)])


@pytest.mark.slow
def test_rows_on_this_machine(small_run: Path, small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for name in ("extract", "shard", "vocab", "samples_64", "samples_128"):  # made before, by the undisturbed run
        shutil.copytree(small_run / "stages" / name, folder / "data" / "stages" / name)
    for name in ("enwiki-table-markup.xml.bz2", "boolq.jsonl"):  # the tasks' files need not be there
        shutil.copy2(small_data / name, tmp_path / name)
    words = ["--run", folder, "--recipe", SMALL, "--cluster", "local", "--data", tmp_path, "--steps", "3"]
    first = call("bench", "scaling", *words, "--nodes", "1,2", "--phase", "phase1", "--json")
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)["rows"]
    assert [(row["nodes"], row["gpus"], row["micro_batch"], row["accumulation"]) for row in rows] == [
        (1, 1, 4, 3), (1, 2, 4, 2),
    ]  # fmt: skip
    assert [row["steps"] for row in rows] == [3, 3]
    assert all(row["step_s"] * row["sequences_per_s"] == pytest.approx(12, rel=1e-2) for row in rows)
    assert [rows[0]["scaling"], rows[1]["scaling"]] == [
        1.0, round(rows[1]["sequences_per_s"] / rows[0]["sequences_per_s"], 3),
    ]  # fmt: skip
    again = call("bench", "scaling", *words, "--nodes", "1,2", "--out", tmp_path / "rows.json")  # phase 2, too
    assert again.returncode == 0, again.stderr
    assert "2 of 4 rows to measure" in again.stdout
    figures = json.loads((tmp_path / "rows.json").read_text())
    rows_now, values = figures["rows"], values_of(tmp_path / "rows.json", figures["model"])
    assert [value.value for value in values] == [row["sequences_per_s"] for row in rows_now]
    assert "CPU" in values[0].place
    assert rows_now[:2] == rows
    assert [row["phase"] for row in rows_now] == ["phase1", "phase1", "phase2", "phase2"]
    assert call("bench", "scaling", "--run", folder).stdout.splitlines() == again.stdout.splitlines()[-5:]
    assert states(folder / "phase2-fp32-2")["phase2"] == "done"
    assert call("status", folder).stdout.count("\n") == 5
