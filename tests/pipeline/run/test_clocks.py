"""A node's clock and that of the file server, an hour apart: neither progress nor what is done is judged by both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.run.chain import Chain
from support.compiled import shared_library
from support.running import ROOT

from .test_chain import chain_of, finish

pytestmark = pytest.mark.slow
SOURCE = ROOT / "tests/support/clock.c"
HOUR = 3600
STAGE = """\
import dataclasses, sys, time
from pathlib import Path
from pipeline import worker
from pipeline.errors import StoppedCleanly
from pipeline.node.job import Job, Topology
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir

run, name, makes = RunDir(Path(sys.argv[1])), sys.argv[2], sys.argv[3]

def work(job):
    if makes == "report":
        return {}
    if makes == "a file":
        (job.out / "part").write_text("x")
    raise StoppedCleanly("asked to stop")

print(time.time())
chain = Chain.of(run)
stage = dataclasses.replace(chain.stages[name], run="__main__:work", config={}, inputs={}, looks_at={})
folder = run.stage(name)
folder.path.mkdir(parents=True, exist_ok=True)
(folder.path / "older").write_text("x")
time.sleep(0.05)
job = Job(run, name, folder.new_attempt("launch"), Topology.of({}), workers=1, threads=1)
time.sleep(0.05)
worker.execute(chain, stage, job)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(SOURCE, tmp_path_factory.mktemp("clock"), "a clock that differs")


def execute(library: Path, ahead_s: int, *words: object) -> int:
    """The exit code of a stage that runs where the clock is so much ahead of the file system's."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "CLOCK_AHEAD_S": str(ahead_s), "PYTHONPATH": str(ROOT)}
    script = Path(str(words[0])) / "stage.py"
    script.write_text(STAGE)
    environment["JOB_TRIES"] = str(script.with_name("tries"))
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert abs(float(done.stdout.splitlines()[0]) - time.time() - ahead_s) < HOUR / 2, done.stderr
    return done.returncode


@pytest.mark.parametrize("makes", ["a file", "nothing"])
@pytest.mark.parametrize("ahead_s", [-HOUR, HOUR])
def test_progress_is_judged_by_the_file_systems_clock_alone(library, tmp_path: Path, ahead_s: int, makes: str) -> None:
    """A stage that stopped after it had finished a file may be tried again; one that finished none has had a try."""
    chain_of(tmp_path)
    (tmp_path / "tries").write_text("7.0\n")
    assert execute(library, ahead_s, tmp_path, "extract", makes) != 0
    assert (tmp_path / "tries").exists() is (makes == "nothing")


@pytest.mark.parametrize("ahead_s", [-HOUR, HOUR])
def test_a_report_holds_until_what_it_tells_of_is_made_again(library, tmp_path: Path, ahead_s: int) -> None:
    """Whatever the clocks of the nodes say that made the one and the other."""
    finish(chain := chain_of(tmp_path))
    for number, name in enumerate(chain.stages):
        chain.run.stage(name).mark_done({**chain.record(name), "finished": time.time() + number, "result": {}})
    assert execute(library, ahead_s, tmp_path, "report", "report") == 0
    assert Chain.of(chain.run).todo() == {}
    chain.run.stage("sst2").mark_done({**chain.record("sst2"), "finished": time.time() + 60, "result": {}})
    assert Chain.of(chain.run).todo() == {"report": "a stage changed"}
