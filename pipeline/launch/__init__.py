"""From the command line, or from Python by ``launch``, to a running chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.launch.send import SlurmJob


def launch(run: str | Path, **options: Any) -> list[SlurmJob]:
    """Send a run's chain to Slurm as ``python -m pipeline.submit --run RUN …`` does, and return its jobs, submitit's.

    ``options`` are those of submit and of sbatch by their long names: ``launch("runs/mine", nodes=32, replace=True,
    set=["phase1.steps=100"])``. None and False leave an option out. The jobs' ``state``, ``wait()``, ``cancel()`` and
    ``stdout()`` work; [] when everything is done. Raises what submit refuses.
    """
    from pipeline.errors import ConfigError
    from pipeline.launch import request, start  # only now: whoever imports a part of this room imports this file

    words = ["--run", str(run)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list | tuple) else [value]
        words += [flag if one is True else f"{flag}={one}" for one in values if one is not None and one is not False]
    asked = request.of(words)
    if asked.local or asked.write_scripts or asked.dry_run or asked.test_only:
        raise ConfigError(f"{run}: launch sends to Slurm; for all else there is python -m pipeline.submit")
    return start.to_slurm(asked)
