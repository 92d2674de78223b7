"""``python -m pipeline.bench records``: what looking at a large run costs.

Makes a run of files as 32 nodes of 8 GPUs leave it after a week (8,601 steps in 400 attempts, a log, a line of metrics
a step, the samples of 256 GPUs) and, as the control, one of a tenth of the attempts. Prints the processor time and
memory of `pipeline.status`, `pipeline.report` and `pipeline.plan` beside their bars, and what a second look opens.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import load_profile, load_recipe
from pipeline.monitor.fold import Fold
from pipeline.run import account
from pipeline.run.chain import Chain
from pipeline.run.rundir import Attempt, RunDir
from pipeline.run.state import Sent, events_of, survey
from pipeline.strict_toml import table_of
from pipeline.words import columns

NODES, GPUS = 32, 8
ATTEMPTS = 400
CONTROL = 10  # the smaller run has a tenth of the attempts
WEEK_S = 7 * 86_400
BEGAN = 1.795e9  # Unix time
STATUS_S, REPORT_S, REPORT_MB, PLAN_S, SAMPLES_MB = 0.3, 5.0, 100, 3.0, 100  # the bars; seconds of processor time
LOOKS = 5  # at each figure; the one that the machine disturbed least counts
PLANNED = 1024
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Print a table, or its figures as JSON; 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench records", description=__doc__)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, help=f"of both phases together ({ATTEMPTS})")
    parser.add_argument("--json", action="store_true", help="figures instead of the table")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-records-") as name:
        rows = list(measured(Path(name), chosen.attempts))
    held = all(row["value"] <= row["bar"] for row in rows if row["bar"] is not None)
    print(json.dumps({"rows": rows, "held": held}) if chosen.json else "\n".join(table(rows)))
    return 0 if held else 1


def measured(folder: Path, attempts: int) -> Iterator[Row]:
    """A row for each figure: ``what``, ``unit``, ``value``, its ``bar``, and ``control``, that of the smaller run."""
    large, small = folder / "large", folder / "small"
    invent(large, attempts)
    invent(small, max(2, attempts // CONTROL))
    for what, bars in (("status", (STATUS_S, None)), ("report", (REPORT_S, REPORT_MB))):
        whole, control = (
            [costs(f"pipeline.{what}", str(run)) for run in pair] for pair in ((large,) * LOOKS, (small,) * LOOKS)
        )
        for number, (unit, bar) in enumerate(zip(("s", "MB"), bars, strict=True)):
            value, other = (min(cost[number] for cost in each) for each in (whole, control))
            yield {"what": what, "unit": unit, "value": value, "bar": bar, "control": other}
    again, first = looks(large)
    yield {"what": "files opened by a second look of status --watch", "unit": "", "value": again, "bar": None,
           "control": first}  # fmt: skip
    numbers = [",".join(map(str, range(1, last + 1))) for last in (PLANNED, PLANNED // CONTROL)]
    words = ("--recipe", "bert_large", "--cluster", "dgx_a100_80g", "--nodes")
    seconds, fewer = (min(costs("pipeline.plan", *words, each)[0] for _ in range(LOOKS)) for each in numbers)
    yield {"what": f"plan of {PLANNED:,} numbers of nodes", "unit": "s", "value": seconds, "bar": PLAN_S,
           "control": fewer}  # fmt: skip
    size = sum(file.stat().st_size for file in large.glob("gpu/*")) / 1e6
    unfolded = len(json.dumps(reading(random.Random(0), 0.0))) * WEEK_S * NODES * GPUS / 1e6
    yield {"what": "GPU samples of a week", "unit": "MB", "value": size, "bar": SAMPLES_MB, "control": unfolded}


def costs(*words: str) -> tuple[float, float]:
    """Processor seconds and peak MB of a command, all its processes."""
    child = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def looks(path: Path) -> tuple[int, int]:
    """Files that are opened as `pipeline.status` looks a second time in one process, and the first time."""
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    counts = []
    for _ in range(2):
        opened.clear()
        run = RunDir(path)
        survey(run, Sent.of(run))
        account.read(run, Chain.of(run).stages, events_of(run), [], BEGAN + WEEK_S)
        counts.append(sum(str(path) in name for name in opened))
    return counts[1], counts[0]


# ---------------------------------------------------------------- a run made of files


def invent(path: Path, attempts: int) -> None:
    """A run of bert_large whose two phases share a week and ``attempts`` equal attempts, stopped but for the last."""
    path.mkdir()
    recipe = load_recipe("bert_large")
    values = {"format": 1, "recipe": table_of(recipe), "profile": dataclasses.asdict(load_profile("dgx_a100_80g"))}
    (path / "run.json").write_text(json.dumps({**values, "nodes": NODES, "corpora": {}, "data_dir": "../data"}))
    chain, began = Chain.of(RunDir(path)), BEGAN
    chain.run.event("submitted", recipe="bert_large", cluster="dgx_a100_80g", nodes=NODES)
    for name in chain.stages:
        if name not in recipe.phases:
            continue
        folder, steps, count = chain.run.stage(name), recipe.phases[name].steps, attempts // len(recipe.phases)
        folder.path.mkdir(parents=True)
        (folder.path / "stage.json").write_text(json.dumps(chain.record(name)))
        ends = [round(number * steps / count) for number in range(count + 1)]
        step_s = WEEK_S / len(recipe.phases) / steps
        gpus = Gpus(chain.run.path, name, began)
        for first, last in itertools.pairwise(ends):
            attempt = folder.new_attempt(f"123456.{first}")
            began = fill(chain, attempt, name, (first, last), began, step_s, stopped=last < steps)
            gpus.sample(attempt.number, began - (last - first) * step_s, began)
        record = {"started": BEGAN, "finished": began, "duration_s": WEEK_S / len(recipe.phases)}
        result = {"checkpoint": f"attempts/{count:04d}/step-{steps:08d}", "step": steps, "samples": steps * 65_536}
        folder.mark_done({**chain.record(name), "attempt": count, **record, "result": result})


def fill(
    chain: Chain, attempt: Attempt, stage: str, steps: tuple[int, int], began: float, step_s: float, *, stopped: bool
) -> float:
    """What an attempt over the steps behind the first of ``steps`` leaves; when it ended."""
    (first, last), number = steps, attempt.number
    host = f"node{number % NODES:03d}"
    owner = {"launch": f"123456.{number}", "job_id": "123456", "host": host, "pid": 4242, "time": began}
    (attempt.path / "owner.json").write_text(json.dumps(owner))
    origin = {"attempt": number - 1, "step": first} if first else None
    (attempt.path / "attempt.json").write_text(json.dumps({"resumed_from": origin, "time": began}))
    chain.run.event("started", stage=stage, attempt=number, world_size=NODES * GPUS)
    with attempt.metrics.open("w") as metrics, attempt.log.open("w") as log:
        for step in range(first + 1, last + 1):
            line = {"stage": stage, "attempt": number, "step": step, "since": began, "time": began + step_s}
            spent = {"data": 0.004, "compute": 0.86 * step_s, "communication": 0.13 * step_s, "checkpoint": 0.0}
            figures = {"loss": 9.64 * 0.9999**step, "mlm_loss": 8.95 * 0.9999**step, "nsp_loss": 0.69}
            figures |= {"learning_rate": 1.4e-4, "grad_norm": 1.98, "sequences_per_s": 15603.03, "tokens_per_s": 1.67e6}
            metrics.write(json.dumps({**line, "spent_s": spent, **figures, "step_s": step_s}) + "\n")
            log.write(f"{stage}: step {step}  loss 6.8275  lr 0.0005  15603.0 sequences/s\n")
            began += step_s
    if stopped:
        attempt.write_verdict(75, f"asked to stop (signal SIGUSR2); step {last} is saved", 3)
        chain.run.event("slow_rank", stage=stage, attempt=number, step=last, rank=3, host=host, ratio=1.6)
    return began


class Gpus:
    """The samples of all GPUs of a stage: the windows of one, written for each under its own name."""

    def __init__(self, run: Path, stage: str, began: float) -> None:
        self.folder, self.stage, self.began, self.draw = run / "gpu", stage, began, random.Random(0)
        self.folder.mkdir(exist_ok=True)

    def sample(self, attempt: int, began: float, ended: float) -> None:
        """What an attempt adds to ``gpu/NODE.jsonl``, read once a second from ``began`` to ``ended``."""
        fold, windows, which = (
            Fold(age_s=began - self.began),
            [],
            {"stage": self.stage, "begun": self.began, "attempt": attempt},
        )
        for second in range(round(ended - began)):
            if (window := fold.add(float(second), reading(self.draw, float(second)))) is not None:
                windows.append({"time": round(began + second, 3), **which, **window})
        if (window := fold.close()) is not None:
            windows.append({"time": round(ended, 3), **which, **window})
        for node in range(NODES):
            own = [{"gpu": gpu, "name": "NVIDIA A100-SXM4-80GB"} for gpu in range(GPUS)]
            first = [{**known, "uuid": f"GPU-{node:08x}-1234-5678-9abc-{known['gpu']:012x}"} for known in own]
            lines = (window | gpu for number, window in enumerate(windows) for gpu in (own if number else first))
            with (self.folder / f"node{node:03d}.jsonl").open("a") as file:
                file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def reading(draw: random.Random, second: float) -> Row:
    """What NVML says of a GPU at work."""
    return {
        "utilization_pct": draw.randrange(85, 100), "memory_used_mb": 61_234, "memory_total_mb": 81_920,
        "power_w": round(draw.uniform(300, 400), 1), "energy_j": 350.5 * second,
        "temperature_c": draw.randrange(50, 65), "sm_clock_mhz": 1410, "memory_clock_mhz": 1593, "throttle": [],
        "ecc_corrected": 0, "ecc_uncorrected": 0, "xid": [],
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """The figures in lines."""
    cells = [("what", "found", "bar", "control")]
    for row in rows:
        unit = f" {row['unit']}".rstrip()
        value, bar, control = ("" if row[key] is None else f"{row[key]:,.4g}" for key in ("value", "bar", "control"))
        cells.append((row["what"], value + unit, bar and bar + unit, control + unit))
    return [
        *columns(cells, (1, 2, 3)),
        f"control: a run of 1/{CONTROL} of the attempts, the first look, 1/{CONTROL} of the numbers, samples as read",
    ]
