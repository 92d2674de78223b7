"""``python -m pipeline.doctor CLUSTER [Slurm's options]``: a job of a few minutes proves a cluster profile.

It is sent as every job of ours is, asked to stop, queued again by itself and cancelled. The table says what holds and
what to change: exit code 0, or 7. Nothing of it is left but its folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import load_profile
from pipeline.errors import ConfigError, EnvironmentFault, run_command
from pipeline.launch import request
from pipeline.launch.request import Request
from pipeline.launch.start import to_slurm
from pipeline.run.chain import made_with
from pipeline.run.files import read_json
from pipeline.run.joblog import first_error
from pipeline.run.journal import Journal
from pipeline.words import columns
from slurm import queue, states

DEFAULTS = ("--nodes=2", "--time=15")
PATIENCE_S = 300.0
SLOW, SKEW_S, SAVE_GB = 0.5, 5.0, 4.1  # of the declared bandwidth; clocks; weights and moments of BERT-large


class Row(NamedTuple):
    """One line of the table: whether it holds (``?``: look), what was tried, what was found, what to change."""

    holds: str
    what: str
    found: str
    change: str = ""


def main() -> int:
    options = request.Options(prog="python -m pipeline.doctor", description=__doc__, allow_abbrev=False)
    options.example = "mysite.toml -p gpu"
    options.add_argument("cluster", help="how the site runs jobs: a name in slurm/profiles or a .toml file")
    new = Path("runs") / f"doctor-{time.strftime('%Y%m%d-%H%M%S')}"
    options.add_argument("--run", type=Path, default=new, help="a new folder, where runs are to lie (default: in runs)")
    given, words = options.parse_known_args()
    profile, answers = load_profile(given.cluster), given.run.resolve() / "found"
    if profile.runner == "local":
        raise ConfigError(f"cluster profile {profile.name!r} has no Slurm: there is nothing to prove")
    if given.run.exists():
        raise ConfigError(f"--run {given.run}: is there already; name a new folder")
    asked = request.of(
        ["--run", str(given.run), "--cluster", given.cluster, "--saves", str(answers), *DEFAULTS, *words],
        command=[profile.python or sys.executable, "-m", "pipeline.node.checkup", str(answers)],
    )
    asked = dataclasses.replace(asked, profile=dataclasses.replace(asked.profile, spares=0))
    answers.mkdir(parents=True)
    rows = list(judge(asked, *examine(asked, answers)))
    print("\n".join(columns([("", "what", "found", "to change"), *rows])))
    wrong = [row.what for row in rows if row.holds == "no"]
    print(f"{profile.name}: {'does not hold: ' + ', '.join(wrong) if wrong else 'holds'}; {asked.run.path}")
    return EnvironmentFault.exit_code if wrong else 0


def examine(asked: Request, folder: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Send the job and lead it through stop, requeue and end; what the ranks noted by kind, and its log."""
    try:
        (job,) = to_slurm(asked)
    except Exception:
        if not Journal.path(asked.run).exists():  # nothing was sent: the call put right may name the folder again
            shutil.rmtree(asked.run.path)
        raise
    ranks, said = asked.asked["pretrain"].resources.most_tasks, [""]

    def notes(kind: str) -> list[dict[str, Any]]:
        return [note for path in sorted(folder.glob(f"{kind}-*.json")) if (note := read_json(path)) is not None]

    def wait(enough: Callable[[], bool]) -> bool:
        """Whether it came true: as long as the job waits, and PATIENCE_S from when it runs."""
        since = time.monotonic()
        while not enough():
            known = queue.patiently(lambda: queue.jobs([job.job_id]), say=print).get(job.job_id)
            if known is None or known.ended:
                return enough()
            if known.waiting:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                return False
            if (now := states.in_words(known)) != said[0]:
                said[0] = now
                print(f"job {job.job_id}: {now}", flush=True)
            time.sleep(1.0)
        return True

    try:
        if wait(lambda: len(notes("found")) == ranks):
            queue.tell(["scancel", "--signal=USR2", job.job_id])
            if wait(lambda: len(notes("signal")) == ranks) and asked.profile.requeue:
                wait(lambda: len(notes("again")) == ranks)
    finally:
        queue.cancel([job.job_id])
    job.wait()
    return {kind: notes(kind) for kind in ("found", "signal", "again", "term")}, job.stdout() or ""


def judge(asked: Request, notes: Mapping[str, Sequence[Mapping[str, Any]]], log: str) -> Iterator[Row]:
    """The table."""
    profile, resources, began = asked.profile, asked.asked["pretrain"].resources, notes["found"]
    ranks = resources.most_tasks
    if len(began) < ranks:
        change = "python, modules, setup, container of the profile say how nodes find the interpreter"
        yield Row("no", "ranks", f"{len(began)} of {ranks} answered{first_error(asked.run.path, '*')}", change)
        return
    by_node: dict[str, list[Mapping[str, Any]]] = {}
    for note in began:
        by_node.setdefault(note["node"], []).append(note)
    even = {len(own) for own in by_node.values()} == {resources.tasks_per_node}
    yield Row("yes" if even else "no", "ranks", f"{ranks} on {', '.join(sorted(by_node))}", "" if even else "srun_args")
    yield from judge_software(began)
    yield from judge_gpus(asked, began)
    yield from judge_errors(began, "network", "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME in [env]: " + interfaces(began))
    yield from judge_errors(began, "files", "put --run on a file system that all nodes share and that has room")
    yield from judge_network(asked, [note["network"] for note in began if "network" in note])
    yield from judge_files([note["files"] for note in began if note.get("files")], notes["term"])
    stopped, again, lived = (notes[kind] for kind in ("signal", "again", "term"))
    yield Row("yes" if len(stopped) == ranks else "no", "signal", f"USR2 reached {len(stopped)} of {ranks} ranks")
    if not profile.requeue:
        yield Row("?", "requeue", "not tried: requeue = false", "spares = 2 has jobs stand by")
    elif len(again) == ranks:
        yield Row("yes", "requeue", "asked for by the job itself, and started again")
    else:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "no line in its log")
        yield Row("no", "requeue", last[:160], "requeue = false and spares = 2, or ask the site for --requeue")
    if lived:
        yield Row("yes", "grace", f"{min(note['lived_s'] for note in lived):.1f} s from TERM to KILL")


def judge_errors(notes: Sequence[Mapping[str, Any]], what: str, change: str) -> Iterator[Row]:
    """A row for what a rank could not do."""
    if failed := [note for note in notes if what in note["errors"]]:
        first = failed[0]
        where = f"rank {first['rank']} on {first['node']}"
        yield Row("no", what, f"{len(failed)} ranks; {where}: {first['errors'][what]}", change)


def judge_software(notes: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Interpreter, packages and Slurm's commands on every node."""
    yield from judge_errors(notes, "versions", "install the same environment on every node, or name it with python")
    here = made_with()
    other = {
        f"{name} {theirs.get(name, 'missing')} on {note['node']}, here {here.get(name, 'missing')}"
        for note in notes
        if (theirs := note.get("versions"))
        for name in here | made_of(theirs)
        if theirs.get(name) != here.get(name)
    }
    if other:
        yield Row("no", "packages", "; ".join(sorted(other)[:3]), "one environment for all: python in the profile")
    elif all("versions" in note for note in notes):
        yield Row("yes", "packages", f"Python {here['python']}, torch {here.get('torch')}: {notes[0]['python']}")
    needed = {"scontrol", "squeue", "srun"}
    lacking = sorted({name for note in notes for name in needed - set(note["commands"])})
    there = f"{', '.join(lacking)} missing on nodes" if lacking else "scontrol, squeue, srun are on the nodes"
    change = "PATH in setup, or bind them into the container" if lacking else ""
    yield Row("no" if lacking else "yes", "Slurm there", there, change)


def made_of(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name != "cuda"}


def judge_gpus(asked: Request, notes: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """As many as the profile says, all of one kind."""
    yield from judge_errors(notes, "gpus", "a driver that fits torch (docs/how_long.md), or leave the node out with -x")
    count, seen = asked.asked["pretrain"].resources.gpus_per_node, [note["gpus"] for note in notes if "gpus" in note]
    kinds = sorted({f"{name} {gb:.0f} GB" for gpus in seen for name, gb in gpus})
    if not count and not kinds:
        return
    numbers = sorted({len(gpus) for gpus in seen})
    holds = numbers == [count] and (len(kinds) <= 1 or asked.allow_mixed)
    text = f"{'-'.join(map(str, numbers))} visible to each rank, {count} asked: {', '.join(kinds) or 'none'}"
    yield Row("yes" if holds else "no", "GPUs", text, "" if holds else "gpus_per_node, gpu_type, constraint, container")


def judge_network(asked: Request, nets: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    if len(nets) < 2:
        return
    slowest = min(net["gb_s"] for net in nets)
    rate = f"all-reduce {slowest:.2f} GB/s ({nets[0]['backend']}), formed in {nets[0]['formed_s']:.1f} s"
    declared = asked.profile.rates.get("reduce_gb_s")
    if declared and slowest < SLOW * declared:
        yield Row("no", "network", f"{rate}; [rates] says {declared:g}", "*_SOCKET_IFNAME, or reduce_gb_s by this")
    else:
        note = "" if declared else f"[rates] reduce_gb_s = {slowest:.3g} lets plan count with it"
        yield Row("yes", "network", rate, note)
    late_s = max(net["seen_s"] for net in nets)
    yield Row("yes" if late_s < SKEW_S else "?", "shared files", f"a peer's new file is seen within {late_s:.1f} s")


def judge_files(disks: Sequence[Mapping[str, float]], term: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Write, sync and rename in the run's folder; and whether a checkpoint fits between TERM and KILL."""
    if not disks:
        return
    slow, free = (min(disk[key] for disk in disks) for key in ("mb_s", "free_gb"))
    ahead = max((disk["ahead_s"] for disk in disks), key=abs)
    yield Row("yes", "files", f"{slow:.0f} MB/s written, synced and renamed; {free:.0f} GB free (no quota shows)")
    if abs(ahead) > SKEW_S:
        yield Row("?", "clocks", f"the file server's is {ahead:+.0f} s off a node's", "NTP; only shown times suffer")
    lived_s, save_s = min((note["lived_s"] for note in term), default=0.0), 1000 * SAVE_GB / slow
    if term and lived_s < save_s:
        text = f"{lived_s:.0f} s from TERM to KILL, and BERT-large takes {save_s:.0f} s to save"
        yield Row("?", "time to save", text, "checkpoint_every bounds what a preemption costs; ask for a GraceTime")


def interfaces(notes: Sequence[Mapping[str, Any]]) -> str:
    common = set.intersection(*(set(note["interfaces"]) for note in notes))
    return f"all nodes have {', '.join(sorted(common)) or 'none in common'}"


if __name__ == "__main__":
    run_command(main)
