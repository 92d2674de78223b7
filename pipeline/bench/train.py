"""``python -m pipeline.bench train``: pretraining throughput of a recipe's phase on 1 or more GPUs, without a corpus.

A step is what the loop computes: accumulated micro-batches, forward and backward, the sum over the processes, the
optimizer. Samples are invented, as long as real ones (or as those of a samples folder). ``--beside transformers``
trains Hugging Face's model on the same samples, in the same precision and by turns, so that what disturbs the machine
disturbs both: padded rows, SDPA, DistributedDataParallel, torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.publish import publish_json
from pipeline.bench.gpu_fast import PowerMeter, memory_gib, padded, release
from pipeline.bench.gpu_subject import Samples, Subject, best, invent, synchronise
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.costs import training_flops
from pipeline.config import PRECISIONS, Recipe, load_recipe
from pipeline.engine.backend import of_config
from pipeline.engine.precision import AUTOCAST, autocast_for
from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.node.device import claimed, driver_version
from pipeline.words import columns

DIFFERENT = 4  # micro-batches that take turns, so that no timing rests on one shape
KEYS = ("variant", "phase", "seq_len", "precision", "gpus", "micro_batch", "accumulation", "sequences_per_s",
        "tokens_per_s", "ratio_vs_transformers")  # fmt: skip
Row = dict[str, Any]
Step = Callable[[int, float], Any]
"""A training step by its number at a learning rate."""
RATE = 1e-4


def main(arguments: list[str]) -> int:
    """Measure every combination that was asked for and print a table, or its figures as JSON."""
    options = parser().parse_args(arguments)
    recipe = load_recipe(options.recipe, options.settings)
    phases = options.phase.split(",") if options.phase else list(recipe.phases)
    precisions = options.precision.split(",") if options.precision else [recipe.train.precision]
    refuse(options, recipe, phases, precisions)
    if "RANK" in os.environ and "BENCH_STORE" in os.environ:  # one of the processes that the first has started
        for _ in measured(options, recipe, phases[0], precisions[0], int(os.environ["WORLD_SIZE"])):
            pass
        return 0
    rows: list[Row] = []
    for phase in phases:
        for precision in precisions:
            for gpus in options.gpus:
                rows += rows_of(options, recipe, phase, precision, gpus)
    figures = {"rows": rows, "environment": environment(options)}
    if options.out:
        publish_json(options.out, figures)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        shown = [[shown_value(row.get(key)) for key in KEYS] for row in rows]
        print("\n".join(columns([list(KEYS), *shown])))
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.bench train", description=__doc__)
    add = options.add_argument
    add("--recipe", default="bert_large", help="whose model and phases (default: bert_large)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a recipe value")
    add("--phase", metavar="NAMES", help="phases, separated by commas (default: all of the recipe)")
    add("--precision", metavar="NAMES", help=f"of {', '.join(PRECISIONS)}, separated by commas (default: the recipe's)")
    add("--micro-batch", default="", metavar="N", help="samples at a time, for each precision as tf32=128,fp16=256")
    add("--accumulation", default="", metavar="N", help="micro-batches of a step and GPU, likewise (default: 1)")
    add("--batch-per-gpu", type=int, metavar="N", help="samples of a step and GPU, instead of --accumulation")
    add("--gpus", type=numbers, default=[1], metavar="N", help="processes, a GPU each where there are any: 1,8")
    add("--steps", type=int, default=10, help="timed steps (default: 10)")
    add("--warmup", type=int, default=2, help="steps before them (default: 2)")
    add("--beside", choices=["transformers"], help="train this on the same samples by turns")
    add("--lengths", type=Path, metavar="DIR", help="a samples folder whose lengths are taken (default: invented)")
    add("--threads", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--json", action="store_true", help="figures instead of the table")
    add("--out", type=Path, metavar="FILE", help="write the figures there, too")
    return options


def numbers(text: str) -> list[int]:
    """``1,8``, for argparse."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return found


def refuse(options: argparse.Namespace, recipe: Recipe, phases: Sequence[str], precisions: Sequence[str]) -> None:
    """All that cannot be measured, before anything is."""
    lines = [f"--phase {name}: recipe {recipe.name} has {', '.join(recipe.phases)}" for name in phases
             if name not in recipe.phases]  # fmt: skip
    lines += [f"--precision {name}: choose from {', '.join(PRECISIONS)}" for name in precisions
              if name not in PRECISIONS]  # fmt: skip
    lines += [f"--{name} {getattr(options, name)}: at least 1" for name in ("steps", "warmup")
              if getattr(options, name) < 1]  # fmt: skip
    if options.batch_per_gpu and options.accumulation:
        lines.append("--batch-per-gpu and --accumulation: give one of them")
    if lines:
        raise ConfigError("\n".join(lines))
    for precision in precisions:
        of_precision(options.micro_batch, precision), of_precision(options.accumulation, precision)
        autocast_for(precision, device_of_rank(0))
    there = torch.cuda.device_count()
    if there and max(options.gpus) > there:
        raise EnvironmentFault(f"--gpus {max(options.gpus)}: this machine has {there} GPUs")
    if options.beside and importlib.util.find_spec("transformers") is None:
        raise EnvironmentFault("--beside transformers: it is not installed")


def of_precision(text: str, precision: str) -> int | None:
    """``256``, or that of ``precision`` in ``tf32=128,fp16=256``; None where nothing is said."""
    if not text:
        return None
    named = {name: value for name, _, value in (part.rpartition("=") for part in text.split(","))}
    value = named.get(precision, named.get(""))
    if value is None or not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{text!r}: give a number, or one for each precision, as tf32=128,fp16=256")
    return int(value)


def rows_of(options: argparse.Namespace, recipe: Recipe, phase: str, precision: str, gpus: int) -> list[Row]:
    """The rows of one combination: in this process, with so many others where more than one is asked for."""
    if gpus == 1:
        return list(measured(options, recipe, phase, precision, 1))
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        places = {"BENCH_STORE": f"{folder}/store", "WORLD_SIZE": str(gpus)}
        words = [sys.executable, "-m", "pipeline.bench", "train", "--phase", phase, "--precision", precision]
        for name in PASSED:
            if (value := getattr(options, name)) not in (None, ""):
                words += [f"--{name.replace('_', '-')}", str(value)]
        for setting in options.settings:
            words += ["--set", setting]
        others = [subprocess.Popen(words, env={**os.environ, **places, "RANK": str(rank)}) for rank in range(1, gpus)]
        os.environ |= {**places, "RANK": "0"}
        try:
            return list(measured(options, recipe, phase, precision, gpus))
        finally:
            for name in (*places, "RANK"):
                del os.environ[name]
            for process in others:
                process.terminate()
                process.wait()


PASSED = ("recipe", "micro_batch", "accumulation", "batch_per_gpu", "steps", "warmup", "beside", "lengths", "threads")


def measured(options: argparse.Namespace, recipe: Recipe, phase: str, precision: str, gpus: int) -> Iterator[Row]:
    """This process's share of a measurement; what it yields counts on rank 0."""
    rank = int(os.environ.get("RANK", "0"))
    device = device_of_rank(rank)
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // gpus))
    if gpus > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{os.environ['BENCH_STORE']}", rank=rank, world_size=gpus
        )  # fmt: skip
    try:
        yield from by_turns(options, recipe, phase, precision, gpus, device)
    finally:
        if gpus > 1:
            dist.destroy_process_group()


def by_turns(
    options: argparse.Namespace, recipe: Recipe, phase: str, precision: str, gpus: int, device: torch.device
) -> Iterator[Row]:
    """Time the variants step by step in turn."""
    seq_len = recipe.phases[phase].seq_len
    micro_batch = of_precision(options.micro_batch, precision) or recipe.phases[phase].micro_batch or 16
    accumulation = of_precision(options.accumulation, precision) or 1
    if options.batch_per_gpu:
        if options.batch_per_gpu % micro_batch:
            raise ConfigError(f"--batch-per-gpu {options.batch_per_gpu}: no multiple of the micro-batch {micro_batch}")
        accumulation = options.batch_per_gpu // micro_batch
    config = BertConfig(vocab_size=padded_vocab(recipe.data.vocab_size), **dataclasses.asdict(recipe.model))
    seeds = range(min(DIFFERENT, accumulation))
    lengths = lengths_of(options.lengths, seq_len) if options.lengths else None
    samples = [invent(micro_batch, seq_len, config.vocab_size, seed, lengths) for seed in seeds]
    release(device)
    variants: dict[str, Step] = {"ours": our_step(recipe, config, precision, samples, accumulation, device)}
    if options.beside:
        variants["transformers"] = transformers_step(config, precision, samples, accumulation, device)
    for number in range(options.warmup):
        for step in variants.values():
            step(number, RATE)
    times: dict[str, list[float]] = {name: [] for name in variants}
    memory = memory_gib(device)
    with PowerMeter() as power:
        for number in range(options.steps):
            for name, step in variants.items():
                synchronise(device)
                began = time.perf_counter()
                step(options.warmup + number, RATE)
                synchronise(device)
                times[name].append(time.perf_counter() - began)
    turns = [samples[index % len(samples)] for index in range(accumulation)]
    flops = sum(training_flops(config, each.lengths.tolist(), len(each.labels)) for each in turns)
    sequences, tokens = micro_batch * accumulation * gpus, gpus * sum(len(each.tokens) for each in turns)
    means = {name: statistics.fmean(own) for name, own in times.items()}
    for name, mean in means.items():
        yield {
            "variant": name,
            "phase": phase,
            "seq_len": seq_len,
            "precision": precision,
            "gpus": gpus,
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "sequences_per_s": round(sequences / mean, 3),
            "tokens_per_s": round(tokens / mean, 1),
            "ratio_vs_transformers": round(means["transformers"] / mean, 3) if options.beside else None,
            "recipe": recipe.name,
            "padded_tokens_per_s": round(sequences * seq_len / mean, 1),
            "lengths": "real" if options.lengths else "invented",
            "steps": len(times[name]),
            "step_s": round(mean, 5),
            "step_deviation_s": round(statistics.stdev(times[name]), 5) if len(times[name]) > 1 else None,
            "tflops_per_gpu": round(flops / mean / 1e12, 3),
            "memory_gib": memory if len(variants) == 1 else None,  # two models share it
            "watts": power.mean if len(variants) == 1 else None,
            "joules_per_sequence": round(power.mean * gpus * mean / sequences, 3)
            if power.mean and len(variants) == 1 else None,
        }  # fmt: skip


def our_step(
    recipe: Recipe, config: BertConfig, precision: str, samples: list[Samples], accumulation: int, device: torch.device
) -> Step:
    """A step as the loop computes it, with the recipe's optimizer."""
    subject = Subject(device, config, best(device, precision=precision), samples)
    optimizer = of_config(recipe.optimizer, subject.model.named_parameters(), subject.gradients)
    indices = [index % len(samples) for index in range(accumulation)]

    def step(number: int, learning_rate: float) -> Tensor:
        subject.gradients.zero_()
        losses = subject.accumulate(indices, number)
        if dist.is_initialized():
            dist.all_reduce(subject.gradients.flat)
        optimizer.step(learning_rate, max_grad_norm=recipe.train.max_grad_norm)
        return losses[-1]

    return step


def transformers_step(
    config: BertConfig, precision: str, samples: list[Samples], accumulation: int, device: torch.device
) -> Step:
    """A step of Hugging Face's model as its users train it."""
    library = importlib.import_module("transformers")
    described = library.BertConfig(**config.to_hugging_face(vocab_size=config.vocab_size))
    model = library.BertForPreTraining._from_config(described, attn_implementation="sdpa").to(device).train()
    trained = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches = [{name: value.to(device) for name, value in padded(each).items()} for each in samples]
    autocast = functools.partial(
        torch.autocast, device.type, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST
    )

    def step(number: int, learning_rate: float) -> Tensor:
        repeatable = torch.are_deterministic_algorithms_enabled()  # ours; its users run it without
        torch.use_deterministic_algorithms(False)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for index in range(accumulation):
            last = index == accumulation - 1
            with nullcontext() if last or not dist.is_initialized() else trained.no_sync():
                with autocast():
                    loss = trained(**batches[index % len(batches)]).loss
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.use_deterministic_algorithms(repeatable)
        found: Tensor = loss.detach()
        return found

    return step


def device_of_rank(rank: int) -> torch.device:
    """The GPU of a process, made its own; the CPU where there is none."""
    return claimed(torch.device("cuda", rank)) if torch.cuda.is_available() else torch.device("cpu")


def lengths_of(folder: Path, seq_len: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Lengths of the samples of a folder's first training shard."""
    from data_prep.hdf5 import read_listed  # h5py is needed for nothing else here
    from data_prep.manifest import load

    samples = load(folder, "train")
    if samples.seq_len != seq_len:
        raise ConfigError(f"--lengths {folder}: its samples have length {samples.seq_len}, the phase has {seq_len}")
    return np.diff(read_listed(samples, samples.shards[0]).offsets).astype(np.int64)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.is_available()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "unknown")  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(0) if gpu else f"CPU, {model}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version() or None,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": options.threads,
        "transformers": importlib.import_module("transformers").__version__ if options.beside else None,
    }


def shown_value(value: object) -> str:
    return "-" if value is None else f"{value:,.1f}" if isinstance(value, float) and value >= 100 else str(value)
