"""What the doctor's ranks find out, as two processes of this machine, and what it makes of it; Slurm is in
tests/cluster/test_odd_site.py."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor import DEFAULTS, judge
from pipeline.launch import request
from pipeline.run.files import read_json
from support.running import ROOT, call

Notes = dict[str, list[dict[str, Any]]]
KINDS = ("found", "signal", "again", "term")


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> Notes:
    """Of two real ranks: looked, stopped by TERM, started again, and killed some time after another TERM."""
    folder = tmp_path_factory.mktemp("found")
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29719", "LOCAL_RANK": "0"}

    def begin(restart: str) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "pipeline.node.checkup", str(folder)]
        own = [{"RANK": str(k), "SLURMD_NODENAME": f"n{k}", "SLURM_RESTART_COUNT": restart} for k in (0, 1)]
        return [subprocess.Popen(command, env=common | one, cwd=ROOT) for one in own]

    def wait(kind: str) -> None:
        deadline = time.monotonic() + 120
        while len(list(folder.glob(f"{kind}-*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)

    for restart, before, after in (("0", "found", "signal"), ("1", "again", "term")):
        ranks = begin(restart)
        try:
            wait(before)
            for rank in ranks:
                rank.terminate()
            wait(after)
        finally:
            codes = [rank.poll() or rank.wait(60) for rank in ranks] if restart == "0" else []
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert codes in ([75, 75], [])
    return {kind: [read_json(path) or {} for path in sorted(folder.glob(f"{kind}-*.json"))] for kind in KINDS}


def table(noted: Notes, tmp_path: Path, change: Callable[[Notes], object] = lambda notes: None) -> dict[str, Any]:
    """The doctor's rows by name, of the notes with a change."""
    notes = copy.deepcopy(noted)
    change(notes)
    words = ["--run", str(tmp_path / "run"), "--cluster", "devcluster", "--saves", "x", *DEFAULTS]
    rows: dict[str, Any] = {}
    for row in judge(request.of(words, command=["x"]), notes, "attempt 0: requeue refused\n"):
        rows.setdefault(row.what, row)
    return rows


@pytest.mark.slow
def test_what_two_ranks_find_out_holds(noted, tmp_path) -> None:
    rows = table(noted, tmp_path)
    held = ("ranks", "packages", "Slurm there", "network", "shared files", "files", "signal", "requeue", "grace")
    lacking = [what for what in held if rows[what].holds != "yes" and what != "Slurm there"]  # it may not be here
    assert not lacking, rows
    assert rows["ranks"].found == "2 on n0, n1"
    assert "GB/s (gloo)" in rows["network"].found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        (lambda n: n["found"].pop(), "ranks", "1 of 2 answered"),
        (lambda n: n["found"][1]["versions"].update(torch="2.5.0"), "packages", "torch 2.5.0 on n1, here 2."),
        (
            lambda n: [rank.update(commands=["srun"]) for rank in n["found"]],  # whatever this machine has
            "Slurm there",
            "scontrol, squeue missing on nodes",
        ),
        (
            lambda n: n["found"][1].update(gpus=[["H100", 85.0]]),
            "GPUs",
            "0-1 visible to each rank, 0 asked: H100 85 GB",
        ),
        (lambda n: n["found"][1]["errors"].update(network="timed out"), "network", "1 ranks; rank 1 on n1: timed out"),
        (lambda n: n["found"][0]["errors"].update(files="no space"), "files", "1 ranks; rank 0 on n0: no space"),
        (lambda n: n["signal"].pop(), "signal", "USR2 reached 1 of 2 ranks"),
        (lambda n: n["again"].clear(), "requeue", "attempt 0: requeue refused"),
    ],
)
def test_what_does_not_hold_is_named(noted, tmp_path, change, what, said) -> None:
    rows = table(noted, tmp_path, change)
    assert rows[what].holds == "no"
    assert said in rows[what].found


def test_what_cannot_be_proved_is_refused(tmp_path) -> None:
    done = call("doctor", "local", "--run", tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no Slurm" in done.stderr
    assert "is there already" in call("doctor", "devcluster", "--run", tmp_path).stderr
    refused = call("doctor", "devcluster", "--run", tmp_path / "new", env={**os.environ, "PATH": "/nowhere"})
    assert (refused.returncode, (tmp_path / "new").exists()) == (9, False), refused.stderr
