"""Which developer clusters there are: where they are kept, found, numbered, and the one lock around them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from slurm.devcluster import layout, network
from slurm.devcluster.layout import Layout
from slurm.errors import SlurmError

LAYOUT_FILE = "cluster.json"


def default_base() -> Path:
    """Where the clusters of this user live; short, since sockets in it may have at most 107 characters."""
    return Path("/tmp") / f"slurm-devcluster-{os.geteuid()}"


def find(base: Path, name: str) -> Layout:
    """The layout of a cluster that was brought up; SlurmError when there is none of this name."""
    try:
        return layout.load((base / layout.check_name(name) / LAYOUT_FILE).read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(other.name for other in others(base))) or "none"
        raise SlurmError(f"no cluster {name!r} under {base} (there: {known}); python -m slurm.devcluster up") from None


def claim_slot(base: Path, wanted: Layout) -> Layout:
    """The cluster in the first slot, from its name's own one on, that no other cluster on this machine uses.

    With isolated nodes the slot's bridge exists afterwards: making it is what decides between two that want it.
    """
    taken = {other.slot for other in others(base)}
    first = layout.preferred_slot(wanted.name)
    for step in range(layout.SLOTS):
        tried = dataclasses.replace(wanted, slot=(first + step) % layout.SLOTS)
        if tried.slot in taken or not _ports_free(tried):
            continue
        if tried.isolation == "host" or network.claim(tried):
            return tried
    raise SlurmError(f"all {layout.SLOTS} slots for clusters on this machine are taken")


def _ports_free(cluster: Layout) -> bool:
    ports = [cluster.controller_port, cluster.database_port]
    if cluster.isolation == "host":
        ports += [cluster.port(k) for k in range(1, cluster.nodes + 1)]
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def others(base: Path) -> Iterator[Layout]:
    for file in base.glob(f"*/{LAYOUT_FILE}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            yield layout.load(file.read_text())


@contextlib.contextmanager
def locked(base: Path) -> Iterator[None]:
    """One `up` or `down` at a time for this user; the folder goes when its last cluster has gone."""
    while True:
        try:
            base.mkdir(mode=0o755, parents=True, exist_ok=True)
            handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise SlurmError(f"{base}: cannot be used for clusters: {error.strerror}") from None
        if os.fstat(handle).st_uid != os.geteuid():
            os.close(handle)
            raise SlurmError(f"{base}: belongs to another user; name another folder with --state-dir")
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == base.stat().st_ino:
                break
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            base.rmdir()
        os.close(handle)
