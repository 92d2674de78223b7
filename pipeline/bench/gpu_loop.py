"""Blocks of `bench gpu` that go through the engine's own loop: feed, steps, checkpoints, a stop and going on."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.publish import publish_json
from pipeline.bench.gpu import Bench, check
from pipeline.bench.gpu_subject import (
    LARGE,
    PHASES,
    TINY,
    Samples,
    best,
    device_for,
    invent,
    laid_out,
    losses_of,
    model_on,
)
from pipeline.bert.config import BertConfig
from pipeline.bert.heads import BertForPreTraining
from pipeline.config import OptimizerConfig
from pipeline.engine.checkpoint import newest_verified
from pipeline.engine.loop import train
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch, Settings
from pipeline.errors import StoppedCleanly
from pipeline.node.job import Job, Topology
from pipeline.run.rundir import RunDir

Pairs = Iterator[tuple[str, Any]]
STAGE = "bench"


class Invented:
    """Pretraining on invented samples, as the engine's task."""

    losses_named: tuple[str, ...] = ("mlm_loss", "nsp_loss")
    counts_named: tuple[str, ...] = ("masked", "pairs", "tokens")

    def __init__(self, config: BertConfig, samples: Sequence[Samples], layout: str, **settings: Any) -> None:
        self.config, self.samples, self.layout = config, samples, layout
        self.settings = Settings(
            seed=1, micro_batch=len(samples[0].lengths), precision="bf16", reduction="fast", learning_rate=1e-3,
            warmup=0.0, schedule="constant", max_grad_norm=1.0, optimizer=OptimizerConfig(backend="torch"), **settings,
        )  # fmt: skip

    def optimizer(self) -> None:
        return None

    def model(self) -> BertForPreTraining:
        return model_on(torch.device("cpu"), self.config)

    def size(self, batch: int) -> int:
        return len(self.samples) * self.settings.micro_batch

    def counts(self, batch: int, indices: range) -> Sequence[int]:
        chosen = [self.samples[index] for index in indices]
        return [sum(sizes) for sizes in zip(*map(_counts, chosen), strict=True)] or [0, 0, 0]

    def read(self, batch: int, index: int) -> MicroBatch:
        samples = self.samples[index]
        ids = np.arange(len(samples.lengths)) + index * self.settings.micro_batch
        return MicroBatch(ids, laid_out(samples, self.layout), _counts(samples), {"seq_len": samples.seq_len})

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return losses_of(model, inputs, inputs["seq_len"])

    def evaluate(self, model: nn.Module, ranks: Ranks) -> Mapping[str, float]:
        return {}

    def in_words(self, figures: Mapping[str, float]) -> str:
        return "nothing held out"

    def identity(self) -> Mapping[str, Any]:
        return {"invented": True}

    def finish(self, model: nn.Module, ranks: Ranks) -> Mapping[str, Any]:
        return {}


def _counts(samples: Samples) -> tuple[int, int, int]:
    return len(samples.labels), len(samples.nsp), len(samples.tokens)


def trained(folder: Path, task: Invented, *, stop: bool = False) -> RunDir:
    """One attempt of the task in a run of its own; with ``stop`` it is asked to stop and ends after its first step."""
    run = RunDir(folder)
    folder.mkdir(exist_ok=True)
    publish_json(folder / "run.json", {})
    attempt = run.stage(STAGE).new_attempt("launch")
    job = Job(run, STAGE, attempt, Topology(0, 1, 0, "launch"), workers=1, threads=torch.get_num_threads())
    job.stop.reason = "the benchmark" if stop else None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(StoppedCleanly):
        train(job, lambda ranks: task)
    return run


def resume(bench: Bench) -> Pairs:
    """A training that is stopped and goes on ends with the bits of one that is not."""
    device = device_for(bench.tiny)
    config = replace(TINY, hidden_size=128)
    samples = [invent(8, 64, config.vocab_size, seed) for seed in (1, 2, 3)]
    task = Invented(config, samples, best(device).layout, steps=4, checkpoint_every=2)
    with tempfile.TemporaryDirectory() as scratch:
        whole = trained(Path(scratch) / "whole", task)
        trained(Path(scratch) / "stopped", task, stop=True)
        parts = trained(Path(scratch) / "stopped", task)
        ends = [newest_verified(run.stage(STAGE).path, lambda line: None) for run in (whole, parts)]
        lines = [line for line in whole.stage(STAGE).metrics() if "loss" in line]
        attempts = len(parts.stage(STAGE).attempts)
    assert ends[0] is not None
    assert ends[1] is not None
    yield "attempts", check(abs(attempts - 2), 0)
    yield "steps", check(abs(ends[0].step - 4) + abs(ends[1].step - 4), 0)
    yield "other_bits", check(float(ends[0].digest != ends[1].digest), 0)
    yield "losses", [round(line["loss"], 5) for line in lines]


def loop(bench: Bench) -> Pairs:
    """Whole steps of BERT-large as training does them, both phases, with what the loop waits for."""
    device, config = device_for(bench.tiny), TINY if bench.tiny else LARGE
    for phase, (seq_len, size) in PHASES.items():
        samples = [invent(4, seq_len // 4, 512, seed) if bench.tiny else invent(size, seq_len, 30_528, seed)
                   for seed in range(8)]  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            task = Invented(config, samples, best(device).layout, steps=4, checkpoint_every=1000)
            lines = [line for line in trained(Path(scratch) / "run", task).stage(STAGE).metrics() if "step_s" in line]
        steady = lines[2:]
        step_s = sum(line["step_s"] for line in steady) / len(steady)
        spent = {part: sum(line["spent_s"][part] for line in steady) / len(steady) for part in steady[0]["spent_s"]}
        yield (
            phase,
            {
                "micro_batch": task.settings.micro_batch,
                "accumulation": len(samples),
                "step_s": round(step_s, 4),
                "sequences_per_s": round(task.size(0) / step_s, 2),
                "spent_s": {part: round(seconds, 4) for part, seconds in spent.items()},
                "first_step_s": round(lines[0]["step_s"], 2),
            },
        )
