"""Blocks of `bench gpu` that say whether this machine computes what it should: alive, right, the same every time."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.publish import publish_json
from pipeline.bench.gpu import Bench, Skip, check
from pipeline.bench.gpu_reference import SIZES, case, difference, kept, values_of
from pipeline.bench.gpu_subject import (
    LARGE,
    TINY,
    Samples,
    Subject,
    best,
    build_optimizer,
    device_for,
    invent,
    layouts,
    model_on,
    starting_weights,
)
from pipeline.bert.attention import SelfAttention
from pipeline.bert.config import BertConfig
from pipeline.bert.dropout import dropout, keyed
from pipeline.engine import checkpoint
from pipeline.engine.reduce import GradientBuffer
from pipeline.node.device import driver_version

Pairs = Iterator[tuple[str, Any]]
LIMITS = {"fp32": (2e-5, 1e-3), "bf16": (6e-3, 5e-2)}  # of the losses and of the gradients, relative
SEEN_P = 0.005  # how far a measured dropout rate of 0.1 may be off


def env(bench: Bench) -> Pairs:
    """Versions and devices: what every figure of this file was measured on."""
    yield "torch", torch.__version__
    yield "python", platform.python_version()
    yield "cuda", torch.version.cuda
    yield "driver", driver_version()
    yield "cpus", len(os.sched_getaffinity(0))
    yield "packages", {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    device = device_for(bench.tiny)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        yield "gpu", facts.name
        yield "memory_gib", round(facts.total_memory / 2**30, 1)
        yield "sms", facts.multi_processor_count
        yield "capability", list(torch.cuda.get_device_capability(device))
        yield "architectures", torch.cuda.get_arch_list()
        yield "cudnn", torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        yield "nccl", torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    yield "layouts", layouts(device)
    yield "environment", {name: os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")}


PACKAGES = ("transformers", "apex", "amp_C", "h5py", "safetensors", "pynvml", "triton", "tokenizers")


def alive(bench: Bench) -> Pairs:
    """A small model: equal starting weights, a loss that falls, no waiting for the device, save and resume."""
    device = device_for(bench.tiny)
    config = replace(TINY, hidden_size=128)
    wanted, weights = starting_weights(_without_dropout(config)), model_on(device, config).state_dict()
    yield "weights_differ", check(max(float((weights[n].cpu() - w).abs().max()) for n, w in wanted.items()), 0.0)
    samples = [invent(16, 64, config.vocab_size, seed) for seed in (1, 2)]
    subject = Subject(device, config, best(device), samples, backend="torch")
    yield "compiled", subject.compiled
    with torch.no_grad(), subject.autocast():
        before = float(sum(subject.losses(0)))
    for number in range(20):
        subject.step(number, 1e-2)
    with torch.no_grad(), subject.autocast():
        yield "loss_left", check(float(sum(subject.losses(0))) / before, 0.97)
    if device.type == "cuda":
        waits = _waits(subject)
        yield "waits", check(len(waits), 0.0, places=waits)
    yield from _saved_and_resumed(device, config, samples)


def _waits(subject: Subject) -> list[str]:
    """Where a micro-batch makes the host wait for the device, as torch's debug mode sees it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            subject.accumulate([0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in told if "called a synchronizing" in str(warning.message)]  # not that of the mode
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


def _saved_and_resumed(device: torch.device, config: BertConfig, samples: list[Samples]) -> Pairs:
    """Two steps, a save, two more; what was saved must be the state at the save, and go on to the same end."""

    def fresh() -> Subject:
        return Subject(device, config, best(device), samples, backend="torch")

    subject, again = fresh(), fresh()
    assert subject.optimizer is not None
    assert again.optimizer is not None
    with tempfile.TemporaryDirectory() as scratch:
        attempt = Path(scratch) / "attempts/0001"
        attempt.mkdir(parents=True)
        publish_json(attempt / "attempt.json", {"resumed_from": None})
        saver = checkpoint.Saver(attempt)
        for number in range(4):
            saver.before_update()
            subject.step(number)
            if number == 1:
                wanted = subject.digest()
                folder = saver.save(
                    step=2, stage="bench", attempt=1, sample_position=0, identity={}, model={},
                    weights=subject.model.state_dict(), optimizer=subject.optimizer.state(),
                )  # fmt: skip
        saver.wait()
        if importlib.util.find_spec("safetensors") is None:
            yield "resume", "skipped: safetensors is not installed"
            return
        read = checkpoint.read(folder)
    again.model.load_state_dict({name: torch.from_numpy(value) for name, value in read.weights.items()})
    again.optimizer.load({name: torch.from_numpy(value) for name, value in read.optimizer.items()})
    yield "saved_other_bits", check(float(again.digest() != wanted), 0.0)
    for number in (2, 3):
        again.step(number)
    yield "resumed_to_other_bits", check(float(again.digest() != subject.digest()), 0.0)


def correctness(bench: Bench) -> Pairs:
    """Losses and gradients against a CPU's, in every layout; dropout rates; LAMB against the CPU's."""
    device = device_for(bench.tiny)
    for name in SIZES:
        config, samples = case(name, bench.tiny)
        wanted = kept(name, bench.tiny)
        for precision, (loss_limit, gradient_limit) in LIMITS.items():
            for layout in layouts(device):
                also = device.type == "cuda" and layout == layouts(device)[0] and name == "phase1"  # it takes a while
                for compiled in (False, True) if also else (False,):
                    levers = best(device, layout=layout, precision=precision, compiled=compiled)
                    loss, gradient = difference(values_of(Subject(device, config, levers, [samples])), wanted)
                    what = f"{name}_{precision}_{layout}" + ("_compiled" if compiled else "")
                    yield f"{what}_loss", check(loss, loss_limit)
                    yield f"{what}_gradient", check(gradient, gradient_limit)
        other = replace(samples, b_start=samples.lengths - 1)  # the control: segments a little different
        changed = difference(values_of(Subject(device, config, best(device, precision="fp32"), [other])), wanted)
        yield f"{name}_control", {"loss": changed[0], "gradient": changed[1]}
        yield f"{name}_control_share", check(LIMITS["fp32"][1] / changed[1], 0.5)
    yield from _dropout_rates(device, bench.tiny)
    yield "lamb_update", check(_lamb_difference(device), 1e-4)


def _dropout_rates(device: torch.device, tiny: bool) -> Pairs:
    """The share that dropout really takes, of hidden values and of attention probabilities."""
    keyed("rate")
    ones = torch.ones(10**6 if tiny else 10**7, device=device, dtype=torch.bfloat16)
    taken = float((dropout(ones, 0.1) == 0).float().mean())
    yield "hidden_dropout", check(abs(taken - 0.1), SEEN_P, rate=taken)
    for precision in ("fp32", "bf16"):
        rate = _attention_rate(device, precision)
        yield f"attention_dropout_{precision}", check(abs(rate - 0.1), SEEN_P, rate=rate)


def _attention_rate(device: torch.device, precision: str) -> float:
    """From the variance of a mean over n equally likely keys, p / ((1 - p) n), through the model's own attention.

    Query, key and the value's weight are zero and its bias one: the context is the share of keys kept, by 1 - p.
    """
    config = BertConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    lengths = [64] * 64
    samples = replace(invent(64, 64, 64, 1), lengths=torch.tensor(lengths).numpy())
    samples = replace(samples, tokens=torch.randint(10, 64, (sum(lengths),)).numpy(), b_start=samples.lengths // 2)
    samples = replace(samples, places=samples.lengths.cumsum() - 3, labels=samples.nsp + 10)
    subject = Subject(device, config, best(device, precision=precision, compiled=False), [samples])
    (attention,) = (part for part in subject.model.modules() if isinstance(part, SelfAttention))
    contexts: list[torch.Tensor] = []
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.weight.zero_()
            linear.bias.fill_(float(linear is attention.value))
    attention.register_forward_hook(lambda module, inputs, output: contexts.append(output.detach().float()))
    with subject.autocast():
        subject.losses(0)
    seen = contexts[0].reshape(-1, 4, 64)[..., 0]  # all values of a head are the same
    scaled = float(seen.var()) * 64
    return scaled / (1 + scaled)


def _lamb_difference(device: torch.device) -> float:
    """Largest relative difference of three LAMB updates of a small model to the CPU's, same gradients."""
    config = _without_dropout(replace(TINY, hidden_size=128))
    models = [model_on(torch.device("cpu"), config), model_on(device, config)]
    optimizers = [build_optimizer(model, "torch", GradientBuffer(list(model.parameters()))) for model in models]
    start = [p.detach().clone() for p in models[0].parameters()]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            theirs.grad.copy_(ours.grad.normal_(generator=generator))
        for optimizer in optimizers:
            optimizer.step(1e-2, max_grad_norm=1.0)
    with torch.no_grad():
        pairs = zip(models[0].parameters(), models[1].parameters(), start, strict=True)
        return max(float((ours - theirs.cpu()).norm() / (ours - before).norm()) for ours, theirs, before in pairs)


def determinism(bench: Bench) -> Pairs:
    """Five steps with dropout, twice: the same bits; with another key of the dropout: others."""
    device = device_for(bench.tiny)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        name = "compiled" if compiled else "eager"
        digests = [_five_steps(device, bench.tiny, compiled) for _ in range(2)]
        yield f"{name}_digest", digests[0]
        yield f"{name}_differs", check(float(digests[0] != digests[1]), 0.0)
        yield f"{name}_control", check(float(digests[0] == _five_steps(device, bench.tiny, compiled, key=100)), 0.0)


def again(bench: Bench) -> Pairs:
    """`determinism` in another process: the same bits as there."""
    before = bench.results.get("determinism", {})
    if not before.get("eager_digest"):
        raise Skip("the block determinism did not run before this one")
    device = device_for(bench.tiny)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        name = "compiled" if compiled else "eager"
        yield (
            f"{name}_differs",
            check(float(_five_steps(device, bench.tiny, compiled) != before[f"{name}_digest"]), 0.0),
        )


def _five_steps(device: torch.device, tiny: bool, compiled: bool, key: int = 0) -> str:
    config = TINY if tiny else replace(LARGE, num_hidden_layers=4)
    samples = [invent(8, 32, config.vocab_size, 1)] if tiny else [invent(64, 128, 30522, 1), invent(64, 128, 30522, 2)]
    subject = Subject(device, config, best(device, compiled=compiled), samples, backend="torch")
    for number in range(5):
        subject.step(key + number)
    return subject.digest()


def nvml(bench: Bench) -> Pairs:
    """Every field that the sampler reads, against nvidia-smi."""
    from pipeline.bench.gpu_nvml import compared

    if not torch.cuda.is_available():
        raise Skip("no GPU")
    if shutil.which("nvidia-smi") is None:
        raise Skip("nvidia-smi is not there")
    yield from compared()


def _without_dropout(config: BertConfig) -> BertConfig:
    return replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
