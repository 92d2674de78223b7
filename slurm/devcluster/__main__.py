"""A real multi-node Slurm on this machine: ``python -m slurm.devcluster up``, ``down``, ``kill`` and more."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from pathlib import Path

from slurm.command import SBIN
from slurm.devcluster import cluster, network, processes, registry
from slurm.devcluster.layout import Layout
from slurm.errors import SlurmError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m slurm.devcluster", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--name", default="lab", help="name of the cluster (default: lab)")
    shared.add_argument(
        "--state-dir", type=Path, default=registry.default_base(), help="where clusters keep their files"
    )
    commands = top.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[shared], help="bring a cluster up (again: mend it)")
    up.add_argument("--nodes", "-N", type=int, default=4)
    up.add_argument("--gpus-per-node", type=int, default=0, help="GPUs that each node claims to have")
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and a private MariaDB")
    up.add_argument("--isolation", choices=("auto", "netns", "host"), default="auto")
    up.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a line for slurm.conf")
    up.add_argument("--cpus", default="64", metavar="N,…", help="cores that the nodes claim, in turn")
    up.add_argument("--memory-mb", type=int, default=500_000, help="memory that each claims; 1: not counted")
    up.add_argument("--domain", default="", help="hosts are called NODE.DOMAIN, which is no name that Slurm knows")
    up.add_argument("--max-submit", type=int, default=0, help="jobs that a user may have queued (with --accounting)")
    up.add_argument("--banner", action="store_true", help="sbatch greets, and prints more after the id")
    up.add_argument("--no-install", action="store_true", help="never run apt-get")
    commands.add_parser("down", parents=[shared], help="take the cluster away, leaving nothing")
    commands.add_parser("status", parents=[shared], help="nodes and daemons; code 9 when something is down")
    commands.add_parser("env", parents=[shared], help='lines for a shell: eval "$(python -m slurm.devcluster env)"')
    kill = commands.add_parser("kill", parents=[shared], help="a node loses power")
    kill.add_argument("node")
    kill.add_argument("--daemon-only", action="store_true", help="only slurmd dies; its jobs run on")
    for name, text in (("cut", "a node loses its network"), ("heal", "bring a killed or cut node back")):
        commands.add_parser(name, parents=[shared], help=text).add_argument("node")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = parser().parse_args(argv)
    base = args.state_dir.absolute()
    if args.command == "up":
        return _up(base, args)
    if args.command == "down":
        gone = cluster.down(base, args.name)
        print(f"{args.name}: down" if gone else f"{args.name}: was not up")
        return 0
    found = registry.find(base, args.name)
    if args.command == "env":
        print("\n".join(environment_lines(found)))
        return 0
    if args.command == "status":
        return _status(found)
    if args.command == "kill":
        print(f"{args.node}: {cluster.kill(found, args.node, args.daemon_only)} processes killed")
    elif args.command == "cut":
        cluster.cut(found, args.node)
        print(f"{args.node}: off the network")
    else:
        cluster.heal(found, args.node)
        print(f"{args.node}: back")
    return 0


def _up(base: Path, args: argparse.Namespace) -> int:
    settings = tuple((key, value) for key, _, value in (item.partition("=") for item in args.set))
    if any(not key.isalnum() or "\n" in value for key, value in settings):
        raise SlurmError(f"--set {args.set}: each is KEY=VALUE, one line of slurm.conf")
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", args.cpus) or not re.fullmatch(r"[a-z0-9.-]*", args.domain):
        raise SlurmError(
            f"--cpus {args.cpus} --domain {args.domain}: numbers like 64,16, and a domain like example.org"
        )
    if args.max_submit and not args.accounting:
        raise SlurmError(f"--max-submit {args.max_submit}: the limit is kept by --accounting, which is missing")
    begin = time.monotonic()
    made = cluster.up(
        base,
        args.name,
        args.nodes,
        gpus_per_node=args.gpus_per_node,
        with_accounting=args.accounting,
        isolation=args.isolation,
        settings=settings,
        cpus=tuple(map(int, args.cpus.split(","))),
        memory_mb=args.memory_mb,
        domain=args.domain,
        max_submit=args.max_submit,
        banner=args.banner,
        install=not args.no_install,
    )
    nodes = f"{made.nodes} nodes ({made.node_list})"
    own = "each with its own network" if made.isolation == "netns" else "sharing this host's network"
    print(f"{made.name}: {nodes} up in {time.monotonic() - begin:.1f} s, {own}")
    name = "" if made.name == "lab" else f" --name {made.name}"
    print(f'use it:  eval "$(python -m slurm.devcluster env{name})" && sinfo')
    return 0


def environment_lines(found: Layout) -> list[str]:
    """Shell lines after which sbatch, squeue and the rest talk to this cluster."""
    lines = [f"export SLURM_CONF={shlex.quote(str(found.conf))}"]
    lines += [f'export PATH={shlex.quote(str(found.state / "bin"))}":$PATH"'] if found.banner else []
    have = os.environ.get("PATH", "").split(os.pathsep)
    lines += [f'export PATH="$PATH:{folder}"' for folder in SBIN[1:2] if folder not in have]
    return lines


def _status(found: Layout) -> int:
    running = processes.recorded(found)
    states = cluster.node_states(found)
    daemons = ["munged", "slurmctld", *(["mariadbd", "slurmdbd"] if found.accounting else [])]
    good = True
    for role in daemons:
        good &= role in running
        print(f"{role:<24} {'pid ' + str(running[role]) if role in running else 'not running'}")
    for node in found.node_names:
        pid = running.get(f"slurmd-{node}")
        cable = "" if network.is_up(found, node) else ", off the network"
        good &= pid is not None and not cable
        slurmd = f"pid {pid}" if pid else "slurmd not running"
        print(f"{node:<24} {states.get(node, 'unknown'):<12} {slurmd}{cable}")
    print(f"state in {found.state}")
    return 0 if good else SlurmError.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SlurmError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.exit_code)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
