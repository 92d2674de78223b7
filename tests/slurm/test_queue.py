"""Asking and telling Slurm, with stub commands that answer as Slurm 22.05 was seen to answer."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from slurm import queue, states
from slurm.environment import clean
from slurm.errors import ControllerDown, SlurmError
from slurm.queue import QueuedJob

DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1\n'


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put shell text in the place of a Slurm command; its calls are appended to ``log``."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: None)

    def put(name: str, body: str) -> None:
        (tmp_path / name).write_text(f'#!/bin/bash\ncd "{tmp_path}"\necho "{name} $*" >>log\n{body}')
        (tmp_path / name).chmod(0o755)

    return put


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def row(job_id: str, state: str = "PENDING", reason: str = "None", comment: str = "(null)") -> str:
    return queue.SEPARATOR.join([job_id, state, reason, "2026-01-02T03:04:05", "afterok:7(unfulfilled)", comment])


def show(*rows: str) -> str:
    return "cat <<'END'\n" + "\n".join(rows) + "\nEND\n"


def test_jobs_with_hostile_comments(stub) -> None:
    hostile = "a|b 'c' \"d\" é;%j"
    stub("squeue", show(row("12", "RUNNING", comment=hostile), row("13", reason="Dependency"), row("14")))
    jobs = queue.jobs([12, "13", 99])
    assert list(jobs) == ["12", "13"]
    assert (jobs["12"].comment, jobs["12"].state, jobs["12"].reason) == (hostile, "RUNNING", "")
    assert jobs["12"].start == datetime(2026, 1, 2, 3, 4, 5).timestamp()
    assert (jobs["13"].reason, jobs["13"].dependency) == ("Dependency", "afterok:7(unfulfilled)")


def test_no_ids_ask_nothing(stub, tmp_path: Path) -> None:
    stub("squeue", "exit 1")
    assert queue.jobs([]) == {}
    assert queue.cancel([]) == []
    assert not (tmp_path / "log").exists()


def test_controller_down_is_told_apart_from_a_refusal(stub) -> None:
    stub("squeue", DOWN)
    with pytest.raises(ControllerDown, match="does not answer"):
        queue.jobs()
    stub("squeue", 'echo "squeue: error: Invalid user" >&2; exit 1\n')
    with pytest.raises(SlurmError, match="Invalid user") as refusal:
        queue.jobs()
    assert not isinstance(refusal.value, ControllerDown)


def test_a_command_that_hangs_counts_as_down(stub) -> None:
    stub("scontrol", "exec /bin/sleep 5")
    with pytest.raises(ControllerDown, match=r"within 0\.2 s"):
        queue.ask(["scontrol", "ping"], timeout_s=0.2)


def test_patience_ends(stub, tmp_path: Path) -> None:
    stub("scontrol", DOWN)
    said: list[str] = []
    with pytest.raises(ControllerDown, match="gave up after 0 s"):
        queue.tell(["scontrol", "release", "1"], patience_s=0.2, say=said.append)
    assert said
    assert len(calls(tmp_path)) == len(said) + 1


def test_patience_is_rewarded(stub) -> None:
    stub("scontrol", f"if [ ! -e up ]; then touch up; {DOWN} fi; echo good\n")
    assert queue.tell(["scontrol", "release", "1"]) == "good\n"


def test_lost_answer_never_makes_two_jobs(stub, tmp_path: Path) -> None:
    lost = 'touch sent; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv" >&2; exit 1\n'
    stub("sbatch", lost)
    stub("squeue", f"if [ -e sent ]; then {show(row('41', comment='run#a'), row('42', comment='run#b'))} fi\n")
    assert queue.submit(tmp_path / "x", tag="run#b") == "42"
    assert [line.split()[0] for line in calls(tmp_path)] == ["sbatch", "squeue"]


def test_lost_call_is_sent_again(stub, tmp_path: Path) -> None:
    stub("sbatch", f"if [ ! -e up ]; then touch up; {DOWN} fi; echo '42;cluster'\n")
    stub("squeue", show(row("41", comment="another")))
    assert queue.submit(tmp_path / "x", ["--hold"], tag="run#b") == "42"
    assert [line.split()[0] for line in calls(tmp_path)] == ["sbatch", "squeue", "sbatch"]
    assert calls(tmp_path)[-1] == f"sbatch --parsable --hold {tmp_path}/x"


def test_rejection_is_in_slurms_words(stub, tmp_path: Path) -> None:
    words = "sbatch: error: invalid partition specified: x\n"
    words += "sbatch: error: Batch job submission failed: Invalid partition name specified"
    stub("sbatch", f"echo '{words}' >&2; exit 1\n")
    with pytest.raises(
        SlurmError, match=r"job\.sbatch: invalid partition specified: x; sbatch refused: Invalid partition"
    ):
        queue.submit(tmp_path / "job.sbatch", tag="t")
    assert len(calls(tmp_path)) == 1


GREETING = "echo ---; echo '  Welcome to the Lab'; echo '--> host 12 OK'\n"


@pytest.mark.parametrize(
    ("prints", "commands"),
    [
        (f"{GREETING} echo 42", ["sbatch"]),
        (f"echo '42;lab'; {GREETING}", ["sbatch"]),
        ("echo 900; echo 42; echo 7", ["sbatch", "squeue"]),  # a budget looks like an id
        ("echo 'job 42 is yours'", ["sbatch", "squeue"]),
        ("echo 42; exit 3", ["sbatch", "squeue", "scancel"]),
        ("echo 'job 42 is yours'; exit 3", ["sbatch", "squeue", "scancel"]),
    ],
)
def test_sbatch_may_print_anything(stub, tmp_path: Path, prints: str, commands: list[str]) -> None:
    stub("sbatch", prints)
    stub("squeue", show(row("41", comment="run#a"), row("42", comment="run#b")))
    stub("scancel", "")
    if "scancel" in commands:  # nothing is left of a job that its caller counts as refused
        with pytest.raises(SlurmError):
            queue.submit(tmp_path / "x", tag="run#b")
        assert calls(tmp_path)[-1] == "scancel 42"
    else:
        assert queue.submit(tmp_path / "x", tag="run#b") == "42"
    assert [line.split()[0] for line in calls(tmp_path)] == commands


def test_cancel_of_ended_jobs_is_no_error(stub) -> None:
    stub("scancel", 'echo "scancel: error: Kill job error on job id 7: Invalid job id specified" >&2; exit 1\n')
    assert queue.cancel([7, 8]) == ["scancel", "7", "8"]
    stub("scancel", 'echo "scancel: error: Kill job error on job id 7: Access/permission denied" >&2; exit 1\n')
    with pytest.raises(SlurmError, match="denied"):
        queue.cancel([7])


def test_accounting_is_a_bonus(stub) -> None:
    stub("sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1\n')
    assert queue.accounted([1]) == {}
    stub("sacct", "printf '7\\x1fCANCELLED by 0\\n'")
    assert queue.accounted([7]) == {"7": QueuedJob(id="7", state="CANCELLED")}


def test_users_habits_do_not_change_the_answers() -> None:
    habits = {"SQUEUE_FORMAT": "%i", "SLURM_TIME_FORMAT": "relative", "SBATCH_PARTITION": "x", "SLURM_JOB_ID": "1"}
    assert clean(habits | {"SLURM_CONF": "c", "HOME": "h"}) == {"SLURM_CONF": "c", "HOME": "h"}


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (QueuedJob(id="1", state="RUNNING"), "running"),
        (
            QueuedJob(id="1", state="PENDING", reason="Dependency", dependency="afterok:7(x),afterany:8(x)"),
            "waits for pretrain and job 8",
        ),
        (QueuedJob(id="1", state="PENDING", reason="Resources"), "next in line, waits for free nodes"),
        (
            QueuedJob(id="1", state="PENDING", reason="ReqNodeNotAvail, UnavailableNodes:n1"),
            "a node that it needs is not available",
        ),
        (
            QueuedJob(id="1", state="PENDING", reason="QOSMaxGRESPerUser"),
            "waits: the QOS's limit is reached (QOSMaxGRESPerUser)",
        ),
        (
            QueuedJob(id="1", state="PENDING", reason="AssocGrpCPUMinutesLimit"),
            "waits: the account's limit is reached (AssocGrpCPUMinutesLimit)",
        ),
        (
            QueuedJob(id="1", state="PENDING", reason="launch failed requeued held"),
            "held by Slurm after a failed launch",
        ),
        (QueuedJob(id="1", state="PENDING", reason="JobHoldMaxRequeue"), "requeued too often for this site"),
        (QueuedJob(id="1", state="PENDING", reason="SomethingNew"), "waits (SomethingNew)"),
        (QueuedJob(id="1", state="PENDING"), "queued; the scheduler has not looked at it yet"),
        (QueuedJob(id="1", state="SOME_NEW"), "some new"),
    ],
)
def test_states_in_words(job: QueuedJob, words: str) -> None:
    assert states.in_words(job, {"7": "pretrain"}) == words
    assert re.fullmatch(r"[ -~]+", words)
