"""Ranks of one job through stages of different width: a stage of one process is waited for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from support.running import ROOT, command, states


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
