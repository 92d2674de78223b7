"""``python -m pipeline.bench scaling``: strong scaling of pretraining, all rows of a table sent by one command.

A row is a node count, a precision and a phase, trained for a few steps of the recipe's global batch in an ordinary run,
FOLDER/PHASE-PRECISION-NODES, on the data of FOLDER/data. What else submit knows (--set, -p, -A, …) is given as to it.
The same call later sends what is missing and prints what there is; without --nodes it only prints. status and cancel
take FOLDER. With a profile of this machine alone --nodes counts processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import publish_json
from pipeline.batch import BatchPlan
from pipeline.bert.config import shape_of
from pipeline.config import PRECISIONS, Recipe, load_profile, load_recipe
from pipeline.errors import ConfigError
from pipeline.launch import estimate
from pipeline.launch.family import requests, start_all
from pipeline.launch.request import Request, hours
from pipeline.launch.scripts import spent_gpu_hours
from pipeline.launch.start import planned
from pipeline.run.family import DATA, runs_of
from pipeline.run.files import to_write
from pipeline.run.rundir import RunDir
from pipeline.run.state import Sent, survey
from pipeline.stages import training_of
from pipeline.words import columns, is_number

WARMUP = 2  # steps of each attempt that are not counted
MINUTES = 20  # time limit of a row, unless --time says another
COLUMNS = ("phase", "precision", "nodes", "gpus", "micro_batch", "batch_per_gpu", "accumulation", "sequences_per_s",
           "scaling", "state")  # fmt: skip
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Send the rows that are missing; then print the table, or its figures as JSON."""
    options, words = parser().parse_known_args(arguments)
    code, rows = 0, []
    if options.nodes:
        data, asked = rows_asked(options, words)
        with aside() if options.json else contextlib.nullcontext():
            print(budget(asked, options.max_gpu_hours))
            if not options.dry_run:
                code = start_all(data, asked)
        rows = [planned_row(one) for one in asked if not one.run.exists]
    elif words:
        raise ConfigError(f"{' '.join(words)}: means nothing without --nodes, which sends rows")
    runs = [run for run in runs_of(options.run) if run.exists and run.path.name != DATA]
    rows = with_scaling([*map(row_of, runs), *rows])
    figures = {"rows": rows, "environment": environment(runs), "model": model(runs)}
    if options.out:
        publish_json(options.out, figures)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        cells = [["" if row[key] is None else str(row[key]) for key in COLUMNS] for row in rows]
        print("\n".join(columns([list(COLUMNS), *cells], right=range(2, 9))))
    return code


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What this process and its children say goes to stderr: stdout is for the figures."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.bench scaling", description=__doc__, allow_abbrev=False)
    add = options.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", help="where the rows' runs lie")
    add("--nodes", type=counts, metavar="N,N", help="node counts, as 1,2,4,8 (default: send nothing)")
    add("--recipe", help="whose model, phases and global batches")
    add("--cluster", help="how the site runs jobs: a name in slurm/profiles or a .toml file")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a recipe value")
    add("--precision", metavar="NAMES", help=f"of {', '.join(PRECISIONS)}, separated by commas (default: the recipe's)")
    add("--phase", metavar="NAMES", help="phases, separated by commas (default: all of the recipe)")
    add("--steps", type=int, default=10, help=f"timed steps, after {WARMUP} that are not (default: 10)")
    add(
        "--micro-batch",
        default="",
        metavar="N",
        help="most samples at a time, also as tf32=128,phase2.tf32=16,fp16=256",
    )
    limit_help = f"send nothing if the rows may use more by their time limit (--time, default {MINUTES} minutes each)"
    add("--max-gpu-hours", type=hours, default=0.0, metavar="H", help=limit_help)
    add("--dry-run", action="store_true", help="show the rows and what they cost; send nothing")
    add("--json", action="store_true", help="figures instead of the table")
    add("--out", type=to_write, metavar="FILE", help="write the figures there, too")
    return options


def counts(text: str) -> list[int]:
    """``1,2,4``, for argparse."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text}: each at least 1, and none twice")
    return sorted(numbers)


# -------------------------------------------------------------------- what to send


def rows_asked(options: argparse.Namespace, words: Sequence[str]) -> tuple[Request, list[Request]]:
    """The run of the data and those of the rows. ConfigError with all that is wrong."""
    if not (options.recipe and options.cluster):
        raise ConfigError("--nodes sends rows: name a --recipe and a --cluster, as to pipeline.submit")
    recipe, local = load_recipe(options.recipe, options.settings), load_profile(options.cluster).runner == "local"
    phases = options.phase.split(",") if options.phase else list(recipe.phases)
    precisions = options.precision.split(",") if options.precision else [recipe.train.precision]
    wrong = [f"--phase {name}: recipe {recipe.name} has {', '.join(recipe.phases)}" for name in phases
             if name not in recipe.phases]  # fmt: skip
    wrong += [f"--precision {name}: choose from {', '.join(PRECISIONS)}" for name in precisions
              if name not in PRECISIONS]  # fmt: skip
    wrong += [f"--steps {options.steps}: at least 1"] if options.steps < 1 else []
    if wrong:
        raise ConfigError("\n".join(wrong))
    members = {}
    for phase in phases:
        for precision in precisions:
            settings = spelled(settings_of(phase, precision, options))
            for count in options.nodes:
                width = ["--processes" if local else "--nodes", str(count)]
                members[f"{phase}-{precision}-{count}"] = [*width, "--stages", phase, *settings]
    fitting: dict[str, object] = {}
    for phase in phases:
        fitting |= settings_of(phase, precisions[0], options)
    names = ", ".join(f'"{name}"' for name in phases)
    members[DATA] = spelled({**fitting, "phases": f"[{names}]"})
    common = ["--recipe", options.recipe, "--cluster", options.cluster, *(f"--set={text}" for text in options.settings)]
    data, rows = requests(options.run, members, [*common, *([] if local else [f"--time={MINUTES}"]), *words])
    return pretraining(data), [pretraining(asked) for asked in rows]


def pretraining(asked: Request) -> Request:
    """The same without tasks, whose files need not be there."""
    assert isinstance(asked.recipe, Recipe)  # a --recipe was given
    without = dataclasses.replace(asked.recipe, squad=None, mrpc=None, sst2=None, inference=None)
    return dataclasses.replace(asked, recipe=without)


def settings_of(phase: str, precision: str, options: argparse.Namespace) -> dict[str, object]:
    """A recipe of one phase of a few steps that nothing interrupts."""
    steps, micro_batch = options.steps + WARMUP, micro_batch_of(options.micro_batch, phase, precision)
    values = {"phases": f'["{phase}"]', "train.precision": precision, f"{phase}.steps": steps, "train.log_every": 1,
              "train.eval_every": steps, "train.checkpoint_every": steps}  # fmt: skip
    return values | ({f"{phase}.micro_batch": micro_batch} if micro_batch else {})


def spelled(settings: Mapping[str, object]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def micro_batch_of(text: str, phase: str, precision: str) -> int | None:
    """Of ``128``, or of ``tf32=128,phase2.tf32=16``; None where nothing is said, which is the profile's."""
    named = {name: value for name, _, value in (part.rpartition("=") for part in text.split(","))} if text else {}
    micro_batch = next((named[key] for key in (f"{phase}.{precision}", precision, "") if key in named), None)
    if odd := [value for value in named.values() if not value.isdecimal() or int(value) < 1]:
        raise ConfigError(f"--micro-batch {text}: {odd[0]!r} is no number of samples; as in tf32=128,phase2.tf32=16")
    return None if micro_batch is None else int(micro_batch)


def budget(asked: Sequence[Request], limit: float) -> str:
    """How many rows are missing and what they cost. ConfigError where that may be more than the ``limit`` of hours."""
    missing = [one for one in asked if planned(one).select(one.stages)]
    most = sum(one.asked["pretrain"].resources.gpu_hours() for one in missing if not one.local)
    spent = sum(spent_gpu_hours(one.run) for one in asked)
    said = f"{len(missing)} of {len(asked)} rows to measure"
    if most:
        said += f", at most {60 * most:,.0f} GPU-minutes by their time limits"
        known = [expected for one in missing if (expected := gpu_hours(one)) is not None]
        said += f", about {60 * sum(known):,.0f} by the profile's rates" if len(known) == len(missing) else ""
    if limit and most + spent > limit:
        raise ConfigError(
            f"{said}; {60 * spent:,.0f} are spent and --max-gpu-hours {limit:g} allows {60 * limit:,.0f}: allow more, "
            "or give a shorter --time"
        )
    return said


def gpu_hours(asked: Request) -> float | None:
    """Of a row's steps alone; None where the profile has no rates of it."""
    recipe, ranks = asked.recipe, asked.asked["pretrain"].resources.most_tasks
    assert isinstance(recipe, Recipe)
    taken = estimate.hours_of(recipe, estimate.declared(recipe, asked.profile), ranks, recipe.phases.keys())
    return None if taken is None else taken * ranks


# -------------------------------------------------------------------- what was measured


def planned_row(asked: Request) -> Row:
    """The row of a run that is yet to begin."""
    assert isinstance(asked.recipe, Recipe)
    ranks = asked.profile.processes if asked.local else asked.asked["pretrain"].resources.most_tasks
    return row(asked.run, asked.recipe, asked.nodes[1], ranks)


def row_of(run: RunDir) -> Row:
    """The row of a run, with its figures when its phase is done; else the state of that."""
    settings = run.whole_settings
    recipe, nodes = training_of(settings, str(run.path / "run.json")), int(settings["nodes"])
    if len(recipe.phases) != 1:
        raise ConfigError(
            f"{run.path}: no row of a scaling table, which trains one phase; name the folder of such rows"
        )
    (phase,) = recipe.phases
    worlds = [event["world_size"] for event in run.events if event.get("event") == "started"]
    measured = row(run, recipe, nodes, worlds[-1] if worlds else nodes)
    state = next(stage for stage in survey(run, Sent.of(run)) if stage["name"] == phase)
    measured["state"] = state["state"]
    timed = list(timed_lines(run, phase)) if state["state"] == "done" else []
    if timed and len(set(worlds)) == 1:
        seconds = [line["step_s"] for line in timed]
        tokens = sum(line["tokens_per_s"] * line["step_s"] for line in timed)
        mean = statistics.fmean(seconds)
        measured |= {
            "sequences_per_s": round(recipe.phases[phase].global_batch / mean, 3),
            "tokens_per_s": round(tokens / sum(seconds), 1),
            "steps": len(seconds),
            "step_s": round(mean, 5),
            "step_deviation_s": round(statistics.stdev(seconds), 5) if len(seconds) > 1 else None,
        }
    return measured


def row(run: RunDir, recipe: Recipe, nodes: int, ranks: int) -> Row:
    """Who computes what in a row; ``gpus`` are those of a node, or its processes."""
    ((name, phase),) = recipe.phases.items()
    plan = BatchPlan(phase.global_batch, phase.micro_batch or 1, ranks)
    return {
        "variant": "ours",
        "phase": name,
        "seq_len": phase.seq_len,
        "precision": recipe.train.precision,
        "nodes": nodes,
        "gpus": ranks // nodes,
        "micro_batch": plan.micro_batch,
        "batch_per_gpu": plan.largest_rank_batch,
        "accumulation": plan.accumulation,
        "sequences_per_s": None,
        "scaling": None,
        "recipe": recipe.name,
        "global_batch": phase.global_batch,
        "lengths": "real",
        "run": run.path.name,
        "state": "todo",
    }


def timed_lines(run: RunDir, phase: str) -> Iterator[dict[str, Any]]:
    """The steps of a phase but for the first of each attempt, which compile and warm up."""
    for attempt in run.stage(phase).attempts:
        yield from [line for line in attempt.lines if is_number(line.get("step_s"))][WARMUP:]


def with_scaling(rows: list[Row]) -> list[Row]:
    """Rows in order of phase, precision and ranks, each beside the first of its phase and precision."""
    rows = sorted(rows, key=lambda each: (each["phase"], each["precision"], each["nodes"] * each["gpus"]))
    first: dict[tuple[str, str], float | None] = {}
    for each in rows:
        base = first.setdefault((each["phase"], each["precision"]), each["sequences_per_s"])
        if base and each["sequences_per_s"]:
            each["scaling"] = round(each["sequences_per_s"] / base, 3)
    return rows


def environment(runs: Sequence[RunDir]) -> dict[str, Any]:
    """What the rows were measured on, as the first that is done has it on record."""
    for run in runs:
        settings = run.settings
        for phase in training_of(settings, str(run.path / "run.json")).phases:
            done = run.stage(phase).done or {}
            if machine := done.get("machine"):
                torch = (done.get("made_with") or {}).get("torch")
                return {"cluster": settings["profile"].get("name"), "torch": torch, **machine}
    return {}


def model(runs: Sequence[RunDir]) -> dict[str, int] | None:
    """The shape of the rows' model; None where they have several, which make no table."""
    shapes = [shape_of(training_of(run.settings, str(run.path / "run.json")).model) for run in runs]
    return shapes[0] if shapes and all(shape == shapes[0] for shape in shapes) else None
