"""The run directory: atomic attempts, one verdict, one holder, curves over several attempts."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, InUseError
from pipeline.run.files import appeared, append_jsonl, read_jsonl
from pipeline.run.rundir import FLOCK, NEWEST, Attempt, RunDir, StageDir


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run"):
        RunDir(tmp_path).settings  # noqa: B018


def test_a_folder_that_looks_like_an_option_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunDir(Path("-5")).word == str(tmp_path / "-5")
    assert RunDir(Path("5")).word == "5"


def test_simultaneous_starts_take_different_attempts(tmp_path):
    stage = StageDir(tmp_path / "phase1")
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda n=n: numbers.append(stage.new_attempt(str(n)).number)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 21))


def test_ranks_join_the_attempt_of_their_own_launch(tmp_path):
    stage = StageDir(tmp_path / "phase1")
    stage.new_attempt("old")
    mine = stage.new_attempt("mine")
    stage.new_attempt("newer")
    joined = stage.join_attempt("mine")
    assert joined == mine
    assert stage.join_attempt("never", lambda look: appeared(look, 0.1)) is None


@pytest.mark.parametrize("put_away", [StageDir.move_aside, lambda stage: shutil.rmtree(stage.path / "attempts")])
def test_ranks_join_an_attempt_that_has_the_number_of_one_put_away(tmp_path, put_away):
    stage = StageDir(tmp_path / "stages" / "phase1")
    stage.new_attempt("older")

    def until(look):
        assert look() is None  # a rank that was faster than rank 0
        put_away(stage)
        assert look() is None
        stage.new_attempt("mine")
        return look()

    joined = stage.join_attempt("mine", until)
    assert joined is not None
    assert joined.owner["launch"] == "mine"


def test_the_first_verdict_stands(tmp_path):
    attempt = Attempt(tmp_path)
    attempt.write_verdict(5, "loss is not finite", 1)
    attempt.write_verdict(76, "lost a peer", 0)
    assert attempt.verdict is not None
    assert (attempt.verdict["code"], attempt.verdict["rank"]) == (5, 1)


def hold(path: str, ready: multiprocessing.synchronize.Event, leave: multiprocessing.synchronize.Event) -> None:
    with RunDir(Path(path)).held():
        ready.set()
        leave.wait(30)


def test_one_holder_and_the_second_is_told_who(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), ready, leave))
    holder.start()
    assert ready.wait(30)
    run = RunDir(tmp_path)
    assert run.is_held()
    with pytest.raises(InUseError, match=f"process {holder.pid} on"), run.held():
        pass
    holder.kill()
    holder.join()
    assert not run.is_held()
    with run.held():
        assert run.is_held()


def test_whoever_looks_locks_nothing_and_a_readers_lock_is_told_from_a_runners(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    with run.held(), monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", None)
        asked = []
        real = fcntl.fcntl
        patch.setattr(fcntl, "fcntl", lambda file, what, *more: asked.append(what) or real(file, what, *more))
        assert run.is_held()
        assert asked == [fcntl.F_OFD_GETLK]
    with open(tmp_path / "lock") as file:  # somebody who may only read
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        assert not run.is_held()
        with pytest.raises(InUseError, match="take the file away"), run.held():
            pass
        (tmp_path / "lock").unlink()
        with run.held():
            assert run.is_held()


def test_metrics_keep_the_last_attempt_per_step(tmp_path):
    stage = StageDir(tmp_path / "phase1")
    for number, steps in enumerate([(1, 2, 3), (3, 4)]):
        attempt = stage.new_attempt(str(number))
        for step in steps:
            append_jsonl(attempt.metrics, {"step": step, "attempt": attempt.number, "loss": 1.0})
        append_jsonl(attempt.metrics, {"step": steps[-1], "attempt": attempt.number, "eval_mlm_loss": 2.0})
    with open(stage.attempts[-1].metrics, "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    found = stage.metrics()
    assert [(line["step"], line["attempt"]) for line in found if "loss" in line] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [line["step"] for line in found if "eval_mlm_loss" in line] == [3, 4]


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        (['{"step": 1}', '{"step": 2}, {"step": 3}', '{"step": 4}'], [1, 4]),  # two in a line
        (['{"step": 1}', '{"step": 2', '"time": 3}', "7", '{"step": 4}'], [1, 4]),  # one in two lines
        (['{"step": 1}', '{"step": "x"}'], [1, None]),  # no number
        (['{"step": 1}', "\udcff"], [1]),
    ],
)
def test_a_line_is_an_object_or_nothing(tmp_path: Path, lines: list[str], steps: list[int | None]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    assert [line.get("step") for line in read_jsonl(path)] == steps


def test_lines_of_several_processes_never_mix(tmp_path):
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from pipeline.run.files import append_jsonl, appeared\n"
        "for i in range(300): append_jsonl(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'pad': 'x' * 500})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert all(writer.wait() == 0 for writer in writers)
    found = read_jsonl(path)
    assert len(found) == 900
    assert all(json.dumps(line) for line in found)


def test_a_line_that_a_full_disk_cut_off_is_dropped_and_the_next_one_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    append_jsonl(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, before[1]))
    try:
        with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"):
            append_jsonl(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_jsonl(path, {"step": 3})
    assert [line["step"] for line in read_jsonl(path)] == [1, 3]


def test_an_attempt_that_was_succeeded_does_not_mark_its_stage_done(tmp_path):
    stage = StageDir(tmp_path / "phase1")
    old, new = stage.new_attempt("old"), stage.new_attempt("new")
    with pytest.raises(InUseError, match=r"attempt 2 \(process \d+ on .*, since 2.*\) has taken over from attempt 1"):
        stage.mark_done({"attempt": old.number})
    assert stage.done is None
    stage.mark_done({"attempt": new.number})
    assert stage.done == {"attempt": 2}


def test_a_lock_that_still_names_a_dead_holder_is_looked_at_again(tmp_path):
    run = RunDir(tmp_path)
    with run.held():
        own = (tmp_path / "lock").read_text()
        gone = {**json.loads(own), "pid": 2**22 + 1}  # no process has a number that high
        (tmp_path / "lock").write_text(json.dumps(gone))
        timer = threading.Timer(0.3, (tmp_path / "lock").write_text, [own])
        timer.start()
        with pytest.raises(InUseError, match=f"process {os.getpid()} on .*, since 2"), RunDir(tmp_path).held():
            pass
        timer.join()


def test_a_waiting_rank_looks_at_no_old_attempt_twice(tmp_path, monkeypatch):
    stage = StageDir(tmp_path / "phase1")
    for number in range(50):
        stage.new_attempt(f"old {number}")
    opened: list[object] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: opened.append(path) or real(path, *more))
    assert stage.join_attempt("never", lambda look: appeared(look, 0.5)) is None
    assert len(opened) == NEWEST


def test_the_files_of_past_attempts_are_opened_once_in_a_process(tmp_path, monkeypatch):
    stage = StageDir(tmp_path / "phase1")
    for number in range(3):
        append_jsonl(stage.new_attempt(f"launch {number}").metrics, {"step": number, "loss": 1.0})
    opened: list[object] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: opened.append(path) or real(path, *more))
    for looks in (6, 2, 2):
        opened.clear()
        assert [(one.owner["launch"], len(one.lines)) for one in stage.attempts] == [
            (f"launch {n}", 1) for n in range(3)
        ]
        assert len(opened) == looks
    stage.attempts[0].write_verdict(75, "late", 0)
    assert stage.attempts[0].verdict is not None
    stage.path.rename(tmp_path / "old")  # as a stage that is stale is moved aside
    for number in range(2):
        stage.new_attempt(f"other {number}")
    assert stage.attempts[0].owner["launch"] == "other 0"


@pytest.mark.parametrize("odd", [{"job_id": "x" * 5000}, {"restart": ["x"] * 5000}, {"job_id": "\0"}, {"restart": {}}])
def test_an_owner_that_somebody_planted_has_lost_no_script(tmp_path, odd):
    attempt = RunDir(tmp_path).stage("phase1").new_attempt("launch")
    (attempt.path / "owner.json").write_text(json.dumps(odd))
    assert not RunDir(tmp_path).stage("phase1").attempts[0].lost_script
