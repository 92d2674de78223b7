"""States in words, from the run's own files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import get_args

import pytest

from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError, InUseError
from pipeline.launch import request
from pipeline.launch.local import run_chain
from pipeline.launch.start import selected
from pipeline.report.facts import gather
from pipeline.run import account
from pipeline.run.chain import Chain
from pipeline.run.files import append_jsonl
from pipeline.run.incidents import incidents
from pipeline.run.journal import Journal, SentJob, live_jobs, name_of, refuse_running, submission_of
from pipeline.run.rundir import Attempt, RunDir
from pipeline.run.state import RULE, Holder, Left, Row, Sent, State, survey
from pipeline.stages import table
from pipeline.status import disk_use, look, show_log
from pipeline.strict_toml import table_of
from pipeline.watch import follow_log, goes_on, short_line, watch
from pipeline.words import in_short
from pipeline.worker import note_lost_node
from slurm import queue
from slurm.queue import QueuedJob
from support.running import ROOT, TWO_PHASES, call, command


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    recipe, profile = load_recipe(TWO_PHASES), load_profile("local")
    settings = {"recipe": table_of(recipe), "profile": dataclasses.asdict(profile), "corpora": {}}
    made = RunDir(tmp_path / "demo")
    made.path.mkdir()
    (made.path / "run.json").write_text(json.dumps({**settings, "data_dir": "."}))
    return made


STAGES = len(table(load_recipe(TWO_PHASES)))


def states(run: RunDir) -> dict[str, str]:
    return {row["name"]: row["state"] for row in survey(run)}


def test_nothing_begun_is_todo(run):
    assert set(states(run).values()) == {"todo"}


def test_what_lies_on_disk(run):
    attempt = run.stage("phase1").new_attempt("now").path
    (attempt / "big").write_bytes(b"x" * 3_000_000)
    run.model.symlink_to(attempt)  # is no second copy
    largest, *_, whole = disk_use(run)
    assert largest.split() == ["3.0", "MB", "stages/phase1"]
    assert whole.split() == ["3.0", "MB", "all"]


def test_while_a_runner_is_at_work(run):
    earlier = run.stage("shard").new_attempt("earlier")
    earlier.write_verdict(3, "a bad file, corrected since", 0)
    with run.held():
        run.stage("extract").new_attempt("now")
        assert states(run)["extract"] == "running"
        assert states(run)["shard"] == "waiting"  # it failed before this runner began
        run.stage("shard").new_attempt("now").write_verdict(3, "a bad file", 0)
        assert states(run)["shard"] == "failed"
        run.stage("vocab").new_attempt("now").write_verdict(76, "lost a peer", 0)
        assert states(run)["vocab"] == "waiting"  # it is started again


@pytest.mark.parametrize(("code", "state"), [(3, "failed"), (5, "failed"), (75, "cancelled"), (130, "cancelled")])
def test_after_the_runner_has_gone(run, code, state):
    run.stage("extract").new_attempt("x").write_verdict(code, "the reason", 0)
    row = survey(run)[0]
    assert row["state"] == state
    assert "the reason" in row["reason"]


def at_work(run: RunDir, steps: range, number: int = 1) -> Attempt:
    """phase1 logs every fifth step; the last step took long, which the median does not mind."""
    for _ in range(number):
        attempt = run.stage("phase1").new_attempt("now")
    for step in steps:
        took = 9.0 if step == steps[-1] else 0.5
        line = {"step": step, "loss": 6.412, "sequences_per_s": 201.4, "tokens_per_s": 9e3, "step_s": took}
        append_jsonl(attempt.metrics, line)
    return attempt


def row_of(run: RunDir, name: str) -> dict[str, object]:
    return next(row for row in survey(run) if row["name"] == name)


def test_eta_is_the_median_step_time_of_this_attempt_times_the_steps_left(run):
    steps = load_recipe(TWO_PHASES).phases["phase1"].steps
    with run.held():
        at_work(run, range(5, 351, 5))
        assert row_of(run, "phase1")["eta_s"] == pytest.approx((steps - 350) * 0.5)
        assert "ETA 3 min" in str(row_of(run, "phase1")["reason"])
        append_jsonl(run.stage("phase1").attempts[-1].metrics, {"step": 351, "loss": 6.4, "time": time.time() - 600})
        assert "10 min ago" in str(row_of(run, "phase1")["reason"])
        at_work(run, range(330, 341, 5))  # went back to a checkpoint
        assert row_of(run, "phase1")["step"] == 340
        assert row_of(run, "phase1")["eta_s"] == pytest.approx((steps - 340) * 0.5)
    assert "eta_s" not in row_of(run, "phase1")


def test_short_is_one_line_for_a_phone(run):
    with run.held():
        at_work(run, range(5, 351, 5))
        (line,), more = look(run, short=True)
        assert more
        assert line == f"demo  phase1 350/700  loss 6.41  201 seq/s  ETA 3 min  0/{STAGES} done"
        at_work(run, range(0)).write_verdict(3, "a bad file " * 20, 0)
        (line,), _ = look(run, short=True)
        assert len(line) == 80
        assert "failed phase1: exit 3: a bad file" in line
        assert line.endswith(f"…  0/{STAGES} done")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("done", ""), ("todo", "not done yet")], "demo  1/2 done"),
        ([("done", ""), ("done", "")], "demo  2/2 done"),
        ([("waiting", "Priority"), ("waiting", "waits for s0")], "demo  s0 Priority  0/2 done"),
        ([("running", ""), ("running", "")], "demo  s0  and 1 more  0/2 done"),
        ([("running", ""), ("failed", "exit 3: x")], "demo  s0  failed s1: exit 3: x  0/2 done"),
    ],
)
def test_short_says_what_matters_most(rows, expected):
    found = [{"name": f"s{i}", "state": state, "reason": reason} for i, (state, reason) in enumerate(rows)]
    assert short_line("demo", found) == expected
    long = short_line("a" * 200, found)
    assert len(long) == 80
    assert long.endswith(expected.removeprefix("demo"))


def test_short_says_when_slurm_does_not(run):
    assert short_line("demo", [{"name": "a", "state": "unknown"}], "down") == "demo  Slurm does not answer  0/1 done"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (172800, "2.0 d")]
)
def test_durations_in_one_unit(seconds, text):
    assert in_short(seconds) == text


def test_watching_ends_when_nothing_goes_on_and_prints_changes_only(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.watch.INTERVAL_S", 0)
    looks = iter([(["a running", "b waiting"], True), (["a done", "b waiting"], True), (["a done", "b done"], False)])
    watch(lambda: next(looks))
    assert capsys.readouterr().out.splitlines() == ["a running", "b waiting", "a done", "b done"]


def test_a_terminal_is_redrawn(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.watch.INTERVAL_S", 0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "5")
    looks = iter([(["123456", "b"], True), (["a"], False)])
    watch(lambda: next(looks))
    assert capsys.readouterr().out == "\x1b[H1234…\x1b[K\nb\x1b[K\n\x1b[J\x1b[Ha\x1b[K\n\x1b[J"


def test_what_can_never_start_is_not_waited_for():
    assert goes_on({"state": "waiting"})
    assert not goes_on({"state": "waiting", "stuck": True})
    assert not goes_on({"state": "todo"})


@pytest.mark.parametrize(("reason", "more"), [("DependencyNeverSatisfied", False), ("Priority", True)])
def test_a_job_in_slurm_that_can_never_start_ends_the_watching(run, reason, more):
    sent = SentJob(name="squad", stages=("squad",), needs=(), held_by_us=False, id="7")
    journal = Journal(submission="s", state="released", jobs=(sent,))
    rows = survey(run, Sent(journal, {"7": QueuedJob(id="7", state="PENDING", reason=reason)}))
    assert any(goes_on(row) for row in rows) is more


def sent_as(job: QueuedJob) -> Sent:
    one = SentJob(name="pretrain", stages=("phase1", "phase2"), needs=(), held_by_us=False, id="7")
    return Sent(Journal(submission="s", state="released", jobs=(one,)), {"7": job})


def test_what_became_of_earlier_attempts(run):
    """Stopped in this job: preempted; in another job, which never comes back: stopped by whoever cancelled it."""
    ends = [("5-0-0", 75, "asked"), ("7-0-0", 75, "asked"), ("7-1-0", 75, "asked"), ("7-2-0", 76, "lost")]
    for launch, code, line in ends:  # as version 0.1.0 noted them
        run.stage("phase1").new_attempt(launch).write_verdict(code, line, 0)
    run.stage("phase1").new_attempt("7-3-0", job_id="7").write_verdict(75, "asked", 0, "time_limit")
    start = datetime.now().replace(hour=23, minute=59, second=58, microsecond=0).timestamp()
    waiting = sent_as(QueuedJob(id="7", state="PENDING", reason="Resources", start=start))
    row = next(row for row in survey(run, waiting) if row["name"] == "phase1")
    assert row["expected_start"] == start
    assert row["reason"] == (
        "stopped, preempted twice, lost a rank, out of time; "
        "next in line, waits for free nodes, expected to start at 23:59:58"
    )
    attempt = run.stage("phase1").new_attempt("7-4-0")
    (attempt.path / "attempt.json").write_text('{"resumed_from": {"attempt": 5, "step": 1200}}')
    row = next(row for row in survey(run, sent_as(QueuedJob(id="7", state="RUNNING"))) if row["name"] == "phase1")
    assert row["reason"].endswith("stopped, preempted twice, lost a rank, out of time, resumed at step 1200")


@pytest.mark.parametrize(("state", "words"), [("OUT_OF_MEMORY", "ran out of memory"), ("TIMEOUT", "its time limit")])
def test_a_job_that_only_the_accounting_remembers(run, monkeypatch, state, words):
    sent_as(QueuedJob(id="7", state="PENDING")).journal.write(run)
    monkeypatch.setattr(queue, "jobs", lambda ids: {})
    monkeypatch.setattr(queue, "accounted", lambda ids: {one: QueuedJob(id=one, state=state) for one in ids})
    row = next(row for row in survey(run, Sent.of(run)) if row["name"] == "phase1")
    assert (row["state"], words in row["reason"]) == ("failed", True)
    log = run.path / "logs" / "pretrain-7.out"
    log.parent.mkdir()
    log.write_text(
        "srun: error: n2: task 1: Exited with exit code 2\n"
        "slurmstepd: error: execve(): /venv/python: No such file\nattempt 0: code 76\n"
    )
    row = next(row for row in survey(run, Sent.of(run)) if row["name"] == "phase1")
    assert row["reason"].endswith(f": slurmstepd: error: execve(): /venv/python: No such file ({log})")


def test_the_rule_has_a_state_for_everything_that_may_be():
    assert set(RULE) == set(get_args(Holder))
    for rules in RULE.values():
        assert {state for state, _ in rules.values()} <= set(get_args(State)) - {"done"}
        assert set(rules) - {"any"} <= set(get_args(Left))
    for holder in ("nobody", "cancelled", "silent"):  # what an attempt said stands, whatever Slurm forgot
        states = [RULE[holder][left][0] for left in ("stopped", "restart", "failed")]
        assert states == ["cancelled", "failed", "failed"]


def test_a_stage_killed_until_its_runner_gave_up_says_the_same_everywhere(run, monkeypatch, capsys):
    """``status``, the report and the next ``submit``; only the runner is left to say it."""
    python = run.path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.run.rundir import RunDir\n_, _, _, run, stage = sys.argv\n"
        "RunDir(Path(run)).stage(stage).new_attempt('x')\nos.kill(os.getpid(), 9)\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with run.held():
        assert run_chain(run, {"extract": "not done yet"}, 1, 1) == 76
        assert survey(run)[0]["state"] == "failed"  # also while the runner goes on with other stages
    monkeypatch.undo()
    row = survey(run)[0]
    assert (row["state"], row["reason"], row["attempts"]) == ("failed", "exit 76: killed", 2)
    assert gather(run, held=False).rows[0] == row
    capsys.readouterr()
    selected(Chain.of(run), request.of(["--run", str(run.path), "--stages", "extract"]))
    assert capsys.readouterr().out == "  will run extract      continues; failed before: exit 76: killed\n"
    run.stage("extract").new_attempt("y")
    run.event("started", stage="extract")
    assert survey(run)[0]["state"] == "todo"


def test_a_job_that_its_batch_script_ended(run):
    over = run.path / "jobs" / "7.over"
    over.parent.mkdir()
    over.write_text("137 code 76, 2 attempts without progress\n")
    for job in ({"7": QueuedJob(id="7", state="FAILED")}, {}):  # also when Slurm has forgotten it
        row = next(row for row in survey(run, Sent(sent_as(QueuedJob(id="7", state="")).journal, job)) if "job" in row)
        assert (row["state"], row["reason"]) == ("failed", "exit 137: code 76, 2 attempts without progress")
    run.stage("phase1").new_attempt("7-0-0", job_id="7").write_verdict(75, "stopped by SIGUSR2", 0)
    row = phase1(run, sent_as(QueuedJob(id="7", state="FAILED")))
    why = "exit 137: code 76, 2 attempts without progress: stopped by SIGUSR2"
    assert (row["state"], row["reason"]) == ("failed", why)  # asked to stop it was, but nobody has cancelled it
    shutil.rmtree(run.stage("phase1").path)
    over.unlink()
    os.mkfifo(over)
    row = next(row for row in survey(run, sent_as(QueuedJob(id="7", state="COMPLETED"))) if "job" in row)
    assert (row["state"], row["reason"]) == ("todo", "not done yet")  # it ran, and there is more to do since


def phase1(run: RunDir, sent: Sent) -> Row:
    return next(row for row in survey(run, sent) if row["name"] == "phase1")


def test_while_slurm_does_not_answer_the_figures_are_those_of_the_files(run):
    attempt = at_work(run, range(5, 30, 5))
    append_jsonl(attempt.metrics, {"step": 30, "loss": 6.3, "time": time.time() - 5})
    row = phase1(run, Sent(sent_as(QueuedJob(id="7", state="RUNNING")).journal, {}, "down"))
    assert (row["state"], row["step"]) == ("unknown", 30)
    assert re.search(r"step 30, loss 6\.3, .*, [5-9] s ago", row["reason"]), row


def test_a_stage_that_its_job_never_came_to_is_told_nothing_of_the_log(run):
    """The job was cancelled in the stage before; a line on the way says that something is not found."""
    run.stage("phase1").new_attempt("7-0-0", job_id="7").write_verdict(75, "asked to stop", 0)
    log = run.path / "logs" / "pretrain-7.out"
    log.parent.mkdir()
    log.write_text("phase1: no GPU monitoring on n1: libnvidia-ml.so.1 is not found\n")
    rows = {row["name"]: row for row in survey(run, sent_as(QueuedJob(id="7", state="CANCELLED")))}
    assert (rows["phase2"]["state"], rows["phase2"]["reason"]) == ("cancelled", "cancelled")


def test_a_report_that_could_not_be_made_says_why_itself(run):
    """It needs nothing that failed: it is made all the same."""
    jobs = [
        SentJob(name=name, stages=(stage,), needs=(), held_by_us=False, id=number)
        for name, stage, number in (("data", "extract", "7"), ("report", "report", "8"))
    ]
    journal = Journal(submission="s", state="released", jobs=tuple(jobs))
    known = {number: QueuedJob(id=number, state="FAILED") for number in ("7", "8")}
    (run.path / "logs").mkdir()
    (run.path / "logs/report-8.out").write_text("execve(): /venv/python: No such file\n")
    row = survey(run, Sent(journal, known))[-1]
    assert (row["name"], row["state"]) == ("report", "failed")
    assert "/venv/python: No such file" in row["reason"]


def test_a_lost_node_is_named(run):
    """By srun, or, where the node of the batch script was lost, by the attempt that came after it."""
    log = run.path / "logs" / "pretrain-7.out"
    log.parent.mkdir()
    log.write_text(
        "attempt 0: on n[1-2], this script on n1\nsrun: error: Node failure on n2\n"
        "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED DUE TO NODE FAILURE ***\n"
        "attempt 1: on n[3-4], this script on n3\nphase1: step 10\nattempt 1: no rank said why it ended\n"
        "attempt 2: on n[1-2], this script on n1\nattempt 2: code 75; Slurm is ending this job\n"
        "attempt 3: on n[1-2], this script on n1\n"
    )
    for restart, code in ((0, 75), (1, None), (2, 75), (3, None)):
        attempt = run.stage("phase1").new_attempt(f"7-{restart}-0", job_id="7", restart=restart)
        if code:
            attempt.write_verdict(code, "asked", 0)
        note_lost_node(run, attempt, run.stage("phase1").attempts[:-1])
    row = phase1(run, sent_as(QueuedJob(id="7", state="RUNNING")))
    assert row["reason"] == "lost node n2, lost node n3, preempted, attempt 4"
    assert incidents(run.events) == ["phase1, attempt 1: node n2 was lost", "phase1, attempt 2: node n3 was lost"]


def test_a_job_sent_by_hand_is_known_by_its_attempt(run, monkeypatch):
    """Running or queued again: it is at work on its stage, and a submit or a cancel finds it. Ended: as before."""
    known = {}
    monkeypatch.setattr(queue, "jobs", lambda ids=None: known)
    monkeypatch.setattr(queue, "accounted", lambda ids: {})
    attempt = run.stage("phase1").new_attempt("9-0-0", job_id="9", restart=0)
    assert Sent.of(run) is None
    known["9"] = QueuedJob(id="9", state="RUNNING")
    assert phase1(run, Sent.of(run))["state"] == "running"
    (job,) = live_jobs(run)
    assert (name_of(job), submission_of(job)) == ("phase1", "by-hand")
    with pytest.raises(InUseError, match="phase1 \\(job 9, running\\) of this run is at work"):
        refuse_running(run, [job], "wait for it")
    attempt.write_verdict(75, "asked", 0)
    known["9"] = QueuedJob(id="9", state="PENDING", reason="Resources")
    assert phase1(run, Sent.of(run))["reason"].startswith("preempted; ")
    known["9"] = QueuedJob(id="9", state="CANCELLED")
    assert (Sent.of(run), live_jobs(run)) == (None, [])


ON = "attempt {}: on n[1-2], this script on n1\n"
HAND = " DUE TO JOB REQUEUE"


def by_slurm(what: str, why: str) -> str:
    return f"slurmstepd-n1: error: *** {what} 7 ON n1 CANCELLED AT 2026-11-28T10:48:22{why} ***\n"


@pytest.mark.parametrize(
    ("log", "code", "cause", "words"),
    [
        (by_slurm("JOB", " DUE TO PREEMPTION"), 75, None, "preempted"),
        (by_slurm("STEP", "") + by_slurm("JOB", " DUE TO PREEMPTION"), None, None, "preempted"),
        ("attempt 0: code 75, preempted, requeued\n" + by_slurm("JOB", HAND), 75, None, "preempted"),
        (by_slurm("JOB", HAND), 75, None, "requeued by hand"),
        (by_slurm("JOB", HAND), None, None, "requeued by hand"),
        ("attempt 0: code 75, requeued\n" + by_slurm("JOB", HAND), 75, None, "stopped by a signal"),
        ("attempt 0: code 75, requeued\n", 75, "time_limit", "out of time"),
        (by_slurm("JOB", " DUE TO TIME LIMIT"), None, None, "out of time"),
        ("attempt 0: code 76, requeued\n" + by_slurm("JOB", HAND), 76, None, "lost a rank"),
        (by_slurm("STEP", ""), 77, None, "met a bad node"),
        (by_slurm("STEP", ""), None, None, "killed"),
    ],
)  # fmt: skip
def test_how_an_attempt_ended_in_the_words_of_its_log(run, log, code, cause, words):
    """Seen on a real Slurm; the line of its own requeue follows that of a script which asked for it."""
    (run.path / "logs").mkdir()
    (run.path / "logs/pretrain-7.out").write_text(ON.format(0) + log + ON.format(1))
    attempt = run.stage("phase1").new_attempt("7-0-0", job_id="7", restart=0)
    if code:
        attempt.write_verdict(code, "asked", 0, cause)
    run.stage("phase1").new_attempt("7-1-0", job_id="7", restart=1)
    assert phase1(run, sent_as(QueuedJob(id="7", state="RUNNING")))["reason"] == f"{words}, attempt 2"


def test_log_of_the_newest_attempt(run, capsys):
    for number in (1, 2):
        run.stage("extract").new_attempt("x").log.write_text(f"attempt {number}\n")
    show_log(run, "extract", follow=False)
    assert capsys.readouterr().out == "attempt 2\n"


@pytest.mark.parametrize("follow", [False, True])
def test_no_log_to_show_is_said(run, follow):
    with pytest.raises(ConfigError, match="extract was not started yet"):
        show_log(run, "extract", follow)
    with pytest.raises(ConfigError, match=r"no stage 'extrakt'; the stages are extract, shard"):
        show_log(run, "extrakt", follow)


def test_following_goes_on_with_the_next_attempt_and_ends_with_the_stage(run, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.watch.INTERVAL_S", 0)
    monkeypatch.setattr("pipeline.watch.LOG_INTERVAL_S", 0)
    folder = run.stage("extract")
    first = folder.new_attempt("x")
    first.log.write_text("one\n")
    second = []

    def happens():
        """What goes on between two looks; False when the stage has ended."""
        yield True
        append(first, "two\n")
        yield True
        append(first, "three\n")
        second.append(folder.new_attempt("y"))
        yield True
        append(second[0], "four\n")
        yield False  # what was written until then is still shown

    events = happens()
    follow_log(folder, lambda: next(events))
    assert capsys.readouterr().out == "one\ntwo\nthree\n==> attempt 2 <==\nfour\n"


def append(attempt: Attempt, text: str) -> None:
    with open(attempt.log, "a") as file:
        file.write(text)


def test_where_the_time_went_and_what_stood_out(run):
    run.event("submitted")
    attempt = run.stage("phase1").new_attempt("x")
    began = attempt.owner["time"]
    spent = {"compute": 70.0, "communication": 10.0, "data": 20.0}
    append_jsonl(attempt.metrics, {"step": 5, "loss": 1.0, "since": began, "time": began + 100, "spent_s": spent})
    for step in (40, 60):
        run.event("slow_rank", stage="phase1", attempt=1, step=step, rank=5, host="node3.site", ratio=step / 25)
    run.event("rolled_back", stage="phase1", attempt=1, step=70, to_step=50, line="loss is not finite\x1b[31m")
    lines, _ = look(run, short=False)
    assert lines[STAGES:] == [
        "! phase1, steps 40 to 60: rank 5 on node3 took at worst 2.4 times as long as the others, in 2 reports",
        r"! phase1, attempt 1: back from step 70 to 50: loss is not finite\x1b[31m",
        "2 min, goodput 80 %: computing 70 %, waiting for data 20 %, communication 10 %",
    ]
    told = json.loads(call("status", run.path, "--json").stdout)
    assert told["account"]["stages"]["phase1"]["parts_s"]["data"] == pytest.approx(20.0, abs=0.01)
    assert len(told["incidents"]) == 2


def test_a_first_step_is_work_and_what_trains_nothing_has_no_goodput(run):
    run.event("submitted")
    began = run.stage("extract").new_attempt("x").owner["time"]
    record = {"started": began, "finished": began + 60, "attempt": 1, "duration_s": 60.0}
    run.stage("extract").mark_done({**Chain.of(run).record("extract"), **record})
    assert look(run, short=False)[0][-1] == "60 s: computing 100 %"
    attempt = run.stage("phase1").new_attempt("x")
    owner = {**attempt.owner, "time": began + 60}
    (attempt.path / "owner.json").write_text(json.dumps(owner))
    times = account.read(run, Chain.of(run).stages, run.events, ["phase1"], began + 160)
    assert times.stages["phase1"].parts["start_up"] == pytest.approx(100)
    (attempt.path / "attempt.json").write_text(json.dumps({"resumed_from": None, "time": began + 80}))
    times = account.read(run, Chain.of(run).stages, run.events, ["phase1"], began + 160)
    assert times.stages["phase1"].parts["start_up"] == pytest.approx(20)
    assert times.stages["phase1"].parts["compute"] == pytest.approx(80)


def test_a_run_that_has_not_begun_has_no_account(run):
    assert len(look(run, short=False)[0]) == STAGES
    assert json.loads(call("status", run.path, "--json").stdout)["account"] is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: what a colleague may see is not tested")
def test_a_colleague_may_look_without_leaving_a_trace(run):
    """Status and report as a user who may only read, while a runner holds the run."""
    with tempfile.TemporaryDirectory() as folder, run.held():
        run.stage("extract").new_attempt("now")
        seen = Path(folder) / "run"
        shutil.copytree(run.path, seen)
        with RunDir(seen).held():
            subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
            before = sorted(path.stat().st_mtime_ns for path in seen.rglob("*"))
            code = "import os, pathlib; "
            code += "from pipeline.run.rundir import RunDir; from pipeline.run.state import survey; "
            code += "from pipeline.report.facts import gather; from pipeline.report.render import render; "
            code += "os.setgroups([]); os.setgid(65534); os.setuid(65534); "
            code += f"run = RunDir(pathlib.Path({str(seen)!r})); held = run.is_held(); "
            code += "print(held, survey(run)[0]['state'], len(render(gather(run, held=held))) > 1000)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "True running True\n", done.stderr
        assert before == sorted(path.stat().st_mtime_ns for path in seen.rglob("*"))


def test_the_commands(run):
    """Ctrl-C leaves with 130, an impossible pair of flags with 2."""
    for words in (["--watch", "--log", "extract"], ["-f"], ["--short", "--json"], ["--watch", "--json"]):
        assert call("status", run.path, *words).returncode == 2
    with run.held(), subprocess.Popen(command("status", run.path, "--watch", "--short"), stdout=-1, stderr=-1) as shown:
        assert shown.stdout is not None
        line = shown.stdout.readline()
        shown.send_signal(signal.SIGINT)
        assert shown.wait(10) == 130
    assert f"extract starts next  0/{STAGES} done" in line.decode()
    assert call("status", run.path, "--watch").stdout.count("\n") == STAGES  # nothing runs: once
