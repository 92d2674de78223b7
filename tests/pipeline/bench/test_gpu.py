"""`bench gpu`: every block on a tiny model, and what a block that fails, crashes or hangs does to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from pipeline.bench import gpu
from pipeline.bench.gpu import check
from support.running import ROOT

HERE = {**os.environ, "OMP_NUM_THREADS": "1"}


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.bench", "gpu", *words]
    return subprocess.run(command, cwd=ROOT, env=HERE, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_block_on_a_tiny_model(tmp_path):
    done = bench("--tiny", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["format"], found["tiny"]) == (gpu.FORMAT, True)
    assert list(found["blocks"]) == [name for name, _, _ in gpu.BLOCKS]
    assert all(facts["ok"] for facts in found["blocks"].values())
    skipped = {name for name, facts in found["blocks"].items() if "skipped" in facts}
    assert skipped <= {"nvml", "kernels"}  # without a GPU
    assert found["blocks"]["phase1"]["all_on"]["sequences_per_s"] > 0
    assert found["blocks"]["transformers"]["phase2"]["ours"] > 0


@pytest.mark.slow
def test_packed_into_one_file_it_runs_anywhere(tmp_path):
    assert bench("--pack", str(tmp_path / "gpu_bench.py")).returncode == 0
    first = (tmp_path / "gpu_bench.py").read_bytes()
    assert bench("--pack", str(tmp_path / "gpu_bench.py")).returncode == 0
    assert (tmp_path / "gpu_bench.py").read_bytes() == first
    command = [sys.executable, "-P", "gpu_bench.py", "--tiny", "--only", "env,lamb"]
    environment = {name: value for name, value in HERE.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((tmp_path / "gpu.json").read_text())["blocks"]) == {"env", "lamb"}


def fine(bench: gpu.Bench):
    yield "seen", sorted(bench.results)


def wrong(bench: gpu.Bench):
    yield "figure", check(3.0, 2.0)
    yield "later", 1


def broken(bench: gpu.Bench):
    yield "early", 1
    raise RuntimeError("CUDA error: device-side assert triggered")


def dead(bench: gpu.Bench):
    yield "early", 1
    os._exit(9)


def hung(bench: gpu.Bench):
    yield "early", 1
    time.sleep(60)


def lacking(bench: gpu.Bench):
    import no_such_package  # noqa: F401

    yield "never", 1


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [wrong, broken, dead, hung, lacking])
def test_trouble_in_one_block_costs_that_block_alone(tmp_path, monkeypatch, capfd, trouble):
    module = types.ModuleType("pipeline.bench.some_blocks")
    module.first, module.trouble, module.last = fine, trouble, fine
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gpu, "BLOCKS", tuple((name, "some_blocks", 1) for name in ("first", "trouble", "last")))
    monkeypatch.setattr(gpu, "START_S", 1.0)
    out = tmp_path / "gpu.json"
    results = gpu.run(["first", "trouble", "last"], tiny=True, out=out)
    assert json.loads(out.read_text())["blocks"] == results
    assert [results[name]["ok"] for name in ("first", "trouble", "last")] == [True, trouble is lacking, True]
    assert results["trouble"].get("early", 1) == 1  # what it had said before is kept
    assert "trouble" in results["last"]["seen"]
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("trouble"))
    words = {
        wrong: "figure 3 > 2",
        broken: "CUDA error: device-side assert triggered",
        dead: "the process ended (exit code 9)",
        hung: "no end after 2 s",
        lacking: "skipped  no_such_package is not installed",
    }
    assert words[trouble] in line


def test_a_failed_block_is_a_failed_command(tmp_path, monkeypatch):
    module = types.ModuleType("pipeline.bench.some_blocks")
    module.first = wrong
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gpu, "BLOCKS", (("first", "some_blocks", 1),))
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1


@pytest.mark.slow
def test_what_another_call_measured_stays(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"blocks": {"peak": {"ok": True, "kept": 1}}}))
    assert bench("--tiny", "--only", "env", "--out", str(out)).returncode == 0
    assert set(json.loads(out.read_text())["blocks"]) == {"peak", "env"}


def test_an_unknown_block_is_refused():
    done = bench("--only", "phase3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "phase3" in done.stderr


def test_the_process_that_watches_knows_no_torch():
    code = "import pipeline.bench.gpu, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert Path(ROOT, "pipeline").is_dir()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
