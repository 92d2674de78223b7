"""Two starts of one run: paused, overtaken, continued; and simultaneous.

An old attempt is paused (SIGSTOP, by strace) right after one of its calls, a new attempt begins and runs to its end
or a part of the way, the old one is continued, then the new one goes on. A failure is: a history of both, a lost or
damaged checkpoint of the new attempt, a done mark that is not the new attempt's, other bits at the end than an
undisturbed training has, an old attempt that ends otherwise than with exit code 8 and the name of its successor (or
with 0 where it had saved its last step before). Of two simultaneous starts one must win; the other must say which
process holds the run, on which host, since when.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.publish import publish_json
from faults import traced, training, zygote
from faults.checkpoints import INTERVAL, KEEP, SAVED, after_history, history, same
from faults.checkpoints_full import traced_training, undisturbed
from faults.starts import begun
from faults.table import Injection, Row, share, spread, tried
from faults.training import PHASE, STAGE
from pipeline.engine.checkpoint import lineage, listing, newest_verified
from pipeline.errors import InUseError
from pipeline.run.rundir import RunDir
from support.running import command

NAMED = re.compile(r"process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
COMMITS = {"mkdir": 3, "fsync": 7, "rename": 3, "unlinkat": 2, "write": 8, "openat": 12}  # last number tried of each
HOW = ("to its end", "part of the way")


def stopped(folder: Path, pid: int) -> bool:
    """Whether the trial is paused; a trial that has ended counts too."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state == "Z" or "--- stopped by SIGSTOP ---" in (folder / "calls").read_text()
    return True


def to_its_end(trial: zygote.ForkServerProcess, timeout_s: float = 60.0) -> int:
    """Continue a paused trial as often as it takes (strace pauses each of its threads once)."""
    deadline = time.monotonic() + timeout_s
    while trial.exitcode is None and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(trial.pid or 0, signal.SIGCONT)
        trial.join(0.01)
    return zygote.code_of(trial, 0.1)


# ---------------------------------------------------------------- paused at every I/O call of a save


def paused_anywhere(folder: Path, scale: float) -> list[Row]:
    """The history of `checkpoints`, paused after each of its I/O calls."""
    (folder / "clean").mkdir()
    code, _ = traced.run(folder / "clean", history, str(folder / "clean" / "run"))
    assert code == 0, (folder / "clean" / "output").read_text()
    points = traced.calls(folder / "clean")
    count = itertools.count()
    rows = []
    for saves, how in ((KEEP + 1, HOW[0]), (1, HOW[1])):
        chosen = spread(points[1 if saves == 1 else 0 :], scale)
        trials = [functools.partial(overtaken, folder / str(next(count)), point, saves) for point in chosen]
        rows.append(tried(f"save and rotate, paused after every I/O call; the new attempt runs {how}", trials))
    return rows


def overtaken(folder: Path, point: tuple[str, int], saves: int) -> None:
    folder.mkdir()
    run = folder / "run"
    inject = f"{point[0]}:signal=STOP:when={point[1]}"
    with traced.traced(folder, history, str(run), inject=inject) as (trial, _, _):
        zygote.until(lambda: stopped(folder, trial.pid or 0))
        numbers = after_history(run, saves)
        code = to_its_end(trial)
    said = f"{inject}: {(folder / 'output').read_text()[-300:]}"
    stage = RunDir(run).stage(STAGE)
    assert code in (0, InUseError.exit_code), f"exit code {code}: {said}"
    if code:
        assert NAMED.search(said), f"the successor is not named: {said}"
    if not stage.attempts[-1].path.joinpath("attempt.json").exists() or len(stage.attempts) < 2:
        return  # paused before it was an attempt: it came second
    found = newest_verified(stage.path, lambda line: None)
    assert found is not None, said
    assert same(found), said
    newest = max(attempt.number for attempt in stage.attempts)
    assert all(row["verified"] for row in listing(run, check=True)), said
    if found.attempt == newest:
        kept = [int(path.name[5:]) for path in lineage(stage.path) if (path / "manifest.json").exists()]
        wanted = list(range(found.step, 0, -INTERVAL))[:KEEP]
        assert kept[: len(wanted)] == wanted, f"{said}: kept {kept}, wanted {wanted}"
    else:
        raise AssertionError(f"{said}: attempt {found.attempt} is gone on from, not {newest}")
    assert found.step >= numbers[SAVED], said


# ---------------------------------------------------------------- paused trainings


def paused_trainings(folder: Path, scale: float) -> list[Row]:
    """50 interleavings of two real trainings."""
    samples, digest = undisturbed(folder)
    points = [(call, number) for call, last in COMMITS.items() for number in range(1, last + 1)]
    points = spread(points, 25 / len(points))
    count = itertools.count()
    return [
        tried(
            f"training paused at a commit call; the new attempt runs {how}",
            [
                functools.partial(overtaken_training, folder / str(next(count)), samples, digest, point, how)
                for point in spread(points, scale)
            ],
            "the old one exits 8, its successor is named, the bits are those of an undisturbed training",
        )
        for how in HOW
    ]


def overtaken_training(folder: Path, samples: Path, digest: str, point: tuple[str, int], how: str) -> None:
    run, new = folder / "run", folder / "new"
    run.mkdir(parents=True)
    new.mkdir()
    (run / "run.json").write_text("{}")
    inject = f"{point[0]}:signal=STOP:when={point[1]}"
    part = "rename:signal=STOP:when=4" if how == HOW[1] else None  # after it has begun, near its second save
    with traced.traced(folder, traced_training, str(run), samples, inject=inject) as (old, _, _):
        zygote.until(lambda: stopped(folder, old.pid or 0))
        with traced.traced(new, traced_training, str(run), samples, inject=part) as (newer, _, _):
            if part is None:
                code_new = zygote.code_of(newer)
                code_old = to_its_end(old)
            else:
                zygote.until(lambda: stopped(new, newer.pid or 0))
                code_old = to_its_end(old)
                code_new = to_its_end(newer)
    said = f"{inject}: {(folder / 'output').read_text()[-400:]} | {(new / 'output').read_text()[-400:]}"
    stage = RunDir(run).stage(STAGE)
    codes = {code_old, code_new}
    assert codes == {0, InUseError.exit_code} or codes == {0}, f"exit codes {code_old}, {code_new}: {said}"
    if InUseError.exit_code in codes:
        assert NAMED.search(said), f"the successor is not named: {said}"
    done = stage.done
    assert done is not None, said
    checkpoint = stage.path / done["result"]["checkpoint"]
    found = training.newest(run)
    assert found is not None, said
    assert found.folder == checkpoint, f"{said}: done with {checkpoint}, the history ends with {found.folder}"
    assert (found.step, found.digest) == (PHASE.steps, digest), f"{said}: other bits at the end"
    assert all(row["verified"] for row in listing(run, check=True)), said
    steps = {line["step"]: line["loss"] for line in stage.metrics() if "loss" in line}
    assert sorted(steps) == list(range(1, PHASE.steps + 1)), said


# ---------------------------------------------------------------- simultaneous starts


def double_starts(folder: Path, scale: float) -> list[Row]:
    """Two processes at the same instant, on the lock of a run and as workers of a stage; whole commands."""
    rows = []
    for what, number, prepare, start in (
        ("hold the run", 50, lambda run: run.mkdir(), hold),
        ("work on a new stage", 25, begun, work),
        ("work on a stage that was begun with another recipe", 25, begun_otherwise, work),
    ):
        trials = [
            functools.partial(at_once, folder / f"{len(rows)}-{i}", prepare, start) for i in range(share(number, scale))
        ]
        rows.append(tried(f"two processes at once {what}", trials, "one winner, the other exits 8 and names it"))
    trials = [functools.partial(two_submits, folder / f"submit-{i}") for i in range(share(5, scale))]
    rows.append(tried("two submits at once", trials, "whole commands; one winner, the other exits 8 and names it"))
    return rows


def begun_otherwise(run: Path) -> None:
    begun(run)
    stage = RunDir(run).stage(STAGE)
    stage.new_attempt("older")
    publish_json(stage.path / "stage.json", {"fingerprint": "another"})


def at_once(folder: Path, prepare: Callable[[Path], object], start: Callable[..., None]) -> None:
    folder.mkdir()
    run = folder / "run"
    prepare(run)
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "time": 1.7e9}))  # long gone
    numbers = traced.Shared(folder / "numbers")
    outputs = [folder / f"output-{index}" for index in (0, 1)]
    trials = [zygote.start(start, str(folder / "numbers"), str(run), index, output=outputs[index]) for index in (0, 1)]
    with zygote.ended(*trials):
        zygote.until(lambda: numbers[0] == numbers[1] == 1)
        numbers[7] = 1
        codes = [zygote.code_of(trial) for trial in trials]
    texts = [path.read_text() if path.exists() else "" for path in outputs]
    if start is work and codes == [0, 0] and "" in texts and len(list(run.glob("old/*"))) <= 1:
        return  # the machine was so slow that one began when the other was done
    assert sorted(codes) == [0, InUseError.exit_code], f"exit codes {codes}: {texts}"
    winner, loser = codes.index(0), codes.index(InUseError.exit_code)
    said = texts[loser]
    named = NAMED.search(said)
    assert named, f"the winner is not named: {said}"
    if start is hold:
        assert named[0].startswith(f"process {trials[winner].pid} on {os.uname().nodename},"), said
        return
    stage = RunDir(run).stage(STAGE)
    found = training.newest(run)
    assert stage.done is not None
    assert found is not None
    assert found.folder == stage.path / stage.done["result"]["checkpoint"], said
    assert found.step == PHASE.steps


def together(shared: str, index: int) -> traced.Shared:
    """Say that this process is ready, and wait for the other."""
    numbers = traced.Shared(Path(shared))
    numbers[index] = 1
    while not numbers[7]:
        pass
    return numbers


def hold(shared: str, run: str, index: int) -> None:
    numbers = together(shared, index)
    try:
        with RunDir(Path(run)).held():
            zygote.until(lambda: numbers[2 + (1 - index)] == 1)  # until the other has been refused
    finally:
        numbers[2 + index] = 1


def work(shared: str, run: str, index: int) -> None:
    from pipeline.worker import run_stage

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", PIPELINE_LAUNCH=f"start-{index}")
    together(shared, index)
    try:
        run_stage(RunDir(Path(run)), STAGE)
    except SystemExit as error:
        os._exit(int(error.code or 0))


def two_submits(folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    text = " ".join(f"This is sentence number {number} of a text." for number in range(50))
    (data / "text.jsonl").write_text("".join(json.dumps({"text": f"{i}. {text}"}) + "\n" for i in range(400)))
    recipe = folder / "recipe.toml"
    small = (Path(__file__).parents[1] / "e2e" / "small.toml").read_text(encoding="utf-8")
    without_tasks = re.sub(r"(?ms)^\[(squad|mrpc|sst2)\].*?(?=^\[|\Z)", "", small)
    own_text = re.sub(r"(?m)^(wikipedia|jsonl) = .*$", "", without_tasks).replace(
        "[data]", '[data]\njsonl=["text.jsonl"]'
    )
    recipe.write_text(own_text)
    words = ("--recipe", recipe, "--cluster", "local", "--run", folder / "run", "--data", data, "--stages", "extract")
    submits = [
        subprocess.Popen(
            command("submit", *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=traced.zygote.ROOT,
        )
        for _ in range(2)
    ]
    outputs = [submit.communicate(timeout=120)[0] for submit in submits]
    codes = [submit.returncode for submit in submits]
    assert sorted(codes) == [0, InUseError.exit_code], f"exit codes {codes}: {outputs}"
    winner = codes.index(0)
    said = outputs[1 - winner]
    assert f"process {submits[winner].pid} on {os.uname().nodename}, since " in said, said
    assert len(RunDir(folder / "run").stage("extract").attempts) == 1


INJECTIONS: dict[str, Injection] = {
    "paused_anywhere": paused_anywhere,
    "paused_trainings": paused_trainings,
    "double_starts": double_starts,
}
