"""A GPU that falls off the bus under a real training process: it saves, leaves with 77, and goes on elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.files import read_jsonl
from support.running import ROOT

pytestmark = [pytest.mark.slow]


def worker(run: Path, driver: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Phase 1 as a batch script's srun starts it, on a node with two GPUs by the word of its driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_NVML": script}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.worker", run, "phase1"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip(
            "gcc is not installed: the watch over GPUs is not tested, it needs a stand-in for the driver's library"
        )
    folder = tmp_path_factory.mktemp("nvml")
    source = ROOT / "tests" / "pipeline" / "monitor" / "fake_nvml.c"
    words = ["gcc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([*words, "-o", folder / "libnvidia-ml.so.1", source, "-lpthread"], check=True)
    return folder


def test_a_lost_gpu_ends_the_attempt_with_77_and_loses_nothing(small_run, driver, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True, ignore=shutil.ignore_patterns("phase*", "export", "events.jsonl"))
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"]["phase1"]["steps"] = 400  # some seven seconds: not over before the second reading
    (run / "run.json").write_text(json.dumps(settings))
    sick = worker(run, driver, "fail * 1 20 15")  # GPU 1 answers "lost" from its second reading on
    assert sick.returncode == 77, sick.stdout + sick.stderr
    host, attempt = socket.gethostname(), run / "stages/phase1/attempts/0001"
    verdict = json.loads((attempt / "verdict.json").read_text())
    assert verdict["code"] == 77
    assert "GPU 1" in verdict["line"]
    assert verdict["line"].endswith(f"goes on without {host}")
    (event,) = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] != "started"]
    assert (event["event"], event["verdict"], event["gpu"]) == ("gpu_health", "fatal", 1)

    well = worker(run, driver, "")
    assert well.returncode == 0, well.stderr
    steps = [line["step"] for line in read_jsonl(attempt / "metrics.jsonl") if "loss" in line]
    resumed = json.loads((attempt.with_name("0002") / "attempt.json").read_text())["resumed_from"]
    assert (resumed or {"step": 0})["step"] == max(steps, default=0)
    assert json.loads((run / "stages/phase1/done.json").read_text())["attempt"] == 2
    samples = [json.loads(line) for line in (run / f"gpu/{host}.jsonl").read_text().splitlines()]
    assert {(line["gpu"], line["attempt"]) for line in samples} == {
        (gpu, number) for gpu in (0, 1) for number in (1, 2)
    }
