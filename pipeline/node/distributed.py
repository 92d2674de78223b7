"""The ranks of one attempt as a torch.distributed group, and a lost peer or GPU as one clear error."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hmac
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from data_prep.errors import escaped
from data_prep.publish import publish_json
from pipeline.errors import PeerLost, PipelineError
from pipeline.node.bell import ring, until
from pipeline.node.device import fault_of
from pipeline.node.job import LOOPBACK, Job, rendezvous_host
from pipeline.run.files import masked, read_json

PEER_TIMEOUT_S = 120.0  # longer than any honest wait between two collectives
LOOPBACKS = ("127.", "::1")  # how its addresses begin
SIOCGIFADDR = 0x8915  # of an interface its IPv4 address
BACKLOG = 4096  # ranks that connect at once
Group = dist.ProcessGroup | None


@contextlib.contextmanager
def joined(job: Job, device: torch.device) -> Iterator[tuple[Group, Store | None]]:
    """The group of all ranks of this attempt and the store where they met (None for a single one), left at the end.

    Ranks of the local runner meet in a file that nobody else can open, those of a Slurm job at a port of rank 0's.
    Where that is stands in the attempt's folder, readable by the owner only, with a token by which both sides know each
    other before the group forms. Raises PeerLost when they do not come together, for whatever reason, or one goes away.
    """
    if job.world_size == 1:
        yield None, None
        return
    host = rendezvous_host()
    if host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with contextlib.ExitStack() as at_the_end, peers_named(job):
        with _forming(job):
            store = _meet(job, host, at_the_end)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=job.rank,
                world_size=job.world_size,
                timeout=datetime.timedelta(seconds=PEER_TIMEOUT_S),
                device_id=device if device.type == "cuda" else None,  # connects now: a broken fabric shows at the start
            )
        yield dist.group.WORLD, store
        dist.destroy_process_group()  # not after an error: it may wait for ever, and the process ends anyway


@contextlib.contextmanager
def _forming(job: Job) -> Iterator[None]:
    """No failure to form the group is a defect: a peer is gone, a stranger spoke, or the network does not carry."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if (fault := fault_of(error, job, None)) is not None:
            raise fault from error
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"rank {job.rank} on {socket.gethostname()}"
        raise PeerLost(f"{where}: the {job.world_size} ranks did not come together: {escaped(text)[:300]}") from error


def _meet(job: Job, host: str, at_the_end: contextlib.ExitStack) -> Store:
    """The store of this attempt's ranks, once all of them have shown in it that they know the token."""
    meeting, timeout = job.attempt.path / "rendezvous.json", datetime.timedelta(seconds=PEER_TIMEOUT_S)
    store: Store
    if job.rank == 0:
        place: dict[str, Any] = {"launch": job.topology.launch, "token": secrets.token_hex(32)}
        if host == LOOPBACK and "SLURM_JOB_ID" not in os.environ:  # there each task may have a /tmp of its own
            folder = at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="ranks-"))  # others cannot enter
            place["file"] = f"{folder}/store"
            store = FileStore(place["file"], job.world_size)
        else:
            listener = listening(host)
            place["host"], place["port"] = listener.getsockname()[:2]
            if place["host"] in ("0.0.0.0", "::"):
                place["host"] = host
            store = TCPStore(
                place["host"], place["port"], job.world_size, True,
                timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach(),
            )  # fmt: skip
        with masked(0o077):
            publish_json(meeting, place)
        ring(job.topology, "rendezvous")
    else:
        answer = until(job.topology, "rendezvous", lambda: read_json(meeting), PEER_TIMEOUT_S)
        if answer is None:
            raise PeerLost(f"rank {job.rank} waited {PEER_TIMEOUT_S:.0f} s for rank 0 to say where the ranks meet")
        place = answer
        if "file" in place:
            os.stat(os.path.dirname(place["file"]))  # else torch waits for it
            store = FileStore(place["file"], job.world_size)
        else:
            store = TCPStore(place["host"], place["port"], job.world_size, False, timeout=timeout)
    store.set_timeout(timeout)
    store = PrefixStore(_proof(place["token"], "keys"), store)
    _recognise(store, place["token"], job)
    if "host" in place:
        with contextlib.suppress(OSError):  # what has no route here gloo need not know of
            _name_interface(store, place["host"], job)
    return store


def listening(host: str) -> socket.socket:
    """A socket at a port of the address that this machine's peers know it by, and of no other.

    Where the name means loopback here (as Debian has it), or an address of another machine, it listens on all.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    if host == LOOPBACK or not str(address[0]).startswith(LOOPBACKS):
        with contextlib.suppress(OSError):
            return socket.create_server((str(address[0]), 0), family=family, backlog=BACKLOG)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=BACKLOG, dualstack_ipv6=both)


def _name_interface(store: Store, host: str, job: Job) -> None:
    """Have gloo use the network that leads to the other nodes, where it would go by a name that means loopback here.

    The last rank, on another node than rank 0 if there are several, tells its address to those that are beside rank 0.
    """
    own = local_address(host)
    if job.rank == job.world_size - 1:
        store.set("last", own)
    with contextlib.suppress(OSError):  # a name that means nothing here is no better
        if not local_address(socket.gethostname()).startswith(LOOPBACKS):
            return
    own = local_address(store.get("last").decode()) if own.startswith(LOOPBACKS) else own
    if interface := interface_of(own):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def local_address(host: str) -> str:
    """This machine's address on the way to ``host``; nothing is sent. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has an address; "" where none is seen to."""
    address = address.partition("%")[0]  # of an address of the link alone, without its scope
    if ":" in address:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((row[5] for row in rows if bytes.fromhex(row[0]) == socket.inet_pton(socket.AF_INET6, address)), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                if fcntl.ioctl(probe, SIOCGIFADDR, name.encode().ljust(256, b"\0"))[20:24] == socket.inet_aton(address):
                    return name
    return ""


def _recognise(store: Store, token: str, job: Job) -> None:
    """Both sides show that they know the token, without telling it; PeerLost where one does not."""
    if job.rank > 0:
        store.set(f"rank {job.rank}", _proof(token, f"rank {job.rank}"))
        asked = ["rank 0"]
    else:
        asked = [f"rank {rank}" for rank in range(1, job.world_size)]
    for name, answer in zip(asked, store.multi_get(asked), strict=True):
        if not hmac.compare_digest(answer, _proof(token, name).encode()):
            raise PeerLost(f"rank {job.rank}: who speaks as {name} does not know this attempt's token")
    if job.rank == 0:
        store.set("rank 0", _proof(token, "rank 0"))


def _proof(token: str, name: str) -> str:
    return hmac.new(bytes.fromhex(token), name.encode(), "sha256").hexdigest()


@contextlib.contextmanager
def peers_named(job: Job, micro_batch: int | None = None) -> Iterator[None]:
    """Turn torch's errors about a peer into PeerLost with rank and host, those of CUDA into what they mean.

    ``micro_batch`` is the one in use, for the advice when memory does not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (fault := fault_of(error, job, micro_batch)) is not None:
            raise fault from error
        if of_peer(error):
            first = str(error).strip().splitlines()[0]
            raise PeerLost(f"rank {job.rank} on {socket.gethostname()} lost a peer: {first}") from error
        raise


def of_peer(error: BaseException) -> bool:
    """Whether torch says that another process of the group is gone."""
    named = any(word in str(error) for word in ("gloo", "NCCL", "Connection", "peer"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named)
