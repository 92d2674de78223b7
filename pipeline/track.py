"""``python -m pipeline.track RUN --wandb PROJECT``: a run's figures in Weights & Biases.

It reads what the run has written, from any machine that sees its folder: on clusters the login node has a network and
the compute nodes often have none. Training knows nothing of it, so nothing that goes wrong here can disturb it.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

from pipeline.engine.tensorboard import scalars
from pipeline.errors import EnvironmentFault, run_command
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir
from pipeline.run.state import rows_of
from pipeline.stages import training_of
from pipeline.watch import goes_on

INTERVAL_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.track", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--wandb", required=True, metavar="PROJECT", help="WANDB_MODE=offline keeps it in ./wandb")
    parser.add_argument("--follow", action="store_true", help=f"look again every {INTERVAL_S:g} s until the run ends")
    options = parser.parse_args()
    run = RunDir(options.run)
    chain = Chain.of(run)
    try:
        import wandb
    except ImportError:
        raise EnvironmentFault("wandb is not installed: pip install wandb") from None
    sent: dict[str, int] = {}
    while True:
        going = options.follow and any(map(goes_on, rows_of(chain, run.is_held())))
        try:
            for stage in chain.stages:
                sent[stage] = send(wandb, options.wandb, run, stage, after=sent.get(stage, -1), ended=not going)
        except wandb.Error as error:
            raise EnvironmentFault(f"Weights & Biases: {error}; the same command again goes on") from None
        if not going:
            break
        time.sleep(INTERVAL_S)
    stages = ", ".join(f"{stage} to step {step}" for stage, step in sent.items() if step >= 0)
    print(f"{options.wandb}: {stages or 'no stage has figures yet'}")
    return 0


def send(wandb: Any, project: str, run: RunDir, stage: str, *, after: int, ended: bool) -> int:
    """Send a stage's figures of steps above ``after``, each once; returns the last step that was sent.

    A stage is a run of W&B, the same whenever it is sent. Its newest step may still get figures: it waits until another
    has begun or the run has ``ended``.
    """
    steps: dict[int, dict[str, float]] = {}
    for line in run.stage(stage).metrics():
        if line["step"] > after:
            steps.setdefault(line["step"], {}).update(scalars(line))
    if not ended and steps:
        del steps[max(steps)]
    if not steps:
        return after
    settings = run.settings
    recipe = training_of(settings, str(run.path / "run.json"))
    place = str(run.stage(stage).path.resolve())
    sink = wandb.init(
        project=project,
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        name=f"{run.path.resolve().name}/{stage}",
        group=run.path.resolve().name,
        config={"recipe": recipe.name, "stage": stage, **settings["recipe"]},
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    for step in sorted(steps):
        sink.log(steps[step], step=step)
    sink.finish()
    return max(steps)


if __name__ == "__main__":
    run_command(main)
