"""Which stages of a run must be run, and why. Pure: reads stages and done marks, starts nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.manifest import PACKAGES, versions
from pipeline.config import Recipe
from pipeline.errors import ConfigError
from pipeline.run.rundir import RunDir
from pipeline.stage import Stage, fingerprints
from pipeline.stages import Command, recipe_of, table


@dataclass(frozen=True)
class Chain:
    """The stages of a run with their current fingerprints; those ``elsewhere`` are another run's to make."""

    run: RunDir
    stages: Mapping[str, Stage]
    prints: Mapping[str, str]
    corpora: Mapping[str, Any]
    elsewhere: Collection[str] = ()

    @classmethod
    def of(cls, run: RunDir) -> Chain:
        """The chain that a run's run.json describes."""
        settings = run.whole_settings
        return cls.planned(run, recipe_of(settings, str(run.path / "run.json")), settings["corpora"])

    @classmethod
    def planned(
        cls, run: RunDir, recipe: Recipe | Command, corpora: Mapping[str, Any], elsewhere: Collection[str] = ()
    ) -> Chain:
        """The chain of a recipe, whether or not the run exists yet."""
        stages = table(recipe)
        records = {name: [r for r in (run.stage(name).begun, run.stage(name).done) if r] for name in stages}
        return cls(run, stages, fingerprints(stages, corpora, records), corpora, elsewhere)

    def is_done(self, name: str) -> bool:
        """Whether the stage's done mark carries the current fingerprint."""
        return (self.run.stage(name).done or {}).get("fingerprint") == self.prints[name]

    def is_current(self, name: str) -> bool:
        """Whether what lies in the stage's folder, finished or not, was begun with the current fingerprint."""
        begun = self.run.stage(name).begun
        return begun is None or begun.get("fingerprint") == self.prints[name]

    def record(self, name: str) -> dict[str, Any]:
        """What a stage's folder says about its making: compared later to tell what changed."""
        return {**self.stages[name].record(self.prints, self.corpora), "fingerprint": self.prints[name]}

    def older(self) -> list[str]:
        """The finished stages that an older version of their work has made; they stay done."""
        finished = [name for name, stage in self.stages.items() if not stage.always and self.is_done(name)]
        made_by = {name: (self.run.stage(name).done or {}).get("version", 1) for name in finished}
        return [name for name, version in made_by.items() if version < self.stages[name].version]

    def with_followers(self, names: Iterable[str]) -> list[str]:
        """``names`` and all stages that need one of them, in order, but for those that follow any change anyway."""
        chosen = list(self._known(names, "--remake"))
        for name, stage in self.stages.items():
            if name not in chosen and not stage.always and set(stage.needs).intersection(chosen):
                chosen.append(name)
        return [name for name in self.stages if name in chosen]

    def todo(self, remake: Collection[str] = ()) -> dict[str, str]:
        """Stages to run, in order, each with the reason in words; those of ``remake`` though they are done."""
        reasons: dict[str, str] = {}
        for name, stage in self.stages.items():
            if name in self.elsewhere:
                continue
            if name in remake:
                reasons[name] = "made again"
            elif stage.always:
                if reasons or not self.is_done(name) or self._older_than_a_need(name):
                    reasons[name] = "a stage changed" if self.is_done(name) else "not done yet"
            elif not self.is_current(name):
                before = self.run.stage(name).begun or {}
                changes = self.stages[name].changes(before, self.prints, self.corpora)
                reasons[name] = "; ".join(changes) or "its definition changed"
            elif not self.is_done(name):
                reasons[name] = "continues" if self.run.stage(name).attempts else "not done yet"
        return reasons

    def select(self, names: Iterable[str], remake: Collection[str] = ()) -> dict[str, str]:
        """The part of ``todo`` that ``--stages`` names; ConfigError when a need is neither done nor in it."""
        wanted, todo = list(self._known(names, "--stages")), self.todo(remake)
        reasons = {name: why for name, why in todo.items() if name in wanted}
        for name in reasons:
            missing = [need for need in self.stages[name].needs if need not in wanted and need in todo]
            if missing and not self.stages[name].always:
                raise ConfigError(
                    f"--stages: {name} needs {', '.join(missing)}, which is neither done nor named; "
                    f"add it: --stages {','.join([*missing, *wanted])}"
                )
        return reasons

    def _known(self, names: Iterable[str], option: str) -> Iterator[str]:
        """The stages that an option names; a task means its seeds too."""
        for name in map(str.strip, names):
            if name not in self.stages:
                raise ConfigError(f"{option}: no stage {name!r}; the stages are {', '.join(self.stages)}")
            yield from (need for need in self.stages[name].needs if self.stages[need].is_seed)
            yield name

    def needs_finished(self, name: str) -> dict[str, Any]:
        """When each need of a stage was finished, by the clock of the machine that did it."""
        return {need: (self.run.stage(need).done or {}).get("finished", 0) for need in self.stages[name].needs}

    def _older_than_a_need(self, name: str) -> bool:
        done, needs = self.run.stage(name).done or {}, self.needs_finished(name)
        return bool(done["saw"] != needs if "saw" in done else max(needs.values(), default=0) > done.get("finished", 0))


def made_with() -> dict[str, str]:
    """Versions that shape results, of what is installed."""
    return versions((*PACKAGES, "torch", "safetensors"))
