"""What one rank finds out about its node and its way to the others: the program of ``python -m pipeline.doctor``.

Started again, it says so and then counts how long it lives after SIGTERM. What it finds goes to FOLDER/KIND-RANK.json.
"""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from data_prep.publish import publish_json
from pipeline.errors import StoppedCleanly
from pipeline.node.job import Topology
from pipeline.run.chain import made_with
from pipeline.stage import function_of
from slurm.environment import this_node

WRITE_MB, TIMES, PATIENCE_S = 64, 5, 60.0
REDUCE_MB = {"gloo": 16, "nccl": 512}


def main() -> int:
    folder, place = Path(sys.argv[1]), Topology.of(os.environ)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())

    def note(kind: str, **found: Any) -> None:
        publish_json(folder / f"{kind}-{place.rank}.json", found)

    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        note("found", **look(folder, place))
        asked.wait()
        note("signal", time=time.time())
        return StoppedCleanly.exit_code
    note("again", time=time.time())
    asked.wait()
    began = time.time()
    while True:  # until it is killed
        note("term", lived_s=time.time() - began)
        time.sleep(0.2)


def look(folder: Path, place: Topology) -> dict[str, Any]:
    """All that one rank can tell; what fails is told as ``errors``, by name."""
    facts: dict[str, Any] = {
        "rank": place.rank,
        "local_rank": place.local_rank,
        "node": this_node(),
        "host": socket.gethostname(),
        "python": sys.executable,
        "commands": [name for name in ("scontrol", "squeue", "srun", "scancel") if shutil.which(name)],
        "interfaces": sorted(name for _, name in socket.if_nameindex() if name != "lo"),
        "errors": {},
    }
    for name, measure in {"versions": versions, "gpus": gpus, "files": files, "network": network}.items():
        try:
            facts[name] = measure(folder, place)
        except Exception as error:
            facts["errors"][name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    return facts


def versions(folder: Path, place: Topology) -> dict[str, str]:
    """Of the packages that stages import, once they are."""
    import torch

    for name in ("data_prep.hdf5:write_shard", "pipeline.pretrain.task:run", "pipeline.finetune.task:run"):
        function_of(name)
    return {**made_with(), "cuda": torch.version.cuda or ""}


def gpus(folder: Path, place: Topology) -> list[list[Any]]:
    """Name and GB of each GPU that is visible, each of which has multiplied."""
    import torch

    seen = []
    for index in range(torch.cuda.device_count()):
        one = torch.ones(1024, 1024, device=f"cuda:{index}")
        if float((one @ one).sum()) != 1024**3:
            raise ValueError(f"GPU {index} multiplies wrongly")
        seen.append([torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory / 1e9])
    return seen


def files(folder: Path, place: Topology) -> dict[str, float]:
    """The folder's file system: MB/s written and synced, free GB, and how far its clock is ahead of the node's."""
    if place.local_rank > 0:
        return {}
    new, file = folder / f"written-{place.rank}.new", folder / f"written-{place.rank}"
    began = time.perf_counter()
    try:
        with new.open("wb") as out:
            for _ in range(WRITE_MB):
                out.write(os.urandom(1_000_000))
            out.flush()
            os.fsync(out.fileno())
        took_s, ahead_s = time.perf_counter() - began, new.stat().st_mtime - time.time()
        new.rename(file)
        if new.exists() or file.stat().st_size != WRITE_MB * 1_000_000:
            raise OSError(f"{file}: renamed, and not whole at its new name")
    finally:
        for path in (new, file):
            path.unlink(missing_ok=True)
    free = os.statvfs(folder)
    return {"mb_s": WRITE_MB / took_s, "ahead_s": ahead_s, "free_gb": free.f_bavail * free.f_frsize / 1e9}


def network(folder: Path, place: Topology) -> dict[str, Any]:
    """The ranks as a group: seconds to form it, GB/s of an all-reduce, and seconds until a peer's new file is seen."""
    import torch
    import torch.distributed as dist

    backend, began = "nccl" if torch.cuda.is_available() else "gloo", time.perf_counter()
    if backend == "nccl":
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=PATIENCE_S))
    formed_s = time.perf_counter() - began
    many = torch.ones(REDUCE_MB[backend] * 250_000, device="cuda" if backend == "nccl" else "cpu")
    times_s = []
    for _ in range(TIMES):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(many)
        many /= place.world_size
        float(many[0])  # waits for the GPU
        times_s.append(time.perf_counter() - began)
    if not bool((many == 1).all()):
        raise ValueError("an all-reduce of ones is not the number of ranks")
    publish_json(folder / f"shown-{place.rank}.json", {})
    dist.barrier()
    began, peer = time.perf_counter(), folder / f"shown-{(place.rank + 1) % place.world_size}.json"
    while not peer.exists() and time.perf_counter() - began < PATIENCE_S:
        time.sleep(0.05)
    seen_s = time.perf_counter() - began
    dist.barrier()
    dist.destroy_process_group()
    ring = 2 * (place.world_size - 1) / place.world_size
    rate = ring * many.numel() * 4 / 1e9 / min(times_s)
    return {"backend": backend, "formed_s": formed_s, "gb_s": rate, "seen_s": seen_s}


if __name__ == "__main__":
    sys.exit(main())
