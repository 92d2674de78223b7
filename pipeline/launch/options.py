"""The command line of ``pipeline.submit``: our own options, and Slurm's under their own names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from slurm import flags
from slurm.profile import SECTIONS


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Our own options by argparse; Slurm's by their own names as ``flags``, what follows ``--`` as ``extra``."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.submit",
        description="Make or continue a run and send its chain to this machine or to Slurm.",
        epilog="Slurm's options keep their names and letters (-p gpu -A project -t 2-00:00:00) and mean pretraining; "
        "-p data=cpu addresses the jobs of one kind (data, pretrain, finetune), --no-qos removes what the profile "
        "says, and words after -- go to sbatch untouched.",
    )
    parser.add_argument(
        "--recipe", help="what to train: a name in pipeline/recipes or a .toml file (default: the run's)"
    )
    parser.add_argument(
        "--cluster",
        help="how the site runs jobs: a name in slurm/profiles or a .toml file (default: the run's)",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory: everything of this training")
    parser.add_argument(
        "--data", type=Path, help="folder of the corpora that the recipe names (default: the profile's)"
    )
    parser.add_argument(  # taken out with Slurm's flags; named here to be explained
        "--nodes",
        "-N",
        help="nodes for pretraining, as 32 or 16-32; the global batch stays the same (default: the run's, else 1)",
    )
    parser.add_argument("--processes", type=int, help="local runner: ranks in training and data workers")
    parser.add_argument("--stages", help="run only these, separated by commas")
    parser.add_argument(
        "--remake",
        type=lambda text: text.split(","),
        default=[],
        metavar="STAGES",
        help="make these again with all that follows from them, though they are done; what is there goes to RUN/old",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a recipe value, such as phase1.steps=100",
    )
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--split", action="store_true", help="one job for each stage")
    slurm.add_argument("--dry-run", action="store_true", help="show the jobs and where each setting comes from")
    slurm.add_argument(
        "--write-scripts", type=Path, metavar="DIR", help="write batch files and submit.sh; send nothing"
    )
    slurm.add_argument("--test-only", action="store_true", help="ask Slurm when the jobs would start; send nothing")
    slurm.add_argument("--replace", action="store_true", help="cancel jobs of this run that are at work")
    slurm.add_argument(
        "--max-gpu-hours",
        type=hours,
        metavar="H",
        help="stop when all attempts of all jobs of the run have spent so much; 0: no limit (default: the run's)",
    )
    slurm.add_argument(
        "--allow-mixed", action="store_true", default=None, help="let GPUs of different models share a job"
    )
    line = flags.split(words, sections=SECTIONS)
    arguments = parser.parse_args(line.rest)
    arguments.flags, arguments.extra = line.flags, line.passthrough
    for flag in arguments.flags:
        if flag.name == "nodes" and flag.section in ("", "pretrain"):
            arguments.nodes = flag.value
    return arguments


def hours(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours")
    return value
