"""Where a process finds itself, and for which reason it stops: as fields, not as words."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from data_prep.errors import DataError
from pipeline.errors import (
    ConfigError,
    NodeFault,
    NumericalError,
    PeerLost,
    StoppedCleanly,
    StorageError,
    cause_of,
)
from pipeline.node.job import Job, Topology
from pipeline.node.preempt import STOP_SIGNALS, StopRequest, stop_at_once
from pipeline.run.rundir import Attempt, RunDir, StageDir
from slurm import verdict
from slurm.errors import FlagError, SlurmError

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}


def test_an_attempt_knows_its_slurm_job_restart_and_step(tmp_path):
    topology = Topology.of({**SRUN, "SLURM_RESTART_COUNT": "2"})
    assert (topology.rank, topology.launch) == (3, "71-2-0")
    attempt = StageDir(tmp_path).new_attempt(topology.launch, **topology.place)
    owner = json.loads((attempt.path / "owner.json").read_text())
    assert (attempt.job_id, owner["restart"], owner["step"]) == ("71", 2, "0")


def test_what_sets_a_value_is_a_key_of_the_recipe_or_an_option_of_the_command(tmp_path):
    run = RunDir(tmp_path)
    attempt = run.stage("squad-2").new_attempt("a")
    job = Job(run, "squad-2", attempt, Topology.of({}), workers=1, threads=1)
    assert job.option("micro_batch", 8) == "--micro-batch 8"  # of pipeline.finetune, whose folder has no recipe
    (tmp_path / "run.json").write_text("{}")
    assert job.option("micro_batch", 8) == "--set squad.micro_batch=8"


def test_the_local_runner_inside_an_allocation_is_no_job_of_the_run(tmp_path):
    topology = Topology.of({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PIPELINE_LAUNCH": "aa"})
    assert topology.place == {}
    assert StageDir(tmp_path).new_attempt(topology.launch).job_id != "71"


def test_an_attempt_of_version_0_1_0_is_read_by_the_same_reader(tmp_path):
    (tmp_path / "owner.json").write_text('{"launch": "71-2-0", "host": "n1", "pid": 1, "time": 1.0}')
    (tmp_path / "verdict.json").write_text('{"code": 75, "line": "asked to stop", "rank": 0, "host": "n1", "time": 2}')
    attempt = Attempt(tmp_path)
    assert attempt.job_id == "71"
    assert attempt.verdict is not None
    assert attempt.verdict["cause"] == "signal"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConfigError("x"), "configuration"),
        (FlagError("x"), "configuration"),
        (DataError("x"), "data"),
        (NumericalError("x"), "numerical"),
        (StorageError("x"), "disk"),
        (OSError(28, "No space left on device"), "disk"),
        (SlurmError("x"), "slurm"),
        (StoppedCleanly("x"), "signal"),
        (StoppedCleanly("x", "time_limit"), "time_limit"),
        (PeerLost("x"), "peer"),
        (NodeFault("x", ("n1",)), "node"),
        (KeyboardInterrupt(), "signal"),
        (ZeroDivisionError("x"), "defect"),
    ],
)
def test_every_error_has_a_cause_and_the_verdict_keeps_it(tmp_path, error, cause):
    assert cause_of(error) == cause
    Attempt(tmp_path).write_verdict(1, "x", 0, cause_of(error))
    assert (Attempt(tmp_path).verdict or {})["cause"] == cause


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("left_s", "environ", "cause"),
    [
        (1000, {}, "signal"),
        (100, {}, "time_limit"),
        (100, {verdict.LIMIT: "gpu_hours"}, "gpu_hours"),
        (100, {verdict.LIMIT: "nonsense"}, "time_limit"),
    ],
)
def test_a_signal_near_a_limit_is_caused_by_the_limit(left_s, environ, cause):
    stop = StopRequest(deadline=time.time() + left_s, limit=verdict.limit(environ), warning_s=120)
    stop.listen()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.cause == cause
    stop_at_once(stop)
    with pytest.raises(StoppedCleanly, match="stopped by SIGUSR2") as stopped:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert stopped.value.cause == cause


def test_a_deadline_that_comes_near_is_the_cause():
    other = StopRequest(deadline=time.time() + 10, looks=False)  # of another rank, whose clock may differ
    other.after_step(step_s=1.0, save_s=0.0)
    assert other.reason is None
    stop = StopRequest(deadline=time.time() + 10, limit="gpu_hours")
    assert stop.cause is None
    stop.after_step(step_s=1.0, save_s=0.0)
    assert stop.cause == "gpu_hours"
