"""``python -m pipeline.bench gpu``: is the pipeline alive, right, repeatable and fast on this machine's GPU? One JSON.

A child process does the work, block after block, and its parent, free of torch, writes what it says at once: a block
that hangs, crashes or breaks CUDA costs itself alone, for the next one begins in a new child.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_prep.fanout import die_with_parent
from data_prep.publish import publish_json
from pipeline.errors import ConfigError
from pipeline.node.device import set_defaults
from pipeline.run.files import to_write

FORMAT = 1
TOTAL_S = 480.0
START_S = 90.0  # for a child: importing torch, and the first word from the GPU
Facts = dict[str, Any]
Block = Callable[["Bench"], Iterator[tuple[str, Any]]]

# Blocks by value of information: (name, module, seconds after which it is given up).
BLOCKS = (
    ("env", "gpu_right", 30),
    ("alive", "gpu_right", 90),
    ("correctness", "gpu_right", 120),
    ("determinism", "gpu_right", 60),
    ("again", "gpu_right", 60),
    ("resume", "gpu_loop", 45),
    ("peak", "gpu_fast", 15),
    ("phase1", "gpu_fast", 100),
    ("phase2", "gpu_fast", 100),
    ("loop", "gpu_loop", 60),
    ("lamb", "gpu_fast", 20),
    ("transformers", "gpu_fast", 45),
    ("save", "gpu_fast", 60),
    ("feed", "gpu_fast", 15),
    ("nvml", "gpu_right", 15),
    ("sweep", "gpu_fast", 60),
    ("kernels", "gpu_fast", 30),
)
OWN = ("", "pipeline", "data_prep", "slurm")
FRESH = {"again"}  # what it repeats, it repeats in a new process


class Skip(Exception):
    """A block cannot run here, for a reason that is no fault."""


@dataclass(frozen=True)
class Bench:
    """What a block knows: the size of the work, and the results of the blocks before it."""

    tiny: bool
    results: Mapping[str, Facts]
    deadline: float  # monotonic: when this block's time is over

    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def check(value: float, at_most: float, **more: Any) -> Facts:
    """A figure with the limit that it is held against; the block fails when it is above, or not a number."""
    return {"value": value, "at_most": at_most, "ok": bool(value <= at_most), **more}


def main(arguments: list[str]) -> int:
    """Run the blocks, write the JSON after each, print a line for each; 1 when a block failed."""
    options = parser().parse_args(arguments)
    if options.pack is not None:
        from pipeline.bench.gpu_pack import pack

        pack(options.pack)
        return 0
    names = [name for name, _, _ in BLOCKS]
    wanted = [word for text in options.only for word in text.split(",")] or names
    if unknown := sorted(set(wanted) - set(names)):
        raise ConfigError(f"--only {', '.join(unknown)}: the blocks are {', '.join(names)}")
    results = run([name for name in names if name in wanted], tiny=options.tiny, out=options.out)
    return 0 if all(facts["ok"] for facts in results.values()) else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench gpu", description=__doc__)
    parser.add_argument("--out", type=to_write, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json")
    parser.add_argument("--tiny", action="store_true", help="the same blocks on a small model, also without a GPU")
    parser.add_argument("--only", action="append", default=[], metavar="BLOCK,…", help="some of the blocks")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write all of this as one .py that needs torch alone")
    return parser


def run(names: list[str], *, tiny: bool, out: Path) -> dict[str, Facts]:
    """The results of the named blocks by name; those of a JSON that is there already stay beside them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_defaults(os.environ)
    before = json.loads(out.read_text(encoding="utf-8"))["blocks"] if out.exists() else {}
    results: dict[str, Facts] = {name: facts for name, facts in before.items() if name not in names}
    ends, told = time.monotonic() + TOTAL_S, set(results)

    def keep(name: str, facts: Facts) -> None:
        results[name] = facts
        publish_json(out, {"format": FORMAT, "tiny": tiny, "time": round(time.time()), "blocks": results})
        if "ok" in facts and name not in told:
            told.add(name)
            print(line_of(name, facts), flush=True)

    waiting = list(names)
    while waiting:
        waiting = _child(waiting, Bench(tiny, results, ends), keep)
    return {name: results[name] for name in names}


def _child(names: list[str], bench: Bench, keep: Callable[[str, Facts], None]) -> list[str]:
    """Run blocks in one child process; returns those that are left for another one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    until = 1 + next((i for i, name in enumerate(names[1:]) if name in FRESH), len(names) - 1)
    child = context.Process(target=_work, args=(names[:until], bench, theirs, os.getpid()))
    child.start()
    theirs.close()
    for done, name in enumerate(names[:until], 1):
        fault = _one(name, ours, START_S + _budget(name, bench), keep, began=time.monotonic())
        broken = "CUDA error" in str(bench.results.get(name, {}).get("error"))  # nothing works there any more
        if fault or broken:
            child.kill()
            child.join()
        if fault:
            keep(name, {**bench.results.get(name, {}), "ok": False, "error": fault.format(code=child.exitcode)})
        if fault or broken:
            return names[done:]
    child.join(10)
    if child.is_alive():
        child.kill()
    return names[until:]


def _one(name: str, ours: Connection, patience_s: float, keep: Callable[[str, Facts], None], began: float) -> str:
    """Take over what the child says of one block; why it did not come to an end, "" if it did."""
    facts: Facts = {}
    while ours.poll(max(0.0, began + patience_s - time.monotonic())):
        try:
            key, value = ours.recv_bytes().decode().split("\n", 1)
        except EOFError:
            return "the process ended (exit code {code})"
        facts[key] = json.loads(value)
        if key == "ok":
            facts["seconds"] = round(time.monotonic() - began, 1)
        keep(name, facts)
        if key == "ok":
            return ""
    return f"no end after {patience_s:.0f} s"


def _budget(name: str, bench: Bench) -> float:
    allowed = next(seconds for block, _, seconds in BLOCKS if block == name)
    return max(1.0, min(float(allowed), bench.deadline - time.monotonic()))


def _work(names: list[str], bench: Bench, theirs: Connection, parent: int) -> None:
    """In the child: every block, told key by key; JSON, for nothing else may come from a broken process."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def tell(key: str, value: Any) -> None:
        theirs.send_bytes(f"{key}\n{json.dumps(value)}".encode())

    modules = {block: module for block, module, _ in BLOCKS}
    for name in names:
        results: Facts = {}
        fine = True  # until something is wrong
        try:
            if bench.left_s() < 1:
                raise Skip("no time left")
            block: Block = getattr(importlib.import_module(f"pipeline.bench.{modules[name]}"), name)
            allowed = Bench(bench.tiny, bench.results, time.monotonic() + _budget(name, bench))
            for key, value in block(allowed):
                results[key] = value
                tell(key, value)
                fine = fine and not (isinstance(value, dict) and value.get("ok") is False)
        except Skip as why:
            tell("skipped", str(why))
        except Exception as error:
            if package := lacking(error):
                tell("skipped", f"{package} is not installed")
            else:
                fine = False
                tell("error", f"{type(error).__name__}: {error}")
                tell("traceback", traceback.format_exc().splitlines()[-12:])
        bench = Bench(bench.tiny, {**bench.results, name: results}, bench.deadline)
        tell("ok", fine)
    theirs.close()
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads of libraries


def lacking(error: Exception) -> str | None:
    """The package of others that is not there, when that is what went wrong."""
    package = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    return package if package not in OWN else None


def line_of(name: str, facts: Facts) -> str:
    """One block for people: what came out, first of all what went wrong."""
    if "skipped" in facts:
        state, rest = "skipped", str(facts["skipped"])
    elif facts["ok"]:
        state, rest = "ok", f"{facts.get('seconds', 0):.1f} s"
    else:
        wrong = [f"{key} {value['value']:g} > {value['at_most']:g}" for key, value in facts.items() if _above(value)]
        state, rest = "FAILED", "; ".join([*filter(None, [facts.get("error")]), *wrong])
    return f"{name:13s} {state:8s} {rest}"


def _above(value: Any) -> bool:
    return isinstance(value, dict) and value.get("ok") is False and "value" in value
