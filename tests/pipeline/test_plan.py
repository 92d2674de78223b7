"""The plan command: the published strong-scaling columns, every node count, and a light login node."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from pipeline.config import load_profile, load_recipe
from pipeline.plan import node_counts, rows
from slurm.profile import PROFILES

# NVIDIA's published strong-scaling table with its two misprints corrected:
# nodes, rank batch, accumulation in FP16 and in TF32, for phase 1 and phase 2.
PUBLISHED = {
    "phase1": {
        1: (8192, 32, 64),
        2: (4096, 16, 32),
        4: (2048, 8, 16),
        8: (1024, 4, 8),
        16: (512, 2, 4),
        32: (256, 1, 2),
    },
    "phase2": {
        1: (4096, 128, 256),
        2: (2048, 64, 128),
        4: (1024, 32, 64),
        8: (512, 16, 32),
        16: (256, 8, 16),
        32: (128, 4, 8),
    },
}
MICRO = {"fp16": {"phase1": 256, "phase2": 32}, "tf32": {"phase1": 128, "phase2": 16}}


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline.plan", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_the_published_columns(precision):
    done = plan(
        "--recipe",
        "bert_large",
        "--cluster",
        "dgx_a100_80g",
        "--precision",
        precision,
        "--nodes",
        "1,2,4,8,16,32",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert len(found) == 12
    for row in found:
        rank_batch, fp16, tf32 = PUBLISHED[row["phase"]][row["nodes"]]
        assert row["world_size"] == 8 * row["nodes"]
        assert row["rank_batch"] == rank_batch
        assert row["accumulation"] == (fp16 if precision == "fp16" else tf32)
        assert row["micro_batch"] == MICRO[precision][row["phase"]]
        assert row["balance"] == 1.0


@pytest.mark.parametrize("cluster", ["dgx_a100_80g", "dgx1_32g", "generic"])
@pytest.mark.parametrize("recipe", ["bert_large", "bert_base"])
def test_an_exact_plan_for_every_node_count_from_1_to_64(recipe, cluster):
    loaded = load_recipe(recipe, ['train.precision="fp16"'])
    found = rows(loaded, load_profile(cluster), list(range(1, 65)), with_ranks=True)
    assert len(found) == 128
    for row in found:
        ranks = row["rank_batches"]
        assert len(ranks) == 8 * row["nodes"]
        assert sum(ranks) == row["global_batch"] == {"phase1": 65536, "phase2": 32768}[row["phase"]]
        assert max(ranks) - min(ranks) <= row["micro_batch"]
        assert min(ranks) > 0
        assert row["rank_batch"] == max(ranks) == row["micro_batch"] * row["accumulation"]


def test_the_table_for_people_names_the_repair_of_a_bad_balance():
    done = plan("--recipe", "bert_large", "--cluster", "dgx_a100_80g", "--nodes", "40")
    assert "--set phase1.micro_batch=" in done.stdout


def test_help_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert plan("--help").returncode == 0
        times.append(time.perf_counter() - began)
    code = "import pipeline.plan, pipeline.submit, pipeline.status, pipeline.cancel, sys; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "h5py", "mpi4py", "numpy", "submitit", "tokenizers"):
        assert f"'{heavy}'" not in modules, heavy
    print(f"plan --help: {min(times):.3f} s")


def test_node_counts():
    assert node_counts("1,2,4-6") == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("words", ["0", "a", "4-", "3-1", ""])
def test_impossible_node_counts_are_refused_in_one_line(words):
    done = plan("--recipe", "tiny", "--cluster", "local", "--nodes", words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--nodes" in done.stderr


def test_an_unknown_precision_key_in_the_profile_is_refused():
    done = plan("--recipe", "bert_large", "--cluster", "dgx1_32g", "--precision", "bf16")
    assert done.returncode == 2
    assert "bert_large.phase1.bf16" in done.stderr


LARGE = ("--recipe", "bert_large", "--cluster", "dgx_a100_80g", "--precision", "fp16")


def test_checkpoint_advice_for_people():
    done = plan(*LARGE, "--nodes", "32,1024", "--rate", "6.5", "--hours", "1.2")
    assert done.returncode == 0, done.stderr
    assert "6.5 failures per 1,000 node-days" in done.stdout
    cells = [line.split() for line in done.stdout.splitlines() if " h  " in line]
    assert cells[0] == ["32", "115", "h", "644", "s", "1,282", "0.20", "%", "1.2", "0.01", "99.0", "%"]
    assert cells[1][:5] == ["1024", "3.61", "h", "114", "s"]
    one = plan(*LARGE, "--nodes", "32", "--rate", "6.5", "--hours", "1.2").stdout
    assert "on 32 nodes for 1.2 h the chance of any interruption is 1.0 %" in one
    assert "chance of any interruption" not in done.stdout  # 1,024 nodes are another matter


def test_published_throughput_gives_hours_and_steps():
    done = plan(*LARGE, "--nodes", "32,33", "--rate", "6.5", "--preempt-hours", "6", "--save-seconds", "8", "--json")
    known, unknown = json.loads(done.stdout)["checkpoints"]
    assert known["hours"] == pytest.approx(7038 * 65536 / 138294 / 3600 + 1563 * 32768 / 49663 / 3600)  # 1.213 h
    assert known["interval_s"] == pytest.approx(566, abs=2)
    assert known["checkpoint_every"] == int(known["interval_s"] / (32768 / 49663))
    assert known["restarts"] == pytest.approx(known["hours"] * 3600 / known["between_s"] * (1 + known["lost"]))
    assert known["young_s"] > known["interval_s"]
    assert "hours" not in unknown
    assert "give --hours" in plan(*LARGE, "--nodes", "33", "--rate", "6.5").stdout
    assert "checkpoints" not in json.loads(plan(*LARGE, "--json").stdout)


@pytest.mark.parametrize("words", [("--rate", "0"), ("--rate", "nan"), ("--hours", "-1"), ("--save-seconds", "inf")])
def test_impossible_rates_are_refused(words):
    done = plan(*LARGE, *words)
    assert done.returncode == 2
    assert words[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_any_phase_has_its_rows_by_its_own_key_of_the_profile(tmp_path):
    site = tmp_path / "site.toml"
    profile = (PROFILES / "dgx_a100_80g.toml").read_text()
    site.write_text(profile.replace("[micro_batch]", '[micro_batch]\n"bert_large.phase3.fp16" = 8'))
    second = dataclasses.asdict(load_recipe("bert_large").phases["phase2"])
    third = {key: value for key, value in second.items() if value is not None} | {"steps": 100}
    settings = [word for key, value in third.items() for word in ("--set", f"phase3.{key}={value}")]
    large = ("--recipe", "bert_large", "--precision", "fp16", "--json", *settings)
    rows = json.loads(plan(*large, "--cluster", str(site)).stdout)["rows"]
    assert [(row["phase"], row["micro_batch"]) for row in rows] == [("phase1", 256), ("phase2", 32), ("phase3", 8)]
    only = plan(*large, "--cluster", "dgx_a100_80g", "--set", 'phases=["phase1"]', "--rate", "6.5", "--nodes", "32")
    found = json.loads(only.stdout)
    assert [row["phase"] for row in found["rows"]] == ["phase1"]
    assert found["checkpoints"][0]["hours"] == pytest.approx(7038 * 65536 / 138294 / 3600)
    without = plan(*large, "--cluster", "dgx_a100_80g")
    assert without.returncode == 2
    assert "no micro_batch for bert_large.phase3.fp16" in without.stderr
