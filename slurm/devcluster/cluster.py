"""Bring a developer cluster up, look at it, break and mend its nodes, and take it down without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import socket
import stat
import time
from pathlib import Path
from typing import Any

from slurm.command import run, which
from slurm.devcluster import accounting, conf, layout, network, packages, processes, registry
from slurm.devcluster.layout import Layout
from slurm.errors import SlurmError

UP_LIMIT_S = 60.0


def up(
    base: Path,
    name: str,
    nodes: int,
    *,
    gpus_per_node: int = 0,
    with_accounting: bool = False,
    isolation: str = "auto",
    install: bool = True,
    **more: Any,
) -> Layout:
    """A cluster with all nodes idle. Already up: dead nodes are restarted; half up: made anew.

    ``more``: further fields of Layout.

    Raises:
        SlurmError: it cannot run here (why, in one line); nothing is left behind.
    """
    layout.check_name(name)
    if not 1 <= nodes <= layout.MAX_NODES or not 0 <= gpus_per_node <= 64:
        raise SlurmError(f"{nodes} nodes of {gpus_per_node} GPUs: at most {layout.MAX_NODES} nodes of 64")
    packages.ensure(with_accounting, install)
    with registry.locked(base):
        wanted = Layout(
            name=name,
            nodes=nodes,
            slot=0,
            state=base / name,
            isolation=_isolation(isolation),
            user=getpass.getuser(),
            host=socket.gethostname(),
            gpus_per_node=gpus_per_node,
            accounting=with_accounting,
            first_job_id=int(time.time()) % 50_000_000 + 1,
            **more,
        )
        if _still_good(base, wanted):
            cluster = registry.find(base, name)
            for node in cluster.node_names:
                _mend(cluster, node)
        else:
            _remove(base, name)
            wanted.state.mkdir(mode=0o755)
            try:
                cluster = registry.claim_slot(base, wanted)
                # before anything else, so that `down` knows what to look for
                (cluster.state / registry.LAYOUT_FILE).write_text(cluster.dump())
                _bring_up(cluster)
            except BaseException:
                _remove(base, name)
                raise
        return cluster


def _isolation(wished: str) -> str:
    if wished == "host":
        return "host"
    reason = network.why_not()
    if wished == "netns" and reason:
        raise SlurmError(f"nodes cannot have namespaces of their own: {reason}; leave --isolation out")
    return "host" if reason else "netns"


def _still_good(base: Path, wanted: Layout) -> bool:
    """Whether this very cluster runs; SlurmError when another of the same name does."""
    try:
        old = registry.find(base, wanted.name)
    except SlurmError:
        return False
    if "slurmctld" not in processes.recorded(old) or not (old.state / "ready").exists():
        return False
    same = dataclasses.replace(wanted, slot=old.slot, first_job_id=old.first_job_id)
    if old != same:
        raise SlurmError(
            f"cluster {old.name} is up with other settings ({old.nodes} nodes, {old.gpus_per_node} GPUs per "
            f"node, isolation {old.isolation}); first: python -m slurm.devcluster down --name {old.name}"
        )
    return True


def _bring_up(cluster: Layout) -> None:
    state = cluster.state
    for folder in ("log", "pid", "munge", "spool", "tmp"):
        (state / folder).mkdir(mode=0o755)
    (state / "controller").mkdir(mode=0o700)
    for node in cluster.node_names:
        (state / "tmp" / node).mkdir()
        (state / "tmp" / node).chmod(0o1777)
    _write_files(cluster)
    if cluster.isolation == "netns":
        network.make(cluster)
    _start_munge(cluster)
    if cluster.accounting:
        accounting.bring_up(cluster)
    start_controller(cluster)
    for node in cluster.node_names:
        _start_node(cluster, node)
    wait_for_nodes(cluster, cluster.node_names)
    (state / "ready").touch()


def _write_files(cluster: Layout) -> None:
    state = cluster.state
    cluster.conf.write_text(conf.slurm_conf(cluster))
    (state / "cgroup.conf").write_text("")
    if cluster.banner:
        (state / "bin").mkdir()
        (state / "bin" / "sbatch").write_text(conf.greeting_sbatch(str(which("sbatch"))))
        (state / "bin" / "sbatch").chmod(0o755)
    (state / "hosts").write_text(conf.hosts(cluster))
    nsswitch = Path("/etc/nsswitch.conf")
    (state / "nsswitch.conf").write_text(conf.nsswitch(nsswitch.read_text() if nsswitch.exists() else ""))
    if cluster.gpus_per_node:
        (state / "gres.conf").write_text(conf.gres_conf(cluster, _gpu_devices(cluster)))


def _gpu_devices(cluster: Layout) -> list[str]:
    """Character devices that stand for GPUs: own ones as root, the first terminals otherwise."""
    wanted = range(cluster.gpus_per_node)
    if os.geteuid() != 0:
        devices = [f"/dev/tty{k}" for k in wanted]
        if missing := [device for device in devices if not Path(device).is_char_device()]:
            raise SlurmError(f"{missing[0]}: no such device to stand for a GPU; as root any number can be claimed")
        return devices
    folder = cluster.state / "gpu"
    folder.mkdir()
    devices = [str(folder / f"nvidia{k}") for k in wanted]
    for device in devices:
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError as error:
            raise SlurmError(f"{device}: this machine lets root make no device files ({error.strerror})") from None
    return devices


def _start_munge(cluster: Layout) -> None:
    folder = cluster.state / "munge"
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = [f"--key-file={key}", f"--socket={cluster.munge_socket}", f"--pid-file={folder}/pid"]
    files += [f"--log-file={cluster.state}/log/munged.log", f"--seed-file={folder}/seed"]
    daemon = processes.start(cluster, "munged", ["munged", "--foreground", "--force", *files])
    end = time.monotonic() + 10
    while not cluster.munge_socket.exists():
        if not processes.alive(daemon) or time.monotonic() > end:
            raise SlurmError(f"munged did not start: {processes.last_words(cluster, 'munged')}")
        time.sleep(0.01)


def start_controller(cluster: Layout) -> int:
    """slurmctld, also again after it was stopped; its pid."""
    slurmctld = ["slurmctld", "-D", "-f", str(cluster.conf)]
    return processes.start(cluster, "slurmctld", network.named(cluster, slurmctld))


def _start_node(cluster: Layout, node: str) -> None:
    slurmd = ["slurmd", "-D", "-N", node, "-f", str(cluster.conf)]
    argv = network.enter(cluster, node, slurmd) if cluster.isolation == "netns" else slurmd
    processes.start(cluster, f"slurmd-{node}", argv)


def node_states(cluster: Layout) -> dict[str, str]:
    """Slurm's word for each node (``idle``, ``mixed``, ``down*``, …); empty without a controller."""
    answer = run(["sinfo", "-h", "-N", "-o", "%N %T"], timeout_s=10, env=processes.daemon_environment(cluster))
    rows = [line.split() for line in answer.out.splitlines()] if answer.ok else []
    return {row[0]: row[1] for row in rows if len(row) == 2}


def wait_for_nodes(cluster: Layout, nodes: list[str], limit_s: float = UP_LIMIT_S) -> None:
    """Wait until Slurm may start jobs on these nodes; SlurmError with the culprit's last words."""
    usable = ("idle", "mixed", "allocated", "completing")
    end = time.monotonic() + limit_s
    while True:
        states = node_states(cluster)
        waiting = [node for node in nodes if states.get(node) not in usable]
        if not waiting:
            return
        running = processes.recorded(cluster)
        for role in ("slurmctld", *(f"slurmd-{node}" for node in waiting)):
            if role not in running:
                raise SlurmError(f"{role} stopped: {processes.last_words(cluster, role)}")
        if time.monotonic() > end:
            role = f"slurmd-{waiting[0]}"
            raise SlurmError(
                f"{len(waiting)} of {len(nodes)} nodes not ready after {limit_s:g} s; {waiting[0]} is "
                f"{states.get(waiting[0], 'unknown')}: {processes.last_words(cluster, role)}"
            )
        time.sleep(0.05)


def down(base: Path, name: str) -> bool:
    """Take a cluster away, however far it had come; False when there was none."""
    with registry.locked(base):
        return _remove(base, layout.check_name(name))


def _remove(base: Path, name: str) -> bool:
    state = base / name
    if not state.exists():
        return False
    try:
        cluster = registry.find(base, name)
    except (
        SlurmError,
        ValueError,
        TypeError,
        KeyError,
    ):  # stopped before or while it wrote its layout: nothing else exists
        shutil.rmtree(state)
        return True
    spaces = list(network.namespaces(cluster)) if cluster.isolation == "netns" else []
    processes.kill_all(
        lambda: [
            *processes.recorded(cluster).values(),
            *processes.members(state, cluster.conf),
            *processes.in_namespaces(spaces),
        ]
    )
    if cluster.isolation == "netns":
        network.remove(cluster)
    network.remove_cgroups(cluster)
    shutil.rmtree(state)
    return True


def kill(cluster: Layout, node: str, daemon_only: bool = False) -> int:
    """Pull the plug of a node: cable out, then every process of it dies; returns how many.

    ``daemon_only`` kills slurmd alone: its jobs run on, as after a crash of slurmd.
    """
    name = cluster.node_names[cluster.number(node) - 1]
    if daemon_only or cluster.isolation != "netns":
        return processes.kill_all(lambda: _of_node(cluster, name, daemon_only))
    network.set_link(cluster, name, up=False)
    spaces = list(network.namespaces(cluster, [name]))
    return processes.kill_all(lambda: processes.in_namespaces(spaces))


def _of_node(cluster: Layout, node: str, daemon_only: bool) -> list[int]:
    daemon = [pid for role, pid in processes.recorded(cluster).items() if role == f"slurmd-{node}"]
    if daemon_only:
        return daemon
    tasks = processes.members(cluster.state, cluster.conf)
    return daemon + [pid for pid in tasks if processes.variable(pid, "SLURMD_NODENAME") == node]


def cut(cluster: Layout, node: str) -> None:
    """Take a node off the network; what runs on it runs on. SlurmError where nodes share one network."""
    name = cluster.node_names[cluster.number(node) - 1]
    if cluster.isolation != "netns":
        raise SlurmError(f"{name}: nodes of this cluster share one network; cut needs root when the cluster is made")
    network.set_link(cluster, name, up=False)


def heal(cluster: Layout, node: str) -> None:
    """Plug the cable in again and restart slurmd when it is dead; returns when Slurm may use the node."""
    name = cluster.node_names[cluster.number(node) - 1]
    _mend(cluster, name)


def _mend(cluster: Layout, node: str) -> None:
    if not network.is_up(cluster, node):
        network.set_link(cluster, node, up=True)
    running = processes.recorded(cluster)
    if f"slurmd-{node}" not in running:
        _start_node(cluster, node)
    elif node_states(cluster).get(node, "down").startswith("down"):
        os.kill(running[f"slurmd-{node}"], signal.SIGHUP)  # it reports at once instead of a minute or two later
    _wait_for_port(cluster, cluster.number(node))
    wait_for_nodes(cluster, [node])


def _wait_for_port(cluster: Layout, number: int) -> None:
    """Wait until slurmd answers: Slurm's word is of no use here, it may not yet have noticed the fault."""
    end = time.monotonic() + UP_LIMIT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection((cluster.address(number), cluster.port(number)), timeout=1).close()
            return
        time.sleep(0.02)
    node = cluster.node_names[number - 1]
    raise SlurmError(f"{node}: slurmd does not answer: {processes.last_words(cluster, f'slurmd-{node}')}")
