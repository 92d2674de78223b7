"""The plan command: the published strong-scaling columns, every node count, and a light login node."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time

import pytest

from pipeline.batch import BatchPlan
from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError
from pipeline.launch.estimate import declared, fit, measured, step_of
from pipeline.launch.request import choose_micro_batches
from pipeline.plan import node_counts, rows
from pipeline.report.published import published
from pipeline.run.rundir import RunDir
from slurm.profile import PROFILES
from support.reporting import begin
from support.running import call

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


@pytest.mark.parametrize("words", ["0", "a", "4-", "3-1", "", "²", "1,5-3", "1-9999999999", "1-2-3"])
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


def test_rates_give_hours_and_steps():
    done = plan(*LARGE, "--nodes", "32,33", "--rate", "6.5", "--preempt-hours", "6", "--save-seconds", "8", "--json")
    known, other = json.loads(done.stdout)["checkpoints"]
    published_hours = 7038 * 65536 / 138294 / 3600 + 1563 * 32768 / 49663 / 3600  # 1.213
    assert known["hours"] == pytest.approx(published_hours, rel=0.015)
    assert known["interval_s"] == pytest.approx(566, abs=2)
    assert known["checkpoint_every"] == pytest.approx(known["interval_s"] / (32768 / 49663), rel=0.02)
    assert known["restarts"] == pytest.approx(known["hours"] * 3600 / known["between_s"] * (1 + known["lost"]))
    assert known["young_s"] > known["interval_s"]
    assert other["hours"] > known["hours"]  # 264 ranks share 256 micro-batches: no better than 256
    assert "checkpoints" not in json.loads(plan(*LARGE, "--json").stdout)
    unknown = plan("--recipe", "bert_base", *LARGE[2:], "--nodes", "32", "--rate", "6.5")
    assert "give --hours" in unknown.stdout
    assert "rates unknown" in unknown.stdout


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_all_published_nodes_follow_from_one_fitted_rate(phase, precision):
    """24 rows, 4 rates; without the one declared constant the irregular set is 10 % off, and so is any without LAMB."""
    recipe = load_recipe("bert_large", [f'train.precision="{precision}"'])
    rates = declared(recipe, load_profile("dgx_a100_80g"))
    total = recipe.phases[phase].global_batch
    wanted = {
        BatchPlan(total, int(row["micro_batch"]), 8 * int(row["nodes"])): total / float(row["value"])
        for row in published()
        if (row["measured"], row["precision"], row["gpus_per_node"]) == (phase, precision, "8")
        and "A100" in row["hardware"]
        and row["metric"] == "throughput"
    }
    assert len(wanted) == 6
    rate = fit(wanted, rates, recipe, rates.extra_s[phase])
    assert rates.sequences_per_s[phase] == pytest.approx(rate, rel=0.002)  # what the profile declares
    for batches, seconds in wanted.items():
        assert step_of(rates, phase, batches, recipe).total_s == pytest.approx(seconds, rel=0.015)


def test_the_estimates_for_people_and_their_cost():
    done = plan(*LARGE, "--nodes", "1,32", "--price-per-gpu-hour", "2")
    assert done.returncode == 0, done.stderr
    one, many = (line for line in done.stdout.splitlines() if "GPU-hours" in line)
    assert one.startswith("1 node: 36.")
    assert many.startswith("32 nodes: 1.22")
    found = json.loads(plan(*LARGE, "--nodes", "32", "--price-per-gpu-hour", "2", "--json").stdout)
    (run,) = found["runs"]
    assert run["cost"] == pytest.approx(2 * run["gpu_hours"])
    assert run["gpu_hours"] == pytest.approx(256 * run["hours"])
    for row in found["rows"]:
        assert sum(row["parts_s"].values()) == pytest.approx(row["step_s"])
        assert row["micro_batch"] <= row["fitting_micro"] <= 1024  # the published micro-batches fit, by arithmetic too
        assert row["memory_gb"] < 80


def test_rates_measured_by_the_benchmark(tmp_path):
    measured = {
        "env": {"gpu": "NVIDIA H100"},
        "phase1": {"all_on": {"sequences_per_s": 1800.0, "tflops": 380.0, "mean_tokens": 109.0}},
        "phase2": {"all_on": {"sequences_per_s": 780.0, "tflops": 390.0, "mean_tokens": 250.0}},
        "lamb": {"torch": {"ms": 8.0}},
    }
    (tmp_path / "gpu.json").write_text(json.dumps({"format": 1, "blocks": measured}))
    words = (*LARGE, "--nodes", "1", "--rates", str(tmp_path / "gpu.json"), "--json")
    phase1, phase2 = json.loads(plan(*words).stdout)["rows"]
    assert phase1["parts_s"]["compute_s"] == pytest.approx(8192 / 1800)
    assert phase2["parts_s"]["compute_s"] == pytest.approx(4096 / 780)
    assert phase1["parts_s"]["lamb_s"] == pytest.approx(0.008)
    base = json.loads(plan("--recipe", "bert_base", *words[2:]).stdout)["rows"][0]
    assert 2.8 < base["sequences_per_s"] / phase1["sequences_per_s"] < 3.6  # 110 to 336 million parameters


@pytest.mark.parametrize("odd", [{"sequences_per_s": 0}, {"sequences_per_s": "many"}, {"mean_tokens": "many"}, None])
def test_a_file_without_rates_is_refused(tmp_path, odd):
    recipe, path = load_recipe("bert_large"), tmp_path / "gpu.json"
    row = odd and {"sequences_per_s": 1800.0, "tflops": 380.0, "mean_tokens": 109.0, **odd}
    for content in ([], {"blocks": {"env": {}, "phase1": {"all_on": row}}}):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="not a JSON file of"):
            measured(path, recipe, declared(recipe, load_profile("dgx_a100_80g")))


def test_small_models_take_memory_and_disk_too(tmp_path):
    (tmp_path / "book.txt").write_text("A sentence.\n" * 100)
    words = ("--recipe", "small", "--cluster", "local", "--set", 'data.books=["book.txt"]', "--data", str(tmp_path))
    said = call("plan", *words).stdout
    assert " 0 " not in said
    assert " 0.0 " not in said
    assert re.search(r"\n1 node: \d+\.?\d* MB of disk\n", said)


def test_more_than_the_profile_allows_is_said():
    done = plan(*LARGE, "--set", "phase2.micro_batch=128")
    assert "bert_large.phase2.fp16: micro_batch = 128 is more than cluster profile 'dgx_a100_80g'" in done.stderr
    assert "32 is taken" in done.stderr
    assert plan(*LARGE, "--set", "phase2.micro_batch=16").stderr == ""


@pytest.mark.parametrize("setting", ["phase1.micro_batch=4", " phase1.micro_batch = 4"])
def test_a_run_keeps_its_micro_batch_unless_it_is_told_another(setting):
    recipe, profile = load_recipe("small", ['data.books=["b"]', setting]), load_profile("local")
    stored = {"recipe": {"phase1": {"micro_batch": 16}}}
    for settings, micro_batch in (((), 16), ((setting,), 4)):
        assert choose_micro_batches(recipe, profile, 2, 2, stored, settings).phases["phase1"].micro_batch == micro_batch


def fitted_run(path, *settings):
    begin(path, "bert_large", "dgx_a100_80g", "train.precision=fp16", "phase1.micro_batch=256", *settings)
    stage = RunDir(path).stage("phase1")
    lines = [json.dumps({"stage": "phase1", "step": step, "step_s": 14.4}) + "\n" for step in range(5)]
    stage.new_attempt("launch").metrics.write_text("".join(lines))
    RunDir(path).event("started", stage="phase1", attempt=1, world_size=8)
    return str(path)


def test_rates_fitted_to_a_run(tmp_path):
    run = fitted_run(tmp_path / "run")
    done = plan(*LARGE, "--nodes", "1,32", "--fit", run, "--json")
    assert done.returncode == 0, done.stderr
    one, many, *_ = json.loads(done.stdout)["rows"]
    assert one["step_s"] == pytest.approx(14.4)
    assert many["step_s"] == pytest.approx(0.474, rel=0.03)  # published: 65536 / 138294
    assert plan(*LARGE, "--fit", str(tmp_path / "nothing")).returncode != 0
    twice = json.loads(plan(*LARGE, "--set", "phase1.global_batch=131072", "--fit", run, "--json").stdout)["rows"]
    assert twice[0]["step_s"] == pytest.approx(28.8, rel=0.01)  # a batch of its own, at the run's rate


@pytest.mark.parametrize("other", ["train.precision=tf32", "phase1.seq_len=256", "model.num_hidden_layers=12"])
def test_steps_of_another_training_tell_nothing(tmp_path, other):
    refused = plan(*LARGE, "--fit", fitted_run(tmp_path / "run", other))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "fit another" in refused.stderr


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
    assert found["checkpoints"][0]["hours"] == pytest.approx(7038 * 65536 / 138294 / 3600, rel=0.015)
    without = plan(*large, "--cluster", "dgx_a100_80g")
    assert without.returncode == 2
    assert "no micro_batch for bert_large.phase3.fp16" in without.stderr


def test_what_fails_first_is_said_where_computing_is_no_longer_most_of_a_step():
    few, many = (
        call("plan", "--recipe", "bert_large", "--cluster", "dgx_a100_80g", "--nodes", n) for n in ("4", "1024")
    )
    assert "first to fail" not in few.stdout
    assert "phase1 on 1,024 nodes: a step is computing 30 %, the sum of gradients 23 %, LAMB 36 %" in many.stdout
    assert "first to fail is LAMB" in many.stdout
    assert "8,192 ranks: one process of each node looks for what all wait for" in many.stdout
    shares = [int(share) for share in re.findall(r"(\d+) %", many.stdout)]
    assert all(abs(sum(shares[i : i + 4]) - 100) <= 2 for i in (0, 4))


def test_what_the_preparation_of_a_corpus_takes(tmp_path):
    words = ("--recipe", "bert_base", "--cluster", "generic", "--set", "data.books=[]", "--data", str(tmp_path))
    refused = call("plan", *words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "multistream.xml.bz2: no such file; --data names" in refused.stderr
    with open(tmp_path / "enwiki-latest-pages-articles-multistream.xml.bz2", "wb") as file:
        file.truncate(22_000_000_000)
    said = [call("plan", *words, "--workers", str(workers)).stdout.splitlines()[-1] for workers in (1, 2)]
    hours = [[float(found) for found in re.findall(r"([\d.]+) h ", line)] for line in said]
    assert hours[0][0] == hours[0][1] == hours[1][0] == pytest.approx(2 * hours[1][1], abs=0.11)
    unpacking, extracting, others = 22 / 5.5, 22 * 4.2 / 0.014 / 3600, 55 * (1 / 0.016 + 2 / 0.022) / 3600
    assert hours[0][0] == pytest.approx(unpacking + extracting + others + 120 / 3600, abs=0.051)
    assert "at most 55 GB of text" in said[0]
    assert "300 MB of memory a worker, 0.6 GB together" in said[1]
