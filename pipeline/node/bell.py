"""Waiting for a file with many others: one process of each node looks for it, and rings for the others of its node.

A bell is a datagram to an abstract socket, a name of the node's own network. It says "look" and no more, so that a
stranger's costs a look; where none is heard, as between containers with networks of their own, who waits for it looks
by himself, more rarely.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.node.job import Topology
from pipeline.run.files import patiently

T = TypeVar("T")
LOOKS, RARE_LOOKS = 15.0, 3.5  # files opened a second by all that look, one in each node, and by all that listen
LEAST_S, ASKED_S = 0.1, 1.0  # between two looks, whoever rings; until one that is asked to stop notices
MOST_ON_A_NODE = 256


class Bell:
    """What one process hears of ``what``; each look opens so many files. Close it when the waiting is over."""

    def __init__(self, topology: Topology, what: str, opens: int = 1) -> None:
        looks = topology.local_rank == 0
        self.pause_s = opens * (topology.nodes / LOOKS if looks else topology.world_size / RARE_LOOKS)
        if topology.rank == 0:
            self.pause_s = min(self.pause_s, 1.0)
        self.next_s = time.monotonic() + self.pause_s * random.random()  # not all at the same time
        self.looked_s = time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):  # the name is taken
            self._socket.bind(_name(topology, what, topology.local_rank))

    def wait(self, most_s: float, asked: Callable[[], bool] = lambda: False) -> float:
        """Return when it is time for a look, when ``asked`` to stop, or after ``most_s``; the seconds that it took."""
        began = time.monotonic()
        while (
            (left_s := most_s - (time.monotonic() - began)) > 0 and not asked() and not self.due(min(left_s, ASKED_S))
        ):
            pass
        return time.monotonic() - began

    def due(self, within_s: float = 0.0) -> bool:
        """Whether it is time for a look, or becomes so within these seconds."""
        now = time.monotonic()
        heard, _, _ = select.select([self._socket], [], [], max(0.0, min(within_s, self.next_s - now)))
        with contextlib.suppress(OSError):
            while self._socket.recv(1):
                pass
        if heard:
            time.sleep(max(0.0, self.looked_s + LEAST_S - time.monotonic()))
        now = time.monotonic()
        if not heard and now < self.next_s:
            return False
        self.looked_s, self.next_s = now, now + self.pause_s
        return True

    def close(self) -> None:
        self._socket.close()


def ring(topology: Topology, *whats: str) -> None:
    """Have all processes of this launch and node look that wait for one of ``whats``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        for what in whats:
            for local_rank in range(min(topology.world_size, MOST_ON_A_NODE)):
                with contextlib.suppress(OSError):  # nobody listens, or has heard enough
                    sender.sendto(b"!", _name(topology, what, local_rank))


def until(
    topology: Topology,
    what: str,
    look: Callable[[], T | None],
    timeout_s: float,
    *,
    opens: int = 1,
    asked: Callable[[], bool] = lambda: False,
) -> T | None:
    """What ``look``, which opens so many files, finds once it is there; None after ``timeout_s``, or ``asked`` to stop.

    Each process looks once when it begins to wait. While a file server is away the time stands still.
    """
    with contextlib.closing(Bell(topology, what, opens)) as bell:
        left_s = timeout_s
        while (value := patiently(look, lambda line: None, asked)) is None:
            if left_s <= 0 or asked():
                return None
            left_s -= bell.wait(left_s, asked)
    if topology.local_rank == 0:
        ring(topology, what)
    return value


def _name(topology: Topology, what: str, local_rank: int) -> bytes:
    text = f"{topology.launch} {what} {local_rank}".encode()
    return b"\0ranks-" + hashlib.blake2b(text, digest_size=16).hexdigest().encode()
