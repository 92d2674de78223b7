"""Two ranks on two nodes whose names and addresses are as sites have them, each in a network of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run.rundir import RunDir
from slurm.devcluster import network
from support.running import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

RANK = """\
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from pipeline.errors import describe
from pipeline.node import distributed
from pipeline.node.job import Job, Topology
from pipeline.run.rundir import RunDir

run, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.environ |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2"}
distributed.PEER_TIMEOUT_S = 15.0
topology = Topology(rank, ranks, 0, "launch", nodes=2)
job = Job(RunDir(run), "phase1", RunDir(run).stage("phase1").attempts[-1], topology, workers=1, threads=1)
try:
    with distributed.joined(job, torch.device("cpu")) as (group, _):
        value = torch.ones(1)
        dist.all_reduce(value, group=group)
        dist.barrier(group)
        print(value.item())
except Exception as error:
    print(*describe(error))
os._exit(0)
"""
ENTER = (
    'hostname "$1" && mount --bind "$2.hosts" /etc/hosts && mount --bind "$2.nsswitch" /etc/nsswitch.conf'
    ' && shift 2 && exec "$@"'
)
NAMES = {  # ranks, the addresses of a and b, and what each calls itself
    "Debian: a node's own name is 127.0.1.1": (4, "10.99.0.1/24", "10.99.0.2/24", "127.0.1.1", "127.0.1.1"),
    "one node as Debian has it": (2, "10.99.0.1/24", "10.99.0.2/24", "127.0.1.1", "10.99.0.2"),
    "IPv6 only": (2, "fd99::1/64", "fd99::2/64", "fd99::1", "fd99::2"),
    "IPv6 only, a node's own name is ::1": (4, "fd99::1/64", "fd99::2/64", "::1", "::1"),
    "IPv6 only, a node's own name is 127.0.1.1": (2, "fd99::1/64", "fd99::2/64", "127.0.1.1", "127.0.1.1"),
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    """Two namespaces, a cable between them."""
    if reason := network.why_not():
        pytest.skip(f"NO NODES WITH NAMES OF THEIR OWN: {reason}")
    names = [f"names{os.getpid()}{node}" for node in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.parametrize("case", NAMES)
def test_ranks_meet_whatever_nodes_call_themselves(spaces, tmp_path: Path, case: str) -> None:
    """Of one, then of two ranks a node: those of the first node learn from the others which network leads to them."""
    ranks, *addresses, self_a, self_b = NAMES[case]
    plain_a, plain_b = (address.partition("/")[0] for address in addresses)
    calls = {"a": f"{self_a} node-a\n{plain_b} node-b\n", "b": f"{plain_a} node-a\n{self_b} node-b\n"}
    kept = [line for line in Path("/etc/nsswitch.conf").read_text().splitlines() if not line.startswith("hosts:")]
    (tmp_path / "rank.py").write_text(RANK)
    RunDir(tmp_path).stage("phase1").new_attempt("launch")
    processes = []
    for node, space, address in zip("ab", spaces, addresses, strict=True):
        ip("-n", space, "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))
        for link in ("lo", "eth0"):
            ip("-n", space, "link", "set", link, "up")
        (tmp_path / f"{node}.hosts").write_text("127.0.0.1 localhost\n" + calls[node])
        (tmp_path / f"{node}.nsswitch").write_text("\n".join([*kept, "hosts: files"]) + "\n")
        for rank in range(ranks)["ab".index(node) * ranks // 2 :][: ranks // 2]:
            inside = ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "--propagation", "slave"]
            shell = ["sh", "-c", ENTER, "sh", f"node-{node}", str(tmp_path / node)]
            words = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path), str(rank), str(ranks)]
            env = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "GLOO_"))}
            processes.append(
                subprocess.Popen(
                    [*inside, *shell, *words],
                    cwd=ROOT,
                    env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
    try:
        assert [process.communicate(timeout=60)[0] for process in processes] == [f"{ranks:.1f}\n"] * ranks
    finally:
        for process in processes:
            process.kill()
            process.communicate()
