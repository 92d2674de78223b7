"""Ask Slurm about jobs and tell it what to do with them: squeue, scontrol, sacct, scancel, sbatch by argv lists."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from slurm.command import Answer, run, which
from slurm.environment import clean
from slurm.errors import ControllerDown, Refused, SlurmError
from slurm.resources import UNLIMITED, Resources, format_time, parse_time

T = TypeVar("T")
TIMEOUT_S = 30.0
PATIENCE_S = 120.0  # how long a controller that is down is asked again
SEPARATOR = "\x1f"
SQUEUE_FIELDS = {"id": "%i", "state": "%T", "reason": "%r", "start": "%S", "dependency": "%E", "comment": "%k"}
DOWN = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Connection timed out|Zero Bytes were"
    r"|Unable to establish control|Transport endpoint|munge.*(?:Failed to access|Socket communication)"
    r"|slurm_persist_conn_open|Invalid authentication credential|Protocol authentication error|no answer within"
    r"|Slurm backup controller in standby|temporarily unable to (?:accept|connect)|Communication connection failure",
    re.IGNORECASE,
)
ENDED = frozenset(["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"])
ENDED |= {"PREEMPTED", "TIMEOUT", "REVOKED"}
WAITING = frozenset(["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"])


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """One job as Slurm sees it now. ``start`` is in seconds since 1970; None when Slurm does not say."""

    id: str
    state: str
    reason: str = ""
    start: float | None = None
    dependency: str = ""
    comment: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def stuck(self) -> bool:
        """Whether it waits for something that can no longer happen."""
        return self.waiting and self.reason == "DependencyNeverSatisfied"


def ask(argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> Answer:
    """Run one Slurm command; ControllerDown when nobody answered, else the answer, good or bad."""
    answer = run(argv, timeout_s=timeout_s, env=clean())
    if answer.timed_out or (not answer.ok and DOWN.search(answer.err)):
        raise ControllerDown(f"{argv[0]}: Slurm's controller does not answer ({answer.said})")
    return answer


def tell(argv: Sequence[str], *, patience_s: float = PATIENCE_S, say: Callable[[str], None] | None = None) -> str:
    """Run a command that may be repeated safely, again while the controller is down; SlurmError when it refuses."""
    answer = patiently(lambda: ask(argv), patience_s=patience_s, say=say)
    if not answer.ok:
        raise SlurmError(f"{' '.join(argv)}: {answer.said}")
    return answer.out


def patiently(
    action: Callable[[], T], *, patience_s: float = PATIENCE_S, say: Callable[[str], None] | None = None
) -> T:
    """Repeat while it raises ControllerDown, with growing pauses, for at most ``patience_s`` seconds."""
    end = time.monotonic() + patience_s
    pause_s = 1.0
    while True:
        try:
            return action()
        except ControllerDown as down:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise ControllerDown(f"{down}; gave up after {patience_s:.0f} s") from None
            if say is not None:
                say(f"{down}; asking again for {left_s:.0f} s")
            time.sleep(min(pause_s, max(left_s, 0.1)))
            pause_s = min(2 * pause_s, 15.0)


def jobs(ids: Iterable[str | int] | None = None) -> dict[str, QueuedJob]:
    """Jobs in Slurm's memory by id (also those that ended minutes ago): the named ones, or all of this user.

    A job that Slurm has forgotten is simply not in the answer. Raises ControllerDown, SlurmError.
    """
    form = SEPARATOR.join(SQUEUE_FIELDS.values())
    argv = ["squeue", "--noheader", "--all", "--states=all", f"--format={form}"]
    wanted = None if ids is None else {str(job_id) for job_id in ids}
    if wanted is not None and not wanted:
        return {}
    # by id also what belongs to others: a colleague may look at a run
    answer = ask([*argv, f"--user={os.geteuid()}" if wanted is None else f"--jobs={','.join(sorted(wanted))}"])
    if not answer.ok and "Invalid job id" in answer.err:  # of a single id that it does not know
        return {}
    if not answer.ok:
        raise SlurmError(f"squeue: {answer.said}")
    read = (_job(line) for line in answer.out.split("\n") if line)
    return {job.id: job for job in read if job is not None and (wanted is None or job.id in wanted)}


def _job(line: str) -> QueuedJob | None:
    fields = line.split(SEPARATOR)
    if len(fields) != len(SQUEUE_FIELDS):
        return None
    values = zip(SQUEUE_FIELDS, fields, strict=True)
    texts = {name: "" if text in ("N/A", "(null)", "None") else text for name, text in values}
    start = texts.pop("start")
    return QueuedJob(**texts, start=_when(start))


def _when(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def accounted(ids: Iterable[str | int]) -> dict[str, QueuedJob]:
    """What the accounting database knows of jobs, by id; {} where there is none. One call for all ids."""
    wanted = ",".join(str(job_id) for job_id in ids)
    if not wanted or which("sacct") is None:
        return {}
    argv = ["sacct", "-X", "-n", "-P", f"--delimiter={SEPARATOR}", f"--jobs={wanted}", "--format=JobIDRaw,State"]
    answer = run(argv, timeout_s=TIMEOUT_S, env=clean())
    rows = [line.split(SEPARATOR) for line in answer.out.splitlines() if answer.ok]
    # "CANCELLED by 1000"
    return {row[0]: QueuedJob(id=row[0], state=row[1].partition(" ")[0]) for row in rows if len(row) == 2}


def cancel(ids: Iterable[str | int], *, patience_s: float = PATIENCE_S) -> list[str]:
    """Cancel jobs, also held ones; returns the command that was run ([] without ids). Ended jobs are no error."""
    argv = ["scancel", *(str(job_id) for job_id in ids)]
    if len(argv) == 1:
        return []
    answer = patiently(lambda: ask(argv), patience_s=patience_s)
    refused = [line for line in answer.err.splitlines() if "already completing or completed" not in line.lower()]
    refused = [line for line in refused if "Invalid job id" not in line and line.strip()]
    if not answer.ok and refused:
        raise SlurmError(f"{' '.join(argv)}: {refused[-1]}")
    return argv


def release(ids: Iterable[str | int]) -> None:
    for job_id in ids:
        tell(["scontrol", "release", str(job_id)])


def estimate_start(script: Path, extra: Sequence[str] = ()) -> str:
    """Slurm's own estimate of when and where the script would start. Raises Refused, ControllerDown."""
    answer = ask(["sbatch", "--test-only", *extra, str(script)])
    if not answer.ok:
        raise Refused(f"{script.name}: {_reason(answer)}")
    return answer.said.removeprefix("sbatch: ")


def records(text: str, key: str) -> Iterator[dict[str, str]]:
    """One dict for each line of ``scontrol --oneliner``; of a repeated word the first counts (comments come last)."""
    for line in text.splitlines():
        pairs = re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", line)
        if pairs and pairs[0][0] == key:
            yield dict(reversed(pairs))


def partitions(say: Callable[[str], None]) -> str:
    """What Slurm tells of all partitions, one a line; "", with a word to ``say``, where no scontrol does."""
    argv = ("scontrol", "--oneliner", "show", "partition")
    answer = ask(argv) if which(argv[0]) else Answer(argv=argv, code=127, out="", err="no scontrol on PATH")
    if not answer.ok:
        say(f"the limits of the partitions were not looked at ({answer.said})")
    return answer.out if answer.ok else ""


def beyond_limits(known: str, partition: str, asked: Resources) -> str:
    """What of a request its partition, of those ``known``, does not allow, with the option; "" where one of those that
    are named allows all of it. Most sites let sbatch take such a job, which then waits for ever.
    """
    faults = []
    for record in records(known, "PartitionName"):
        name = record["PartitionName"]
        if name in partition.split(",") if partition else record.get("Default") == "YES":
            most, time_min = parse_time(record.get("MaxTime", "UNLIMITED")), asked.time_min
            if time_min is not None and most != UNLIMITED and (time_min == UNLIMITED or time_min > most):
                most_time = f"{format_time(most)} of time and not {format_time(time_min)}; -t {format_time(most)}"
                faults.append(f"partition {name} allows {most_time} has a stage go on in as many jobs as it needs")
            elif record.get("MaxNodes", "").isdecimal() and asked.nodes[0] > int(record["MaxNodes"]):
                faults.append(f"partition {name} allows {record['MaxNodes']} nodes and not {asked.nodes[0]} (--nodes)")
            else:
                return ""
    return next(iter(faults), "")


def accounts() -> tuple[str, ...]:
    """Those of this user; none where no accounting database tells."""
    with contextlib.suppress(SlurmError, KeyError):  # no sacctmgr, no database that answers, a user without a name
        answer = ask(["sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}", "format=Account"])
        if answer.ok:
            return tuple(sorted({line.split("|")[0] for line in answer.out.splitlines() if line.strip("|\n ")}))
    return ()


def unavailable_nodes(partition: str = "") -> int:
    """Nodes that are down, drained, reserved or silent now, of a partition or of all; 0 when Slurm does not say."""
    where = [f"--partition={partition}"] if partition else []
    answer = ask(["sinfo", "--noheader", "--Node", "--format=%N|%T", *where])
    states = dict(line.partition("|")[::2] for line in answer.out.splitlines())  # one line for each partition of a node
    usable = re.compile(r"(idle|mixed|allocated|completing|planned)[^*]*")  # "*": it does not respond
    return sum(usable.fullmatch(state) is None for state in states.values())


def submit(
    script: Path,
    extra: Sequence[str] = (),
    arguments: Sequence[str] = (),
    *,
    tag: str,
    patience_s: float = PATIENCE_S,
    say: Callable[[str], None] | None = None,
) -> str:
    """Send one script, with ``arguments`` of its own, and return the job id: one job whatever the controller does.

    ``tag`` is the script's ``--comment``, unique to this sending: after an answer that got lost Slurm is asked for it
    before anything is sent again, and also where a site's sbatch prints more than the id, or something else. Raises
    Refused (in Slurm's words) and ControllerDown; nothing is left of a refused job.
    """

    def tagged() -> str:
        return next((job.id for job in jobs().values() if job.comment == tag), "")

    unsure = False  # whether an earlier sbatch may have reached Slurm

    def once() -> Answer:
        nonlocal unsure
        # raises ControllerDown itself while there is no answer, so nothing is sent twice
        if unsure and (job_id := tagged()):
            return Answer(argv=("squeue",), code=0, out=job_id, err="")
        unsure = True
        return ask(["sbatch", "--parsable", *extra, str(script), *arguments], timeout_s=60)

    answer = patiently(once, patience_s=patience_s, say=say)
    ids: list[str] = re.findall(r"^\s*([0-9]+)(?:;\S*)?\s*$", answer.out, re.MULTILINE)
    if answer.ok and len(ids) == 1:
        return ids[0]
    job_id = patiently(tagged, patience_s=patience_s, say=say) if answer.ok or answer.out.strip() else ""
    if answer.ok and job_id:
        return job_id
    if answer.ok:
        raise Refused(f"{script.name}: sbatch gave no job id, and no job has the comment {tag}: {answer.said}")
    cancel([job_id] if job_id else [], patience_s=patience_s)  # a wrapper that failed after Slurm had taken the job
    raise Refused(f"{script.name}: {_reason(answer)}")


def _reason(answer: Answer) -> str:
    """Slurm's words for a rejection, without its prefixes."""
    lines = [
        re.sub(r"^sbatch: (?:error: )?|^allocation failure: ", "", line).strip() for line in answer.err.splitlines()
    ]
    lines = [line for line in lines if line and not line.startswith("Batch job submission failed: Unspecified")]
    return "; ".join(lines[-2:]).replace("Batch job submission failed: ", "sbatch refused: ") or answer.said
