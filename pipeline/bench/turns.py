"""Steps timed by turns, on one or several processes: what `bench train` and `bench finetune` have in common.

Each measurement has processes of its own, one for each GPU where there are any, and nothing is left of it for the next
one. The variants step in turn, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from data_prep.fanout import die_with_parent
from data_prep.publish import publish_json
from pipeline.bench.environment import environment
from pipeline.bench.gpu_fast import PowerMeter, memory_gib, release
from pipeline.bench.gpu_subject import synchronise
from pipeline.bert.config import shape_of
from pipeline.config import PRECISIONS
from pipeline.engine.precision import autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.errors import ConfigError, EnvironmentFault, PeerLost, PipelineError, describe
from pipeline.node.device import claimed, set_defaults
from pipeline.node.distributed import of_peer
from pipeline.run.files import to_write
from pipeline.words import columns

DIFFERENT = 4  # micro-batches that take turns, so that no timing rests on one shape
RATE = 1e-4
GRACE_S = 30.0  # for the others to end when one has failed: it may be they who know why
FIGURES = ("seq_len", "precision", "gpus", "micro_batch", "accumulation", "sequences_per_s", "tokens_per_s",
           "ratio_vs_transformers")  # fmt: skip
Row = dict[str, Any]
Step = Callable[[int, float], Any]
"""A step by its number at a learning rate."""


@dataclass(frozen=True)
class Work:
    """What is timed: a step of each variant by name, and what one step of all processes together holds.

    ``row`` is what is known before anything is timed, ``holds`` gives tokens and floating-point operations by the
    step's number.
    """

    row: Row
    steps: Mapping[str, Step]
    sequences: int
    holds: Callable[[int], tuple[int, float]]


Prepare = Callable[[argparse.Namespace, Row, Ranks], AbstractContextManager[Work]]
"""Makes the work of a measurement, described by a row, in each of its processes."""


# -------------------------------------------------------------------- what is asked


def common_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark of steps."""
    add = parser.add_argument
    add("--recipe", default="bert_large", help="whose model is trained (default: bert_large)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a recipe value")
    add("--precision", metavar="NAMES", help=f"of {', '.join(PRECISIONS)}, separated by commas (default: the recipe's)")
    add("--micro-batch", default="", metavar="N", help="samples at a time, for each precision as tf32=128,fp16=256")
    add("--accumulation", default="", metavar="N", help="micro-batches of a step and GPU, likewise (default: 1)")
    add("--batch-per-gpu", default="", metavar="N", help="samples of a step and GPU, instead of --accumulation")
    add("--gpus", type=numbers, default=[1], metavar="N", help="processes, a GPU each where there are any: 1,8")
    add("--steps", type=int, default=10, help="timed steps (default: 10)")
    add("--warmup", type=int, default=2, help="steps before them (default: 2)")
    add("--beside", choices=["transformers"], help="time this on the same samples by turns")
    add("--threads", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--json", action="store_true", help="figures instead of the table")
    add("--out", type=to_write, metavar="FILE", help="write the figures there, too")


def numbers(text: str) -> list[int]:
    """``1,8``, for argparse."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return found


def amounts(options: argparse.Namespace, precision: str, micro_batch: int, wrong: list[str]) -> Row:
    """Micro-batch (``micro_batch`` where none is asked for) and accumulation; ``wrong`` gets lines of what is wrong."""
    try:
        micro_batch = of_precision(options.micro_batch, precision) or micro_batch
        accumulation = of_precision(options.accumulation, precision) or 1
        if batch := of_precision(options.batch_per_gpu, precision):
            accumulation, rest = divmod(batch, micro_batch)
            if rest:
                raise ConfigError(f"--batch-per-gpu {batch}: no multiple of the micro-batch {micro_batch}")
    except ConfigError as error:
        wrong.append(str(error))
        return {}
    return {"micro_batch": micro_batch, "accumulation": accumulation}


def of_precision(text: str, precision: str) -> int | None:
    """``256``, or that of ``precision`` in ``tf32=128,fp16=256``; None where nothing is said."""
    if not text:
        return None
    named = {name: value for name, _, value in (part.rpartition("=") for part in text.split(","))}
    value = named.get(precision, named.get(""))
    if value is None or not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{text!r}: give a number, or one for each precision, as tf32=128,fp16=256")
    return int(value)


def refuse(options: argparse.Namespace, precisions: Sequence[str], wrong: Iterable[str]) -> None:
    """All that cannot be measured, before anything is; ``wrong`` are lines that the caller has found."""
    lines = [*wrong]
    lines += [f"--precision {name}: choose from {', '.join(PRECISIONS)}" for name in precisions
              if name not in PRECISIONS]  # fmt: skip
    lines += [f"--{name} {value}: at least 1" for name in ("steps", "warmup", "threads")
              if (value := getattr(options, name)) is not None and value < 1]  # fmt: skip
    if options.batch_per_gpu and options.accumulation:
        lines.append("--batch-per-gpu and --accumulation: give one of them")
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    there = torch.cuda.device_count()
    for precision in precisions:  # asks the GPU without taking memory of it, and where some needs all of it
        autocast_for(precision, torch.device("cuda", 0) if there else torch.device("cpu"))
    if there and max(options.gpus) > there:
        raise EnvironmentFault(f"--gpus {max(options.gpus)}: this machine has {there} GPUs")
    if options.beside and importlib.util.find_spec("transformers") is None:
        raise EnvironmentFault("--beside transformers: it is not installed")


def run(
    options: argparse.Namespace, prepare: Prepare, measurements: Iterable[Row], names: Sequence[str], model: object
) -> int:
    """Measure one after the other and print a table, or its figures as JSON.

    ``names`` are its first columns, the shape of ``model`` (a `BertConfig`, or a recipe's) stands in the figures.
    """
    set_defaults(os.environ)
    rows = [row for asked in measurements for row in on_processes(prepare, options, asked)]
    figures = {
        "rows": rows,
        "environment": environment(options.threads, beside=bool(options.beside)),
        "model": shape_of(model),
    }
    if options.out:
        publish_json(options.out, figures)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        keys = ("variant", *names, *FIGURES)
        print("\n".join(columns([list(keys), *([shown_value(row.get(key)) for key in keys] for row in rows)])))
    return 0


def shown_value(value: object) -> str:
    return "-" if value is None else f"{value:,.1f}" if isinstance(value, float) and value >= 100 else str(value)


# -------------------------------------------------------------------- its processes


def on_processes(prepare: Prepare, options: argparse.Namespace, asked: Row) -> list[Row]:
    """The rows of one measurement, from processes of its own.

    The first that fails ends the others, and its error is raised: a refusal with its exit code, PeerLost for one that
    was killed.
    """
    context, world_size = multiprocessing.get_context("spawn"), asked["gpus"]
    pipes: dict[SpawnProcess, Connection] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for rank in range(world_size):
                pipe, far_end = context.Pipe(duplex=False)
                arguments = (prepare, options, asked, rank, folder, far_end, os.getpid())
                process = context.Process(target=_be_rank, args=arguments, name=f"rank {rank}")
                process.start()
                far_end.close()
                pipes[process] = pipe
            if failed := _wait_for([*pipes]):
                cause = min(failed, key=_innocence)
                raise _error_of(cause, pipes[cause], world_size)
            rows: list[Row] = next(iter(pipes.values())).recv()
            return rows
        finally:
            for process in pipes:
                process.kill()
                process.join()


def _wait_for(running: list[SpawnProcess]) -> list[SpawnProcess]:
    """Those that fail, in their order, when all have ended, or some time after the first of them."""
    failed: list[SpawnProcess] = []
    end: float | None = None
    while running and (end is None or time.monotonic() < end):
        wait([process.sentinel for process in running], None if end is None else max(0.0, end - time.monotonic()))
        ended = [process for process in running if process.exitcode is not None]
        failed += [process for process in ended if process.exitcode]
        running = [process for process in running if process not in ended]
        if failed and end is None:
            end = time.monotonic() + GRACE_S
    return failed


def _innocence(process: SpawnProcess) -> int:
    """Who was killed or refuses is the cause, rather than who has a defect, aborts or says that it lost a peer."""
    code = process.exitcode or 0
    return 3 if code in (PeerLost.exit_code, -signal.SIGABRT) else 2 if code == 1 else 0 if code < 0 else 1


def _error_of(process: SpawnProcess, pipe: Connection, world_size: int) -> PipelineError:
    code, who = process.exitcode or 0, f"{process.name} of {world_size}"
    if code < 0:
        return PeerLost(
            f"{who} was ended by {signal.Signals(-code).name}, as when memory runs out: nothing is measured"
        )
    line, trace = pipe.recv() if pipe.poll() else (f"{who} ended with code {code}", "")
    error = PipelineError(line)
    error.exit_code = code
    if code == 1:  # a defect, which is shown with its traceback
        error.add_note(f"{who}:\n{trace}")
    return error


def _be_rank(
    prepare: Prepare, options: argparse.Namespace, asked: Row, rank: int, folder: str, pipe: Connection, parent: int
) -> None:
    """A process of a measurement; it says nothing but to its parent."""
    die_with_parent(parent)
    try:
        pipe.send(list(measured(prepare, options, asked, rank, folder)))
    except BaseException as error:
        line, code = describe(_told(error, asked))
        pipe.send((line, traceback.format_exc()[-8000:]))  # as much as a pipe holds unread
        os._exit(code)  # what is left of a group that lost a peer may abort, or wait for ever


def _told(error: BaseException, asked: Row) -> BaseException:
    """A lack of GPU memory is a choice of options, and no defect; nor is a lost peer."""
    if of_peer(error):
        return PeerLost(f"lost a peer: {error}")
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    first = str(error).split(". ")[0]
    return ConfigError(f"{asked['precision']}: take a --micro-batch below {asked['micro_batch']}: {first}")


def measured(prepare: Prepare, options: argparse.Namespace, asked: Row, rank: int, folder: str) -> Iterator[Row]:
    """This process's share of a measurement; what it yields counts on rank 0."""
    gpus = asked["gpus"]
    device = claimed(torch.device("cuda", rank)) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // gpus))
    if gpus > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=gpus)
    ranks = Ranks(rank, gpus, dist.group.WORLD if gpus > 1 else None, device)
    release(device)
    with prepare(options, asked, ranks) as work:
        yield from by_turns(work, options, ranks)
    if gpus > 1:
        dist.destroy_process_group()  # not after an error: it may wait for ever


def by_turns(work: Work, options: argparse.Namespace, ranks: Ranks) -> Iterator[Row]:
    """Time the variants step by step in turn."""
    device = ranks.device
    for number in range(options.warmup):
        for step in work.steps.values():
            step(number, RATE)
    times: dict[str, list[float]] = {name: [] for name in work.steps}
    timed = range(options.warmup, options.warmup + options.steps)
    memory = memory_gib(device)
    with PowerMeter() as power:
        for number in timed:
            for name, step in work.steps.items():
                synchronise(device)
                began = time.perf_counter()
                step(number, RATE)
                synchronise(device)
                times[name].append(time.perf_counter() - began)
    tokens, flops = (statistics.fmean(values) for values in zip(*map(work.holds, timed), strict=True))
    means = {name: statistics.fmean(own) for name, own in times.items()}
    alone = len(means) == 1  # else two models share the GPU
    for name, mean in means.items():
        yield {
            "variant": name,
            **work.row,
            "sequences_per_s": round(work.sequences / mean, 3),
            "tokens_per_s": round(tokens / mean, 1),
            "ratio_vs_transformers": round(means["transformers"] / mean, 3) if options.beside else None,
            "padded_tokens_per_s": round(work.sequences * work.row["seq_len"] / mean, 1),
            "mean_tokens": round(tokens / work.sequences, 1),
            "sequences": work.sequences,  # of a step
            "steps": len(times[name]),
            "step_s": round(mean, 5),
            "step_deviation_s": round(statistics.stdev(times[name]), 5) if len(times[name]) > 1 else None,
            "tflops_per_gpu": round(flops / mean / 1e12 / ranks.world_size, 3),
            "memory_gib": memory if alone else None,
            "watts": power.mean if alone else None,
            "joules_per_sequence": round(power.mean * ranks.world_size * mean / work.sequences, 3)
            if power.mean and alone else None,
        }  # fmt: skip
