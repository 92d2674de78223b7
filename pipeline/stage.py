"""A stage of the chain as data, and what follows from that data: its fingerprint and where its inputs lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import science


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the chain. It says what to run, never how: submitting, waiting and retrying read this data.

    ``run`` names ``module:function``, called as ``function(job, **config, **inputs)``. An input is
    ``stage:path`` (inside the folder of a need), ``stage#output`` (a path that the need's done mark declares)
    or ``data:name`` (a file under ``--data``).
    """

    name: str
    run: str
    job: Literal["data", "pretrain", "finetune"]
    width: Literal["ranks", "workers", "one"]  # W ranks of one group, one process with W workers, or one process
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    after: tuple[str, ...] = ()  # needs that give no input file
    always: bool = False  # runs also when a need failed, and is stale whenever any stage changed

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that must be done before this one, in order of mention."""
        named = [source for _, source in self._sources() if source is not None]
        return tuple(dict.fromkeys((*named, *self.after)))

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the files under --data that this stage reads."""
        return tuple(text.removeprefix("data:") for text, source in self._sources() if source is None)

    def _sources(self) -> list[tuple[str, str | None]]:
        texts = [t for value in self.inputs.values() for t in ((value,) if isinstance(value, str) else value)]
        return [(t, None if t.startswith("data:") else t.replace("#", ":").split(":")[0]) for t in texts]

    def fingerprint(self, needs: Mapping[str, str], corpora: Mapping[str, Any]) -> str:
        """Hash of the stage's name, scientific configuration, input files and its needs' fingerprints."""
        content = {
            "name": self.name,
            "run": self.run,
            "config": science(dict(self.config)),
            "inputs": {key: value if isinstance(value, str) else list(value) for key, value in self.inputs.items()},
            "needs": {name: needs[name] for name in self.needs},
            "corpora": {name: corpora.get(name) for name in self.corpora},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fingerprints(stages: Mapping[str, Stage], corpora: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint of every stage; ``stages`` is ordered so that needs come first."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        found[name] = stage.fingerprint(found, corpora)
    return found
