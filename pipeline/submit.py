"""``python -m pipeline.submit``: make or continue a run and send its chain to this machine or to Slurm."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.errors import ConfigError, run_command
from pipeline.launch import estimate, request
from pipeline.launch.family import start_family
from pipeline.launch.request import Request
from pipeline.launch.start import plan_jobs, planned, start, try_out
from pipeline.run.files import as_shared
from pipeline.stages import Command
from pipeline.words import columns, duration
from slurm import flags
from slurm.errors import Refused
from slurm.profile import SECTIONS


def main() -> int:
    if by_count := by_node_count(sys.argv[1:]):
        return compare_node_counts(by_count)
    given, words = seeds_and_run(sys.argv[1:])
    if given.share:
        os.umask(0o002)
    if given.seeds and given.seeds[0] == "pretrain":
        share(given, sys.argv)
        return start_family(given.run, {f"seed-{seed}": [f"--set=train.seed={seed}"] for seed in given.seeds[1]}, words)
    to_pipe = "--dry-run=sbatch" in sys.argv  # only the batch file goes there
    with taken_back(given.run):
        with contextlib.redirect_stdout(sys.stderr) if to_pipe else contextlib.nullcontext():
            asked = request.of(sys.argv[1:])
            if asked.own:
                print(effort(asked))
        share(given, sys.argv)
        return start(asked)


@contextlib.contextmanager
def taken_back(run: Path | None) -> Iterator[None]:
    """The recipe that this call writes for --text goes again if the call is refused before the run begins.

    Else the call put right would be refused as well: another recipe would be there.
    """
    recipe = (run or Path()) / "recipe.toml"
    there = recipe.exists()
    try:
        yield
    except Exception:
        if not there and not recipe.with_name("run.json").exists():
            recipe.unlink(missing_ok=True)
        raise


def seeds_and_run(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """--seeds, --run and --share of the words, and the others."""
    options = request.Options(prog="python -m pipeline.submit", add_help=False, allow_abbrev=False)
    options.add_argument("--seeds", type=request.seeds_of)
    options.add_argument("--run", type=Path)
    options.add_argument("--share", choices=["group"])
    return options.parse_known_args(words)


def share(given: argparse.Namespace, words: Sequence[str]) -> None:
    """With --share, let the group of the run's folder write into it; what is made in there is the group's, too."""
    if given.share and not {"--dry-run", "--dry-run=plan", "--test-only"}.intersection(words):
        given.run.mkdir(parents=True, exist_ok=True)
        given.run.chmod(0o2775)
    as_shared(given.run)


PROCESS_GB = 0.4  # Python with PyTorch


def effort(asked: Request) -> str:
    """Hours and memory of pretraining, before somebody waits for it."""
    recipe, profile = asked.recipe, asked.profile
    assert not isinstance(recipe, Command)  # --text writes a recipe
    rates = estimate.declared(recipe, profile)
    if asked.local:
        from pipeline.bench import here  # torch

        rates = here.rates(recipe, rates, profile.threads)
    ranks = profile.ranks(asked.nodes[0])
    hours = estimate.hours_of(recipe, rates, ranks, recipe.phases.keys())
    memory = PROCESS_GB + max(
        estimate.memory_gb(recipe, phase, phase.micro_batch or 1) for phase in recipe.phases.values()
    )
    took = "time not known, the profile has no [rates]" if hours is None else f"about {duration(3600 * hours)}"
    return f"pretraining: {took} ({rates.source}); {memory:.1f} GB of memory for each of {ranks} processes"


def by_node_count(words: Sequence[str]) -> dict[str, list[str]]:
    """The words once for each number of ``--nodes 1,2,4``, by number; {} without such a list or --test-only."""
    flag = [f.value for f in flags.split(words, sections=SECTIONS).flags if f.name == "nodes" and "," in f.value]
    if not flag or "--test-only" not in words:
        return {}
    spelled = [f"{before}{flag[-1]}" for before in ("", "--nodes=", "-N")]
    return {
        count: [word.removesuffix(flag[-1]) + count if word in spelled else word for word in words]
        for count in flag[-1].split(",")
    }


def compare_node_counts(by_count: dict[str, list[str]]) -> int:
    """``--test-only --nodes 1,2,4``: when pretraining would start and, where the rates are known, end on each."""
    rows, refusals = [("nodes", "starts", "trains", "ends by", "")], []
    for count, words in by_count.items():
        try:
            asked = request.of(words)
        except ConfigError as refused:  # of so many ranks, perhaps
            refusals.append(refused)
            rows.append((count, "never", "", "", str(refused)))
            continue
        chain = planned(asked)
        todo = chain.select(asked.stages, set()) if asked.stages else chain.todo()
        jobs = [job for job in plan_jobs(chain, todo, asked) if job.section == "pretrain"]
        try:
            estimates = try_out(asked, jobs).values()
        except Refused as refused:
            rows.append((count, "never", "", "", str(refused)))
            continue
        starts = re.findall(r"to start at (\S+)", " ".join(estimates))
        ranks, hours = asked.asked["pretrain"].resources.most_tasks, None
        if not isinstance(asked.recipe, Command):
            rates = estimate.declared(asked.recipe, asked.profile)
            hours = estimate.hours_of(asked.recipe, rates, ranks, todo.keys() & asked.recipe.phases.keys())
        ends = ""
        if starts and hours is not None:
            ends = (datetime.fromisoformat(starts[0]) + timedelta(hours=hours)).isoformat(timespec="minutes")
        took = "not known: no [rates] in the profile" if hours is None else f"{hours:.1f} h"
        rows.append((count, *starts[:1], took, ends, "") if starts else (count, "?", took, "", ""))
    if len(refusals) == len(by_count):
        raise refusals[0]
    print("\n".join(columns(rows, right=(0, 2))))
    return 0


if __name__ == "__main__":
    run_command(main)
