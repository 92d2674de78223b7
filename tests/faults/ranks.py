"""Sick ranks: found, named, and without a trace in what is saved

Each trial is a training of three ranks (the flipped bits: also of two) of which one, at a random step, hangs, is slow,
meets a number that is not finite, or has a bit of a parameter flipped. Every checkpoint that was ever saved must be,
bit for bit, that of the training that nobody disturbed, and so must the end, after another start where one is due.
"""

from __future__ import annotations

import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults import training
from faults.histories import SHAPE, references
from faults.outcome import EVERY, STEPS, Facts, final_digest, saved
from faults.starts import LANES, SAMPLES, Start, begun, in_lanes
from faults.table import Injection, Row, share, spread
from faults.training import STAGE
from pipeline.run.files import read_json
from pipeline.run.rundir import RunDir

WORLD = 3
TRAINING = {**SHAPE, "keep_checkpoints": STEPS}
MICRO_BATCHES = -(-SHAPE["global_batch"] // SHAPE["micro_batch"])
MICRO_BATCH_S = 0.15  # far more than a busy machine adds to a micro-batch of this size
FOUND_S = 60.0
WAITING_LANES = 8  # at once, of trials that mostly wait
Before = Callable[[int], None]


# ---------------------------------------------------------------- hangs


def hung(case: Facts, folder: Path) -> Facts:
    """One rank stops giving signs of life; seconds until that was said, and what was wrong with how it was."""
    run, victim = begun(folder / "run", **TRAINING), case["rank"]
    start = Start(run, WORLD, hanging(folder / "hangs", case))
    if case["how"] == "stopped":
        wait_for(lambda: len(run.stage(STAGE).metrics()) >= case["step"], 60)
        time.sleep(case["after_s"])
        os.kill(start.trainer(victim), signal.SIGSTOP)
        (folder / "hangs").write_text(str(time.time()))
    wait_for((folder / "hangs").exists, 60)
    began, problems = float((folder / "hangs").read_text()), []
    left = start.wait(150)
    if not left:
        problems.append(f"ranks {start.alive} did not leave in 150 s")
        start.send(signal.SIGKILL)
        start.wait(10)
    attempt = run.stage(STAGE).attempts[-1]
    verdict = attempt.verdict or {}
    if verdict.get("code") != 76 or f"rank {victim} on" not in verdict.get("line", "") or "hung" not in verdict["line"]:
        problems.append(f"rank {victim} hung and the verdict is {verdict}")
    # a stopped rank runs on for its stacks: a training as small as this one may then reach its end
    ended = {76} if run.stage(STAGE).done is None else {0, 76}
    if left and (start.codes[victim] != 76 or not set(start.codes.values()) <= ended):
        problems.append(f"exit codes {start.codes}")
    took_s = verdict.get("time", math.inf) - began
    if took_s > FOUND_S:
        problems.append(f"found after {took_s:.0f} s")
    stacks = attempt.path / "stacks.txt"
    named = (
        sorted(int(rank) for rank in re.findall(r"^=== rank (\d+) on", stacks.read_text(), re.M))
        if stacks.exists()
        else []
    )
    if named != list(range(WORLD)):
        problems.append(f"stacks of the ranks {named}")
    return {"took_s": took_s, "problems": problems + goes_on(run, case)}


def hanging(mark: Path, case: Facts) -> Before:
    """For each rank: have the victim hang in the given way in the given step."""

    def before(rank: int) -> None:
        from pipeline.node import supervise
        from pipeline.pretrain.data import PretrainingData

        for name, value in case["limits"].items():
            setattr(supervise, name, value)
        if rank != case["rank"] or case["how"] == "stopped":
            return
        read = PretrainingData.read

        def hang(self: PretrainingData, positions: Any) -> Any:
            if self.train.masking == "dynamic" and positions[0] >= (case["step"] - 1) * TRAINING["global_batch"]:
                mark.with_suffix(".new").write_text(str(time.time()))
                mark.with_suffix(".new").rename(mark)
                if case["how"] == "reader sleeps":
                    time.sleep(600)
                threading.Thread(target=re.match, args=(r"(a+)+$", "a" * 60 + "b"), daemon=True).start()
            return read(self, positions)

        PretrainingData.read = hang  # type: ignore[method-assign]

    return before


def goes_on(run: RunDir, case: Facts) -> list[str]:
    """Start the training again; a problem unless it ends as if nothing had been."""
    start = Start(run, WORLD)
    if not start.wait(120) or set(start.codes.values()) != {0}:
        start.send(signal.SIGKILL)
        return [f"started again it ended with {start.codes}"]
    return as_wanted(run, case)


def as_wanted(run: RunDir, case: Facts) -> list[str]:
    """Problems with what is saved, and with the end of a training that is done."""
    found, wanted = saved(run), case["reference"]["saved"]
    wrong = sorted(int(step) for step in found if found[step] != wanted[step])
    if wrong:
        return [f"the checkpoints of the steps {wrong} hold another state"]
    return [] if run.stage(STAGE).done is None or final_digest(run) == wanted[str(STEPS)] else ["another end"]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not begin"
        time.sleep(0.002)


def hangs(folder: Path, scale: float) -> list[Row]:
    """Three ways to hang. With the product's own limits at full scale, else with ones that need less patience."""
    limits = {} if scale >= 1 else {"HANG_S": 4.0, "PEERS_DUMP_S": 2.0}
    reference, dice = undisturbed(folder), random.Random(1)
    ways = ("stopped", "reader sleeps", "a thread holds the interpreter's lock")
    cases = [
        {
            "how": how,
            "rank": dice.randrange(WORLD),
            "step": dice.randint(2, STEPS - 8),
            "after_s": dice.uniform(0, 0.03),
            "limits": limits,
            "reference": reference,
        }
        for _ in range(share(10, scale))
        for how in ways
    ]
    found, rows = trials(hung, cases, folder / "hangs", WAITING_LANES), []
    for number, how in enumerate(ways):
        own = found[number :: len(ways)]
        longest_s = max(facts["took_s"] for facts in own)
        note = f"found after {longest_s:.0f} s at most" + (f", limit {limits['HANG_S']:g} s" if limits else "")
        rows.append(row(f"a rank hangs: {how}", own, note))
    return rows


# ---------------------------------------------------------------- slow ranks


def slowed(case: Facts, folder: Path) -> Facts:
    """One rank, or none, takes twice the time for each micro-batch."""
    run = begun(folder / "run", **TRAINING)
    start = Start(run, WORLD, at_half_speed(case["rank"]))
    problems = [] if start.wait(120) and set(start.codes.values()) == {0} else [f"ended with {start.codes}"]
    named = [(event["rank"], event["step"]) for event in run.events if event["event"] == "slow_rank"]
    wanted = [] if case["rank"] is None else [(case["rank"], peers_window())]
    if named != wanted:
        problems.append(f"slow ranks (rank, step) {named} instead of {wanted}")
    return {"problems": problems + as_wanted(run, case)}


def peers_window() -> int:
    from pipeline.engine import peers

    return peers.WINDOW


def at_half_speed(victim: int | None) -> Before:
    """For each rank: add seconds to each micro-batch, twice as many where it is the victim."""

    def before(rank: int) -> None:
        from pipeline.engine.accumulate import Accumulator

        sums = Accumulator.sums

        def slower(self: Accumulator, *arguments: Any) -> Any:
            time.sleep(MICRO_BATCH_S * (2 if rank == victim else 1))
            return sums(self, *arguments)

        Accumulator.sums = slower  # type: ignore[method-assign]

    return before


def slow_ranks(folder: Path, scale: float) -> list[Row]:
    """A rank at half speed, and as many trainings without one."""
    reference = undisturbed(folder)
    victims = [victim for n in range(share(20, scale)) for victim in (n % WORLD, None)]
    cases = [{"rank": victim, "reference": reference} for victim in victims]
    found = trials(slowed, cases, folder / "slow", WAITING_LANES)
    faults = ("a rank at half speed is named after 20 steps", "no rank is slow, none is named")
    return [row(fault, found[number::2]) for number, fault in enumerate(faults)]


# ---------------------------------------------------------------- numbers that are not finite


def poisoned(case: Facts, folder: Path) -> Facts:
    """A loss or gradient of one micro-batch is not finite in one step: once, or whenever it is computed."""
    run, step = begun(folder / "run", **TRAINING), case["step"]
    start = Start(run, WORLD, poisoning(case))
    ended = start.wait(120)
    wanted = 0 if case["once"] else 5
    problems = [] if ended and set(start.codes.values()) == {wanted} else [f"ended with {start.codes}"]
    back = [(event["step"], event["to_step"]) for event in run.events if event["event"] == "rolled_back"]
    if back != [(step, (step - 1) // EVERY * EVERY)]:
        problems.append(f"rolled back (step, to step): {back}")
    if not case["once"]:
        line = (run.stage(STAGE).attempts[-1].verdict or {}).get("line", "")
        ids = ", ".join(map(str, ids_of(run, step, case["index"])))
        if (
            f"step {step}, rank {case['rank']}, micro-batch {case['index']}:" not in line
            or f"(samples {ids})" not in line
        ):
            problems.append(f"samples {ids} of step {step} were poisoned, the verdict is {line}")
        return {"problems": problems + as_wanted(run, case) + goes_on(run, case)}
    return {"problems": problems + as_wanted(run, case)}


def ids_of(run: RunDir, step: int, micro_batch: int) -> list[int]:
    """Ids of the samples of one micro-batch, from the order alone."""
    import numpy as np

    from pipeline.pretrain.data import SampleOrder

    rows = read_json(run.stage(SAMPLES).path / "manifest.json")["shards"][0]["rows"]
    first = (step - 1) * TRAINING["global_batch"] + micro_batch * TRAINING["micro_batch"]
    last = min(first + TRAINING["micro_batch"], step * TRAINING["global_batch"])
    return SampleOrder([rows], training.TRAIN.seed)[np.arange(first, last)][2].tolist()


def poisoning(case: Facts) -> Before:
    """For each rank: have the victim's loss, or its gradient, be what it should not be."""

    def before(rank: int) -> None:
        import torch

        from pipeline.engine.accumulate import Accumulator

        sums, left = Accumulator.sums, [1 if case["once"] else 10]

        class Infinite(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
                return loss.clone()

            @staticmethod
            def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
                return gradient * torch.inf

        def poison(self: Accumulator, batch: int, fed: Any) -> Any:
            mlm_loss, nsp_loss = sums(self, batch, fed)
            if rank == case["rank"] and fed.index == case["index"] and self.state.step + 1 == case["step"] and left[0]:
                left[0] -= 1
                mlm_loss = Infinite.apply(mlm_loss) if case["what"] == "gradient" else mlm_loss * torch.nan
            return mlm_loss, nsp_loss

        Accumulator.sums = poison  # type: ignore[method-assign]

    return before


def not_finite(folder: Path, scale: float) -> list[Row]:
    """Each step once for each kind."""
    reference, rows = undisturbed(folder), []
    for once, said in ((True, "once: rolled back, and done"), (False, "again: code 5 names the samples")):
        for what, steps in (("loss", range(1, STEPS + 1)), ("gradient", range(STEPS, 0, -1))):
            cases = []
            for step in spread(steps, scale):
                rank = step % WORLD
                index = rank * MICRO_BATCHES // WORLD  # the first of the rank's
                case = {"once": once, "what": what, "step": step, "rank": rank, "index": index}
                cases.append({**case, "reference": reference})
            fault = f"a {what} is not finite {said}"
            rows.append(row(fault, trials(poisoned, cases, folder / str(len(rows)))))
    return rows


# ---------------------------------------------------------------- flipped bits


def flipped(case: Facts, folder: Path) -> Facts:
    """One bit of one parameter of one rank flips after the update of a step."""
    run = begun(folder / "run", **TRAINING)
    start = Start(run, case["world"], flipping(case))
    if not start.wait(120):
        start.send(signal.SIGKILL)
    codes, problems = set(start.codes.values()), as_wanted(run, case)
    verdict = (run.stage(STAGE).attempts[-1].verdict or {}).get("line", "")
    rolled_back = any(event["event"] == "rolled_back" for event in run.events)
    if not rolled_back and (codes != {77 if case["world"] > 2 else 76} or "parameters" not in verdict):
        problems.append(f"bit {case['bit']} flipped; codes {start.codes}, verdict {verdict}")
    if codes == {77} and f"rank {case['rank']} on" not in verdict:
        problems.append(f"bit {case['bit']} flipped on rank {case['rank']}, the verdict is {verdict}")
    return {"rolled_back": rolled_back, "problems": problems or goes_on(run, case)}


def flipping(case: Facts) -> Before:
    """For each rank: have the victim's parameter change by one bit, once."""

    def before(rank: int) -> None:
        import torch

        from pipeline.engine.loop import Loop

        if rank != case["rank"]:
            return
        init, left = Loop.__init__, [1]

        def prepared(self: Loop, *arguments: Any) -> None:
            init(self, *arguments)
            update = self.state.optimizer.step

            def flip(*given: Any, **named: Any) -> float:
                norm = update(*given, **named)
                if self.state.step + 1 == case["step"] and left.pop() if left else False:
                    parameters = list(self.state.model.parameters())
                    flat = parameters[case["parameter"] % len(parameters)].detach().view(-1)
                    place = case["element"] % len(flat)
                    bits = flat[place : place + 1].view(torch.int32)
                    bits ^= (1 << case["bit"]) if case["bit"] < 31 else -(1 << 31)
                return norm

            self.state.optimizer.step = flip

        Loop.__init__ = prepared  # type: ignore[method-assign]

    return before


def flipped_bits(folder: Path, scale: float) -> list[Row]:
    """All 32 bits, each in a place of its own."""
    rows = []
    for world in (WORLD, 2):
        reference = undisturbed(folder, world)
        dice = random.Random(world)
        cases = [
            {
                "bit": bit,
                "world": world,
                "rank": dice.randrange(world),
                "step": dice.randint(1, STEPS - 2),
                "parameter": dice.randrange(1000),
                "element": dice.randrange(10000),
                "reference": reference,
            }
            for bit in spread(range(32), scale)
        ]
        found = trials(flipped, cases, folder / f"flips-{world}")
        note = f"{sum(facts['rolled_back'] for facts in found)} made the loss infinite and were rolled back"
        rows.append(
            row(f"a bit of a parameter of one of {world} ranks flips: caught before the next save", found, note)
        )
    return rows


# ---------------------------------------------------------------- the rows


def undisturbed(folder: Path, world: int = WORLD) -> Facts:
    return references([world], folder / f"reference-{world}", keep_checkpoints=STEPS)[world]


def trials(function: Any, cases: Sequence[Facts], folder: Path, lanes: int = LANES) -> list[Facts]:
    folder.mkdir()
    return in_lanes(function, cases, folder, 550, lanes)


def row(fault: str, found: Sequence[Facts], note: str = "") -> Row:
    failed = tuple("; ".join(facts["problems"])[:500] for facts in found if facts["problems"])
    return Row(fault, len(found), len(failed), None, note, failed)


INJECTIONS: dict[str, Injection] = {
    "hangs": hangs,
    "slow_ranks": slow_ranks,
    "not_finite": not_finite,
    "flipped_bits": flipped_bits,
}
