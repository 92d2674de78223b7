"""Kills and errors at every I/O call of beginning, resuming, saving and rotating.

strace kills the process at its N-th call, or lets that call (once, or all calls of its kind from then on) fail, for
every N that a clean run has. Then the attempt after it begins, resumes and saves undisturbed. A failure is: a
traceback or a wrong exit code, a manifest over files that do not verify, a finished save that is not found again,
more steps lost than the interval, or a state whose bits differ.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.publish import publish_json
from faults import traced, zygote
from faults.table import Injection, Row, spread, tried
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint import Saver, listing, newest_verified
from pipeline.errors import StorageError
from pipeline.run.rundir import RunDir

STAGE, INTERVAL, KEEP = "phase1", 2, 2
REACHED, SAVED = 0, 1  # shared numbers: the last step computed, the last step known to be saved
FAULTS = {
    "SIGKILL": "signal=KILL:when={}",
    "ENOSPC once": "error=ENOSPC:when={}",
    "ENOSPC from then on": "error=ENOSPC:when={}+",
    "EDQUOT once": "error=EDQUOT:when={}",
    "EDQUOT from then on": "error=EDQUOT:when={}+",
    "EIO once": "error=EIO:when={}",
    "EIO from then on": "error=EIO:when={}+",
}


def state(step: int, rows: int = 50) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Weights and optimizer that only this step has."""
    dice = np.random.default_rng(step)
    weights = {"a.weight": dice.normal(size=(rows, 8)).astype("f4"), "a.bias": np.zeros(8, "f4")}
    return {"weights": weights, "optimizer": {"exp_avg.a.weight": -weights["a.weight"], "step": np.array(step)}}


def fields(attempt: int, step: int) -> dict[str, Any]:
    """What a checkpoint holds besides its tensors."""
    common = {"stage": STAGE, "attempt": attempt, "step": step, "sample_position": step * 32}
    return {**common, "identity": {"data": "ab12"}, "model": {"hidden_size": 8}}


def same(found: checkpoint.Checkpoint) -> bool:
    """Whether a checkpoint holds the bits of its step."""
    wanted = state(found.step)
    return all(
        set(got) == set(want) and all(np.array_equal(got[name], want[name]) for name in want)
        for got, want in ((found.weights, wanted["weights"]), (found.optimizer, wanted["optimizer"]))
    )


class Inline:
    """A thread that runs where it is started: strace counts calls by thread, and here all of them count as one."""

    def __init__(self, *, target: Any, args: tuple[Any, ...], name: str, daemon: bool) -> None:
        self.start = functools.partial(target, *args)

    def join(self) -> None:
        pass


def history(numbers: traced.Shared, run: str, saves: int = KEEP + 1) -> None:
    """One attempt as the training loop makes it: begin, resume, some steps and saves, rotation."""
    checkpoint.threading.Thread = Inline  # type: ignore[attr-defined]
    folder = RunDir(Path(run)).stage(STAGE)
    attempt = folder.new_attempt("trial")
    lines: list[str] = []
    found = newest_verified(folder.path, lines.append)
    origin = {"attempt": found.attempt, "step": found.step} if found else None
    publish_json(attempt.path / "attempt.json", {"resumed_from": origin})
    step = found.step if found else 0
    assert found is None or same(found)

    def saved() -> None:
        numbers[SAVED] = step

    saver = Saver(attempt.path, keep=KEEP, warn=lines.append, saved=saved)
    numbers[REACHED] = numbers[SAVED] = step
    for _ in range(saves):
        step += INTERVAL
        numbers[REACHED] = step
        saver.save(**fields(attempt.number, step), **state(step))
    print("\n".join(lines), flush=True)
    saver.wait()


def after_history(run: Path, saves: int = KEEP + 1) -> traced.Shared:
    """An undisturbed attempt after a trial, in this process."""
    numbers = traced.Shared(run.parent / "again")
    thread = checkpoint.threading.Thread  # type: ignore[attr-defined]
    try:
        with contextlib.redirect_stdout(None):
            history(numbers, str(run), saves)
    finally:
        checkpoint.threading.Thread = thread  # type: ignore[attr-defined]
    return numbers


def after(run: Path, code: int, numbers: traced.Shared, fault: str) -> int:
    """Check what a trial left, and that the next attempt goes on from it; the steps that were lost."""
    stage = RunDir(run).stage(STAGE).path
    said: list[str] = []
    allowed = (-9,) if fault == "SIGKILL" else (0, StorageError.exit_code)
    assert code in allowed, f"exit code {code}"
    assert all(row["verified"] for row in listing(run, check=True)), "a manifest over files that do not verify"
    found = newest_verified(stage, said.append)
    step = found.step if found else 0
    assert found is None or same(found), f"step {step} has other bits"
    assert not any("SHA-256" in line for line in said), said
    assert step >= numbers[SAVED], f"step {numbers[SAVED]} was saved, {step} is found"
    lost = numbers[REACHED] - step if "from then on" not in fault else numbers[SAVED] - min(step, numbers[SAVED])
    assert lost <= INTERVAL, f"{lost} steps lost, the interval is {INTERVAL}"
    again = after_history(run)
    assert again[SAVED] == step + (KEEP + 1) * INTERVAL, "the next attempt did not save"
    left = sorted(row["step"] for row in listing(run, check=True) if row["verified"])
    assert left[-KEEP:] == [again[SAVED] - INTERVAL, again[SAVED]], left
    return lost


def trial(base: Path | None, folder: Path, saves: int, fault: str, call: str, number: int) -> int:
    """One fault at one call; AssertionError says what went wrong."""
    folder.mkdir()
    if base is not None:
        shutil.copytree(base, folder / "run")
    inject = f"{call}:{FAULTS[fault].format(number)}"
    try:
        code, numbers = traced.run(folder, history, str(folder / "run"), saves, inject=inject)
        return after(folder / "run", code, numbers, fault)
    except AssertionError as error:
        raise AssertionError(f"{inject}: {error}: {(folder / 'output').read_text().strip()[-300:]}") from error
    except Exception as error:
        raise AssertionError(f"{inject}: the next attempt: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def every_call(begun: bool, folder: Path, scale: float) -> list[Row]:
    """All faults at all calls of a first attempt (``begun`` False) or of one that resumes."""
    zygote.forking()
    base = None
    if begun:
        (folder / "first").mkdir()
        code, _ = traced.run(folder / "first", history, str(folder / "first" / "run"))
        assert code == 0, (folder / "first" / "output").read_text()
        base = folder / "first" / "run"
    clean = folder / "clean"
    clean.mkdir()
    if base is not None:
        shutil.copytree(base, clean / "run")
    saves = 1 if begun else KEEP + 1  # enough that something is rotated out
    code, numbers = traced.run(clean, history, str(clean / "run"), saves)
    assert code == 0, (clean / "output").read_text()
    assert numbers[SAVED] == (saves + begun * (KEEP + 1)) * INTERVAL
    points = traced.calls(clean)
    kinds = f"{len(points)} calls: {kinds_of(points)}"
    what = "resume, save, rotate" if begun else "create, save, rotate"
    count = itertools.count()
    rows = []
    for index, fault in enumerate(FAULTS):
        chosen = spread(points[index:] + points[:index], scale)  # a share hits other calls with every fault
        trials = [functools.partial(trial, base, folder / str(next(count)), saves, fault, *point) for point in chosen]
        rows.append(tried(f"{what}: {fault} at every I/O call", trials, kinds if index == 0 else ""))
    return rows


def kinds_of(points: Iterable[tuple[str, int]]) -> str:
    """``close 41, openat 39, …``"""
    most = dict(points)  # the last number of each call is its count
    return ", ".join(f"{name} {count}" for name, count in sorted(most.items(), key=lambda item: -item[1]))


INJECTIONS: dict[str, Injection] = {
    "io_create": functools.partial(every_call, False),
    "io_resume": functools.partial(every_call, True),
}
