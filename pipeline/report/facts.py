"""All that a report says, read from the files of a run in whatever state it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import TASKS, Recipe, restore
from pipeline.report.curves import Metrics, Phase, metrics_of
from pipeline.run import account, gpu_samples
from pipeline.run.account import RunAccount
from pipeline.run.chain import Chain
from pipeline.run.files import read_json
from pipeline.run.gpu_samples import GpuSamples
from pipeline.run.rundir import RunDir, StageDir
from pipeline.run.state import Row, events_of, rows_of
from pipeline.stages import training_of
from pipeline.words import is_number
from slurm.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Facts:
    chain: Chain
    settings: Mapping[str, Any]
    recipe: Recipe
    profile: Profile
    rows: list[Row]  # a stage each, as pipeline.status shows it; without the report itself
    results: dict[str, dict[str, Any]]  # of the stages that are done
    made: dict[str, dict[str, str]]  # by stage that is done, the machine and the versions that made it
    phases: list[Phase]
    scores: dict[str, dict[str, Any]]  # scores.json of the fine-tuning stages
    scratch: dict[str, dict[str, Any]]  # and of the same tasks without pretraining, where they were trained
    tuning: dict[str, dict[str, Metrics]]  # lines of steps by task, and by stage: one, or one for each seed
    events: list[dict[str, Any]]
    account: RunAccount | None
    gpus: GpuSamples | None

    @property
    def name(self) -> str:
        return self.chain.run.path.resolve().name

    @property
    def nodes(self) -> int:
        return int(self.settings.get("nodes", 1))

    @property
    def evaluated(self) -> Phase | None:
        """The last phase that has been evaluated."""
        evaluated = [phase for phase in self.phases if is_number(phase.last("eval_mlm_loss"))]
        return evaluated[-1] if evaluated else None

    def worlds(self, stage: str) -> list[int]:
        """The numbers of ranks that a stage was started with, each once."""
        events = [event for event in self.events if (event.get("event"), event.get("stage")) == ("started", stage)]
        return list(dict.fromkeys(event["world_size"] for event in events if event.get("world_size", 0) > 0))

    def training_s(self, stage: str) -> float | None:
        """Seconds of a finished stage's training steps, their data included; no start-up, evaluation or checkpoint."""
        known = self.account.stages.get(stage) if self.account else None
        return sum(known.parts[part] for part in account.TRAINING) if known and stage in self.made else None

    def figures(self, phase: Phase) -> dict[str, Any]:
        """The phase's last held-out figures, with what only its end has measured."""
        return {**phase.evaluations[-1], **self.results.get(phase.name, {})}


def gather(run: RunDir, *, held: bool) -> Facts:
    """Read a run. ``held``: whether a runner is at work on it. ConfigError when it is not a run."""
    chain, settings = Chain.of(run), run.settings
    origin = str(run.path / "run.json")
    recipe, profile = training_of(settings, origin), restore(Profile, settings["profile"], origin)
    rows = [row for row in rows_of(chain, held) if not chain.stages[row["name"]].always]
    names = [row["name"] for row in rows]
    done = {row["name"]: run.stage(row["name"]) for row in rows if row["state"] == "done"}
    results = {name: (folder.done or {}).get("result") for name, folder in done.items()}
    scores = scores_of(done, {name: name for name in TASKS})
    phases = [Phase.read(name, phase, run.stage(name)) for name, phase in recipe.phases.items()]
    tuning: dict[str, dict[str, Metrics]] = {}
    for name, stage in chain.stages.items():
        if "task" in stage.config and stage.width == "ranks":  # a task's own stage, or one for each seed
            steps = [line for line in metrics_of(name, run.stage(name))[0] if "loss" in line]
            tuning.setdefault(stage.config["task"], {})[name] = steps
    events, live = events_of(run), [row["name"] for row in rows if row["state"] == "running"]
    return Facts(
        chain=chain,
        settings=settings,
        recipe=recipe,
        profile=profile,
        rows=rows,
        results={name: result for name, result in results.items() if isinstance(result, dict)},
        made={name: made_by(folder.done or {}) for name, folder in done.items()},
        phases=phases,
        scores=scores,
        scratch=scores_of(done, {name: f"{name}-scratch" for name in TASKS}),
        tuning={task: lines for task, lines in tuning.items() if any(lines.values())},
        events=events,
        account=account.read(run, chain.stages, events, live, time.time()),
        gpus=gpu_samples.read(run, names),
    )


def made_by(done: Mapping[str, Any]) -> dict[str, str]:
    """Device, driver and versions of a done mark; older marks know no device."""
    known = {**(done.get("made_with") or {}), **(done.get("machine") or {})}
    return {str(key): str(value) for key, value in known.items()}


def scores_of(done: Mapping[str, StageDir], stages: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By task what ``stages`` that are done have scored."""
    records = {task: read_json(done[name].path / "scores.json") or {} for task, name in stages.items() if name in done}
    return {task: record for task, record in records.items() if isinstance(record.get("scores"), dict)}
