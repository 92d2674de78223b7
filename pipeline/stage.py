"""A stage of the chain as data, and what follows from that data: its fingerprint and where its inputs lie."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.publish import json_sha256
from pipeline.config import differences, science


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the chain. It says what to run, never how: submitting, waiting and retrying read this data.

    ``run`` names ``module:function``, called as ``function(job, **config, **inputs)``; ``check`` another one, called as
    ``function(**config, **inputs)`` with the inputs under ``--data`` alone, before anything of a chain runs, on a login
    node: it raises what is wrong with them. An input is
    ``stage:path`` (inside the folder of a need), ``stage#output`` (a path that the need's done mark declares)
    or ``data:name`` (a file under ``--data``). A value of ``config`` that ``defaults`` names leaves no trace.
    ``looks_at`` are files under ``--data`` of which only something is said: what the stage makes does not depend on
    them, so they are no part of the fingerprint, and one that is not there is left out.
    ``version`` is raised when the stage's work changes its results: what an older version made stays done.
    """

    name: str
    run: str
    job: Literal["data", "pretrain", "finetune"]
    width: Literal["ranks", "workers", "one"]  # W ranks of one group, one process with W workers, or one process
    config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    looks_at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    after: tuple[str, ...] = ()  # needs that give no input file
    always: bool = False  # runs also when a need failed, and is stale whenever any stage changed
    is_seed: bool = False  # one seed of a task that has several: `TASK-SEED`, gathered by the stage TASK
    version: int = 1
    check: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that must be done before this one, in order of mention."""
        named = [source for _, source in self._sources() if source is not None]
        return tuple(dict.fromkeys((*named, *self.after)))

    @property
    def has_steps(self) -> bool:
        """Whether it trains by steps that it logs; somebody's command may, but not to us."""
        return self.width == "ranks" and "command" not in self.config

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the files under --data that this stage reads."""
        return tuple(text.removeprefix("data:") for text, source in self._sources() if source is None)

    def _sources(self) -> list[tuple[str, str | None]]:
        texts = [t for value in self.inputs.values() for t in ((value,) if isinstance(value, str) else value)]
        return [(t, None if t.startswith("data:") else t.replace("#", ":").split(":")[0]) for t in texts]

    def record(self, needs: Mapping[str, str], corpora: Mapping[str, Any]) -> dict[str, Any]:
        """What is written down of the stage's making: name, science, inputs, the needs' fingerprints, and their hash.

        Where the code lies and which version it has is no part of the hash.
        """
        content = {
            "stage": self.name,
            "config": science(self.config, self.defaults),
            "inputs": science({key: value for key, value in self.inputs.items() if value}),
            "needs": {name: needs[name] for name in self.needs},
            "corpora": {name: corpora.get(name) for name in self.corpora},
        }
        digest = json_sha256(content)
        return {**content, "fingerprint": digest[:16], "version": self.version}

    def changes(self, record: Mapping[str, Any], needs: Mapping[str, str], corpora: Mapping[str, Any]) -> list[str]:
        """Lines on what has changed since ``record`` was written, by whatever version; none where it still holds."""
        now = self.record(needs, corpora)
        lines = differences(record.get("config", {}), self.config, self.defaults)
        for key, words in (("corpora", "file {} changed"), ("needs", "its need {} changed")):
            before = record.get(key)
            before = before if isinstance(before, Mapping) else {}
            names = dict.fromkeys([*now[key], *before])
            lines += [
                words.format(name) for name in names if not _holds(before.get(name, ...), now[key].get(name, ...))
            ]
        return lines + differences(record.get("inputs", now["inputs"]), now["inputs"])  # version 0.1.0 wrote none


def _holds(before: Any, now: Any) -> bool:
    """Whether what was known of a file or a need is what is known now, of which it may be more than then."""
    return bool({**now, **before} == now if isinstance(before, Mapping) and isinstance(now, Mapping) else before == now)


def function_of(name: str) -> Any:
    """The function that a stage names as ``module:function``, imported only now."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def fingerprints(
    stages: Mapping[str, Stage], corpora: Mapping[str, Any], records: Mapping[str, Iterable[Mapping[str, Any]]]
) -> dict[str, str]:
    """Fingerprint of every stage; ``stages`` is ordered so that needs come first.

    A stage keeps that of one of its ``records`` that still holds, so that the hash may be made of other things from
    one version to the next.
    """
    prints: dict[str, str] = {}
    for name, stage in stages.items():
        known = [record for record in records.get(name, ()) if "fingerprint" in record]
        kept = (record for record in known if not stage.changes(record, prints, corpora))
        prints[name] = next(kept, stage.record(prints, corpora))["fingerprint"]
    return prints
