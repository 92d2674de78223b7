"""`bench records` makes a run that the readers take for what it says, and every bar has its row and its control."""

from __future__ import annotations

import json

import pytest

from pipeline.bench import records
from pipeline.run import gpu_samples
from pipeline.run.rundir import RunDir
from pipeline.run.state import Sent, survey
from support.running import call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    path = tmp_path_factory.mktemp("records") / "run"
    records.invent(path, 4)
    return RunDir(path)


def test_the_invented_run_is_whole(run: RunDir) -> None:
    """8,601 steps in as many attempts as asked for, each resumed where the one before it ended; two stages done."""
    lines = [line for name in ("phase1", "phase2") for line in run.stage(name).metrics()]
    assert len(lines) == 7038 + 1563
    for name in ("phase1", "phase2"):
        first, second = run.stage(name).attempts
        assert second.resumed_from == first.lines[-1]["step"]
    states = {row["name"]: row["state"] for row in survey(run, Sent.of(run))}
    assert (states["phase1"], states["phase2"]) == ("done", "done")


def test_its_samples_are_a_week_of_256_gpus(run: RunDir) -> None:
    samples = gpu_samples.read(run, ["phase1", "phase2"], most_bytes=1 << 40)
    assert samples is not None
    assert (len(samples.gpus), samples.unread, len(samples.spans)) == (256, 0, 4)
    assert {gpu.samples for gpu in samples.gpus} == {records.WEEK_S}


def test_every_figure_has_its_control_and_most_their_bar() -> None:
    done = call("bench", "records", "--attempts", "4", "--json")
    figures = json.loads(done.stdout)
    assert done.returncode == (not figures["held"])
    rows = figures["rows"]
    assert {row["what"].split()[0] for row in rows} == {"status", "report", "files", "plan", "GPU"}
    assert all(row["value"] > 0 and row["control"] > 0 for row in rows)
    assert [row["what"] for row in rows if row["bar"] is None] == ["status", rows[4]["what"]]
