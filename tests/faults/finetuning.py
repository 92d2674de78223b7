"""Fine-tuning, killed in the middle of its steps

A real fine-tuning of a toy model on two forked ranks, saved after every step, dropout on. A random rank is killed while
it computes a step, again and again, each attempt after two or three steps of its own; the last one is left alone.
Scores, predictions and weights must be those of the training that nobody disturbed, byte by byte, and every attempt
must go on from a step above 0.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults import zygote
from faults.table import Injection, Row, share, tried
from pipeline.config import FinetuneConfig
from pipeline.node.job import Job, Topology
from pipeline.run.files import read_json, read_jsonl
from pipeline.run.rundir import RunDir
from support.toys import config_of, examples, write_model

MODEL, RESULTS = "model", ("scores.json", "predictions.json", "model/model.safetensors")


def prepare(folder: Path, task: str, count: int = 36) -> Path:
    """A model and a file to learn in ``folder``; returns the file."""
    write_model(folder / MODEL)
    return examples(folder, task, count)


def config(task: str, **changed: Any) -> FinetuneConfig:
    """At least five micro-batches a step, an uneven last batch in each epoch, dropout on."""
    few = {"epochs": 3, "batch": 14, "micro_batch": 2, "reduction": "tree", "checkpoint_every": 1}
    return config_of(task, **{**few, **changed})


def tune(run: Path, folder: Path, task: str, rank: int, world: int, launch: str, changed: dict[str, Any]) -> None:
    """One rank of one attempt, as the worker does it."""
    from pipeline.finetune.task import run as finetune

    stage = RunDir(run).stage(task)
    if rank == 0:
        stage.path.mkdir(parents=True, exist_ok=True)
    attempt = stage.new_attempt(launch) if rank == 0 else stage.join_attempt(launch)
    assert attempt is not None
    job = Job(RunDir(run), task, attempt, Topology(rank, world, rank, launch), workers=1, threads=1)
    data = folder / f"{task}.txt"
    finetune(job, task=task, config=config(task, **changed), model=folder / MODEL, train=data, eval=data)


def start(run: Path, folder: Path, task: str, world: int, **changed: Any) -> list[Any]:
    """The ranks of an attempt, running."""
    launch = os.urandom(8).hex()
    output = folder / "ranks.log"
    return [zygote.start(tune, run, folder, task, rank, world, launch, changed, output=output) for rank in range(world)]


def finish(run: Path, folder: Path, task: str, world: int, **changed: Any) -> None:
    """An attempt to its end; AssertionError when a rank fails."""
    ranks = start(run, folder, task, world, **changed)
    with zygote.ended(*ranks):
        codes = [zygote.code_of(rank, 240) for rank in ranks]
    assert not any(codes), (codes, (folder / "ranks.log").read_text()[-3000:])


def results(run: Path, task: str) -> list[bytes]:
    """What a fine-tuning leaves, byte by byte."""
    return [(RunDir(run).stage(task).path / name).read_bytes() for name in RESULTS]


def losses(run: Path, task: str) -> list[float]:
    """The loss of each step, that of the last attempt where steps were done again."""
    return [line["loss"] for line in RunDir(run).stage(task).metrics() if "loss" in line]


def killed(run: Path, folder: Path, task: str, world: int, kills: int, seed: int, **changed: Any) -> list[int]:
    """Kill a random rank in the middle of steps, ``kills`` times, then let it finish.

    Returns the steps at which the attempts after a kill went on. A kill falls after the attempt has made two steps or
    three of its own.
    """
    dice = random.Random(seed)
    for number in range(kills):
        ranks = start(run, folder, task, world, **changed)
        with zygote.ended(*ranks):
            _until_steps(run, task, number, dice.randrange(2, 4))
            time.sleep(dice.random() * 0.02)
            victim = dice.choice(ranks)
            assert victim.exitcode is None, "the training ended before its kills"
            os.kill(victim.pid or 0, signal.SIGKILL)
            for rank in ranks:
                rank.join(60)
    finish(run, folder, task, world, **changed)
    return _resumed(run, task)[1:]


def _until_steps(run: Path, task: str, number: int, steps: int) -> None:
    """Wait until attempt ``number`` (from 0) has made so many steps."""

    def made() -> bool:
        attempts = RunDir(run).stage(task).attempts
        return len(attempts) > number and sum("loss" in line for line in read_jsonl(attempts[number].metrics)) >= steps

    zygote.until(made, 240, 0.001)


def _resumed(run: Path, task: str) -> list[int]:
    """Where the attempts went on from, 0 for the beginning."""
    records = [read_json(attempt.path / "attempt.json") for attempt in RunDir(run).stage(task).attempts]
    return [(record["resumed_from"] or {"step": 0})["step"] for record in records if record is not None]


KILLS = {"squad": 50, "mrpc": 10}


def kills(folder: Path, scale: float) -> list[Row]:
    """The counts of `KILLS`, at least two."""
    rows = []
    for task, most in KILLS.items():
        count = max(2, share(most, scale))
        epochs = count + 3  # three steps each: enough of them for all kills
        place = folder / task
        place.mkdir()
        prepare(place, task)
        finish(place / "whole", place, task, 2, epochs=epochs)

        def trial(place: Path = place, task: str = task, count: int = count, epochs: int = epochs) -> None:
            resumed = killed(place / "killed", place, task, 2, count, seed=1, epochs=epochs)
            assert results(place / "killed", task) == results(place / "whole", task), "other bytes"
            assert len(resumed) == count, resumed
            assert all(step > 0 for step in resumed), resumed

        rows.append(replace(tried(f"{task}: a rank is killed", [trial]), trials=count))
    return rows


INJECTIONS: dict[str, Injection] = {"finetuning_killed": kills}
