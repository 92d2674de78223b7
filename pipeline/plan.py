"""``python -m pipeline.plan``: what any number of nodes means in micro-batches, hours, memory and money.

Sends nothing. Hours need rates: the profile's, those that ``python -m pipeline.bench gpu`` measured (``--rates``), or
those of a run (``--fit``). With ``--rate`` or ``--preempt-hours`` it also says how often to save and what interruptions
will cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import batch
from pipeline.bert import costs
from pipeline.config import Recipe, load_profile, load_recipe
from pipeline.errors import ConfigError, run_command
from pipeline.launch import corpora, estimate
from pipeline.launch.estimate import Rates
from pipeline.launch.request import micro_batch_limit
from pipeline.run.interruptions import advise, chance_of_none, expected_restarts, young_s
from pipeline.words import columns, number, size, whole_numbers
from slurm.profile import Profile

COLUMNS = ("phase", "nodes", "world_size", "global_batch", "rank_batch", "micro_batch", "accumulation", "balance")
PARTS = {"compute_s": "computing", "reduce_s": "the sum of gradients", "lamb_s": "LAMB", "host_s": "the host"}
MOSTLY, MANY_RANKS = 0.9, 1000  # share of a step; ranks whose looks at a file system add up
ESTIMATES = ("step_s", "sequences_per_s", "hours", "gpu_hours", "memory_gb", "fitting_micro")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a name in pipeline/recipes or a .toml file")
    parser.add_argument("--cluster", required=True, help="a name in slurm/profiles or a .toml file")
    parser.add_argument("--nodes", default="1", help="node counts: 1,2,4 or 1-64 (default 1)")
    parser.add_argument("--precision", help="short for --set train.precision=…")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--rate", type=positive, metavar="R", help="failures per 1,000 node-days (seen: 2 to 16)")
    parser.add_argument("--preempt-hours", type=positive, metavar="H", help="mean hours between preemptions, unwarned")
    parser.add_argument("--save-seconds", type=positive, default=0.5, metavar="S", help="steps stand still (0.5)")
    parser.add_argument("--restart-seconds", type=positive, default=180.0, metavar="S", help="to the first step (180)")
    parser.add_argument("--hours", type=positive, help="of training (default: by the rates)")
    speeds = parser.add_mutually_exclusive_group()
    speeds.add_argument("--rates", type=Path, metavar="FILE", help="a JSON of python -m pipeline.bench gpu")
    speeds.add_argument("--fit", type=Path, metavar="RUN", help="a run: its steps say how fast this machine is")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the corpora: what their preparation takes")
    parser.add_argument("--workers", type=positive, default=16, metavar="N", help="processes that prepare them (16)")
    parser.add_argument("--price-per-gpu-hour", type=positive, metavar="P", help="in any currency: for the cost")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--ranks", action="store_true", help="with --json: the batch of every rank")
    arguments = parser.parse_args()
    if arguments.ranks and not arguments.json:
        parser.error("--ranks goes with --json")
    settings = arguments.settings + ([f'train.precision="{arguments.precision}"'] if arguments.precision else [])
    profile = load_profile(arguments.cluster)
    recipe = load_recipe(arguments.recipe, settings, gpus=profile.gpus_per_node > 0)
    counts = node_counts(arguments.nodes)
    rates = estimate.declared(recipe, profile)
    if arguments.rates:
        rates = estimate.measured(arguments.rates, recipe, rates)
    elif arguments.fit:
        rates = estimate.fitted(arguments.fit, recipe, rates)
    planned = [
        {**row, **estimates(recipe, profile, rates, row)} for row in rows(recipe, profile, counts, arguments.ranks)
    ]
    runs = totals(planned, recipe, arguments.price_per_gpu_hour)
    asked = arguments.rate or arguments.preempt_hours
    saving = [checkpoint_row(recipe, planned, count, arguments) for count in counts] if asked else []
    if arguments.json:
        print(json.dumps({"rows": planned, "runs": runs, **({"checkpoints": saving} if asked else {})}))
    else:
        show(planned)
        show_estimates(planned, runs, rates, profile)
        show_limits(planned, recipe)
        if arguments.data:
            print(preparation(recipe, arguments.data, arguments.workers))
        if asked:
            show_saving(saving, arguments)
    return 0


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def node_counts(text: str) -> list[int]:
    """``1,2,4-6`` as a list of node counts."""
    if counts := whole_numbers(text.replace(" ", ""), 1, 100_000):
        return counts
    raise ConfigError(f"--nodes {text}: write it as 4, 1,2,4 or 1-64, of 1 to 100000")


def rows(recipe: Recipe, profile: Profile, nodes: list[int], with_ranks: bool = False) -> list[dict[str, Any]]:
    """One row for each phase and node count; ``rank_batch`` and ``accumulation`` are those of the busiest rank."""
    planned = []
    for name, phase in recipe.phases.items():
        limit = micro_batch_limit(recipe, profile, name)
        for count in nodes:
            plan = batch.plan(phase.global_batch, limit, profile.ranks(count))
            row: dict[str, Any] = {
                "phase": name,
                "nodes": count,
                "world_size": plan.world_size,
                "global_batch": plan.global_batch,
                "rank_batch": plan.largest_rank_batch,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                "balance": round(plan.balance, 4),
            }
            if (better := batch.better_micro_batch(plan)) is not None:
                row["better_micro_batch"] = better
            if with_ranks:
                row["rank_batches"] = plan.rank_batches
            planned.append(row)
    return planned


def estimates(recipe: Recipe, profile: Profile, rates: Rates, row: dict[str, Any]) -> dict[str, Any]:
    """Memory of one GPU and, where the rates know the phase, seconds of a step by part, and hours of all steps."""
    name = row["phase"]
    phase = recipe.phases[name]
    known: dict[str, Any] = {"memory_gb": float(f"{estimate.memory_gb(recipe, phase, row['micro_batch']):.3g}")}
    if profile.gpu_memory_gb is not None:
        known["fitting_micro"] = estimate.largest_micro_batch(recipe, phase, profile.gpu_memory_gb)
    if name in rates.sequences_per_s:
        plan = batch.BatchPlan(row["global_batch"], row["micro_batch"], row["world_size"])
        step = estimate.step_of(rates, name, plan, recipe)
        hours = phase.steps * step.total_s / 3600
        known |= {"step_s": step.total_s, "sequences_per_s": plan.global_batch / step.total_s, "hours": hours}
        known |= {"gpu_hours": hours * plan.world_size, "parts_s": dataclasses.asdict(step)}
    return known


def totals(planned: list[dict[str, Any]], recipe: Recipe, price: float | None) -> list[dict[str, Any]]:
    """Both phases together by node count: disk, and hours, GPU-hours and cost where they are known."""
    runs = []
    for nodes in dict.fromkeys(row["nodes"] for row in planned):
        own = [row for row in planned if row["nodes"] == nodes]
        run: dict[str, Any] = {"nodes": nodes, "disk_gb": estimate.disk_gb(recipe)}
        if all("hours" in row for row in own):
            run |= {key: sum(row[key] for row in own) for key in ("hours", "gpu_hours")}
            if price is not None:
                run["cost"] = price * run["gpu_hours"]
        runs.append(run)
    return runs


def checkpoint_row(
    recipe: Recipe, planned: list[dict[str, Any]], nodes: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """How often to save on ``nodes`` nodes, and what is lost; steps, restarts and chances where the hours are known."""
    preempt_s = asked.preempt_hours * 3600 if asked.preempt_hours else math.inf
    save_s, restart_s = asked.save_seconds, asked.restart_seconds
    advice = advise(asked.rate or 0.0, nodes, save_s=save_s, restart_s=restart_s, preempt_s=preempt_s)
    row: dict[str, Any] = {
        "nodes": nodes,
        "between_s": advice.between_s,
        "young_s": young_s(save_s, advice.between_s),
        "interval_s": advice.interval_s,
        "lost": advice.lost,
        "restart_lost": advice.restart_lost,
    }
    steps = {name: phase.steps for name, phase in recipe.phases.items()}
    step_s = {each["phase"]: each["step_s"] for each in planned if each["nodes"] == nodes and "step_s" in each}
    if asked.hours:
        step_s = dict.fromkeys(steps, asked.hours * 3600 / sum(steps.values()))
    if step_s.keys() == steps.keys():
        hours = sum(steps[name] * step_s[name] for name in steps) / 3600
        row["hours"] = hours
        row["checkpoint_every"] = max(1, int(advice.interval_s / max(step_s.values())))
        row["restarts"] = expected_restarts(advice, hours)
        row["chance_of_none"] = chance_of_none(advice, hours)
    return row


def show_saving(saving: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """The checkpoint advice as a table, and in words what it rests on."""
    causes = [f"{asked.rate:g} failures per 1,000 node-days"] if asked.rate else []
    causes += [f"an unwarned preemption every {asked.preempt_hours:g} h"] if asked.preempt_hours else []
    print(
        f"\nInterruptions by {' and '.join(causes)};\na checkpoint holds the steps up for {asked.save_seconds:g} s, "
        f"a restart takes {asked.restart_seconds:g} s:"
    )
    cells = [("nodes", "mean between", "save every", "in steps", "time lost", "hours", "restarts", "none at all")]
    for row in saving:
        known = "hours" in row
        cells.append(
            (
                str(row["nodes"]),
                f"{row['between_s'] / 3600:.3g} h",
                f"{row['interval_s']:,.0f} s",
                f"{row['checkpoint_every']:,}" if known else "-",
                f"{100 * row['lost']:.2f} %",
                f"{row['hours']:.3g}" if known else "-",
                f"{row['restarts']:.2g}" if known else "-",
                f"{100 * row['chance_of_none']:.1f} %" if known else "-",
            )
        )
    print("\n".join(columns(cells, right=range(8))))
    print(
        "save every: Daly 2006, which refines Young 1974; time lost: saving, doing again, restarting; "
        "--set train.checkpoint_every takes steps\n"
        "a job that is warned before it is stopped (the profile's signal_s) saves first and loses only the restart"
    )
    last = saving[-1]
    if "hours" not in last:
        print("give --hours, --rates or --fit to see steps, restarts and chances")
    elif last["chance_of_none"] > 0.95:
        print(
            f"on {last['nodes']} nodes for {last['hours']:.1f} h the chance of any interruption is "
            f"{100 * (1 - last['chance_of_none']):.1f} %: time limits and bad input will stop you sooner"
        )


def show_estimates(planned: list[dict[str, Any]], runs: list[dict[str, Any]], rates: Rates, profile: Profile) -> None:
    """What a step takes and a GPU holds, and the whole training by node count."""
    table: list[Sequence[str]] = [("phase", "nodes", *ESTIMATES)]
    for row in planned:
        table.append((row["phase"], str(row["nodes"]), *(number(row.get(key, "-")) for key in ESTIMATES)))
    print("\n" + "\n".join(columns(table, right=range(len(table[0])))))
    holds = "" if profile.gpu_memory_gb is None else f", a GPU has {profile.gpu_memory_gb:g}"
    source = rates.source if rates.sequences_per_s else "unknown: give --rates, --fit, or [rates] in the profile"
    print(f"rates {source}; memory_gb and fitting_micro are arithmetic{holds}")
    for run in runs:
        spent = f"{number(run['hours'])} h, {number(run['gpu_hours'])} GPU-hours, " if "hours" in run else ""
        spent += f"cost {run['cost']:,.0f}, " if "cost" in run else ""
        print(f"{run['nodes']} node{'s' if run['nodes'] > 1 else ''}: {spent}{size(1e9 * run['disk_gb'])} of disk")


def preparation(recipe: Recipe, data_dir: Path, workers: float) -> str:
    """Disk, hours and memory of the data stages."""
    if absent := [name for name in recipe.data.corpora if not (data_dir / name).exists()]:
        raise ConfigError(f"{data_dir / absent[0]}: no such file; --data names the folder of the corpora")
    hours, mb = corpora.core_hours(recipe, data_dir), corpora.WORKER_MB
    text, disk = (size(of(recipe, data_dir)) for of in (corpora.text_bytes, corpora.estimated_bytes))
    return (
        f"data: at most {text} of text; {disk} on the disk with the run; {number(hours, 2)} h of one core, "
        f"{number(hours / workers, 2)} h with {workers:g} workers where the disk keeps up; {mb} MB of memory a worker, "
        f"{mb * workers / 1000:.1f} GB together"
    )


def show_limits(planned: list[dict[str, Any]], recipe: Recipe) -> None:
    """What fails first at a size where computing is no longer most of a step, and what the ranks do together."""
    for row in planned:
        parts, step_s = row.get("parts_s"), row.get("step_s")
        if not parts or not step_s or parts["compute_s"] > MOSTLY * step_s:
            continue
        shares = {words: parts[key] / step_s for key, words in PARTS.items()}
        first = max((words for words in shares if words != "computing"), key=shares.__getitem__)
        listed = ", ".join(f"{words} {100 * share:.0f} %" for words, share in shares.items())
        print(f"{row['phase']} on {row['nodes']:,} nodes: a step is {listed}; first to fail is {first}")
    ranks = max(row["world_size"] for row in planned)
    if ranks >= MANY_RANKS:
        gb = 12 * costs.parameters(estimate.config_of(recipe)) / 1e9
        print(
            f"{ranks:,} ranks: one process of each node looks for what all wait for, under 20 files a second together; "
            f"a checkpoint of {gb:.1f} GB is written and read by one rank, whatever their number"
        )


def show(planned: list[dict[str, Any]]) -> None:
    table = columns([COLUMNS, *([str(row[name]) for name in COLUMNS] for row in planned)], right=range(len(COLUMNS)))
    for line, row in zip(table, [{}, *planned], strict=True):
        better = row.get("better_micro_batch")
        print(line + (f"  --set {row['phase']}.micro_batch={better} would balance the ranks" if better else ""))
    print(
        "global_batch, the sum of all ranks' batches, never changes; "
        "rank_batch = micro_batch x accumulation, of the busiest rank; balance = mean / largest"
    )


if __name__ == "__main__":
    run_command(main)
