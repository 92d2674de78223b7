"""Ranks of one job through stages of different width: a stage of one process is waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from faults.starts import begun
from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.run.rundir import RunDir
from pipeline.strict_toml import table_of
from pipeline.worker import refuse_other_ranks
from support.running import ROOT, TWO_PHASES, call, command, one_line, states


@pytest.mark.slow
def test_two_ranks_run_a_stage_of_one_process_and_then_one_of_ranks(small_run: Path, tmp_path: Path) -> None:
    """As a Slurm job of export and squad does; the second rank must not go on before the export is there."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", small_run, run], check=True)
    for stage in ("export", "squad", "mrpc", "sst2", "inference", "report"):
        subprocess.run(["rm", "-rf", run / "stages" / stage], check=True)
    environment = {**os.environ, "WORLD_SIZE": "2", "PIPELINE_LAUNCH": "together", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command("worker", run, "export", "squad"),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            start_new_session=True,
        )
        for rank in (1, 0)
    ]
    try:
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
    assert states(run)["squad"] == "done"


@pytest.mark.slow
def test_the_worker_knows_its_place_where_submitits_own_executor_started_it(small_run: Path, tmp_path: Path) -> None:
    """Two ranks of one job on this machine; each was a rank 0 of its own."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run, symlinks=True, ignore=shutil.ignore_patterns("mrpc", "events.jsonl"))
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    job = executor.submit(submitit.helpers.CommandFunction(command("worker", run, "mrpc"), cwd=ROOT, verbose=False))
    job.results()
    (attempt,) = RunDir(run).stage("mrpc").attempts
    (started,) = [event for event in RunDir(run).events if event["event"] == "started"]
    assert (started["world_size"], attempt.owner["launch"]) == (2, f"submitit-{job.job_id}")
    assert states(run)["mrpc"] == "done"


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "JOB_RANKS": "4"},
            "1 ranks were started and the job has 4",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, "mpiexec has started 3 processes"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec has started 2 processes"),
    ],
)
def test_ranks_that_others_count_differently_are_refused(environment, error):
    with pytest.raises((EnvironmentFault, ConfigError), match=error):
        refuse_other_ranks(environment)


def test_a_link_in_a_stages_place_is_not_written_through(tmp_path: Path) -> None:
    """Planted after it was submitted, by somebody else who may write into the run."""
    run = begun(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (run.path / "stages/phase1").symlink_to(tmp_path / "elsewhere")
    one_line(call("worker", run.path, "phase1"), 2, "is a link to", "where phase1 would write")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_ranks_that_agree_begin():
    refuse_other_ranks({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "JOB_RANKS": "4"})
    refuse_other_ranks({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "PMI_SIZE": "2"})
    refuse_other_ranks({})


@pytest.mark.parametrize(
    ("stage", "packages"), [("extract", "numpy, h5py"), ("phase1", "numpy, h5py, torch, safetensors")]
)
def test_an_interpreter_without_packages_does_not_begin(tmp_path: Path, stage: str, packages: str) -> None:
    """``python -S``: no package of the environment. One line and 7, from any folder, and no attempt is taken."""
    run, profile = tmp_path / "run", dataclasses.asdict(load_profile("local"))
    settings = {"recipe": table_of(load_recipe(TWO_PHASES)), "profile": profile}
    run.mkdir()
    (run / "run.json").write_text(json.dumps({**settings, "corpora": {}, "data_dir": "."}))
    bare = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-S", "-m", "pipeline.worker", run, stage], **bare)
    one_line(done, 7, f"{sys.executable} has no package {packages}; install it there")
    assert not (run / "stages").exists()
    one_line(call("worker", run, "phase9"), 2, "no stage 'phase9'; the stages are extract, shard")
