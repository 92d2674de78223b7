"""Exact histories: one training through kills, stops and other numbers of ranks

Ranks are real workers with gloo between them; dropout is on, a checkpoint is begun every second step, some world sizes
share a step unevenly or leave ranks without any of it. Kills come at random moments of a start, so also while it begins
and while it saves. Compared with the training that nobody disturbed: a digest of the final weights and moments; the
figures of each step in the journal of the attempts that survive, each step once; the samples, each once per epoch.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.outcome import (
    BATCH,
    EVERY,
    STEPS,
    Facts,
    check_reads,
    facts_of,
    figures,
    journal,
    lineage,
    lost_steps,
    noting_reads,
)
from faults.starts import Start, begun, in_lanes
from faults.table import Injection, Row, share, tried
from faults.training import STAGE
from pipeline.engine import checkpoint_folder

SHAPE = {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "eval_every": 8, "checkpoint_every": EVERY}
WORLDS, FEW = (1, 2, 3, 4, 5, 7, 8), (1, 2, 3, 5)  # where all take too long, the few
CHAIN = (1, 2, 3, 4, 8, 5, 7, 1)
COMPARED = 20  # steps whose losses may differ by rounding only
PEERS_LEAVE_S = 10.0


# ---------------------------------------------------------------- trainings


def undisturbed(case: Facts, folder: Path) -> Facts:
    """``case["world"]`` ranks train to the end: the reference of others, with ``took_s``."""
    run, began = begun(folder / "run", **SHAPE, **case["changes"]), time.monotonic()
    start = Start(run, case["world"], noting_reads(run))
    assert start.wait(120), "not done after 120 s"
    took_s = time.monotonic() - began
    assert set(start.codes.values()) == {0}, f"{start.codes}: {(run.path / 'ranks.log').read_text()[-2000:]}"
    check_reads(run)
    return {**facts_of(run), "took_s": took_s}


def disturbed(case: Facts, folder: Path) -> list[Facts]:
    """Trainings one after the other until ``case["disturbances"]`` have come; see ``History``."""
    dice, found, left = random.Random(case["seed"]), [], case["disturbances"]
    while left > 0:
        own = folder / str(len(found))
        found.append(History(case, own, dice, left).to_the_end())
        left -= found[-1].get("disturbances", 0)
        if found[-1]["problems"]:
            break
        shutil.rmtree(own)
    return found


class History:
    """One training through disturbances at random moments until it is done.

    ``case``: ``worlds`` to choose from at each start, ``stops`` (the share of disturbances that are a SIGTERM to all
    rather than a SIGKILL to one), ``took_s`` of an undisturbed training on one rank, ``changes`` of the
    configuration, and ``reference``: facts of which ``exact`` says whether all must be equal or the samples alone.
    """

    def __init__(self, case: Facts, folder: Path, dice: random.Random, most: int) -> None:
        self.case, self.dice, self.most = case, dice, most
        self.run = begun(folder, **SHAPE, **case["changes"])
        self.stage = self.run.stage(STAGE)
        self.count: Counter[str] = Counter()
        self.problems: list[str] = []
        self.world = dice.choice(case["worlds"])  # the first one, or of all starts

    def to_the_end(self) -> Facts:
        while self.stage.done is None and not self.problems:
            self.count["starts"] += 1
            if self.count["starts"] > 1 and self.case["resized"]:
                self.world = self.dice.choice(self.case["worlds"])
            part, began = self.part_left(), time.monotonic()
            self.attempts_before = len(self.stage.attempts)
            start = Start(self.run, self.world, noting_reads(self.run))
            left_alone = self.count["disturbances"] >= self.most
            if not start.wait(120 if left_alone else self.dice.uniform(0, self.case["took_s"] * part)):
                self.disturb(start)
            elif set(start.codes.values()) != {0}:
                self.problems.append(f"nobody disturbed it and it ended with {start.codes}")
            else:
                self.case["took_s"] = (time.monotonic() - began) / part  # as busy as the machine now is
        if not self.problems:
            try:
                self.compare()
            except AssertionError as error:
                self.problems.append(str(error))
        return {**self.count, "problems": self.problems, "lost": lost_steps(self.stage)}

    def part_left(self) -> float:
        """How long the coming start may take, as a part of a whole training on one rank."""
        manifests = self.stage.path.glob("attempts/*/*/manifest.json")
        reached = max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=0)
        return (0.8 + 0.2 * self.world) * (0.2 + 0.8 * (1 - reached / STEPS))

    def disturb(self, start: Start) -> None:
        """A stop for all, or a kill of one rank after which the rest is killed, or left alone to see what it does."""
        alive = start.alive
        if not alive:
            return  # it came too late
        self.count["disturbances"] += 1
        attempts = self.stage.attempts
        attempt = attempts[-1] if len(attempts) > self.attempts_before else None  # of this start
        in_training = attempt is not None and bool(journal(attempt))
        if self.dice.random() < self.case["stops"]:
            start.send(signal.SIGTERM)
            self.count["stops"] += start.wait(5.0) and set(start.codes.values()) == {75}
        else:
            rank = self.dice.choice(alive)
            watcher = self.dice.random() < 0.3
            os.kill(start.pids[rank] if watcher else start.trainer(rank), signal.SIGKILL)
            self.count["kills"] += 1
            self.count["of the watching process"] += watcher
            self.count["while starting"] += not in_training
            self.count["in a save"] += bool(attempt) and any(
                not (folder / checkpoint_folder.MANIFEST).exists() for folder in attempt.path.glob("step-*")
            )
            if self.dice.random() < 0.25 and in_training:
                self.count["left alone"] += 1
                # after the last step the others have nothing left to do but to wait for rank 0's mark
                if not start.wait(PEERS_LEAVE_S) and journal(self.stage.attempts[-1])[-1]["step"] < STEPS:
                    self.problems.append(f"ranks {start.alive} did not leave in {PEERS_LEAVE_S:.0f} s")
                elif not set(start.codes.values()) <= {0, 76, 128 + signal.SIGKILL, -signal.SIGKILL}:
                    self.problems.append(f"ranks that lost a peer ended with {start.codes}")
            start.wait(self.dice.choice((0, 0.02, 0.2)))
        start.send(signal.SIGKILL)  # as srun does
        start.wait(30)

    def compare(self) -> None:
        """AssertionError where the training is not what it would have been."""
        found, wanted = facts_of(self.run), self.case["reference"]
        check_reads(self.run)
        if not self.case["exact"]:
            found, wanted = ({"samples": [line["samples"] for line in facts["steps"]]} for facts in (found, wanted))
        for name in set(found) - {"saved"}:
            assert found[name] == wanted[name], f"{name}: {differing(found[name], wanted[name])}"
        if self.case["exact"]:
            for attempt in self.stage.attempts:  # also what was computed and thrown away
                for line in journal(attempt):
                    if "loss" in line:
                        assert figures(line) == wanted["steps"][line["step"] - 1], f"{attempt}: {line}"
        assert lost_steps(self.stage) <= 2 * EVERY, f"{lost_steps(self.stage)} steps lost"
        lines = [str((attempt.verdict or {}).get("line")) for attempt in self.stage.attempts]
        assert not [line for line in lines if "hung" in line], f"false alarm: {lines}"
        self.count["named slow"] = [event["event"] for event in self.run.events].count("slow_rank")


def differing(found: Any, wanted: Any) -> str:
    if isinstance(found, list) and len(found) == len(wanted):
        return next(f"entry {i}: {a} is not {b}" for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"{found} is not {wanted}"


# ---------------------------------------------------------------- the rows


def references(worlds: Sequence[int], folder: Path, **changes: Any) -> dict[int, Facts]:
    """The undisturbed training by world size."""
    folder.mkdir()
    cases = [{"world": world, "changes": changes} for world in worlds]
    return dict(zip(worlds, in_lanes(undisturbed, cases, folder, 300), strict=True))


def histories(cases: Sequence[Facts], folder: Path, fault: str, trials: str, timeout_s: float) -> Row:
    """Run the cases; a trial is a disturbance or a history (``trials``), a failure a history with a problem."""
    folder.mkdir()
    found = [facts for case in in_lanes(disturbed, cases, folder, timeout_s) for facts in case]
    count = Counter({"histories": len(found)})
    for facts in found:
        count.update({name: number for name, number in facts.items() if isinstance(number, int)})
    failed = tuple(facts["problems"][0][:500] for facts in found if facts["problems"])
    said = (
        "histories",
        "starts",
        "kills",
        "while starting",
        "in a save",
        "of the watching process",
        "left alone",
        "stops",
        "named slow",
    )
    note = ", ".join(f"{count[name]} {name}" for name in said if name != trials and count[name])
    return Row(fault, count[trials], len(failed), max(facts["lost"] for facts in found), note, failed)


def killed_ranks(folder: Path, scale: float) -> list[Row]:
    """L1: the same number of ranks, kills of a random rank at random moments."""
    worlds = (1, 2, 3)
    reference = references(worlds, folder / "references")
    cases = [
        {
            "seed": number,
            "disturbances": 10,
            "worlds": [worlds[number % 3]],
            "resized": False,
            "stops": 0,
            "took_s": reference[1]["took_s"],
            "changes": {},
            "reference": reference[worlds[number % 3]],
            "exact": True,
        }
        for number in range(share(1000, scale) // 10)
    ]
    fault = "SIGKILL of a random rank: weights, moments, losses bitwise equal"
    return [histories(cases, folder / "killed", fault, "kills", 1500)]


def any_history(folder: Path, scale: float) -> list[Row]:
    """L0, and L3 through kills: another random number of ranks at each start."""
    rows = []
    for reduction in ("fast", "tree"):
        reference = references([1], folder / f"reference-{reduction}", reduction=reduction)
        cases = [
            {
                "seed": number,
                "disturbances": 5,
                "worlds": range(1, 9),
                "resized": True,
                "stops": 0.3,
                "took_s": reference[1]["took_s"],
                "changes": {"reduction": reduction},
                "reference": reference[1],
                "exact": reduction == "tree",
            }
            for number in range(share(20, scale))
        ]
        equal = "weights, moments, losses bitwise equal" if reduction == "tree" else "the same samples in every step"
        fault = f"kills and stops, 1 to 8 ranks at random, {reduction} reduction: {equal}"
        rows.append(histories(cases, folder / reduction, fault, "histories", 900))
    return rows


def other_ranks(folder: Path, scale: float) -> list[Row]:
    """L2 and L3 without any disturbance: every step's loss, or every bit, for other numbers of ranks."""
    worlds = WORLDS if scale >= 1 else FEW
    rows = []
    for reduction, precision in (("fast", "fp32"), ("fast", "bf16"), ("tree", "fp32"), ("tree", "bf16")):
        found = references(worlds, folder / f"{reduction}-{precision}", reduction=reduction, precision=precision)
        one = found.pop(1)
        tolerance = {"fp32": 1e-6, "bf16": 1e-4}[precision] if reduction == "fast" else 0.0
        trials = [functools.partial(same_losses, one, other, tolerance) for other in found.values()]
        equal = (
            f"losses of {COMPARED} steps within {tolerance:g}"
            if tolerance
            else "weights, moments, losses bitwise equal"
        )
        named = ", ".join(map(str, found))
        rows.append(tried(f"{named} ranks instead of one, {reduction} reduction, {precision}: {equal}", trials))
    return rows


def same_losses(one: Facts, other: Facts, tolerance: float) -> None:
    """AssertionError unless the losses are within ``tolerance`` (relative); for 0 everything must be equal."""
    for step in range(COMPARED if tolerance else 0):
        a, b = (facts["steps"][step] for facts in (one, other))
        assert a["samples"] == b["samples"], f"step {step + 1}: other samples"
        for name in ("loss", "mlm_loss", "nsp_loss"):
            assert abs(a[name] - b[name]) <= tolerance * a[name], f"step {step + 1}: {name} {a[name]} and {b[name]}"
    for name in ("digest", "steps", "evaluations"):
        assert tolerance or one[name] == other[name], f"{name}: {differing(other[name], one[name])}"


def chained(case: Facts, folder: Path) -> Facts:
    """One training whose number of ranks changes after every third step."""
    run = begun(folder / "run", **SHAPE, **case["changes"])
    for number, world in enumerate(CHAIN, 1):
        start = Start(run, world, stopping_after(STEPS // len(CHAIN)))
        assert start.wait(120), "not done after 120 s"
        wanted = 0 if number == len(CHAIN) else 75
        assert set(start.codes.values()) == {wanted}, f"{start.codes}: {(run.path / 'ranks.log').read_text()[-2000:]}"
    assert [end for _, end in lineage(run.stage(STAGE))] == list(range(3, STEPS + 1, 3))
    return facts_of(run)


def stopping_after(steps: int) -> Callable[[int], None]:
    """For each rank: have rank 0 ask for a stop, so that the start ends after this number of steps."""

    def before(rank: int) -> None:
        from pipeline.engine import checkpoint
        from pipeline.node.preempt import StopRequest

        if rank > 0:  # one rank reads the checkpoint for all
            checkpoint.newest_verified = checkpoint.read = None  # type: ignore[assignment]
        finished: list[float] = []

        def after_step(self: StopRequest, step_s: float, save_s: float) -> None:
            finished.append(step_s)
            if len(finished) == steps - 1:
                self.reason = "the test"  # seen in the next step, which is saved

        StopRequest.after_step = after_step  # type: ignore[method-assign]

    return before


def resized(folder: Path, scale: float) -> list[Row]:
    """L3: one training restarted with other numbers of ranks."""
    folder.mkdir(exist_ok=True)
    rows = []
    for precision in ("fp32", "bf16") if scale >= 1 else ("fp32",):
        changes = {"reduction": "tree", "precision": precision}
        one = references([1], folder / f"reference-{precision}", **changes)[1]
        (folder / precision).mkdir()
        found = in_lanes(chained, [{"changes": changes}], folder / precision, 300)
        trials = [functools.partial(same_losses, one, other, 0.0) for other in found]
        named = "-".join(map(str, CHAIN))
        rows.append(tried(f"restarted as {named} ranks, tree, {precision}: bitwise equal", trials, "stopped cleanly"))
    return rows


INJECTIONS: dict[str, Injection] = {
    "killed_ranks": killed_ranks,
    "any_history": any_history,
    "other_ranks": other_ranks,
    "resized": resized,
}
