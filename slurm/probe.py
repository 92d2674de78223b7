"""``python -m slurm.probe > mysite.toml``: a first draft of a cluster profile, from what the site's own Slurm says.

Every value carries a comment that says where it came from and what to check by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slurm import queue
from slurm.errors import FlagError, SlurmError
from slurm.profile import PROFILES
from slurm.resources import UNLIMITED, format_time, parse_time

LONGEST_MIN = {"data": 24 * 60, "pretrain": 24 * 60, "finetune": 8 * 60}  # no longer, whatever the site allows
SIGNAL_S = 120
# GB of a GPU by its type in Gres, the smaller where there are two; a type may say it itself, as in a100_80gb
GPU_GB = {"v100": 16, "p100": 16, "t4": 16, "a10": 24, "l4": 24, "a30": 24, "rtx_3090": 24, "rtx_4090": 24, "a100": 40,
          "a40": 48, "a6000": 48, "l40": 48, "l40s": 48, "h100": 80, "h200": 141, "gh200": 96, "b200": 180}  # fmt: skip
NETS = Path("/sys/class/net")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What Slurm's commands printed. ``partition`` is the one wanted; "" takes the default one."""

    config: str  # scontrol show config
    partitions: str  # scontrol --oneliner show partition
    nodes: str  # scontrol --oneliner show node
    states: str = ""  # sinfo --noheader --format=%R|%D|%t
    interfaces: tuple[str, ...] = ()  # of this machine, the fastest first
    accounts: tuple[str, ...] = ()  # of this user, by sacctmgr
    partition: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """GPUs of most nodes that have any; ``nodes`` have exactly these, out of ``all_nodes`` of the partition."""

    kind: str = ""
    count: int = 0
    nodes: int = 0
    all_nodes: int = 0
    kinds: int = 0  # different counts or types in the partition


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.probe", description=__doc__)
    parser.add_argument("--partition", "-p", default="", help="partition to train on (Slurm's default one)")
    print(draft(ask(parser.parse_args().partition)), end="")
    return 0


def ask(partition: str = "") -> Facts:
    """Ask the live Slurm. Raises SlurmError where there is none or it does not answer."""
    return Facts(
        config=queue.tell(["scontrol", "show", "config"], patience_s=0),
        partitions=queue.tell(["scontrol", "--oneliner", "show", "partition"], patience_s=0),
        nodes=queue.tell(["scontrol", "--oneliner", "show", "node"], patience_s=0),
        states=queue.tell(["sinfo", "--noheader", "--format=%R|%D|%t"], patience_s=0),
        accounts=queue.accounts(),
        partition=partition,
        interfaces=interfaces(NETS),
    )


def interfaces(nets: Path) -> tuple[str, ...]:
    """Network interfaces of hardware that are up, InfiniBand first and then by speed."""
    speeds = []
    for net in nets.glob("*"):
        with contextlib.suppress(OSError, ValueError):  # one that is down has no speed
            if (net / "device").exists() and (net / "operstate").read_text().strip() == "up":
                infiniband = (net / "type").read_text().strip() == "32"
                speeds.append((infiniband, int((net / "speed").read_text()), net.name))
    return tuple(name for *_, name in sorted(speeds, reverse=True))


def draft(facts: Facts) -> str:
    """A profile in TOML. FlagError for a partition that there is not; SlurmError when none is default or named."""
    config = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", facts.config, re.MULTILINE))
    partitions = {record["PartitionName"]: record for record in queue.records(facts.partitions, "PartitionName")}
    chosen = _choose(partitions, facts.partition)
    nodes = [*queue.records(facts.nodes, "NodeName")]
    own = [node for node in nodes if chosen["PartitionName"] in node.get("Partitions", "").split(",")]
    gpus = _most_common_gpus(own)
    lines = [
        f"# Drafted by slurm.probe from Slurm {config.get('SLURM_VERSION', 'of an unknown version')}: read every line.",
        *_machine(config, chosen, gpus, nodes),
        *_ending(config, chosen),
        *_sections(chosen, gpus, own, nodes, facts),
    ]
    lines += _micro_batches(gpus)
    if len(facts.interfaces) > 1:
        lines += [
            "",
            "[env]",
            f"# check: this machine has {', '.join(facts.interfaces)}; pipeline.doctor shows the nodes'",
        ]
        lines += [f"# {library}_SOCKET_IFNAME = {_string(facts.interfaces[0])}" for library in ("NCCL", "GLOO")]
    return "".join(f"{_plain(line)}\n" for line in lines)


def _choose(partitions: dict[str, dict[str, str]], wanted: str) -> dict[str, str]:
    known = ", ".join(partitions) or "none"
    if wanted:
        if wanted not in partitions:
            raise FlagError(f"--partition {wanted}: Slurm shows no such partition; it shows {known}")
        return partitions[wanted]
    for partition in partitions.values():
        if partition.get("Default") == "YES":
            return partition
    raise SlurmError(f"this Slurm has no default partition; name one with --partition; it shows {known}")


def _gres(text: str) -> tuple[str, int]:
    """``gpu:a100:8(S:0-1),nvme:1`` → ("a100", 8); the first kind of several; ("", 0) without GPUs."""
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        words = part.split(":")
        if words[0] == "gpu":
            count = words[-1] if len(words) > 1 and words[-1].isdecimal() else ""
            return ":".join(words[1 : len(words) - bool(count)]), int(count or 1)
    return "", 0


def _most_common_gpus(nodes: list[dict[str, str]]) -> Gpus:
    counts = Counter(gpus for node in nodes if (gpus := _gres(node.get("Gres", "")))[1])
    if not counts:
        return Gpus(all_nodes=len(nodes))
    (kind, count), number = counts.most_common(1)[0]
    return Gpus(kind=kind, count=count, nodes=number, all_nodes=len(nodes), kinds=len(counts))


def _partitions(nodes: list[dict[str, str]], *, gpus: bool) -> set[str]:
    """Partitions that have a node with (without) GPUs."""
    having = [node for node in nodes if (_gres(node.get("Gres", ""))[1] > 0) == gpus]
    return {name for node in having for name in node.get("Partitions", "").split(",") if name}


def _machine(config: dict[str, str], chosen: dict[str, str], gpus: Gpus, nodes: list[dict[str, str]]) -> Iterator[str]:
    partition = chosen["PartitionName"]
    name = re.sub(r"[^\w-]", "_", config.get("ClusterName", ""), flags=re.ASCII) or "mysite"
    yield f"name = {_string(name)}  # ClusterName"
    yield 'runner = "slurm"'
    if gpus.count:
        yield f"gpus_per_node = {gpus.count}  # Gres of {gpus.nodes} of {gpus.all_nodes} nodes of partition {partition}"
    else:
        yield f"gpus_per_node = 0  # no node of partition {partition} shows a gpu in Gres"
        having = _partitions(nodes, gpus=True)
        if having:
            yield f"# check: there are GPUs in {', '.join(sorted(having))}; draft again with --partition"
        yield "tasks_per_node = 1  # check: ranks on one CPU node; threads = N gives each more than one"
    if gpus.kind:
        mixed = gpus.kinds > 1
        why = "the partition mixes kinds of GPUs" if mixed else "needed only where the site insists on a type"
        yield f"{'' if mixed else '# '}gpu_type = {_string(gpus.kind)}  # from Gres; {why}"
    if memory := _gpu_gb(gpus.kind):
        yield f"gpu_memory_gb = {memory}  # of a {gpus.kind}; check: nvidia-smi"
    select = config.get("SelectType", "select/cons_tres")
    if gpus.count and "cons_tres" not in select:
        yield f'gpu_request = "gres"  # SelectType={select} does not know --gpus-per-node'
    yield "# modules, setup, container and python: how the nodes find Python and CUDA. data_dir: a shared folder"


def _ending(config: dict[str, str], chosen: dict[str, str]) -> Iterator[str]:
    """What the site does with jobs that must end: requeue and signal."""
    job, mode = config.get("JobRequeue", "1"), chosen.get("PreemptMode") or config.get("PreemptMode", "OFF")
    if config.get("PreemptType", "").removeprefix("preempt/") in ("none", "(null)"):
        mode = "OFF"  # whatever the partition says, nothing is preempted
    requeue = job != "0" or "REQUEUE" in mode
    yield f"requeue = {'true' if requeue else 'false'}  # JobRequeue={job}, PreemptMode={mode}"
    if not requeue:
        yield "# check: sites with JobRequeue=0 often allow --requeue; with true, stopped jobs continue by themselves"
    elif "CANCEL" in mode:
        yield "# check: a job preempted in this partition is cancelled; submit again then, it continues"
    grace = chosen.get("GraceTime", "0")
    grace_s = int(grace) if grace.isdecimal() else 0
    sends = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    if sends and grace_s:
        yield f"signal_s = {max(SIGNAL_S, grace_s)}  # preempt_send_user_signal, GraceTime={grace_s}"
        yield f"# check: preemption signals as well and then leaves {grace_s} s, in which a checkpoint must be written"
    else:
        yield f"signal_s = {SIGNAL_S}  # our choice: time to save before the limit; GraceTime={grace_s}"
        if mode != "OFF":
            reason = "preempt_send_user_signal is not set" if not sends else "GraceTime is 0"
            yield f"# check: {reason}, so a preempted job may end without a last checkpoint"


def _gpu_gb(kind: str) -> int:
    """Memory of a type of GPU; 0 where its name does not tell."""
    if size := re.search(r"(?<!\d)(\d{2,3})gb?(?![a-z])", kind.lower()):
        return int(size[1])
    words = re.split(r"[-.]|nvidia_|tesla_", kind.lower())
    return next((GPU_GB[word] for word in words if word in GPU_GB), 0)


def _micro_batches(gpus: Gpus) -> list[str]:
    """[micro_batch] of our profile for the largest GPUs that are no larger; doubled where these are twice as large."""
    memory = max(16, _gpu_gb(gpus.kind))
    tables = {}
    for path in PROFILES.glob("*.toml"):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if table.get("gpu_memory_gb", memory + 1) <= memory and "bert_large.phase1.bf16" in table.get(
            "micro_batch", {}
        ):
            tables[table["gpu_memory_gb"]] = (path.name, table["micro_batch"])
    size = max(tables)
    name, table = tables[size]
    times = 1 << int(memory / size).bit_length() - 1
    why = f"{times} times those" if times > 1 else "those"
    lines = ["", f"# check: {why} of {name}, for {size:g} GB; python -m pipeline.plan says what fits", "[micro_batch]"]
    return lines + [f'"{key}" = {value * times}' for key, value in table.items()]


def _sections(
    chosen: dict[str, str], gpus: Gpus, own: list[dict[str, str]], nodes: list[dict[str, str]], facts: Facts
) -> Iterator[str]:
    name, cpus, memory_gb = chosen["PartitionName"], _least(own, "CPUTot"), _least(own, "RealMemory") // 1024
    rows = [line.split("|") for line in facts.states.splitlines() if line.startswith(f"{name}|")]
    states = ", ".join(f"{row[1]} nodes {row[2]}" for row in rows if len(row) == 3)
    yield ""
    yield f"# Partition {name}: {states or 'no node'} (sinfo), State={chosen.get('State', '?')},"
    yield f"# MaxNodes={chosen.get('MaxNodes', '?')}, QoS={chosen.get('QoS', '?')}"
    yield "# check: a QoS may limit time, nodes and GPUs further (sacctmgr show qos)"
    if facts.accounts:
        yield f'# check: your accounts are {", ".join(facts.accounts)} (sacctmgr); a section takes account = "..."'
    for section in LONGEST_MIN:
        yield ""
        yield f"[{section}]"
        yield f"partition = {_string(name)}  # {'--partition' if facts.partition else 'Default=YES'}"
        free = sorted(_partitions(nodes, gpus=False) - _partitions(nodes, gpus=True))
        if section == "data" and gpus.count and free:
            yield f"# check: CPU-only partitions, enough for these jobs: {', '.join(free)}"
        yield _time(section, chosen.get("MaxTime", ""))
        if section != "data" and gpus.count:
            yield "exclusive = true  # one rank per GPU on whole nodes"
            yield "mem_gb = 0  # all of a node"
            continue
        most_cpus, most_gb = (16, 64) if section == "data" else (1, 0)
        if cpus:
            yield f"cpus_per_task = {max(1, min(most_cpus, cpus))}  # of CPUTot={cpus} on the smallest node"
        if memory_gb and most_gb:
            yield f"mem_gb = {max(1, min(most_gb, memory_gb))}  # of RealMemory={memory_gb} GiB there"


def _time(section: str, text: str) -> str:
    """The section's limit: ours, or the partition's where that is shorter."""
    try:
        most = parse_time(text)
    except FlagError:
        return f"time = {_string(format_time(LONGEST_MIN[section]))}  # check: no MaxTime was found"
    minutes = LONGEST_MIN[section] if most == UNLIMITED else min(most, LONGEST_MIN[section])
    return f"time = {_string(format_time(minutes))}  # MaxTime={text}"


def _least(nodes: list[dict[str, str]], key: str) -> int:
    return min((int(node[key]) for node in nodes if node.get(key, "").isdecimal()), default=0)


def _string(text: str) -> str:
    return json.dumps(_plain(text))


def _plain(text: str) -> str:
    """One line of ASCII: a site's words could hold anything, and so could the locale that writes them."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SlurmError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.exit_code)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
