"""Train one model on a task's samples in packed batches, and predict with it. One process, any device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from pipeline.bert.packing import Batch, pack
from pipeline.errors import NumericalError
from pipeline.finetune.options import FinetuneConfig
from pipeline.finetune.problems import Logits, Problem
from pipeline.finetune.samples import Samples
from pipeline.train.optim import AdamW
from pipeline.train.schedule import learning_rate

MAX_GRAD_NORM = 1.0
EPS = 1e-6  # BERT's Adam

Log = Callable[[dict[str, float]], None]


def total_steps(samples: int, config: FinetuneConfig) -> int:
    """Optimizer steps of a training: every epoch ends with a step on the samples that are left."""
    return config.epochs * math.ceil(samples / config.batch)


def fit(
    model: nn.Module,
    problem: Problem,
    samples: Samples,
    config: FinetuneConfig,
    *,
    seed: int,
    device: torch.device,
    log: Log,
) -> None:
    """Train ``model`` in place. The order of samples depends on (seed, epoch), dropout on the seed.

    Adam with bias correction, without which fine-tuning on few examples often fails (Mosbach et al. 2021).
    ``log`` gets step, loss, learning_rate and sequences_per_s after every optimizer step. NumericalError names
    the step whose loss or gradient is not finite.
    """
    optimizer = AdamW(model.named_parameters(), eps=EPS, weight_decay=config.weight_decay)
    steps = total_steps(len(samples), config)
    torch.manual_seed(seed)
    model.train()
    for step, chosen in enumerate(_steps(len(samples), config, seed), 1):
        began = time.perf_counter()
        rate = learning_rate("linear", base=config.learning_rate, warmup=config.warmup, steps=steps, step=step)
        loss = _accumulate(model, problem, samples.take(chosen), config, device)
        norm = optimizer.step(rate, max_grad_norm=MAX_GRAD_NORM)
        if not math.isfinite(loss + norm):
            raise NumericalError(
                f"step {step} of {steps} (seed {seed}): loss {loss}, gradient norm {norm}, learning rate "
                f"{rate:.3g}; try a lower learning rate or --precision fp32"
            )
        took = time.perf_counter() - began
        log({"step": step, "loss": loss, "learning_rate": rate, "sequences_per_s": len(chosen) / took})


def _steps(samples: int, config: FinetuneConfig, seed: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        yield from np.split(order, range(config.batch, samples, config.batch))


def _accumulate(
    model: nn.Module, problem: Problem, samples: Samples, config: FinetuneConfig, device: torch.device
) -> float:
    """Leave the gradients of the mean loss over all samples in the model; returns that loss."""
    model.zero_grad(set_to_none=True)
    assert samples.targets is not None
    total = torch.zeros((), device=device)
    for begin in range(0, len(samples), config.micro_batch):
        members = np.arange(begin, min(begin + config.micro_batch, len(samples)))
        micro = samples.take(members)
        with _autocast(config, device):
            outputs = model(_packed(micro, config, device))
        targets = torch.from_numpy(samples.targets[members]).to(device)
        loss = problem.loss_sum(outputs, targets) / len(samples)
        torch.autograd.backward(loss)
        total += loss.detach()
    return float(total)


def predict(
    model: nn.Module, problem: Problem, samples: Samples, config: FinetuneConfig, device: torch.device
) -> list[Logits]:
    """Logits of every sample, in their order: ``[tokens, 2]`` or ``[labels]`` each, fp32.

    Samples of like length are computed together. NumericalError when a logit is not finite.
    """
    found: list[Logits] = [np.zeros(0, np.float32)] * len(samples)
    by_length = np.argsort(-samples.lengths, kind="stable")
    model.eval()
    with torch.inference_mode():
        for begin in range(0, len(samples), config.micro_batch):
            members = by_length[begin : begin + config.micro_batch]
            with _autocast(config, device):
                outputs = model(_packed(samples.take(members), config, device))
            rows = problem.rows(outputs).float().cpu().numpy()
            for row, member in zip(rows, members.tolist(), strict=True):
                found[member] = row[: samples.lengths[member]] if row.ndim == 2 else row
                if not np.isfinite(found[member]).all():
                    raise NumericalError(f"prediction of sample {member} is not finite; try --precision fp32")
    return found


def _packed(samples: Samples, config: FinetuneConfig, device: torch.device) -> Batch:
    return pack(samples.tokens, samples.lengths, samples.b_start, config.max_seq_len).to(device)


def _autocast(config: FinetuneConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
