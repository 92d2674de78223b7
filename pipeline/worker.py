"""One process of a stage: ``python -m pipeline.worker RUN STAGE``. What srun, the local runner and the tests start.

The scheduler's verdict is never trusted: the stage starts only when every need is done with the current
fingerprint, and a stage that is not done never exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import manifest
from data_prep.errors import DataError
from data_prep.fanout import EXCHANGE, die_with_parent
from data_prep.liveness import keep_freed_memory
from data_prep.publish import json_sha256, publish_json
from pipeline.config import restore
from pipeline.errors import (
    ConfigError,
    EnvironmentFault,
    PeerLost,
    StoppedCleanly,
    cause_of,
    describe,
    no_package,
    of_server,
    run_command,
)
from pipeline.node.bell import ring, until
from pipeline.node.device import machine, set_defaults
from pipeline.node.job import Job, Topology
from pipeline.node.preempt import StopRequest, stop_at_once
from pipeline.node.supervise import looked_after, supervise
from pipeline.run.chain import Chain, made_with
from pipeline.run.files import as_shared, now, patiently
from pipeline.run.joblog import ends
from pipeline.run.rundir import Attempt, RunDir
from pipeline.stage import Stage, function_of
from slurm import verdict
from slurm.profile import Profile

PACKAGES_OF = {"data": ("numpy", "h5py")} | dict.fromkeys(
    ("pretrain", "finetune"), ("numpy", "h5py", "torch", "safetensors")
)
PATIENCE_S = 120.0  # hundreds of ranks start, and files on a shared file system appear, some seconds apart


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.worker", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("stage", nargs="+", help="stages to run in this order; a command's own words follow behind --")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments, command = parser.parse_args(words[:end]), tuple(words[end + 1 :])
    set_defaults(os.environ)
    refuse_other_ranks(os.environ)
    if parent := os.environ.get("PIPELINE_PARENT"):
        die_with_parent(int(parent))
    try:
        as_shared(arguments.run)
        with looked_after():
            chain = patiently(lambda: Chain.of(RunDir(arguments.run)), _say)
            refuse_missing_packages(chain, arguments.stage)
            for stage in arguments.stage:
                run_stage(RunDir(arguments.run), stage, command)
    except (Exception, KeyboardInterrupt) as error:
        _tell_script(error)
        raise
    return 0


def refuse_other_ranks(environment: Mapping[str, str]) -> None:
    """EnvironmentFault where srun started more or fewer ranks than the job has, ConfigError under an mpiexec."""
    ranks, asked = Topology.of(environment).world_size, environment.get("JOB_RANKS", "")
    if asked.isdecimal() and ranks != int(asked):
        raise EnvironmentFault(
            f"{ranks} ranks were started and the job has {asked} (nodes times tasks): look for what changes it in the "
            "profile's srun_args and in the environment"
        )
    started = max(int(environment.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if ranks == 1 and started > 1:
        raise ConfigError(
            f"mpiexec has started {started} processes: ranks are started by srun or by python -m pipeline.submit "
            "--processes N, which say which rank each is"
        )


def refuse_missing_packages(chain: Chain, names: Sequence[str]) -> None:
    """EnvironmentFault, before any work, where this interpreter lacks what one of the stages imports; ConfigError
    for a stage that there is not.
    """
    if unknown := [name for name in names if name not in chain.stages]:
        raise ConfigError(f"no stage {unknown[0]!r}; the stages are {', '.join(chain.stages)}")
    stages = [chain.stages[name] for name in names if "command" not in chain.stages[name].config]
    needed = dict.fromkeys(package for stage in stages for package in PACKAGES_OF[stage.job])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise EnvironmentFault(no_package(", ".join(missing)))


def _tell_script(error: BaseException) -> None:
    """srun mixes the ranks' codes: the batch script reads this one. A file server that is away costs no try."""
    if of_server(error):
        with contextlib.suppress(OSError):
            verdict.made_progress()
    verdict.give(describe(error)[1], getattr(error, "nodes", ()))


def run_stage(run: RunDir, name: str, command: tuple[str, ...] = ()) -> None:
    """Run one stage as one attempt, or nothing when it is done already; raises what stopped it.

    A ``command`` comes with the batch script: who else may write into the run folder cannot have another one run.
    """
    if (begun := patiently(lambda: begin(run, name, command), _say)) is None:
        return
    chain, stage, attempt, topology = begun
    os.environ[EXCHANGE] = str(attempt.path)  # where the tasks of a data stage share its work without MPI
    settings = patiently(lambda: run.settings, _say)
    os.environ[manifest.RECIPE] = json_sha256(settings["recipe"].get("data"))
    profile = restore(Profile, settings["profile"], str(run.path / "run.json"))
    near: dict[str, Any] = {"deadline": verdict.deadline(), "limit": verdict.limit(), "warning_s": profile.signal_s}
    stop = StopRequest(**near, looks=topology.rank == 0)
    if stage.width == "ranks":
        stop.listen()
    else:
        stop_at_once(stop)
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "")  # that Slurm gave this task
    workers = int(cores) if profile.runner == "slurm" and cores.isdecimal() else profile.processes
    job = Job(run, name, attempt, topology, workers=workers, threads=profile.threads, stop=stop)
    keep_freed_memory()
    if stage.width == "ranks":
        supervise(job, lambda: execute(chain, stage, job))
    else:
        execute(chain, stage, job)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def begin(run: RunDir, name: str, command: tuple[str, ...]) -> tuple[Chain, Stage, Attempt, Topology] | None:
    """The stage and the attempt that this process joins; None where nothing is left to do for it."""
    chain = Chain.of(run)
    stage, topology = chain.stages[name], Topology.of(os.environ)
    if tuple(stage.config.get("command", ())) != command:
        raise ConfigError(f"{run.path / 'run.json'}: its command is not the one that was sent; send it again")
    if not stage.always:
        if chain.is_done(name):
            return None
        missing = [need for need in stage.needs if not chain.is_done(need)]
        if missing:
            raise DataError(
                f"{name} needs {', '.join(missing)}, which is not done with the current configuration; "
                f"run python -m pipeline.submit --run {run.word}"
            )
    if stage.job != "data" and stage.width != "ranks" and topology.rank > 0:
        if not stage.always:
            wait_for_rank_0(chain, name, topology)  # which does the work alone; the job's next stage may need it
        return None
    return chain, stage, take_attempt(chain, name, topology), topology


def wait_for_rank_0(chain: Chain, name: str, topology: Topology) -> None:
    """Wait until a stage that one process does is done.

    Raises SystemExit with rank 0's code where its attempt ended, StoppedCleanly when asked to stop.
    """
    stop_at_once(StopRequest())
    attempt = joined_attempt(chain, name, topology)

    def look() -> int | None:
        if chain.is_done(name):
            return 0
        return None if (ended := attempt.verdict) is None else int(ended.get("code", 1))

    if code := until(topology, "done", look, math.inf, opens=2):
        raise SystemExit(code)


def joined_attempt(chain: Chain, name: str, topology: Topology) -> Attempt:
    """The attempt that rank 0 of this launch has begun; PeerLost where it begins none."""
    wait = functools.partial(until, topology, "attempt", timeout_s=PATIENCE_S, opens=2)
    if (attempt := chain.run.stage(name).join_attempt(topology.launch, wait)) is None:
        raise PeerLost(f"{name}: rank {topology.rank} waited {PATIENCE_S:.0f} s for rank 0 to begin an attempt")
    return attempt


def execute(chain: Chain, stage: Stage, job: Job) -> None:
    """Do a stage's work and mark it done; raises what stopped it, after the attempt's verdict is written."""
    name, attempt, started = stage.name, job.attempt, now()
    changed = job.patiently(lambda: (attempt.path / "owner.json").stat().st_mtime)  # by the file server's clock
    try:
        result = function_of(stage.run)(job, **stage.config, **resolve(chain, stage))
        if job.rank == 0:
            finished = now()
            record = {
                **chain.record(name),
                **({"saw": chain.needs_finished(name)} if stage.always else {}),
                "attempt": attempt.number,
                "started": started,
                "finished": finished,
                "duration_s": round(finished - started, 3),
                "result": result,
                "made_with": made_with(),
                "machine": machine(),
            }
            job.patiently(lambda: job.run.stage(name).mark_done(record))
            ring(job.topology, "done")
            job.run.event("done", stage=name, attempt=attempt.number, duration_s=round(finished - started, 3))
            verdict.made_progress()
        # As it does right after its peers have left the training loop; it may have been killed.
        elif not until(job.topology, "done", lambda: chain.is_done(name) or None, PATIENCE_S, asked=job.stop.asked):
            raise PeerLost(f"{name}: rank {job.rank} waited for rank 0, which did not mark the stage done")
    except (Exception, KeyboardInterrupt) as error:
        line, code = describe(error)
        if isinstance(error, PeerLost) or (isinstance(error, StoppedCleanly) and not job.stop.asked()):
            time.sleep(1.0)  # the peer may know better what happened, and its verdict comes first
        if isinstance(error, StoppedCleanly) and newer_than(job.out, changed):
            verdict.made_progress()
        first = attempt.write_verdict(code, line, job.rank, cause_of(error))
        ring(job.topology, "done", "verdict")
        _tell_script(error)
        if first:
            raise
        raise SystemExit(code) from None  # another rank said it first: one fault, one line


def newer_than(folder: Path, started: float) -> bool:
    """Whether the stage finished any file after ``started``, by the files' clock; what it says of itself is none."""
    own = (path for path in folder.rglob("*") if folder / "attempts" not in path.parents and path.is_file())
    return any(path.stat().st_mtime > started for path in own)


def take_attempt(chain: Chain, name: str, topology: Topology) -> Attempt:
    """Rank 0 begins the stage's folder and takes the next attempt; the other ranks of its launch join it."""
    folder = chain.run.stage(name)
    if topology.rank == 0:
        if folder.path.is_symlink():  # planted since it was submitted
            where = os.readlink(folder.path)
            raise ConfigError(f"{folder.path}: is a link to {where}, where {name} would write; take the link away")
        with folder.beginning():
            if not chain.is_current(name):
                folder.move_aside()
            folder.path.mkdir(parents=True, exist_ok=True)
            publish_json(folder.path / "stage.json", chain.record(name))
            attempt = folder.new_attempt(topology.launch, **topology.place)
        ring(topology, "attempt")
        note_lost_node(chain.run, attempt, folder.attempts[:-1])
        facts = {"attempt": attempt.number, "world_size": topology.world_size}
        patiently(lambda: chain.run.event("started", stage=name, **facts), _say)  # others have joined the attempt
        return attempt
    return joined_attempt(chain, name, topology)


def note_lost_node(run: RunDir, attempt: Attempt, earlier: Sequence[Attempt]) -> None:
    """An event for the node that was lost under the stage's attempt before, in the same job."""
    before, restart = [one for one in earlier if one.job_id == attempt.job_id], attempt.owner.get("restart", 0)
    end = ends(run.path, attempt.job_id).get(str(restart - 1)) if before else None
    if end and end.node:
        facts = {"attempt": before[-1].number, "node": end.node}
        patiently(lambda: run.event("lost_node", stage=before[-1].path.parents[1].name, **facts), _say)


def resolve(chain: Chain, stage: Stage) -> dict[str, Path | list[Path]]:
    """The stage's inputs as paths that exist, and those that it looks at as far as they do."""
    return {
        key: path_of(chain, value) if isinstance(value, str) else [path_of(chain, item) for item in value]
        for key, value in stage.inputs.items()
    } | {
        key: [path for name in names if (path := chain.run.data_dir / name).exists()]
        for key, names in stage.looks_at.items()
    }


def path_of(chain: Chain, source: str) -> Path:
    """``data:name``, ``stage:path`` or ``stage#output`` as a path; DataError when it is not there."""
    if source.startswith("data:"):
        path = chain.run.data_dir / source.removeprefix("data:")
    elif "#" in source:
        need, _, output = source.partition("#")
        path = chain.run.stage(need).path / (chain.run.stage(need).done or {})["result"][output]
    else:
        need, _, relative = source.partition(":")
        path = chain.run.stage(need).path / relative
    if not path.exists():
        if source.startswith("data:"):
            raise DataError(f"{path} is missing; name its folder with --data DIR")
        raise DataError(f"{path} is missing although its stage is done; remove {need}'s done.json and submit again")
    return path


if __name__ == "__main__":
    run_command(main)
