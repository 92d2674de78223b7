"""What test_monitor.py runs in a child process, whose NVIDIA driver is fake_nvml.c: samplers, and all that they told.

``python nvml_child.py NAME FOLDER`` prints as JSON what the function NAME returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.monitor import health, sampler
from pipeline.monitor.sampler import Sampler

UUIDS = [f"GPU-0000abc{index}-0000-4000-8000-000000000000" for index in range(2)]


class Watched:
    """A sampler, all that it told, and the lines that it wrote."""

    def __init__(self, folder: Path, interval_s: float = 0.005, **callbacks: Callable[..., None]) -> None:
        self.said: list[str] = []
        self.warned: list[dict[str, Any]] = []
        self.fatal: list[str] = []
        self.file = folder / "n01.jsonl"
        told = {
            "say": self.said.append,
            "on_warning": lambda line, facts: self.warned.append({**facts, "told": line}),
            "on_fatal": self.fatal.append,
        }
        labels: dict[str, str | int] = {"stage": "phase1", "attempt": 3, "node": "n01"}
        self.sampler = Sampler(folder, labels, **(told | callbacks), interval_s=interval_s, begun=time.time())

    def lines(self, gpu: int = 0) -> list[dict[str, Any]]:
        """Complete lines of one GPU."""
        text = self.file.read_text() if self.file.exists() else ""
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in found if line["gpu"] == gpu]

    def told(self) -> dict[str, Any]:
        return {"said": self.said, "warned": self.warned, "fatal": self.fatal}


@contextlib.contextmanager
def watching(folder: Path, script: str, **options: Any) -> Iterator[Watched]:
    """A sampler at work over the fake, which does what the script says from a fresh start."""
    play("reset;" + script)
    watched = Watched(folder, **options)
    with watched.sampler:
        yield watched


def play(script: str) -> None:
    ctypes.CDLL("libnvidia-ml.so.1").fake_nvml(script.encode())


def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def contract(folder: Path) -> Any:
    with watching(folder, "", interval_s=0.02) as watched:
        until(lambda: len(watched.lines(1)) > 3)
    return {**watched.told(), "lines": watched.lines(0) + watched.lines(1), "torch": "torch" in sys.modules}


def after_a_cut(folder: Path) -> Any:
    """An attempt before was killed within a line."""
    folder.mkdir()
    file = folder / "n01.jsonl"
    file.write_text('{"time":1,"attempt":2,"gp')
    with watching(folder, "", interval_s=0.02):
        until(lambda: file.read_text().count("\n") > 3)
    return file.read_text().splitlines()


def codes(folder: Path) -> Any:
    """Every return code at four moments."""
    moments = {
        "init": "fail nvmlInitWithFlags -1 0 {}",
        "handle": "fail nvmlDeviceGetHandleByIndex_v2 0 0 {}",
        "first": "fail * 0 0 {}",
        "later": "fail * 0 26 {}",  # UUID and name, and two readings of twelve queries
    }
    found = []
    for code in health.RETURN_CODES:
        for moment, script in moments.items():
            place = folder / f"{code}-{moment}"
            with watching(place, "gpus 1;" + script.format(code)) as watched:
                if moment in ("init", "handle"):
                    until(lambda it=watched: it.said or it.warned or it.fatal)
                else:
                    until(lambda it=watched: len(it.lines()) >= 6 or it.fatal)
            found.append((code, moment, watched.told(), watched.lines(), place.exists()))
    return found


def vanish(folder: Path) -> Any:
    with watching(folder, "fail * 1 40 15") as watched:
        until(lambda: watched.fatal)
        counts = []
        for _ in range(2):  # the line of its last, half reading may still be on its way
            others = len(watched.lines(0))
            until(lambda others=others: len(watched.lines(0)) > others + 5)
            counts.append(len(watched.lines(1)))
    return {**watched.told(), "after": counts[1] - counts[0], "facts": watched.sampler.fatal}


def blocked(folder: Path) -> Any:
    """Power of GPU 0 does not answer for 30 s; then not even the start of NVML does."""
    sampler.SILENT_S = 1.0
    watched = Watched(folder)
    play("reset;block nvmlDeviceGetPowerUsage 0 3 30000")
    watched.sampler.start()
    until(lambda: watched.warned)
    others = len(watched.lines(1))
    until(lambda: len(watched.lines(1)) > others + 5)
    sampler.FLUSH_S = 1000.0
    others = len(watched.lines(1))
    time.sleep(0.1)
    seconds = [_seconds(watched.sampler.stop)]
    last = len(watched.lines(1)) - others
    play("reset;block nvmlInitWithFlags -1 0 30000")
    again = Watched(folder / "again")
    seconds += [_seconds(again.sampler.start), _seconds(again.sampler.stop)]
    return {**watched.told(), "seconds": seconds, "again": again.told(), "before": len(watched.lines(0)), "last": last}


def _seconds(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def slow(folder: Path) -> Any:
    from pipeline.monitor import nvml

    nvml.SLOW_S = 1.0
    with watching(folder, "gpus 1;block nvmlDeviceGetPowerUsage 0 2 1500") as watched:
        until(lambda: len(watched.lines()) > 6)
    return {**watched.told(), "lines": watched.lines()}


def xids(folder: Path) -> Any:
    found = []
    for number in [*health.XIDS, 777]:
        with watching(folder / str(number), "gpus 1") as watched:
            until(watched.lines)
            play(f"xid 0 {number};xid 0 {number}")
            until(lambda it=watched: sum(len(line["xid"]) for line in it.lines()) == 2)
        found.append((number, watched.told()))
    with watching(folder / "two", "gpus 1;xid 0 79;xid 0 48") as watched:
        until(lambda: len(watched.lines()) > 3)
    return {"found": found, "two": watched.told()}


def events_refused(folder: Path) -> Any:
    with watching(folder, "fail nvmlDeviceRegisterEvents 0 0 4;fail nvmlDeviceGetTotalEccErrors 1 0 3") as watched:
        until(lambda: len(watched.lines(0)) > 3 and len(watched.lines(1)) > 3)
    return {
        **watched.told(),
        "missing": [sorted(set(watched.lines(1 - gpu)[-1]) - set(watched.lines(gpu)[-1])) for gpu in (0, 1)],
    }


def states(folder: Path) -> Any:
    with watching(folder / "old", "gpus 1;set 0 failed 1;set 0 uncorrected 2;set 0 reasons 64") as old:
        until(lambda: len(old.lines()) > 2)
        for reasons in (4, 64, 4, 64):  # comes and goes
            count = len(old.lines())
            play(f"set 0 reasons {reasons}")
            until(lambda count=count: len(old.lines()) > count + 1)
        play("set 0 uncorrected 5")
        until(lambda: len(old.warned) > 3)
    with watching(folder / "new", "gpus 1") as new:
        until(lambda: len(new.lines()) > 2)
        play("set 0 recovery 2")
        until(lambda: new.fatal)
    return {"old": old.told(), "new": new.told(), "throttle": [line["throttle"] for line in old.lines()]}


def storage(folder: Path) -> Any:
    """The disk is full, and what is told throws: neither stops the watch."""
    folder.mkdir()
    sampler.plain = lambda path, flags: os.open("/dev/full", os.O_RDWR)
    with watching(folder, "", on_warning=lambda line, facts: 1 / 0) as watched:
        until(lambda: watched.said)
        play("set 0 reasons 64")
        until(lambda: len(watched.said) > 1)
        play("xid 1 79")
        until(lambda: watched.fatal)
    return watched.told()


def visible(folder: Path) -> Any:
    from pipeline.monitor import nvml

    play("reset;gpus 4;fail nvmlDeviceGetHandleByIndex_v2 3 0 4")
    nvml.open_library()
    cases: dict[str, dict[str, str]] = {
        "nothing set": {},
        "indices": {"CUDA_VISIBLE_DEVICES": "3,1", "SLURM_STEP_GPUS": "0"},
        "uuids": {"CUDA_VISIBLE_DEVICES": f"{UUIDS[1]},GPU-0000abc0"},
        "none": {"CUDA_VISIBLE_DEVICES": ""},
        "none of Slurm": {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        "minus one": {"CUDA_VISIBLE_DEVICES": "-1"},
        "step": {"SLURM_STEP_GPUS": "2", "SLURM_JOB_GPUS": "1,2"},
        "job": {"SLURM_JOB_GPUS": "1,2"},
        "step in a cgroup": {"SLURM_STEP_GPUS": "5,6,7,8"},
        "partitioned": {"CUDA_VISIBLE_DEVICES": "MIG-5c1f"},
        "unknown uuid": {"CUDA_VISIBLE_DEVICES": "GPU-ffff"},
    }
    return {name: nvml.visible(environment, 4) for name, environment in cases.items()}


def shrunk_package(folder: Path) -> Any:
    """A pynvml that does not know two of the functions."""
    import pynvml

    del pynvml.nvmlDeviceGetCurrentClocksEventReasons, pynvml.nvmlDeviceGetPowerUsage
    return contract(folder)


def no_driver(folder: Path) -> Any:
    watched = Watched(folder)
    with watched.sampler:
        until(lambda: watched.said)
        time.sleep(0.05)
    return {**watched.told(), "folder": folder.exists()}


def no_package(folder: Path) -> Any:
    sys.modules["pynvml"] = None  # type: ignore[assignment]  # what import finds when it is not installed
    return no_driver(folder)


def cost(folder: Path) -> Any:
    """CPU seconds of this process while 8 GPUs are sampled once a second, and microseconds of one reading."""
    from pipeline.monitor import nvml

    wall_s = float(os.environ["WALL_S"])
    sampler.FLUSH_S = 10.0
    with watching(folder, "gpus 8", interval_s=1.0):
        time.sleep(0.5)  # the import of pynvml
        cpu, started = time.process_time(), time.monotonic()
        time.sleep(wall_s)
        share = (time.process_time() - cpu) / (time.monotonic() - started)
    gpu = nvml.Gpu(0)
    gpu._events = None  # waits 1 ms for an event, without using the CPU
    started = time.perf_counter()
    for _ in range(500):
        gpu.read()
    return {"cpu_per_s": share, "reading_us": (time.perf_counter() - started) / 500 * 1e6}


def one_of_two(folder: Path) -> Any:
    with watching(folder, "") as watched:
        until(lambda: watched.lines(1))
    return [len(watched.lines(0)), watched.lines(1)[0]["uuid"] == UUIDS[1]]


if __name__ == "__main__":
    sampler.FLUSH_S = 0.0
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
