"""The pretraining loop: both phases, any number of ranks. Called by the stages phase1 and phase2.

What a step computes depends on the step alone: its samples, their masks, the dropout and the divisors of the loss
are functions of (seed, step, micro-batch), never of the rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_prep.publish import publish_json
from pipeline.batch import BatchPlan
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.heads import BertForPreTraining, initialised, pretraining_loss_sums
from pipeline.bert.packing import pack
from pipeline.config import ModelConfig, OptimizerConfig, PhaseConfig, TrainConfig
from pipeline.distributed import Group, device_of, joined, peers_named
from pipeline.errors import EnvironmentFault, NumericalError, StoppedCleanly
from pipeline.job import Job
from pipeline.rundir import append_jsonl
from pipeline.train import checkpoint, optim
from pipeline.train.data import MaskedSamples, PretrainingData
from pipeline.train.evaluate import Evaluation, evaluate, heldout, unigram_loss
from pipeline.train.reduce import GradientBuffer, Reducer
from pipeline.train.schedule import learning_rate
from slurm.verdict import made_progress

Ints = NDArray[np.int64]


def run(
    job: Job,
    *,
    model: ModelConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    phase: PhaseConfig,
    samples: Path,
    start: Path | None = None,
) -> dict[str, Any]:
    """Pretrain one phase from ``samples``, from random weights or from the checkpoint folder ``start``.

    Returns the done mark's result: the final ``checkpoint`` (relative to the stage's folder), step, losses.
    Raises StoppedCleanly (75) after saving when asked to stop, NumericalError (5) on NaN or inf, PeerLost (76).
    """
    device = device_of(job)
    torch.set_num_threads(job.threads)
    with joined(job, device) as group:
        trainer = Trainer(job, group, device, model, train, optimizer, phase, samples)
        trainer.begin(start)
        with peers_named(job):
            return trainer.loop()


class Trainer:
    """State of one rank: model, optimizer, data, and the number of finished steps."""

    def __init__(
        self,
        job: Job,
        group: Group,
        device: torch.device,
        model: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        phase: PhaseConfig,
        samples: Path,
    ) -> None:
        self.job, self.group, self.device, self.train, self.phase = job, group, device, train, phase
        self.data = PretrainingData(samples, "train", phase, train)
        assert phase.micro_batch is not None  # submit chose it when the run was created
        self.plan = BatchPlan(phase.global_batch, phase.micro_batch, job.world_size)
        if job.world_size > self.plan.micro_batches:
            job.say(
                f"{job.world_size - self.plan.micro_batches} of {job.world_size} ranks have no micro-batch "
                f"and wait; --set {job.stage}.micro_batch={self.plan.global_batch // job.world_size} shares better"
            )
        vocab_size = padded_vocab(self.data.manifest.vocab_size)
        self.config = BertConfig(vocab_size=vocab_size, **dataclasses.asdict(model))
        self.model = BertForPreTraining(self.config).to(device)
        self.autocast = autocast_for(train.precision, device)
        self.gradients = GradientBuffer(list(self.model.parameters()))
        self.reducer = Reducer(self.gradients, self.plan, job.rank, group, train.reduction)
        options = dataclasses.asdict(optimizer)
        name, backend, variant = options.pop("name"), options.pop("backend"), options.pop("variant")
        if name == "lamb":
            options["variant"] = variant
        self.optimizer = optim.build(name, backend, self.model.named_parameters(), **options)
        self.step = 0
        test = PretrainingData(samples, "test", phase, dataclasses.replace(train, masking="static"))
        self.heldout = heldout(test, train.eval_samples, phase.micro_batch)
        self.unigram = unigram_loss(self.data, self.heldout)
        self.identity = {
            "stage": job.stage,
            "data": self.data.manifest.sha256,
            "vocab": self.data.manifest.vocab_sha256,
            "precision": train.precision,
            "threads": job.threads,
            "micro_batch": phase.micro_batch,
        }
        self.evaluation: Evaluation | None = None
        self.saved = ""  # the newest checkpoint, relative to the stage's folder
        self.saver = (
            checkpoint.Saver(job.attempt.path, keep=train.keep_checkpoints, warn=job.warn, saved=made_progress)
            if job.rank == 0
            else None
        )

    # ---------------------------------------------------------------- where training begins

    def begin(self, start: Path | None) -> None:
        """Continue from the newest verified checkpoint of this stage, else from ``start``, else from random weights."""
        stage_dir = self.job.run.stage(self.job.stage).path
        found = checkpoint.newest_verified(stage_dir, self.job.say) if self.job.rank == 0 else None
        chosen = torch.tensor([found.attempt, found.step] if found else [0, 0], device=self.device)
        if self.group is not None:
            with peers_named(self.job):
                dist.broadcast(chosen, 0, group=self.group)
        attempt, step = chosen.tolist()
        if attempt and found is None:
            found = checkpoint.read(stage_dir / "attempts" / f"{attempt:04d}" / f"step-{step:08d}")
        if self.job.rank == 0:
            resumed = {"attempt": attempt, "step": step} if attempt else None
            publish_json(self.job.attempt.path / "attempt.json", {"resumed_from": resumed})
        if found is not None:
            self._check_identity(found)
            self._load_weights(found)
            self.optimizer.load({key: torch.from_numpy(value) for key, value in found.optimizer.items()})
            self.step = found.step
            self.saved = f"attempts/{attempt:04d}/step-{step:08d}"
            self.job.say(f"continues at step {step} of {self.phase.steps} (saved by attempt {attempt})")
        elif start is not None:
            self._load_weights(checkpoint.read(start, tensors=("weights",)))
            self.job.say(f"starts from the weights of {start.parent.parent.parent.name}")
        else:
            initialised(self.model, torch.Generator().manual_seed(self.train.seed))
        self.job.say(
            f"{self.plan.global_batch} samples a step = {self.job.world_size} ranks x up to "
            f"{self.plan.accumulation} micro-batches of {self.plan.micro_batch}; {self.device.type}, "
            f"{self.train.precision}, unigram loss {self.unigram:.3f}"
        )

    def _check_identity(self, found: checkpoint.Checkpoint) -> None:
        changeable = ("threads", "micro_batch")  # same science, other bits
        for key in changeable:
            if found.identity.get(key) != self.identity[key]:
                self.job.say(
                    f"{key} was {found.identity.get(key)}, is {self.identity[key]} from step {found.step} on: "
                    f"results are no longer the same bit for bit"
                )
        checkpoint.check_identity(
            {key: value for key, value in found.identity.items() if key not in changeable},
            {key: value for key, value in self.identity.items() if key not in changeable},
        )

    def _load_weights(self, found: checkpoint.Checkpoint) -> None:
        checkpoint.check_identity({"model": found.model}, {"model": self.config.to_dict()})
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in found.weights.items()})

    # ---------------------------------------------------------------- the loop

    def loop(self) -> dict[str, Any]:
        """Train to the last step; returns the stage's result."""
        self.model.train()
        while self.step < self.phase.steps:
            began = time.perf_counter()
            positions = np.arange(self.step * self.phase.global_batch, (self.step + 1) * self.phase.global_batch)
            lengths = self.data.lengths(positions)

            # ------------------------------------------------------------ the step
            mlm_loss, nsp_loss, stop_asked = self.accumulate(positions, lengths)
            rate = learning_rate(
                self.phase.schedule,
                base=self.phase.learning_rate,
                warmup=self.phase.warmup,
                steps=self.phase.steps,
                step=self.step + 1,
            )
            norm = self.optimizer.step(rate, max_grad_norm=self.train.max_grad_norm)
            if not math.isfinite(norm + mlm_loss + nsp_loss):
                self.refuse_non_finite(positions, lengths)
            self.step += 1
            # ------------------------------------------------------------

            took = time.perf_counter() - began
            last = self.step == self.phase.steps
            if self.step % self.train.log_every == 0 or last:
                self.log(
                    loss=mlm_loss + nsp_loss,
                    mlm_loss=mlm_loss,
                    nsp_loss=nsp_loss,
                    learning_rate=rate,
                    grad_norm=norm,
                    sequences_per_s=len(positions) / took,
                    tokens_per_s=int(lengths.sum()) / took,
                    step_s=took,
                )
            if self.step % self.train.eval_every == 0 or last:
                self.evaluate(mlm_loss)
            if self.step % self.train.checkpoint_every == 0 or last or stop_asked:
                self.save(permanent=last)
            if stop_asked and not last:
                self.finish_saving()
                if self.group is not None:
                    dist.barrier(self.group)  # srun kills all when one leaves, and rank 0 may still be writing
                raise StoppedCleanly(
                    f"asked to stop ({self.job.stop.reason or 'by another rank'}); "
                    f"step {self.step} of {self.phase.steps} is saved"
                )
            if self.saver is not None:
                self.job.stop.after_step(time.perf_counter() - began, self.saver.stall_s + self.saver.write_s)
        self.finish_saving()
        final = self.evaluation or self.evaluate(math.nan)
        return {
            "checkpoint": self.saved,
            "step": self.step,
            "samples": self.step * self.phase.global_batch,
            "unigram_loss": self.unigram,
            **dataclasses.asdict(final),
        }

    def accumulate(self, positions: Ints, lengths: Ints) -> tuple[float, float, bool]:
        """Gradients of the global batch on every rank; returns its MLM and NSP loss and whether a rank must stop.

        With ``loss_mean = "global"`` the sums over masked tokens and over pairs are divided by the counts of the
        whole step, known from the index; ``"micro"`` averages the means of the micro-batches, as NVIDIA does.
        """
        masked_total = int(self.data.masked_counts(lengths).sum())
        self.reducer.begin()
        for index in self.plan.range_of(self.job.rank):
            members = self.plan.samples_of(index)
            found = self.data.read(positions[members.start : members.stop])
            if self.train.loss_mean == "global":
                mlm_divisor, nsp_divisor = masked_total, len(positions)
            else:
                mlm_divisor = len(found.labels) * self.plan.micro_batches
                nsp_divisor = len(found.nsp) * self.plan.micro_batches
            with self.reducer.micro_batch(index) as scalars:
                mlm_loss, nsp_loss = self.losses(found, index, mlm_divisor, nsp_divisor)
                torch.autograd.backward(mlm_loss + nsp_loss)
                scalars[:2] = torch.stack([mlm_loss.detach(), nsp_loss.detach()])
        mlm_total, nsp_total, stops = self.reducer.finish(extra=float(self.job.stop.reason is not None))
        return mlm_total, nsp_total, stops > 0

    def losses(self, found: MaskedSamples, index: int, mlm_divisor: int, nsp_divisor: int) -> tuple[Tensor, Tensor]:
        """Forward of one micro-batch, its dropout keyed by (seed, stage, step, micro-batch index)."""
        torch.manual_seed(dropout_seed(self.train.seed, self.job.stage, self.step, index))
        batch = pack(found.tokens, found.lengths, found.b_start, self.phase.seq_len).to(self.device)
        slots = batch.row_position(torch.from_numpy(found.positions).to(self.device))
        labels, nsp_labels = (torch.from_numpy(values).to(self.device) for values in (found.labels, found.nsp))
        with self.autocast:
            mlm_logits, nsp_logits = self.model(batch, slots)
        mlm_sum, nsp_sum, _, _ = pretraining_loss_sums(mlm_logits, labels, nsp_logits, nsp_labels)
        return mlm_sum / mlm_divisor, nsp_sum / nsp_divisor

    # ---------------------------------------------------------------- what happens beside the step

    def log(self, **figures: float) -> None:
        """One line of metrics.jsonl, and a line for people now and then."""
        if self.job.rank != 0:
            return
        line = {"stage": self.job.stage, "attempt": self.job.attempt.number, "step": self.step, "time": time.time()}
        append_jsonl(self.job.attempt.metrics, {**line, **figures})
        if "loss" in figures and (self.step % (10 * self.train.log_every) == 0 or self.step == self.phase.steps):
            self.job.say(
                f"step {self.step}/{self.phase.steps}  loss {figures['loss']:.4f}  "
                f"lr {figures['learning_rate']:.3g}  {figures['sequences_per_s']:.1f} sequences/s  "
                f"{figures['tokens_per_s']:.0f} tokens/s"
            )

    def evaluate(self, mlm_loss: float) -> Evaluation:
        """Held-out figures, logged beside the unigram loss."""
        self.evaluation = evaluate(
            self.model,
            self.heldout,
            rank=self.job.rank,
            world_size=self.job.world_size,
            group=self.group,
            autocast=self.autocast,
        )
        figures = dataclasses.asdict(self.evaluation)
        self.log(**figures, unigram_loss=self.unigram)
        self.job.say(
            f"step {self.step}  held-out MLM loss {self.evaluation.eval_mlm_loss:.4f} (unigram {self.unigram:.4f}, "
            f"training {mlm_loss:.4f}), MLM accuracy {self.evaluation.eval_mlm_accuracy:.3f}, "
            f"NSP accuracy {self.evaluation.eval_nsp_accuracy:.3f}"
        )
        return self.evaluation

    def save(self, *, permanent: bool) -> None:
        """Hand the state to the writer; rank 0 only. InUseError when a newer attempt has begun."""
        if self.saver is None:
            return
        folder = self.saver.save(
            stage=self.job.stage,
            attempt=self.job.attempt.number,
            step=self.step,
            sample_position=self.step * self.phase.global_batch,
            weights=as_arrays(self.model.state_dict()),
            optimizer=as_arrays(self.optimizer.state()),
            identity=self.identity,
            model=self.config.to_dict(),
            permanent=permanent,
        )
        self.saved = str(folder.relative_to(self.job.out))

    def finish_saving(self) -> None:
        """Wait for the writer; raises StorageError when the last state could not be saved."""
        if self.saver is not None:
            self.saver.close()

    def refuse_non_finite(self, positions: Ints, lengths: Ints) -> NoReturn:
        """Name what went wrong first: the step is computed again, micro-batch by micro-batch, on every rank.

        Raises NumericalError on all ranks; the first rank that finds a culprit of its own names it. Nothing of
        this step has been applied or saved.
        """
        masked_total = int(self.data.masked_counts(lengths).sum())
        for index in self.plan.range_of(self.job.rank):
            members = self.plan.samples_of(index)
            self.gradients.zero_()
            found = self.data.read(positions[members.start : members.stop])
            mlm_loss, nsp_loss = self.losses(found, index, masked_total, len(positions))
            torch.autograd.backward(mlm_loss + nsp_loss)
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                    ids = self.data.ids(positions[members.start : members.stop])
                    raise NumericalError(
                        f"step {self.step + 1}, rank {self.job.rank}, micro-batch {index}: loss "
                        f"{float(mlm_loss + nsp_loss):.4g}, gradient of {name} is not finite "
                        f"(samples {ids[0]}..{ids[-1]}); the last checkpoint is untouched; lower "
                        f"{self.job.stage}.learning_rate or look at these samples"
                    )
        time.sleep(1.0)  # let a rank that has a culprit write its verdict first
        raise NumericalError(
            f"step {self.step + 1}, rank {self.job.rank}: the sum over ranks is not finite although every "
            f"micro-batch of this rank is; the last checkpoint is untouched"
        )


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as NumPy arrays, sharing memory on the CPU."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def dropout_seed(seed: int, stage: str, step: int, micro_batch: int) -> int:
    """A 63-bit seed for one micro-batch's dropout."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def autocast_for(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision; EnvironmentFault where the device cannot do it."""
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise EnvironmentFault(f"train.precision = {precision} needs a CUDA device; use fp32 or bf16 on a CPU")
    if precision == "fp16":
        raise EnvironmentFault("train.precision = fp16 needs loss scaling, which this version does not do; use bf16")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
