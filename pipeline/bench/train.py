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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.bench import turns
from pipeline.bench.engines import transformers_step
from pipeline.bench.gpu_fast import padded
from pipeline.bench.gpu_subject import Samples, Subject, best, invent
from pipeline.bench.turns import DIFFERENT, Row, Step, Work
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.costs import training_flops
from pipeline.config import Recipe, load_recipe
from pipeline.engine.backend import of_config
from pipeline.engine.ranks import Ranks
from pipeline.errors import ConfigError


def main(arguments: list[str]) -> int:
    """Measure every combination that was asked for and print a table, or its figures as JSON."""
    options = parser().parse_args(arguments)
    recipe = load_recipe(options.recipe, options.settings)
    phases = options.phase.split(",") if options.phase else list(recipe.phases)
    precisions = options.precision.split(",") if options.precision else [recipe.train.precision]
    known = [name for name in phases if name in recipe.phases]
    wrong = [f"--phase {name}: recipe {recipe.name} has {', '.join(recipe.phases)}" for name in phases
             if name not in known]  # fmt: skip
    measurements = [
        {"phase": phase, "precision": precision, "gpus": gpus,
         **turns.amounts(options, precision, recipe.phases[phase].micro_batch or 16, wrong)}
        for phase in known for precision in precisions for gpus in options.gpus
    ]  # fmt: skip
    turns.refuse(options, precisions, wrong)
    lengths = {phase: lengths_of(options.lengths, recipe.phases[phase].seq_len) if options.lengths else None
               for phase in phases}  # fmt: skip
    return turns.run(options, functools.partial(prepare, recipe, lengths), measurements, ("phase",), recipe.model)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.bench train", description=__doc__)
    options.add_argument("--phase", metavar="NAMES", help="phases, separated by commas (default: all of the recipe)")
    options.add_argument("--lengths", type=Path, metavar="DIR",
                         help="a samples folder whose lengths are taken (default: invented)")  # fmt: skip
    turns.common_options(options)
    return options


@contextmanager
def prepare(
    recipe: Recipe,
    lengths: dict[str, np.ndarray[Any, np.dtype[np.int64]] | None],
    options: argparse.Namespace,
    asked: Row,
    ranks: Ranks,
) -> Iterator[Work]:
    """The steps of one phase and precision; every process has the same samples."""
    phase, precision, gpus, micro_batch, accumulation = asked.values()
    seq_len = recipe.phases[phase].seq_len
    config = BertConfig(vocab_size=padded_vocab(recipe.data.vocab_size), **dataclasses.asdict(recipe.model))
    samples = [invent(micro_batch, seq_len, config.vocab_size, seed, lengths[phase])
               for seed in range(min(DIFFERENT, accumulation))]  # fmt: skip
    steps = {"ours": our_step(recipe, config, precision, samples, accumulation, ranks.device)}
    if options.beside:
        steps["transformers"] = their_step(config, precision, samples, accumulation, ranks.device)
    step = [samples[index % len(samples)] for index in range(accumulation)]
    tokens = sum(len(each.tokens) for each in step)
    flops = sum(training_flops(config, each.lengths.tolist(), len(each.labels)) for each in step)
    row = {"seq_len": seq_len, **asked, "recipe": recipe.name, "lengths": "real" if options.lengths else "invented"}
    yield Work(row, steps, gpus * accumulation * micro_batch, lambda number: (gpus * tokens, gpus * flops))


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


def their_step(
    config: BertConfig, precision: str, samples: list[Samples], accumulation: int, device: torch.device
) -> Step:
    """A step of Hugging Face's model."""
    library = importlib.import_module("transformers")
    described = library.BertConfig(**config.to_hugging_face(vocab_size=config.vocab_size))
    model = library.BertForPreTraining._from_config(described, attn_implementation="sdpa").to(device)
    batches = [{name: value.to(device) for name, value in padded(each).items()} for each in samples]
    step = [batches[index % len(batches)] for index in range(accumulation)]
    return transformers_step(model, precision, lambda number: step)


def lengths_of(folder: Path, seq_len: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Lengths of the samples of a folder's first training shard."""
    from data_prep.hdf5 import read_listed  # h5py is needed for nothing else here
    from data_prep.manifest import load

    samples = load(folder, "train")
    if samples.seq_len != seq_len:
        raise ConfigError(f"--lengths {folder}: its samples have length {samples.seq_len}, the phase has {seq_len}")
    return np.diff(read_listed(samples, samples.shards[0]).offsets).astype(np.int64)
