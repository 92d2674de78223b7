"""Train one model on a task's samples in packed batches, and predict with it. One process, any device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from pipeline.bert.packing import Batch, pack
from pipeline.config import FinetuneConfig
from pipeline.engine.optim import AdamW, global_norm
from pipeline.engine.precision import LossScale, autocast_for
from pipeline.engine.schedule import learning_rate
from pipeline.errors import NumericalError
from pipeline.finetune.problems import Logits, Problem
from pipeline.finetune.samples import Samples

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
    ``log`` gets step, loss, learning_rate and sequences_per_s after every optimizer step. In fp16 a batch whose
    gradients overflow is skipped and halves the loss scale. NumericalError names the step whose loss or gradient
    is not finite.
    """
    optimizer = AdamW(model.named_parameters(), eps=EPS, weight_decay=config.weight_decay)
    steps = total_steps(len(samples), config)
    scale = LossScale() if config.precision == "fp16" else None
    torch.manual_seed(seed)
    model.train()
    for step, chosen in enumerate(_steps(len(samples), config, seed), 1):
        began = time.perf_counter()
        rate = learning_rate("linear", base=config.learning_rate, warmup=config.warmup, steps=steps, step=step)
        loss, norm = _accumulate(model, problem, samples.take(chosen), config, device, scale)
        optimizer.step(rate, max_grad_norm=MAX_GRAD_NORM, grad_norm=norm)
        finite = math.isfinite(loss + norm)
        if scale and finite:
            scale.good()
        elif not (finite or (scale and math.isfinite(loss) and scale.lowered())):
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
    model: nn.Module,
    problem: Problem,
    samples: Samples,
    config: FinetuneConfig,
    device: torch.device,
    scale: LossScale | None,
) -> tuple[float, float]:
    """Leave the gradients of the mean loss over all samples in the model; returns that loss and their norm."""
    model.zero_grad(set_to_none=True)
    assert samples.targets is not None
    total = torch.zeros((), device=device)
    for begin in range(0, len(samples), config.micro_batch):
        members = np.arange(begin, min(begin + config.micro_batch, len(samples)))
        micro = samples.take(members)
        with autocast_for(config.precision, device):
            outputs = model(packed(micro, device, config.max_seq_len))
        targets = torch.from_numpy(samples.targets[members]).to(device)
        loss = problem.loss_sum(outputs, targets) / len(samples)
        torch.autograd.backward(loss * scale.scale if scale else loss)
        total += loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scale:
        torch._foreach_mul_(gradients, 1 / scale.scale)
    return float(total), global_norm(gradients)


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
            with autocast_for(config.precision, device):
                outputs = model(packed(samples.take(members), device, config.max_seq_len, predicting=True))
            rows = problem.rows(outputs).float().cpu().numpy()
            for row, member in zip(rows, members.tolist(), strict=True):
                found[member] = row[: samples.lengths[member]] if row.ndim == 2 else row
                if not np.isfinite(found[member]).all():
                    raise NumericalError(f"prediction of sample {member} is not finite; try --precision fp32")
    return found


def packed(samples: Samples, device: torch.device, max_seq_len: int, *, predicting: bool = False) -> Batch:
    """The samples as a batch on ``device``, in rows of at most ``max_seq_len`` slots.

    A CPU that predicts takes them end to end in a single row: attention goes sample by sample there, and no pad is
    computed.
    """
    slots = int(samples.lengths.sum()) if predicting and device.type == "cpu" else max_seq_len
    return pack(samples.tokens, samples.lengths, samples.b_start, slots).to(device)
