"""The time account, against histories whose truth is known because the test made them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_profile, load_recipe
from pipeline.engine.metrics import Clock
from pipeline.run.account import PARTS, Times, attempt_parts, pieces_of, read, run_account, stage_account
from pipeline.run.chain import Chain
from pipeline.run.files import append_jsonl
from pipeline.run.rundir import RunDir
from pipeline.strict_toml import table_of
from support.running import TWO_PHASES, Background, call

SPENT = ("data", "compute", "communication", "checkpoint", "evaluation", "other")
SECONDS = st.floats(0.01, 50)


@dataclass
class History:
    """A training that logs every step and is killed and started again, and what really happened to its time."""

    draw: st.DrawFn
    now: float = 1e9
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    attempts: list[Times] = field(default_factory=list)
    submissions: list[float] = field(default_factory=list)

    def spend(self, part: str, seconds: float) -> None:
        self.truth[part] += seconds
        self.now += seconds

    def line(self, step: int, redone: bool) -> dict[str, object]:
        since = self.now
        spent = {part: self.draw(SECONDS) for part in SPENT}
        for part, seconds in spent.items():
            self.spend("rework" if redone else part, seconds)
        return {"step": step, "since": since, "time": self.now, "spent_s": spent}

    def attempt(self, from_step: int, last: int, next_from: int) -> None:
        """Steps after ``from_step`` to ``last``, of which those after ``next_from`` will be done again."""
        began = self.now
        self.spend("start_up", self.draw(SECONDS))
        lines = []
        for step in range(from_step + 1, last + 1):
            lines.append({**self.line(step, step > next_from), "loss": 1.0})
            if self.draw(st.booleans()):
                lines.append({**self.line(step, step > next_from), "eval_mlm_loss": 1.0})
        if not lines:  # died before its first step: all of it was start-up
            self.attempts.append(Times(began, self.now, from_step=from_step, has_steps=True))
            return
        self.spend("other", self.draw(SECONDS))  # until the verdict
        self.attempts.append(Times(began, self.now, pieces_of(lines), from_step, has_steps=True))


@st.composite
def histories(draw: st.DrawFn) -> History:
    made = History(draw)
    steps = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4))
    plan, saved = [], 0  # (from, last) of every attempt: a checkpoint lies up to 4 steps behind
    for count, behind in steps:
        plan.append((saved, saved + count))
        saved = max(0, saved + count - behind)
    for index, (first, last) in enumerate(plan):
        if index and draw(st.booleans()):
            made.spend("stopped", draw(SECONDS))
            made.submissions.append(made.now)
        made.spend("queue", draw(SECONDS))
        made.attempt(first, last, min((later for later, _ in plan[index + 1 :]), default=last))
    return made


@settings(deadline=None, max_examples=150)
@given(histories())
def test_every_second_is_in_the_part_where_it_was_spent(made):
    account = stage_account(made.attempts, 1e9, made.submissions)
    assert account.parts == pytest.approx(made.truth, abs=1e-4)
    assert account.wall_s == pytest.approx(made.now - 1e9, abs=1e-4)
    assert account.ended == pytest.approx(made.now)
    useful = made.truth["compute"] + made.truth["communication"]
    ran = made.now - 1e9 - made.truth["queue"] - made.truth["stopped"]
    assert account.goodput == pytest.approx(useful / ran, rel=1e-4)


NUMBERS = st.one_of(
    st.floats(), st.integers(-(10**400), 10**400), st.none(), st.text(max_size=2), st.lists(st.none(), max_size=1)
)
DAMAGED = st.dictionaries(st.sampled_from(["step", "since", "time", "seed", "step_s"]), NUMBERS, max_size=5).flatmap(
    lambda line: st.dictionaries(st.sampled_from([*SPENT, "new"]), NUMBERS).map(lambda s: {**line, "spent_s": s})
)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(lines=st.lists(DAMAGED, max_size=6), length=st.floats(0, 1e6), step=st.one_of(st.none(), st.integers(0, 9)))
def test_whatever_the_lines_say_the_parts_are_the_wall_time(lines, length, step):
    attempt = Times(1e9, 1e9 + length, pieces_of(lines), step)
    for later in ([], [Times(2e9, 2e9, pieces_of(lines), 0)]):
        parts = attempt_parts(attempt, later, attempt.began, attempt.ended)
        assert set(parts) == set(PARTS)
        assert all(seconds >= -1e-6 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(length, abs=1e-3)


def test_a_logged_line_of_several_steps_is_redone_in_part():
    lines = [{"step": s, "since": 100.0 * (s - 5), "time": 100.0 * s, "spent_s": {"compute": 1}} for s in (5, 10)]
    killed, again = Times(0.0, 1000.0, pieces_of(lines), 0), Times(1000.0, 1000.0, [], 8)
    parts = attempt_parts(killed, [again], 0.0, 1000.0)
    assert parts["rework"] == pytest.approx(0.4 * 500)  # steps 9 and 10 of the five
    assert parts["compute"] == pytest.approx(800)


def test_going_back_within_an_attempt_is_rework():
    times = ((1, 10.0), (2, 20.0), (3, 30.0), (2, 40.0), (3, 50.0))
    lines = [{"step": s, "since": t - 10, "time": t, "spent_s": {"compute": 1}} for s, t in times]
    parts = attempt_parts(Times(0.0, 50.0, pieces_of(lines), 0, rollbacks=[(30.0, 1)]), [], 0.0, 50.0)
    assert (parts["rework"], parts["compute"]) == (20.0, 30.0)


def test_older_lines_count_as_compute_and_what_follows_the_last_as_evaluation():
    lines = [{"step": s, "time": 100.0 + s, "seed": 1} for s in (1, 2, 3)]
    done = Times(90.0, 110.0, pieces_of(lines), finished=True)
    parts = {part: seconds for part, seconds in attempt_parts(done, [], 90.0, 110.0).items() if seconds}
    assert parts == {"start_up": 11.0, "compute": 2.0, "evaluation": 7.0}
    killed = dataclasses.replace(done, finished=False)
    again = [{"step": 2, "time": 250.0, "seed": 1}, {"step": 3, "time": 251.0, "seed": 2}]
    later = Times(200.0, 300.0, pieces_of(again))
    assert attempt_parts(killed, [later], 90.0, 110.0)["rework"] == 1.0  # step 2 of seed 1 only


def test_the_chain_is_its_critical_path():
    histories = {
        "export": [Times(0, 10)],
        "squad": [Times(15, 50)],
        "mrpc": [Times(10, 30)],
        "sst2": [Times(10, 48)],
    }
    found = run_account(histories, {"export": [], **{name: ["export"] for name in ("squad", "mrpc", "sst2")}}, [])
    assert found is not None
    assert found.path == ["export", "squad"]
    assert found.chain.wall_s == 50
    assert (found.chain.parts["compute"], found.chain.parts["queue"]) == (45, 5)
    assert run_account({}, {}, []) is None


def test_a_stage_that_waits_for_the_machine_comes_after_the_one_that_held_it():
    killed = [Times(33, 40), Times(50, 60)]  # it waited 20 s for squad, 3 s for nobody; then 8 s until submitted again
    histories = {"export": [Times(0, 10)], "squad": [Times(10, 30)], "mrpc": [Times(12, 14)], "inference": killed}
    found = run_account(histories, {"export": [], **{name: ["export"] for name in histories if name != "export"}}, [48])
    assert found is not None
    assert found.path == ["export", "squad", "inference"]
    assert found.chain.wall_s == 60
    assert {part: s for part, s in found.chain.parts.items() if s} == {"compute": 47, "queue": 5, "stopped": 8}
    assert found.stages["inference"].parts["queue"] == 25


@settings(deadline=None)
@given(
    spans=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6),
    needs=st.lists(st.sets(st.integers(0, 5)), min_size=6, max_size=6),
    submissions=st.lists(st.floats(0, 200), max_size=3),
)
def test_any_chain_has_an_end_and_its_parts_are_its_wall_time(spans, needs, submissions):
    histories = {str(index): [Times(began, began + took)] for index, (began, took) in enumerate(spans)}
    found = run_account(histories, {str(i): [str(n) for n in needs[i] if n < i] for i in range(6)}, submissions)
    assert found is not None
    assert len(set(found.path)) == len(found.path)
    assert all(seconds >= -1e-9 for seconds in found.chain.parts.values())
    ended = max(began + took for began, took in spans)
    if all(found.stages[b].ended >= found.stages[a].ended for a, b in itertools.pairwise(found.path)):
        assert found.chain.ended == ended


# -------------------------------------------------------------------- from files


def begin(path: Path) -> Chain:
    path.mkdir()
    recipe, profile = load_recipe(TWO_PHASES), load_profile("local")
    settings = {"recipe": table_of(recipe), "profile": dataclasses.asdict(profile), "corpora": {}}
    (path / "run.json").write_text(json.dumps({**settings, "data_dir": "."}))
    return Chain.of(RunDir(path))


def stamp(chain: Chain, stage: str, began: float, **owner: object) -> Path:
    attempt = chain.run.stage(stage).new_attempt("x").path
    (attempt / "owner.json").write_text(json.dumps({"time": began, **owner}))
    return attempt


def test_a_run_is_read_from_its_files(tmp_path):
    chain = begin(tmp_path / "run")
    append_jsonl(chain.run.path / "events.jsonl", {"event": "submitted", "time": 100.0})
    stamp(chain, "extract", 103.0)
    done = {"attempt": 1, "started": 104.0, "finished": 120.0}
    chain.run.stage("extract").mark_done({**chain.record("extract"), **done})
    killed = stamp(chain, "shard", 121.0)
    (killed / "verdict.json").write_text(json.dumps({"code": 76, "time": 141.0}))
    stamp(chain, "shard", 151.0)
    found = read(chain.run, chain.stages, chain.run.events, {"shard"}, 171.0)
    assert found is not None
    assert found.path == ["extract", "shard"]
    assert found.chain.wall_s == pytest.approx(71.0)
    assert {part: s for part, s in found.stages["extract"].parts.items() if s} == {
        "queue": 3.0, "start_up": 1.0, "compute": 16.0
    }  # fmt: skip
    assert {part: s for part, s in found.stages["shard"].parts.items() if s} == {"queue": 11.0, "compute": 40.0}
    assert json.loads(json.dumps(found.to_dict()))["stages"]["shard"]["parts_s"]["queue"] == 11.0


def test_what_is_damaged_costs_itself_only(tmp_path):
    chain = begin(tmp_path / "run")
    assert read(chain.run, chain.stages, [], set(), 1e9) is None
    attempt = stamp(chain, "phase1", 100.0)
    (attempt / "metrics.jsonl").write_bytes(b"not json\n[1]\n")
    (attempt / "attempt.json").write_text("[]")
    (attempt / "verdict.json").write_text('{"time": "soon"}')
    (stamp(chain, "phase1", 130.0) / "owner.json").write_text("{}")
    events = [{"event": "submitted"}, {"event": "rolled_back", "stage": "phase1", "time": None}]
    found = read(chain.run, chain.stages, events, set(), 1e9)
    assert found is not None
    assert found.chain.wall_s == 0.0
    assert found.chain.goodput is None


def test_the_time_of_a_killed_and_resumed_run_is_accounted_for(small_data, tmp_path):
    """A real run: killed without warning in the middle of phase 1, then continued."""
    run, began = tmp_path / "run", time.time()
    disturbed = Background(run, small_data, "--set", "phase1.steps=40", "--set", "train.checkpoint_every=5")
    metrics = run / "stages" / "phase1" / "attempts" / "0001" / "metrics.jsonl"
    disturbed.wait_until(lambda: metrics.exists() and '"step": 13' in metrics.read_text())
    disturbed.send(signal.SIGKILL)
    disturbed.end()
    time.sleep(2.0)
    done = call("submit", "--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = time.time()
    found = json.loads(call("status", run, "--json").stdout)["account"]
    phase1 = found["stages"]["phase1"]
    print(json.dumps(found, indent=1))
    assert found["wall_s"] == pytest.approx(ended - began, rel=0.1)  # the interpreters of submit and of the report
    assert sum(found["parts_s"].values()) == pytest.approx(found["wall_s"], rel=0.02)
    assert found["critical_path"][:2] == ["extract", "shard"]
    assert phase1["parts_s"]["rework"] > 0
    assert phase1["parts_s"]["stopped"] > 2.0
    assert phase1["parts_s"]["other"] < 0.1 * phase1["wall_s"]
    assert 0 < phase1["goodput"] < 1


def test_a_clock_that_is_set_anew_makes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours forward in the middle of an attempt: its lines and its end go on where they were."""
    attempt, clock = RunDir(tmp_path).stage("phase1").new_attempt("launch"), Clock()
    first = clock.take()
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    with clock.spent("compute"):
        time.sleep(0.01)
    second = clock.take()
    attempt.write_verdict(75, "stopped", 0)
    assert second["since"] == first["time"]
    assert second["time"] - second["since"] == pytest.approx(sum(second["spent_s"].values()), abs=1e-5)
    assert attempt.owner["time"] <= second["time"] <= attempt.verdict["time"] < later - 7000
