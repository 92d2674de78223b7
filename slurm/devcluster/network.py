"""One network namespace per node, joined by a bridge on which the controller has address .254."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from slurm.command import run, which
from slurm.devcluster.layout import Layout
from slurm.devcluster.processes import must
from slurm.errors import SlurmError

NETNS = Path("/run/netns")
# the same things in namespaces that vanish with the command: nothing to clean when it fails half way
PROBE = (
    "ip link add probe0 type bridge && ip link add probe1 type veth peer name probe2 && hostname probe"
    " && mount --bind /etc/hostname /etc/hosts"
)


def why_not() -> str:
    """Why nodes cannot have namespaces of their own here; "" when they can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    answer = run(["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", PROBE])
    return "" if answer.ok else f"this machine does not let root make namespaces, bridges and mounts ({answer.said})"


def claim(layout: Layout) -> bool:
    """Make the bridge, and with it the slot, ours; False when another cluster of anybody has it."""
    answer = run(["ip", "link", "add", layout.bridge, "type", "bridge"])
    if not answer.ok and "File exists" not in answer.err:
        raise SlurmError(f"{layout.bridge}: bridge cannot be made: {answer.said}")
    return answer.ok


def make(layout: Layout) -> None:
    """Addresses, namespaces and cables; one ``ip -batch`` call for what concerns this side."""
    batch = [
        f"addr add {layout.controller_address}/24 dev {layout.bridge}",
        f"link set {layout.bridge} up",
    ]
    for k in range(1, layout.nodes + 1):
        batch += [
            f"netns add {layout.namespace(k)}",
            f"link add {layout.link(k)} type veth peer name eth0 netns {layout.namespace(k)}",
            f"link set {layout.link(k)} master {layout.bridge} up",
        ]
    _batch(layout, batch)
    for k in range(1, layout.nodes + 1):
        inside = [f"addr add {layout.address(k)}/24 dev eth0", "link set lo up", "link set eth0 up"]
        _batch(layout, [*inside, f"route add default via {layout.controller_address}"], layout.namespace(k))


def _batch(layout: Layout, commands: list[str], space: str | None = None) -> None:
    script = layout.state / "ip.batch"
    script.write_text("\n".join(commands) + "\n")
    must(["ip", *(["-n", space] if space else []), "-batch", str(script)])


def named(layout: Layout, argv: list[str]) -> list[str]:
    """Command line that runs ``argv`` with the cluster's name files in /etc; ``argv`` where nodes share one network.

    The newer slurmctld looks up the name of whoever talks to it, and answers nobody while a machine's DNS, which knows
    none of them, takes 5 s to lose the question.

    Every program of the line replaces itself by the next, so the pid of the whole is the pid of ``argv``.
    Propagation "slave": a namespace deleted outside must not live on as a mount in here.
    """
    if layout.isolation != "netns":
        return argv
    files = 'mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf'
    space = ["unshare", "--mount", "--propagation", "slave"]
    return [*space, "sh", "-c", f'{files} && shift && exec "$@"', "sh", str(layout.state), *argv]


def enter(layout: Layout, node: str, argv: list[str]) -> list[str]:
    """The same (``named``) with the network and the host name of a node."""
    space = ["nsenter", f"--net={NETNS / layout.namespace(layout.number(node))}", "unshare", "--uts"]
    named_so = ["sh", "-c", 'hostname "$1" && shift && exec "$@"', "sh", layout.host_name(node)]
    return [*space, *named_so, *named(layout, argv)]


def set_link(layout: Layout, node: str, up: bool) -> None:
    """Plug or pull the node's cable, at the bridge's end: the node itself sees a dead line, no error."""
    must(["ip", "link", "set", layout.link(layout.number(node)), "up" if up else "down"])


def is_up(layout: Layout, node: str) -> bool:
    """Whether the node's cable is plugged in; True where nodes have no network of their own."""
    if layout.isolation != "netns":
        return True
    flags = Path(f"/sys/class/net/{layout.link(layout.number(node))}/flags")
    return flags.exists() and bool(int(flags.read_text(), 16) & 1)


def namespaces(layout: Layout, nodes: list[str] | None = None) -> Iterator[int]:
    """Inode numbers of the nodes' network namespaces, as far as they exist."""
    for node in layout.node_names if nodes is None else nodes:
        file = NETNS / layout.namespace(layout.number(node))
        if file.exists():
            yield file.stat().st_ino


def remove(layout: Layout) -> None:
    """Take away cables, namespaces and the bridge, whichever of them exist."""
    for k in range(1, layout.nodes + 1):
        if Path(f"/sys/class/net/{layout.link(k)}").exists():
            run(["ip", "link", "delete", layout.link(k)])
        if (NETNS / layout.namespace(k)).exists():
            must(["ip", "netns", "delete", layout.namespace(k)])
    if Path(f"/sys/class/net/{layout.bridge}").exists():
        must(["ip", "link", "delete", layout.bridge])


def remove_cgroups(layout: Layout) -> None:
    """Remove the empty cgroup folders that slurmd may leave for its nodes."""
    names = {f"slurm_{node}" for node in layout.node_names}
    for folder, inner, _ in os.walk("/sys/fs/cgroup"):
        for name in names & set(inner):
            for part, _, _ in os.walk(Path(folder, name), topdown=False):
                os.rmdir(part)
        inner[:] = [name for name in inner if name not in names]
