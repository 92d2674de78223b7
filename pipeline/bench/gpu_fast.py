"""Blocks of `bench gpu` that say how fast: the ceiling, both phases of BERT-large with each lever on and off, against
transformers, the optimizer, a save, the host's work, and the micro-batches that fit.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.publish import publish_json
from pipeline.bench.gpu import Bench, Skip, check
from pipeline.bench.gpu_subject import (
    LARGE,
    PHASES,
    TINY,
    Levers,
    Samples,
    Subject,
    best,
    build_optimizer,
    device_for,
    invent,
    laid_out,
    layouts,
    model_on,
    seconds_of,
    synchronise,
)
from pipeline.bert import regions
from pipeline.bert.config import BertConfig
from pipeline.bert.costs import training_flops
from pipeline.engine import checkpoint
from pipeline.engine.backend import apex_fused_lamb
from pipeline.engine.reduce import GradientBuffer

Pairs = Iterator[tuple[str, Any]]
DIFFERENT = 4  # micro-batches, so that no timing rests on one shape
SPEND_S = 6.0  # on one row
COMPILE_S = 60.0  # a lever with compiled layers is left out when less time is left


def config_for(bench: Bench) -> BertConfig:
    return TINY if bench.tiny else LARGE


def micro_batches(bench: Bench, phase: str, count: int | None = None, different: int = DIFFERENT) -> list[Samples]:
    """Some micro-batches of a phase, invented; a tiny one has 4 samples of a quarter of the length."""
    seq_len, size = PHASES[phase]
    if bench.tiny:
        seq_len, size = seq_len // 4, 4
    return [invent(count or size, seq_len, config_for(bench).vocab_size, seed) for seed in range(different)]


def spend_s(bench: Bench, wanted: float = SPEND_S) -> float:
    return 0.02 if bench.tiny else min(wanted, max(1.0, bench.left_s() / 4))


def peak(bench: Bench) -> Pairs:
    """TFLOP/s in bf16 of BERT-large's matrix products at 27,000 tokens: what no step can be faster than."""
    device = device_for(bench.tiny)
    rows, width, inner, vocabulary = (256, 64, 128, 512) if bench.tiny else (27_392, 1024, 4096, 30_528)
    shapes = {
        "qkv": (rows, width, 3 * width),
        "attention_out": (rows, width, width),
        "inner": (rows, width, inner),
        "outer": (rows, inner, width),
        "vocabulary": (rows // 6, width, vocabulary),
        "square": (8 * width, 8 * width, 8 * width),
    }
    for name, (m, k, n) in shapes.items():
        left, right = (torch.randn(shape, device=device).bfloat16() for shape in ((m, k), (n, k)))
        took = seconds_of(lambda _: left @ right.t(), device, spend_s(bench, 1.0), group=10)  # noqa: B023
        yield name, {"shape": [m, k, n], "tflops": round(2 * m * k * n / took / 1e12, 3)}


def phase1(bench: Bench) -> Pairs:
    """Forward and backward of micro-batches of 128 tokens with each lever on and off."""
    yield from _levers(bench, "phase1")


def phase2(bench: Bench) -> Pairs:
    """As `phase1`, 512 tokens."""
    yield from _levers(bench, "phase2")


def _levers(bench: Bench, phase: str) -> Pairs:
    device = device_for(bench.tiny)
    samples = micro_batches(bench, phase)
    for name, levers in rows_of(device).items():
        if levers.compiled and bench.left_s() < COMPILE_S:
            yield name, {"skipped": "no time left"}
            continue
        try:
            yield name, {**asdict(levers), **rate(bench, device, samples, levers)}
        except torch.OutOfMemoryError as error:
            yield name, {**asdict(levers), "error": str(error).split("\n")[0]}


def rows_of(device: torch.device) -> dict[str, Levers]:
    """Everything on first, for it counts most; then each lever off alone, and all of them."""
    on = best(device)
    rows = {"all_on": on}
    if on.compiled:
        rows["not_compiled"] = best(device, compiled=False)
    rows["cast_each"] = best(device, cast="micro")
    for layout in layouts(device)[1:]:  # beside not_compiled: other shapes would be compiled anew
        rows[f"layout_{layout}"] = best(device, layout=layout, compiled=False)
    rows["all_off"] = Levers("padded", compiled=False, cast="micro", precision=on.precision)
    return rows


def rate(
    bench: Bench, device: torch.device, samples: list[Samples], levers: Levers, backend: str = ""
) -> dict[str, Any]:
    """Speed of forward and backward, arithmetic of real tokens beside it, and memory, with an optimizer if named."""
    config = config_for(bench)
    release(device)
    began = time.perf_counter()
    subject = Subject(device, config, levers, samples, backend=backend)
    indices = range(len(samples))
    if backend:
        subject.step(0)
    subject.accumulate(indices)
    synchronise(device)
    ready_s = time.perf_counter() - began
    with PowerMeter() as power:
        took = seconds_of(lambda number: subject.accumulate(indices, number), device, spend_s(bench), group=1)
    count, tokens = sum(len(each.lengths) for each in samples), sum(len(each.tokens) for each in samples)
    flops = sum(training_flops(config, each.lengths.tolist(), len(each.labels)) for each in samples)
    return {
        "micro_batch": len(samples[0].lengths),
        "ms": round(1e3 * took / len(samples), 3),
        "sequences_per_s": round(count / took, 2),
        "tokens_per_s": round(tokens / took, 1),
        "tflops": round(flops / took / 1e12, 4),
        "mean_tokens": round(tokens / count, 1),
        "ready_s": round(ready_s, 1),
        "memory_gib": memory_gib(device),
        "power_w": power.mean,
    }


def release(device: torch.device) -> None:
    """Give back what the model before this one held, and count memory from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> float:
    """The most that was allocated since `release`."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else 0.0


class PowerMeter:
    """The GPU's mean power in watts while the block runs; None where NVML does not say."""

    def __enter__(self) -> PowerMeter:
        self.mean: float | None = None
        self._readings: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        try:
            nvml = importlib.import_module("pipeline.monitor.nvml")
            nvml.open_library()
            handle = nvml.ask("nvmlDeviceGetHandleByIndex", 0)
            while not self._end.wait(0.2):
                self._readings.append(nvml.ask("nvmlDeviceGetPowerUsage", handle) / 1000)
        except Exception:  # no NVML, no such reading: the row goes without it
            return

    def __exit__(self, *problem: object) -> None:
        self._end.set()
        self._thread.join(2)
        if self._readings:
            self.mean = round(sum(self._readings) / len(self._readings), 1)


def transformers(bench: Bench) -> Pairs:
    """Hugging Face's model (SDPA, bf16, padded, every position's logits) on the same samples, beside ours."""
    try:
        library = importlib.import_module("transformers")
    except ImportError as why:
        raise Skip("transformers is not installed") from why
    device, config = device_for(bench.tiny), config_for(bench)
    torch.use_deterministic_algorithms(False)  # as its users run it
    described = library.BertConfig(**config.to_hugging_face(vocab_size=config.vocab_size))
    for phase in PHASES:
        samples = micro_batches(bench, phase)
        for size in (len(samples[0].lengths) >> halvings for halvings in range(4)):
            release(device)
            try:
                took = _transformers_seconds(bench, library, described, samples, size, device)
            except torch.OutOfMemoryError:
                continue
            own = bench.results.get(phase, {}).get("all_on", {}).get("sequences_per_s")
            theirs = sum(len(each.lengths) for each in samples) / took
            row = {"micro_batch": size, "sequences_per_s": round(theirs, 2), "memory_gib": memory_gib(device)}
            yield phase, {**row, "ours": round(own / theirs, 2) if own else None}
            break


def _transformers_seconds(
    bench: Bench, library: Any, described: Any, samples: list[Samples], size: int, device: torch.device
) -> float:
    """Seconds for all micro-batches, cut into pieces of ``size`` samples."""
    model = library.BertForPreTraining._from_config(described, attn_implementation="sdpa").to(device).train()
    inputs = [
        {key: value[start : start + size].to(device) for key, value in padded(each).items()}
        for each in samples
        for start in range(0, len(each.lengths), size)
    ]

    def work(_: int) -> None:
        for piece in inputs:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**piece).loss
            loss.backward()

    return seconds_of(work, device, spend_s(bench, 5.0), group=1)


def padded(samples: Samples) -> dict[str, Tensor]:
    """The samples as transformers' model takes them, a row each."""
    count, seq_len = len(samples.lengths), samples.seq_len
    lengths = torch.from_numpy(samples.lengths)
    real = torch.arange(seq_len) < lengths[:, None]
    flat_labels = torch.full((len(samples.tokens),), -100)
    flat_labels[torch.from_numpy(samples.places)] = torch.from_numpy(samples.labels)
    ids, labels = torch.zeros(count, seq_len, dtype=torch.int64), torch.full((count, seq_len), -100)
    ids[real], labels[real] = torch.from_numpy(samples.tokens), flat_labels
    segments = (torch.arange(seq_len) >= torch.from_numpy(samples.b_start)[:, None]) & real
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": segments.long(),
        "labels": labels,
        "next_sentence_label": torch.from_numpy(samples.nsp),
    }


def lamb(bench: Bench) -> Pairs:
    """One optimizer step, ours compiled and not, and apex's where it is; whether ours and apex's are the same."""
    device = device_for(bench.tiny)
    if device.type == "cuda":
        regions.compile_regions(device)
        took, _ = _lamb_steps(bench, device, "torch")
        yield "compiled", {"ms": round(1e3 * took, 3)}
        regions.compile_regions(torch.device("cpu"))
    ends: dict[str, list[Tensor]] = {}
    for backend in ("torch", "apex") if apex_fused_lamb() is not None else ("torch",):
        release(device)
        took, ends[backend] = _lamb_steps(bench, device, backend)
        least = 28 * sum(p.numel() for p in ends[backend])  # weights and moments read and written, gradients read
        yield backend, {"ms": round(1e3 * took, 3), "gb_per_s": round(least / took / 1e9, 1)}
    if "apex" in ends:
        worst = max(float((a - b).abs().max()) for a, b in zip(ends["torch"], ends["apex"], strict=True))
        yield "apex_differs", check(worst, 1e-6)


def _lamb_steps(bench: Bench, device: torch.device, backend: str) -> tuple[float, list[Tensor]]:
    """Seconds of a step with random gradients, and the parameters after the first one."""
    model = model_on(device, config_for(bench))
    gradients = GradientBuffer(list(model.parameters()))
    gradients.flat.normal_(generator=torch.Generator(device).manual_seed(1))
    optimizer = build_optimizer(model, backend, gradients)
    optimizer.step(1e-3, max_grad_norm=1.0)
    end = [p.detach().clone() for p in model.parameters()]
    return seconds_of(lambda _: optimizer.step(1e-3, max_grad_norm=1.0), device, spend_s(bench, 2.0)), end


def save(bench: Bench) -> Pairs:
    """How long the loop stands still for a checkpoint of BERT-large, and what else a save takes."""
    device, config = device_for(bench.tiny), config_for(bench)
    release(device)
    subject = Subject(
        device, config, best(device, compiled=False), micro_batches(bench, "phase1", 8, 1), backend="torch"
    )
    assert subject.optimizer is not None
    state = {"weights": subject.model.state_dict(), "optimizer": subject.optimizer.state()}
    yield "gb", round(sum(t.nbytes for part in state.values() for t in part.values()) / 1e9, 3)
    with tempfile.TemporaryDirectory() as scratch:
        attempt = Path(scratch) / "attempts/0001"
        attempt.mkdir(parents=True)
        publish_json(attempt / "attempt.json", {"resumed_from": None})
        saver = checkpoint.Saver(attempt, keep=1)
        subject.step(0)
        synchronise(device)
        began = time.perf_counter()
        saver.prepare(**state)
        yield "prepare_call_s", round(time.perf_counter() - began, 4)
        saver.wait()
        yield "prepare_s", round(time.perf_counter() - began, 3)
        plain = seconds_of(subject.step, device, spend_s(bench, 1.0), group=1)
        for number in (1, 2):
            synchronise(device)
            began = time.perf_counter()
            saver.save(step=number, stage="bench", attempt=1, sample_position=0, identity={}, model={}, **state)
            stalled = time.perf_counter() - began
            saver.before_update()
            subject.step(number)
            synchronise(device)
            yield (
                f"save{number}",
                {
                    "call_s": round(stalled, 4),
                    "next_step_s": round(time.perf_counter() - began, 4),
                    "plain_step_s": round(plain, 4),
                },
            )
            saver.wait()
            yield f"write{number}_s", round(saver.write_s, 2)


def feed(bench: Bench) -> Pairs:
    """The host's share of a micro-batch: laying it out, and the copy, pinned and not."""
    device = device_for(bench.tiny)
    for phase in PHASES:
        (samples,) = micro_batches(bench, phase, different=1)
        layout = best(device).layout
        took = seconds_of(lambda _: laid_out(samples, layout), torch.device("cpu"), spend_s(bench, 1.0))  # noqa: B023
        yield f"{phase}_layout_ms", round(1e3 * took, 3)
        yield f"{phase}_bytes", sum(values.nbytes for values in laid_out(samples, layout).values())
    for pinned in (False, True) if device.type == "cuda" else (False,):
        for megabytes in (1,) if bench.tiny else (1, 256):
            host = torch.zeros(megabytes << 20, dtype=torch.uint8, pin_memory=pinned)
            there = torch.empty_like(host, device=device)
            name = f"{'pinned' if pinned else 'pageable'}_{megabytes}mb"
            up = seconds_of(lambda _: there.copy_(host, non_blocking=True), device, spend_s(bench, 0.5))  # noqa: B023
            down = seconds_of(lambda _: host.copy_(there, non_blocking=True), device, spend_s(bench, 0.5))  # noqa: B023
            rates = {"to_device_gb_s": host.nbytes / up / 1e9, "to_host_gb_s": host.nbytes / down / 1e9}
            yield name, {key: round(value, 2) for key, value in rates.items()}


def sweep(bench: Bench) -> Pairs:
    """Speed and memory by micro-batch, up to the largest that fits."""
    device = device_for(bench.tiny)
    sizes: Mapping[str, tuple[int, ...]] = {"phase1": (16, 64, 128, 512), "phase2": (4, 16, 32, 64, 256)}
    for phase, counts in sizes.items():
        for count in (2, 4) if bench.tiny else counts:
            if bench.left_s() < 5 and not bench.tiny:
                yield f"{phase}_{count}", {"skipped": "no time left"}
                continue
            try:
                samples = micro_batches(bench, phase, count, 1)
                yield f"{phase}_{count}", rate(bench, device, samples, best(device), "torch")
            except torch.OutOfMemoryError as error:
                yield f"{phase}_{count}", {"error": str(error).split("\n")[0]}
                break


def kernels(bench: Bench) -> Pairs:
    """How many kernels and copies a micro-batch and an optimizer step start. Last: the profiler slows what follows."""
    device = device_for(bench.tiny)
    if device.type != "cuda":
        raise Skip("no GPU")
    for name, levers in (("all_on", best(device)), ("not_compiled", best(device, compiled=False))):
        release(device)
        subject = Subject(device, config_for(bench), levers, micro_batches(bench, "phase1", 16, 1), backend="torch")
        subject.step(0)
        yield f"{name}_micro_batch", started(lambda: subject.accumulate([0]), device)  # noqa: B023
        yield f"{name}_step", started(lambda: subject.step(1), device)  # noqa: B023


def started(work: Callable[[], object], device: torch.device) -> int:
    """How many kernels and copies ``work`` starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        synchronise(device)
    return sum(str(event.device_type).endswith("CUDA") for event in seen.events() or ())
