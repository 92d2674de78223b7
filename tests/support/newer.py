"""``python -m support.newer RUN [STAGE]``: what a later version of the product makes of a run, as one line of JSON.

In that version every configuration class has one more field, at its default, and every stage a higher version.
STAGE is run before. The new fields mean nothing yet: whoever takes a configuration apart does not see them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from pipeline import config, stages

asdict, table = dataclasses.asdict, stages.table


def without_newer(value: Any) -> dict[str, Any]:
    return asdict(value, dict_factory=lambda items: {key: item for key, item in items if key != "newer"})


def become_newer() -> None:
    for name, cls in list(vars(config).items()):
        if dataclasses.is_dataclass(cls) and cls.__module__ == config.__name__:
            newer = dataclasses.make_dataclass(name, [("newer", int, 7)], bases=(cls,), frozen=True, kw_only=True)
            setattr(config, name, newer)
    dataclasses.asdict = without_newer
    stages.table = lambda recipe: {
        name: dataclasses.replace(stage, version=stage.version + 1) for name, stage in table(recipe).items()
    }


def main() -> None:
    become_newer()
    from pipeline.run.chain import Chain
    from pipeline.run.rundir import RunDir
    from pipeline.stage import fingerprints
    from pipeline.worker import run_stage

    run = RunDir(Path(sys.argv[1]))
    for stage in sys.argv[2:]:
        run_stage(run, stage)
    chain = Chain.of(run)
    assert chain.stages["phase1"].config["phase"].newer == 7
    fresh = fingerprints(stages.table(config.load_recipe("tiny")), {}, {})
    print(json.dumps({"todo": chain.todo(), "older": chain.older(), "fresh": fresh}))


if __name__ == "__main__":
    main()
