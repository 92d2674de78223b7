"""The developer cluster is a real Slurm of several nodes, whose nodes can be broken and mended, and leaves no trace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.devcluster import cluster, network, processes, registry

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]
# USR2, which announces a preemption, must not end the ranks: a job whose script ends by itself is not requeued.
# Slurm sends it only to jobs that have a --signal; the others get TERM at once.
STEADY = """\
echo attempt ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST
srun bash -c 'trap "" USR2; echo rank; exec sleep 300'
"""


def output(folder: Path, job_id: str) -> str:
    file = folder / f"{job_id}.out"
    return file.read_text() if file.exists() else ""


def test_every_node_has_its_own_name_and_network(idle) -> None:
    said = idle.call("srun", "-N4", "--immediate=10", "bash", "-c", "echo $(hostname) $(getent hosts $(hostname))")
    expected = {f"test-n{k:02d} {idle.layout.address(k)} test-n{k:02d}" for k in range(1, 5)}
    assert {" ".join(line.split()) for line in said.splitlines()} == expected


def test_the_controller_asks_no_name_server(idle) -> None:
    """The newer slurmctld looks up whoever talks to it, and answers nobody else while a lost answer is waited for."""
    there = ["nsenter", f"--target={processes.recorded(idle.layout)['slurmctld']}", "--mount"]
    assert idle.call(*there, "getent", "hosts", idle.layout.address(2)).split() == [idle.layout.address(2), "test-n02"]
    assert idle.call(*there, "grep", "^hosts:", "/etc/nsswitch.conf") == "hosts: files"


def test_tasks_see_the_gpus_of_their_node(idle) -> None:
    said = idle.call(
        *("srun", "-N2", "--ntasks-per-node=4", "--gpus-per-node=4", "--immediate=10"),
        *("bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"),
    )
    assert sorted(said.splitlines()) == ["test-n01 0,1,2,3"] * 4 + ["test-n02 0,1,2,3"] * 4


def test_a_held_chain_starts_when_released(idle, tmp_path: Path) -> None:
    first = idle.sbatch("srun hostname", tmp_path, "-N2", "--hold")
    second = idle.sbatch("exit 3", tmp_path, f"--dependency=afterok:{first}")
    third = idle.sbatch("true", tmp_path, f"--dependency=afterany:{second}")
    time.sleep(1)
    assert {idle.state(job) for job in (first, second, third)} == {"PENDING"}
    idle.call("scontrol", "release", first)
    idle.wait_state(third, "COMPLETED")
    assert (idle.state(first), idle.state(second)) == ("COMPLETED", "FAILED")
    assert sorted(output(tmp_path, first).split()) == ["test-n01", "test-n02"]


def test_requeue_and_preemption(idle, tmp_path: Path) -> None:
    """A requeued job and one that a partition of higher priority displaces come back under their old ids."""
    asked = idle.sbatch(STEADY, tmp_path, "-N1", "--exclusive")
    taken = idle.sbatch(STEADY, tmp_path, "-N3", "--exclusive", "--signal=USR2@60")
    idle.wait(lambda: output(tmp_path, taken).count("rank") == 3, "three ranks")
    idle.wait(lambda: "rank" in output(tmp_path, asked), "a rank")
    idle.call("scontrol", "requeue", asked)
    above = idle.sbatch("sleep 2", tmp_path, "-N3", "--partition=high", "--exclusive")
    idle.wait_state(above, "RUNNING", "COMPLETED", limit_s=40)
    for job in (asked, taken):
        idle.wait(lambda job=job: "attempt 1" in output(tmp_path, job), f"second attempt of {job}", 45)


def test_lost_nodes(idle, tmp_path: Path) -> None:
    """One node loses power, one its network: both jobs run again elsewhere, and the cut-off rank still writes."""
    beat = f"echo attempt ${{SLURM_RESTART_COUNT:-0}}; cd {tmp_path}; "
    beat += "while true; do date >>beat.$SLURMD_NODENAME; sleep 0.1; done"
    jobs = [idle.sbatch(beat, tmp_path, "-N1", "--exclusive") for _ in range(2)]
    idle.wait(lambda: len(list(tmp_path.glob("beat.*"))) == 2, "both run")
    dark, cut = (idle.call("squeue", "-h", "-j", job, "-o", "%N") for job in jobs)
    assert cluster.kill(idle.layout, dark) >= 3  # slurmd, a step, its shell
    cluster.cut(idle.layout, cut)
    assert not list(processes.in_namespaces(network.namespaces(idle.layout, [dark])))
    with pytest.raises(OSError, match=r"timed out|No route|unreachable"):
        socket.create_connection((idle.layout.address(idle.layout.number(cut)), idle.layout.port(1)), timeout=0.5)
    for job in jobs:
        idle.wait(lambda job=job: "attempt 1" in output(tmp_path, job), f"{job} runs again", 60)
    size = {node: (tmp_path / f"beat.{node}").stat().st_size for node in (dark, cut)}
    time.sleep(0.5)
    assert {node: (tmp_path / f"beat.{node}").stat().st_size > size[node] for node in size} == {dark: False, cut: True}
    for node in (dark, cut):
        cluster.heal(idle.layout, node)
    assert set(idle.call("srun", "-w", f"{dark},{cut}", "--immediate=10", "hostname").split()) == {dark, cut}


def test_a_daemon_that_dies_alone_leaves_its_job_running(idle, tmp_path: Path) -> None:
    job = idle.sbatch(STEADY, tmp_path, "-N1", "--nodelist=test-n03")
    idle.wait(lambda: "rank" in output(tmp_path, job), "the job runs")
    assert cluster.kill(idle.layout, "test-n03", daemon_only=True) == 1
    cluster.heal(idle.layout, "test-n03")
    assert idle.state(job) == "RUNNING"
    assert "attempt 1" not in output(tmp_path, job)


def test_an_ordinary_user_may_use_it(idle) -> None:
    said = idle.call("srun", "-N2", "--immediate=10", "--chdir=/", "id", "-un", user=65534)
    assert said.split() == ["nobody", "nobody"]


def test_up_again_mends_and_refuses_another_shape(idle, base: Path) -> None:
    before = processes.recorded(idle.layout)
    cluster.kill(idle.layout, "n01", daemon_only=True)
    assert cluster.up(base, "test", 4, gpus_per_node=8, settings=idle.layout.settings) == idle.layout
    after = processes.recorded(idle.layout)
    assert [role for role in before if before[role] != after[role]] == ["slurmd-test-n01"]
    with pytest.raises(cluster.SlurmError, match="other settings"):
        cluster.up(base, "test", 3, gpus_per_node=8)


def test_two_side_by_side_and_down_leaves_nothing(idle, base: Path, make_cluster, machine) -> None:
    before = machine()
    second = make_cluster("second", 2)
    assert set(second.call("srun", "-N2", "--immediate=10", "hostname").split()) == {"second-n01", "second-n02"}
    assert second.call("sinfo", "-h", "-o", "%D", "-p", "low") == "2"
    assert idle.call("sinfo", "-h", "-o", "%D", "-p", "low") == "4"
    # an orphan: its slurmd is gone, its shell and sleep are not
    second.call("sbatch", "--output=/dev/null", "--wrap", "setsid sleep 1000 & wait")
    second.wait(lambda: second.call("squeue", "-h", "-t", "RUNNING"), "the job runs")
    cluster.kill(second.layout, "n01", daemon_only=True)
    assert cluster.down(base, "second")
    after = machine()
    assert {kind: after[kind] - before[kind] for kind in before} == {kind: set() for kind in before}
    assert idle.call("srun", "-N4", "--immediate=10", "hostname")
    assert not cluster.down(base, "second")


def test_one_name_in_two_places_is_two_clusters(idle) -> None:
    """As when two test sessions run at once on one machine."""
    elsewhere = Path(f"/tmp/slurm-devcluster-twin-{os.getpid()}")
    twin = cluster.up(elsewhere, "test", 2)
    try:
        assert twin.slot != idle.layout.slot
        assert len(idle.call("srun", "-N4", "--immediate=10", "hostname").split()) == 4
        assert len(idle.call("srun", "-N2", "--immediate=10", "hostname", SLURM_CONF=str(twin.conf)).split()) == 2
    finally:
        assert cluster.down(elsewhere, "test")
    assert len(idle.call("srun", "-N4", "--immediate=10", "hostname").split()) == 4


def test_down_after_a_killed_up(base: Path, idle, machine) -> None:
    """`up` is killed with SIGKILL at various moments; `down` still finds everything."""
    before = machine()
    command = [
        sys.executable,
        "-m",
        "slurm.devcluster",
        "up",
        "--nodes",
        "3",
        "--name",
        "torn",
        "--state-dir",
        str(base),
    ]
    for delay_s in (0.25, 0.4, 0.6):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay_s)
            process.kill()
        cluster.down(base, "torn")
        after = machine()
        assert {kind: after[kind] - before[kind] for kind in before} == {kind: set() for kind in before}
    assert [other.name for other in registry.others(base)] == ["test"]
