"""All that a report says, read from the files of a run in whatever state it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Recipe, restore
from pipeline.report.curves import Phase
from pipeline.run import account, gpu_samples
from pipeline.run.account import RunAccount
from pipeline.run.chain import Chain
from pipeline.run.gpu_samples import GpuSamples
from pipeline.run.rundir import RunDir, read_json
from pipeline.run.state import events_of, state_of
from pipeline.stages import TASKS
from pipeline.words import is_number
from slurm.profile import Profile


@dataclass(frozen=True)
class Facts:
    """All that a report says, read from the run's files."""

    chain: Chain
    settings: Mapping[str, Any]
    recipe: Recipe
    profile: Profile
    rows: list[dict[str, Any]]  # a stage each, as pipeline.status shows it; without the report itself
    results: dict[str, dict[str, Any]]  # of the stages that are done
    phases: list[Phase]
    scores: dict[str, dict[str, Any]]  # scores.json of the fine-tuning stages
    events: list[dict[str, Any]]
    account: RunAccount | None
    gpus: GpuSamples | None
    throughput: dict[str, float | None]  # median sequences/s of training, by stage

    @property
    def name(self) -> str:
        return self.chain.run.path.resolve().name

    @property
    def nodes(self) -> int:
        return int(self.settings.get("nodes", 1))


def gather(run: RunDir, *, held: bool) -> Facts:
    """Read a run. ``held``: whether a runner is at work on it. ConfigError when it is not a run."""
    chain, settings = Chain.of(run), run.settings
    origin = str(run.path / "run.json")
    recipe, profile = restore(Recipe, settings["recipe"], origin), restore(Profile, settings["profile"], origin)
    todo = chain.todo()
    events = events_of(run)
    names = [name for name, stage in chain.stages.items() if not stage.always]
    rows = {name: ended(state_of(chain, name, todo, held), events) for name in names}
    done = [name for name in names if rows[name]["state"] == "done"]
    results = {name: (run.stage(name).done or {}).get("result") for name in done}
    live = [name for name, row in rows.items() if row["state"] == "running"]
    phases = [Phase.read(name, phase, run.stage(name)) for name, phase in recipe.phases.items()]
    throughput = {phase.name: phase.median("sequences_per_s") for phase in phases}
    throughput |= {name: median_rate(run, name) for name in TASKS if name in done}
    scores = {name: read_json(run.stage(name).path / "scores.json") or {} for name in TASKS if name in done}
    return Facts(
        chain,
        settings,
        recipe,
        profile,
        list(rows.values()),
        {name: found for name, found in results.items() if isinstance(found, dict)},
        phases,
        {name: found for name, found in scores.items() if isinstance(found.get("scores"), dict)},
        events,
        account.read(run, chain.stages, events, live, time.time()),
        gpu_samples.read(run, names),
        throughput,
    )


def median_rate(run: RunDir, name: str) -> float | None:
    """Median training sequences/s of a fine-tuning stage; None where its lines tell none."""
    try:
        rates = [line.get("sequences_per_s") for line in run.stage(name).metrics()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = [rate for rate in rates if is_number(rate)]
    return statistics.median(known) if known else None


def ended(row: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a stage whose processes were killed, so that only the runner could say that it failed."""
    mine = [event for event in events if event.get("stage") == row["name"]]
    if row["state"] != "todo" or not mine or mine[-1].get("event") != "failed":
        return row
    return {**row, "state": "failed", "reason": f"exit {mine[-1].get('code')}: {mine[-1].get('line')}"}
