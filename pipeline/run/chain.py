"""Which stages of a run must be run, and why. Pure: reads stages and done marks, starts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Recipe, restore, science
from pipeline.errors import ConfigError
from pipeline.run.rundir import RunDir
from pipeline.stage import Stage, fingerprints
from pipeline.stages import table


@dataclass(frozen=True)
class Chain:
    """The stages of a run with their current fingerprints."""

    run: RunDir
    stages: Mapping[str, Stage]
    prints: Mapping[str, str]
    corpora: Mapping[str, Any]

    @classmethod
    def of(cls, run: RunDir) -> Chain:
        """The chain that a run's run.json describes."""
        settings = run.settings
        recipe = restore(Recipe, settings["recipe"], str(run.path / "run.json"))
        return cls.planned(run, recipe, settings["corpora"])

    @classmethod
    def planned(cls, run: RunDir, recipe: Recipe, corpora: Mapping[str, Any]) -> Chain:
        """The chain of a recipe, whether or not the run exists yet."""
        stages = table(recipe)
        return cls(run, stages, fingerprints(stages, corpora), corpora)

    def is_done(self, name: str) -> bool:
        """Whether the stage's done mark carries the current fingerprint."""
        return (self.run.stage(name).done or {}).get("fingerprint") == self.prints[name]

    def is_current(self, name: str) -> bool:
        """Whether what lies in the stage's folder, finished or not, was begun with the current fingerprint."""
        found = self.run.stage(name).begun
        return found is None or found.get("fingerprint") == self.prints[name]

    def record(self, name: str) -> dict[str, Any]:
        """What a stage's folder says about its making: compared later to tell what changed."""
        stage = self.stages[name]
        return {
            "stage": name,
            "fingerprint": self.prints[name],
            "config": science(dict(stage.config)),
            "corpora": {key: self.corpora.get(key) for key in stage.corpora},
            "needs": {need: self.prints[need] for need in stage.needs},
        }

    def todo(self) -> dict[str, str]:
        """Stages to run, in order, each with the reason in words."""
        reasons: dict[str, str] = {}
        for name, stage in self.stages.items():
            if stage.always:
                if reasons or not self.is_done(name) or self._older_than_a_need(name):
                    reasons[name] = "a stage changed" if self.is_done(name) else "not done yet"
            elif not self.is_current(name):
                reasons[name] = self._what_changed(name)
            elif not self.is_done(name):
                reasons[name] = "continues" if self.run.stage(name).attempts else "not done yet"
        return reasons

    def select(self, names: Iterable[str]) -> dict[str, str]:
        """The part of ``todo`` that ``--stages`` names; ConfigError when a need is neither done nor in it."""
        wanted = list(names)
        for name in wanted:
            if name not in self.stages:
                raise ConfigError(f"--stages: no stage {name!r}; the stages are {', '.join(self.stages)}")
        reasons = {name: why for name, why in self.todo().items() if name in wanted}
        for name in reasons:
            missing = [n for n in self.stages[name].needs if n not in wanted and not self.is_done(n)]
            if missing and not self.stages[name].always:
                raise ConfigError(
                    f"--stages: {name} needs {', '.join(missing)}, which is neither done nor named; "
                    f"add it: --stages {','.join([*missing, *wanted])}"
                )
        return reasons

    def _older_than_a_need(self, name: str) -> bool:
        mine = (self.run.stage(name).done or {}).get("finished", 0)
        return any((self.run.stage(n).done or {}).get("finished", 0) > mine for n in self.stages[name].needs)

    def _what_changed(self, name: str) -> str:
        before, now = self.run.stage(name).begun or {}, self.record(name)
        changes = [*_differences(before.get("config", {}), now["config"])]
        changes += [
            f"file {key} changed"
            for key, value in now["corpora"].items()
            if before.get("corpora", {}).get(key) != value
        ]
        changes += [
            f"its need {key} changed"
            for key, value in now["needs"].items()
            if before.get("needs", {}).get(key) != value
        ]
        return "; ".join(changes) or "its definition changed"


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if before == now else [f"{where} was {before}, is {now}"]
