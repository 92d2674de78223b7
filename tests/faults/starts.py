"""Runs of the toy training and their starts: real workers, forked as ranks from a lane that is itself a warm fork."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults import training, zygote
from pipeline.config import DataConfig, Recipe, load_profile
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir
from pipeline.strict_toml import table_of

LANES = 3  # at once: more than this machine's cores, because a start also waits for disk and peers
SAMPLES = f"samples_{training.SEQ_LEN}"


def begun(run: Path, **changes: Any) -> RunDir:
    """A run whose samples are made and whose training has not begun; ``changes`` are fields of its configuration."""
    model, train, optimizer, phase = (
        training.changed(config, changes)
        for config in (training.MODEL, training.TRAIN, training.OPTIMIZER, training.PHASE)
    )
    assert not changes, f"no configuration has {', '.join(changes)}"
    recipe = Recipe(
        name="faults",
        model=model,
        data=DataConfig(jsonl=("none.jsonl",), vocab="vocab.txt"),
        train=train,
        optimizer=optimizer,
        phases={"phase1": phase},
    )
    profile = load_profile("local")
    settings = {"recipe": table_of(recipe), "profile": dataclasses.asdict(profile)}
    training.make_samples(run / "stages" / SAMPLES)
    (run / "vocab.txt").write_text("".join(f"[unused{number}]\n" for number in range(training.VOCAB)))
    (run / "run.json").write_text(json.dumps({**settings, "corpora": {}, "data_dir": "."}))
    chain = Chain.of(RunDir(run))
    chain.run.stage(SAMPLES).mark_done({**chain.record(SAMPLES), "result": {}})
    return chain.run


class Start:
    """The ranks of one start of phase 1. ``before(rank)`` is called in each of them before its work begins."""

    def __init__(self, run: RunDir, world: int, before: Callable[[int], None] | None = None) -> None:
        self.codes: dict[int, int] = {}  # exit codes of the ranks that have ended, negative for a signal
        launch = os.urandom(8).hex()
        self.pids = [_fork(run, rank, world, launch, before) for rank in range(world)]

    @property
    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def wait(self, timeout_s: float) -> bool:
        """Wait until all ranks have ended; whether they did in time."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that are alive."""
        for rank in self.alive:
            os.kill(self.pids[rank], number)

    def trainer(self, rank: int) -> int:
        """Process of a rank that trains: the child of the one that was started, or that one where there is none."""
        children = Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children").read_text().split()
        return int(children[0]) if children else self.pids[rank]


def _fork(run: RunDir, rank: int, world: int, launch: str, before: Callable[[int], None] | None) -> int:
    from data_prep.fanout import die_with_parent
    from pipeline.errors import describe
    from pipeline.worker import run_stage

    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 0
    try:
        die_with_parent(parent)
        log = os.open(run.path / "ranks.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), PIPELINE_LAUNCH=launch)
        if before is not None:
            before(rank)
        run_stage(run, training.STAGE)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        code = describe(error)[1]
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_lanes(
    function: Callable[[Any, Path], Any], cases: Sequence[Any], folder: Path, timeout_s: float, count: int = LANES
) -> list[Any]:
    """``function(case, own folder)`` of each case, in ``count`` lanes forked from the warm parent; JSON, in order.

    AssertionError with the traceback of a case that failed, or when it takes longer than ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    log = folder / "lanes.log"
    lanes = [
        zygote.start(_lane, function, cases[number::count], range(number, len(cases), count), folder, output=log)
        for number in range(min(count, len(cases)))
    ]
    with zygote.ended(*lanes):
        for lane in lanes:
            code = zygote.code_of(lane, max(0.0, deadline - time.monotonic()))
            assert code == 0, log.read_text()[-4000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(cases))]


def _lane(function: Callable[[Any, Path], Any], cases: Sequence[Any], numbers: Sequence[int], folder: Path) -> None:
    for number, case in zip(numbers, cases, strict=True):
        own = folder / str(number)
        own.mkdir()
        try:
            result = function(case, own)
        except BaseException:
            traceback.print_exc()
            raise
        (folder / f"{number}.json").write_text(json.dumps(result))
