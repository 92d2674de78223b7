"""A file server that goes away while a training starts: it is waited for, and the attempt goes on where it was."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from faults.starts import SAMPLES, begun
from faults.training import STAGE
from pipeline.run.rundir import RunDir
from support.compiled import shared_library
from support.running import ROOT, command, digests, one_line

pytestmark = [pytest.mark.slow]
SOURCE = Path(__file__).parents[1] / "support" / "file_server.c"
WAITS = "waiting up to 600 s for the file server"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_library(SOURCE, tmp_path_factory.mktemp("library"), "a file server that goes away")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[tuple[str, int], str]]:
    """A training that is to go on from its step 6, and the digests that it ends with."""
    run = begun(tmp_path_factory.mktemp("run"))
    trained(run, os.environ, 1)
    settled = digests(run.path)
    (run.stage(STAGE).path / "done.json").unlink()
    shutil.rmtree(run.stage(STAGE).path / "attempts/0001/step-00000008")
    return run, settled


def trained(run: RunDir, environment: Mapping[str, str], world: int, control: Path | None = None) -> str:
    """What rank 0 of a start says on stderr; the server is back once it says that it waits."""
    placed = {**environment, "WORLD_SIZE": str(world), "PIPELINE_LAUNCH": os.urandom(8).hex()}
    ranks = [
        subprocess.Popen(
            command("worker", run.path, STAGE),
            env={**placed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE if rank == 0 else None,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    said = ""
    try:
        for line in ranks[0].stderr or ():
            said += line
            if control is not None and WAITS in line:
                control.unlink(missing_ok=True)
        assert [rank.wait(60) for rank in ranks] == [0] * world, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return said


def start_of(library: Path, control: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(library), "FILE_SERVER": str(control), **more}


@pytest.mark.parametrize(
    ("name", "path", "world"),
    [
        ("ENOTCONN", "run.json", 2),
        ("ESHUTDOWN", f"{SAMPLES}/done.json", 1),
        ("ETIMEDOUT", ".hdf5", 2),
        ("EHOSTDOWN", "attempts/0002", 1),
        ("ESTALE", "step-", 2),
    ],
)
def test_what_a_start_reads_is_waited_for(
    interrupted: tuple[RunDir, dict[tuple[str, int], str]],
    library: Path,
    tmp_path: Path,
    name: str,
    path: str,
    world: int,
) -> None:
    """The run, done marks, shards, the attempt's folder, the checkpoint it goes on from: one attempt, same bits."""
    run, settled = RunDir(tmp_path / "run"), interrupted[1]
    shutil.copytree(interrupted[0].path, run.path)
    control = tmp_path / "control"
    control.write_text(f"{getattr(errno, name)} {path}")
    said = trained(run, start_of(library, control), world, control)
    assert not control.exists(), f"nothing was waited for: {said}"
    assert os.strerror(getattr(errno, name)) in said
    assert [attempt.number for attempt in run.stage(STAGE).attempts] == [1, 2]
    assert digests(run.path) == settled


@pytest.mark.parametrize("path", ["run.json", ".hdf5"])
def test_one_that_stays_away_costs_no_try(
    interrupted: tuple[RunDir, object], library: Path, tmp_path: Path, path: str
) -> None:
    """After the ten minutes, here one second, the start ends with 76, which is started again however often."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(interrupted[0].path, run.path)
    control, tries = tmp_path / "control", tmp_path / "tries"
    control.write_text(f"{errno.ENOTCONN} {path}")
    tries.write_text("earlier\n")
    quick = (
        "from pipeline.run import files; files.SERVER_S = 1.0; from pipeline import worker as w; w.run_command(w.main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", quick, run.path, STAGE],
        env=start_of(library, control, JOB_TRIES=str(tries)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    one_line(done, 76, "Transport endpoint is not connected", "start me again when the server is back")
    assert not tries.exists()
