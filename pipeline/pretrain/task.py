"""Pretraining as a task of the engine: masked language modelling and next sentence prediction, one phase at a time.

Called by every phase's stage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import SampleSet, load, verify_share
from data_prep.wordpiece import Vocabulary
from pipeline.batch import BatchPlan
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.heads import BertForPreTraining, initialised, pretraining_loss_sums
from pipeline.bert.packing import Arrangement, Batch, arrangement, layout
from pipeline.bert.weights import load_start
from pipeline.config import ModelConfig, OptimizerConfig, PhaseConfig, TrainConfig
from pipeline.engine import checkpoint
from pipeline.engine.checkpoint_folder import MANIFEST
from pipeline.engine.loop import train as train_task
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch, Settings
from pipeline.node.job import Job
from pipeline.pretrain.data import MaskedSamples, PretrainingData
from pipeline.pretrain.evaluate import MASKED_SHARE, WordShares, baselines, evaluate, heldout, marked, shuffled
from pipeline.pretrain.nvidia import read_middle
from pipeline.report.learnt import context_in_words


def run(
    job: Job,
    *,
    model: ModelConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    phase: PhaseConfig,
    samples: Path,
    vocab: Path,
    start: Path | None = None,
) -> dict[str, Any]:
    """Pretrain one phase from ``samples``, from random weights or from those at ``start`` (see `Pretraining.model`).

    Returns the done mark's result: the final ``checkpoint`` (relative to the stage's folder), step, losses. Raises
    what `pipeline.engine.loop.train` raises.
    """
    return train_task(job, lambda ranks: Pretraining(job, ranks, model, train, optimizer, phase, samples, vocab, start))


def check(
    *, model: ModelConfig, train: TrainConfig, phase: PhaseConfig, start: Path, vocab: Path, **others: object
) -> None:
    """CheckpointError where the weights at ``start``, or the optimizer's state there, do not fit model and words."""
    size = padded_vocab(Vocabulary.load(vocab, any_kind=True).size)
    config = BertConfig(vocab_size=size, **dataclasses.asdict(model))
    weights = load_start(start, config, vocab, pairs=train.objective != "mlm")
    if phase.start_step:
        read_middle(start, {name: value.shape for name, value in weights.items()})


def verified_together(ranks: Ranks, record: Path, folder: Path, split: str) -> SampleSet:
    """A split of a samples folder, each of whose files was hashed by one of the ranks, before any collective.

    What was verified is on ``record``, and a later attempt trusts it for a time (`data_prep.manifest.verify_share`).
    """
    samples = load(folder, split)
    verify_share(samples, record, rank=ranks.rank, ranks=ranks.world_size)
    ranks.meet(f"{split} verified")
    return samples


def settings_of(train: TrainConfig, optimizer: OptimizerConfig, phase: PhaseConfig) -> Settings:
    """How the engine trains a phase."""
    assert phase.micro_batch is not None  # submit chose it when the run was created
    return Settings(
        steps=phase.steps,
        seed=train.seed,
        micro_batch=phase.micro_batch,
        precision=train.precision,
        reduction=train.reduction,
        loss_mean=train.loss_mean,
        optimizer=optimizer,
        learning_rate=phase.learning_rate,
        warmup=phase.warmup,
        schedule=phase.schedule,
        max_grad_norm=train.max_grad_norm,
        log_every=train.log_every,
        say_every=10 * train.log_every,
        eval_every=train.eval_every,
        checkpoint_every=train.checkpoint_every,
        keep_checkpoints=train.keep_checkpoints,
        best_by="eval_mask_loss" if train.keep_best else None,
        first_step=phase.start_step,
    )


class Pretraining:
    """One phase: its samples in order, their masks, its losses and its held-out figures."""

    losses_named: tuple[str, ...] = ("mlm_loss", "nsp_loss")
    counts_named: tuple[str, ...] = ("masked", "pairs", "tokens")

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        model: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        phase: PhaseConfig,
        samples: Path,
        vocab: Path,
        start: Path | None,
    ) -> None:
        self._aim(train)
        self.arranged = arrangement(ranks.device.type, phase.seq_len)
        self.job, self.phase, self.vocab, self.start = job, phase, vocab, start
        self.settings = dataclasses.replace(
            settings_of(train, optimizer, phase),
            evaluate_first=start is not None and not (start / MANIFEST).exists(),  # a model that others trained
        )
        self.science = {"model": model, "train": train, "optimizer": optimizer, "phase": phase}
        verified = functools.partial(verified_together, ranks, job.out / "verified")
        continuing = Vocabulary.load(vocab).continuing if train.masking_unit == "word" else None
        self.data = PretrainingData(samples, "train", phase, train, verified, continuing)
        vocab_size = padded_vocab(self.data.manifest.vocab_size)
        self.config = BertConfig(vocab_size=vocab_size, **dataclasses.asdict(model))
        once = dataclasses.replace(train, masking="static", masked_lm_prob=MASKED_SHARE)
        test = PretrainingData(samples, "test", phase, once, verified)
        self.heldout = heldout(test, train.eval_samples, self.settings.micro_batch)
        self.shares = WordShares.of(self.data)
        self.baselines = self._meant(baselines(self.heldout, self.shares))
        self.predicting = arrangement(ranks.device.type, phase.seq_len, predicting=True)
        self.heldout_batches = self._marked(self.heldout)  # laid out once for all evaluations
        self.evaluated: dict[str, Any] | None = None

    def _aim(self, train: TrainConfig) -> None:
        """Which losses there are."""
        if train.objective == "mlm":
            self.losses_named, self.counts_named = ("mlm_loss",), ("masked", "tokens")

    @property
    def pairs(self) -> bool:
        """Whether samples are pairs, of which the model says whether they belong together."""
        return "nsp_loss" in self.losses_named

    # ---------------------------------------------------------------- where it begins

    def model(self) -> BertForPreTraining:
        """The model with random weights, or with those of ``start``: a checkpoint of the phase before, a Hugging
        Face folder, or NVIDIA's ``.pt``.
        """
        bert = self._shaped()
        if self.start is None:
            return initialised(bert, torch.Generator().manual_seed(self.settings.seed))
        if (self.start / MANIFEST).exists():
            origin, before = self.start.parent.parent.parent.name, checkpoint.read(self.start, tensors=("weights",))
            checkpoint.check_identity({"model": before.model}, {"model": self.config})
            weights = {name: torch.from_numpy(values) for name, values in before.weights.items()}
        else:
            origin, weights = self.start.name, load_start(self.start, self.config, self.vocab, pairs=self.pairs)
        if self.phase.start_step:  # they may be there in full precision, too
            weights |= read_middle(self.start, {name: value.shape for name, value in weights.items()})[0]
        bert.load_state_dict(weights)
        self.job.say(f"starts from the weights of {origin}")
        return bert

    def optimizer(self) -> Mapping[str, Tensor] | None:
        if not self.phase.start_step or self.start is None:
            return None
        with torch.device("meta"):
            trained = {name: p.shape for name, p in self._shaped().named_parameters() if p.requires_grad}
        return read_middle(self.start, trained)[1]

    def _shaped(self) -> BertForPreTraining:
        bert = BertForPreTraining(self.config)
        for unused in () if self.pairs else (bert.bert.pooler, bert.cls.seq_relationship):
            unused.requires_grad_(False)
        return bert

    def identity(self) -> Mapping[str, Any]:
        """The data by its hashes, and the science of the configuration."""
        return {"data": self.data.manifest.sha256, "vocab": self.data.manifest.vocab_sha256, **self.science}

    # ---------------------------------------------------------------- a batch

    def size(self, batch: int) -> int:
        return self.phase.global_batch

    def counts(self, batch: int, indices: range) -> Sequence[int]:
        """Masked tokens, pairs and tokens, from the lengths in the index."""
        if not indices:
            return (0,) * len(self.counts_named)
        lengths = self.data.lengths(self._positions(batch, indices))
        return self._counted(int(self.data.masked_counts(lengths).sum()), len(lengths), int(lengths.sum()))

    def _counted(self, masked: int, pairs: int, tokens: int) -> tuple[int, ...]:
        return (masked, pairs, tokens) if self.pairs else (masked, tokens)

    def read(self, batch: int, index: int) -> MicroBatch:
        return self.packed(self.data.read(self._positions(batch, range(index, index + 1))), self.arranged)

    def _positions(self, batch: int, indices: range) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions in the order of the samples of consecutive micro-batches."""
        plan = BatchPlan(self.phase.global_batch, self.settings.micro_batch, world_size=1)
        first, last = plan.samples_of(indices[0]), plan.samples_of(indices[-1])
        return np.arange(first.start, last.stop) + batch * self.phase.global_batch

    def packed(self, masked: MaskedSamples, arranged: Arrangement) -> MicroBatch:
        """Masked samples laid out for the device; ``masked [K]`` are the slots of the masked tokens."""
        arrays = layout(masked.tokens, masked.lengths, masked.b_start, self.phase.seq_len, arranged)
        return MicroBatch(
            ids=masked.ids,
            arrays={
                **arrays,
                "masked": arrays["slot"][masked.positions],
                "labels": masked.labels.astype(np.int32),
                "nsp": masked.nsp.astype(np.int32),
            },
            counts=self._counted(len(masked.labels), len(masked.nsp), len(masked.tokens)),
            sizes={"seq_len": self.phase.seq_len},
        )

    def losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        mlm_logits, nsp_logits = model(Batch.of(inputs), inputs["masked"])
        sums = pretraining_loss_sums(mlm_logits, inputs["labels"], nsp_logits, inputs["nsp"])
        return sums[: len(self.losses_named)]

    # ---------------------------------------------------------------- held-out figures

    def evaluate(self, model: nn.Module, ranks: Ranks) -> Mapping[str, Any]:
        self.evaluated = self._evaluated(model, ranks, self.heldout_batches)
        return {**self.evaluated, **self.baselines}

    def _marked(self, parts: Sequence[MaskedSamples]) -> list[MicroBatch]:
        return [marked(self.packed(part, self.predicting), part, self.shares.mask_id) for part in parts]

    def _evaluated(self, model: nn.Module, ranks: Ranks, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        return self._meant(evaluate(model, batches, self.shares, self.settings.precision, ranks))

    def _meant(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Figures without those of next sentences, where there are none."""
        return figures if self.pairs else {name: value for name, value in figures.items() if "nsp" not in name}

    def in_words(self, figures: Mapping[str, Any]) -> str:
        gain, error = figures["eval_mask_gain"], figures["eval_mask_gain_se"]
        at_mask = "" if gain is None or error is None else f"; at [MASK] {gain:.3f} ± {error:.3f} below word counts"
        line = (
            f"held-out MLM loss {figures['eval_mlm_loss']:.4f} (without context {figures['context_free_loss']:.4f} at "
            f"best{at_mask})"
        )
        if not self.pairs:
            return line
        return f"{line}, NSP accuracy {figures['eval_nsp_accuracy']:.3f} (majority {figures['nsp_majority']:.3f})"

    def finish(self, model: nn.Module, ranks: Ranks) -> Mapping[str, Any]:
        """The figures of the last step, made now where an earlier attempt made that step, and their control.

        The control is the same evaluation with the words around in random order: what a model gains by context
        and order is lost there.
        """
        figures = self.evaluated or self._evaluated(model, ranks, self.heldout_batches)
        without_order = [shuffled(part, self.data.manifest.special) for part in self.heldout]
        control = self._evaluated(model, ranks, self._marked(without_order))
        figures |= {f"shuffled_{end}": control[f"eval_{end}"] for end in ("mask_gain", "mask_gain_se")}
        self.job.say(context_in_words(figures))
        return {**figures, **self.baselines}
