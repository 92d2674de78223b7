"""The pretraining loop: both phases, any number of ranks. Called by the stages phase1 and phase2.

What a step computes depends on the step alone: its samples, their masks, the dropout and the divisors of the loss
are functions of (seed, step, micro-batch), never of the rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import BatchPlan
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.dropout import keyed
from pipeline.bert.heads import BertForPreTraining, pretraining_loss_sums
from pipeline.bert.packing import pack
from pipeline.config import ModelConfig, OptimizerConfig, PhaseConfig, TrainConfig, science
from pipeline.engine import checkpoint, optim
from pipeline.engine.diagnose import culprit
from pipeline.engine.metrics import Clock, write_line
from pipeline.engine.peers import Peers
from pipeline.engine.precision import LossScale, autocast_for
from pipeline.engine.reduce import GradientBuffer, Reducer
from pipeline.engine.schedule import learning_rate
from pipeline.engine.state import TrainingState, begin
from pipeline.engine.storage import preflight
from pipeline.engine.tensorboard import Board
from pipeline.errors import NumericalError, StoppedCleanly, StorageError
from pipeline.node.distributed import Group, device_of, joined, peers_named
from pipeline.node.job import Job
from pipeline.pretrain.data import MaskedSamples, PretrainingData
from pipeline.pretrain.evaluate import Evaluation, evaluate, heldout, unigram_loss
from slurm.verdict import made_progress

Ints = NDArray[np.int64]
MLM, NSP, SAMPLES = range(3)  # what a micro-batch tells the other ranks


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
    """Pretrain one phase from ``samples``, from random weights or from those at ``start`` (see `state.begin`).

    Returns the done mark's result: the final ``checkpoint`` (relative to the stage's folder), step, losses.
    Raises StoppedCleanly (75) after saving when asked to stop, NumericalError (5) on NaN or inf that comes again,
    PeerLost (76), NodeFault (77).
    """
    device = device_of(job)
    torch.set_num_threads(job.threads)
    with joined(job, device) as group, peers_named(job):
        return Trainer(job, group, device, model, train, optimizer, phase, samples, vocab, start).loop()


class Trainer:
    """One rank: its data, its training state, and the loop over steps."""

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
        vocab: Path,
        start: Path | None,
    ) -> None:
        self.job, self.group, self.device, self.train, self.phase = job, group, device, train, phase
        self.vocab, self.start = vocab, start
        self.data = PretrainingData(samples, "train", phase, train)
        assert phase.micro_batch is not None  # submit chose it when the run was created
        self.plan = BatchPlan(phase.global_batch, phase.micro_batch, job.world_size)
        if job.world_size > self.plan.micro_batches:
            job.say(
                f"{job.world_size - self.plan.micro_batches} of {job.world_size} ranks have no micro-batch "
                f"and wait; --set {job.stage}.micro_batch={self.plan.global_batch // job.world_size} shares better"
            )
        science_of = {"model": model, "train": train, "optimizer": optimizer, "phase": phase}
        config = {name: science(part) for name, part in science_of.items()}
        shares = [len(self.plan.range_of(rank)) for rank in range(job.world_size)]
        self.peers = Peers(job, group, device, config, shares)

        vocab_size = padded_vocab(self.data.manifest.vocab_size)
        bert = BertForPreTraining(BertConfig(vocab_size=vocab_size, **dataclasses.asdict(model))).to(device)
        self.autocast = autocast_for(train.precision, device)
        self.gradients = GradientBuffer(list(bert.parameters()))
        self.reducer = Reducer(self.gradients, self.plan, job.rank, group, train.reduction, scalars=3)
        options = dataclasses.asdict(optimizer)
        name, backend, variant = options.pop("name"), options.pop("backend"), options.pop("variant")
        if name == "lamb":
            options["variant"] = variant
        identity = {
            "stage": job.stage,
            "data": self.data.manifest.sha256,
            "vocab": self.data.manifest.vocab_sha256,
            "micro_batch": phase.micro_batch,
            **config,
            **{key: self.peers.own[key] for key in ("threads", "code", "torch", "cpu")},
        }
        self.state = TrainingState(
            bert,
            optim.build(name, backend, bert.named_parameters(), **options),
            LossScale() if train.precision == "fp16" else None,
            identity,
        )
        test = PretrainingData(samples, "test", phase, dataclasses.replace(train, masking="static"))
        self.heldout = heldout(test, train.eval_samples, phase.micro_batch)
        self.unigram = unigram_loss(self.data, self.heldout)
        self.evaluation: Evaluation | None = None
        self.rolled_back = False
        self.board: Board | None = None
        self.saver = (
            checkpoint.Saver(job.attempt.path, keep=train.keep_checkpoints, warn=job.warn, saved=made_progress)
            if job.rank == 0
            else None
        )

    # ---------------------------------------------------------------- the loop

    def loop(self) -> dict[str, Any]:
        """Train to the last step; returns the stage's result."""
        self.begin()
        self.job.say(
            f"{self.plan.global_batch} samples a step = {self.job.world_size} ranks x up to "
            f"{self.plan.accumulation} micro-batches of {self.plan.micro_batch}; {self.device.type}, "
            f"{self.train.precision}, unigram loss {self.unigram:.3f}"
        )
        state, phase, train = self.state, self.phase, self.train
        state.model.train()
        self.clock = Clock()
        while state.step < phase.steps:
            began = time.perf_counter()
            positions = np.arange(state.batches * phase.global_batch, (state.batches + 1) * phase.global_batch)
            lengths = self.data.lengths(positions)

            # ------------------------------------------------------------ the step
            mlm_loss, nsp_loss, stop_asked = self.accumulate(positions, lengths)
            rate = learning_rate(
                phase.schedule,
                base=phase.learning_rate,
                warmup=phase.warmup,
                steps=phase.steps,
                step=state.step + 1,
            )
            with self.clock.spent("compute"):
                norm = state.optimizer.step(rate, max_grad_norm=train.max_grad_norm)
            if not math.isfinite(norm + mlm_loss + nsp_loss):
                self.overcome(positions, lengths)
                continue
            state.step += 1
            if state.scale is not None:
                state.scale.good()
            # ------------------------------------------------------------

            took = time.perf_counter() - began
            last = state.step == phase.steps
            if state.step % train.log_every == 0 or last:
                self.log(
                    loss=mlm_loss + nsp_loss,
                    mlm_loss=mlm_loss,
                    nsp_loss=nsp_loss,
                    learning_rate=rate,
                    grad_norm=norm,
                    samples=self.samples_read(),
                    sequences_per_s=len(positions) / took,
                    tokens_per_s=int(lengths.sum()) / took,
                    step_s=took,
                )
            if state.step % train.eval_every == 0 or last:
                self.evaluate(mlm_loss)
            if state.step % train.checkpoint_every == 0 or last or stop_asked:
                self.save(permanent=last)
            if stop_asked and not last:
                self.finish_saving()
                if self.group is not None:
                    self.job.heartbeat.beat("waiting", state.step)
                    dist.barrier(self.group)  # srun kills all when one leaves, and rank 0 may still be writing
                write_line(self.job, self.clock, state.step)  # where the time of the last save went
                raise StoppedCleanly(
                    f"asked to stop ({self.job.stop.reason or 'by another rank'}); "
                    f"step {state.step} of {phase.steps} is saved"
                )
            if self.saver is not None:
                self.job.stop.after_step(time.perf_counter() - began, self.saver.stall_s + self.saver.write_s)
        self.finish_saving()
        if self.group is not None:
            self.job.heartbeat.beat("waiting", state.step)
            dist.barrier(self.group)  # should rank 0 die while it saves, the others notice here
        final = self.evaluation or self.evaluate(math.nan)
        write_line(self.job, self.clock, state.step)  # where the time after the last step went
        if self.board is not None:
            self.board.close()
        return {
            "checkpoint": state.saved,
            "step": state.step,
            "samples": state.step * phase.global_batch,
            "unigram_loss": self.unigram,
            **dataclasses.asdict(final),
        }

    def begin(self, *, again: bool = False) -> None:
        """Bring the state to where training begins or goes on."""
        begin(
            self.state,
            self.job,
            self.group,
            self.device,
            global_batch=self.phase.global_batch,
            seed=self.train.seed,
            vocab=self.vocab,
            start=self.start,
            again=again,
        )
        if self.job.rank == 0:
            if self.board is not None:
                self.board.close()
            checkpoint_bytes = 3 * sum(p.nbytes for p in self.state.model.parameters())  # weights and two moments
            self.job.say(preflight(self.job.out, checkpoint_bytes, self.train.keep_checkpoints))
            if self.saver is not None and self.device.type == "cpu" and not again:
                self.saver.prepare(**self.state.arrays())
            self.board = Board(self.job.out, after_step=self.state.step, warn=self.job.warn)

    def accumulate(self, positions: Ints, lengths: Ints) -> tuple[float, float, bool]:
        """Gradients of the global batch on every rank; returns its MLM and NSP loss and whether a rank must stop.

        With ``loss_mean = "global"`` the sums over masked tokens and over pairs are divided by the counts of the
        whole step, known from the index; ``"micro"`` averages the means of the micro-batches, as NVIDIA does.
        """
        beat, clock, scale = self.job.heartbeat.beat, self.clock, self.state.scale
        computed_before = clock.so_far("compute")
        self.reducer.begin()
        for index in self.plan.range_of(self.job.rank):
            beat("working", self.state.step)
            with clock.spent("data"):
                found = self.read(positions, index)
            with clock.spent("compute"), self.reducer.micro_batch(index) as scalars:
                mlm_loss, nsp_loss = self.losses(found, index, lengths)
                loss = mlm_loss + nsp_loss
                torch.autograd.backward(loss if scale is None else loss * scale.scale)
                scalars[MLM], scalars[NSP], scalars[SAMPLES] = mlm_loss.detach(), nsp_loss.detach(), found.digest48()
        with clock.spent("compute"):
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # what is left is waiting for others
        seconds = [0.0] * self.job.world_size
        seconds[self.job.rank] = clock.so_far("compute") - computed_before
        beat("waiting", self.state.step)
        with clock.spent("communication"):
            self.scalars, extra = self.reducer.finish([float(self.job.stop.reason is not None), *seconds])
        beat("working", self.state.step)
        if scale is not None:
            self.gradients.flat.mul_(1 / scale.scale)
        self.peers.put_slow_on_record(extra[1:], self.state.step + 1)
        mlm_total, nsp_total, _ = self.scalars.sum(0).tolist()
        return mlm_total, nsp_total, extra[0] > 0

    def read(self, positions: Ints, index: int) -> MaskedSamples:
        """The samples of one micro-batch of the step."""
        members = self.plan.samples_of(index)
        return self.data.read(positions[members.start : members.stop])

    def losses(self, found: MaskedSamples, index: int, lengths: Ints) -> tuple[Tensor, Tensor]:
        """MLM and NSP loss of one micro-batch, its dropout keyed by (seed, stage, batch, micro-batch index).

        ``lengths`` are those of all samples of the step, from which the divisors follow.
        """
        keyed(self.train.seed, self.job.stage, self.state.batches, index)
        batch = pack(found.tokens, found.lengths, found.b_start, self.phase.seq_len).to(self.device)
        slots = batch.row_position(torch.from_numpy(found.positions).to(self.device))
        labels, nsp_labels = (torch.from_numpy(values).to(self.device) for values in (found.labels, found.nsp))
        with self.autocast:
            mlm_logits, nsp_logits = self.state.model(batch, slots)
        mlm_sum, nsp_sum, _, _ = pretraining_loss_sums(mlm_logits, labels, nsp_logits, nsp_labels)
        if self.train.loss_mean == "global":
            return mlm_sum / int(self.data.masked_counts(lengths).sum()), nsp_sum / len(lengths)
        parts = self.plan.micro_batches
        return mlm_sum / (len(found.labels) * parts), nsp_sum / (len(found.nsp) * parts)

    def overcome(self, positions: Ints, lengths: Ints) -> None:
        """A step with a loss or gradient that is not finite, of which nothing was applied.

        In fp16 the batch is skipped and the loss scale halved. Else, and at the lowest loss scale, the state goes
        back to the last checkpoint, once; when it comes again, NumericalError names rank, parameter and samples.
        """
        state = self.state
        if state.scale is not None and state.scale.lowered():
            state.skipped += 1
            return
        mine = ((index, self.read(positions, index)) for index in self.plan.range_of(self.job.rank))
        found = culprit(
            mine,
            lambda samples, index: torch.stack(self.losses(samples, index, lengths)).sum(),
            state.model.named_parameters(),
            self.gradients,
        )
        line = f"step {state.step + 1}, rank {self.job.rank}, {found or 'not finite in the sum over ranks only'}"
        if state.scale is not None:
            line += f", at the lowest loss scale ({state.scale.scale:g}): the loss itself is beyond fp16"
        if self.rolled_back:
            if found is None:
                time.sleep(1.0)  # let a rank that has a culprit write its verdict first
            raise NumericalError(
                f"{line}; it came again after going back to the last checkpoint, which is untouched; lower "
                f"{self.job.stage}.learning_rate or look at these samples"
            )
        self.rolled_back = True
        if found is not None or self.job.rank == 0:
            self.job.warn(f"{line}; going back to the last checkpoint, once")
        if self.saver is not None:
            with contextlib.suppress(StorageError):  # then an older checkpoint serves
                self.saver.wait()
        from_step = state.step + 1
        self.begin(again=True)
        if self.job.rank == 0:
            self.job.run.event(
                "rolled_back",
                stage=self.job.stage,
                attempt=self.job.attempt.number,
                step=from_step,
                to_step=state.step,
                line=line,
            )

    # ---------------------------------------------------------------- what happens beside the step

    def log(self, **figures: Any) -> None:
        """One line of metrics.jsonl, and a line for people now and then."""
        step, steps = self.state.step, self.phase.steps
        if self.state.scale is not None:
            figures |= {"loss_scale": self.state.scale.scale, "skipped": self.state.skipped}
        line = write_line(self.job, self.clock, step, **figures)
        if self.board is not None:
            self.board.add(step, line, line["time"])
        if "loss" in figures and (step % (10 * self.train.log_every) == 0 or step == steps):
            self.job.say(
                f"step {step}/{steps}  loss {figures['loss']:.4f}  lr {figures['learning_rate']:.3g}  "
                f"{figures['sequences_per_s']:.1f} sequences/s  {figures['tokens_per_s']:.0f} tokens/s"
            )

    def samples_read(self) -> str:
        """Digest of the ids of all samples that the ranks read for this step, in order."""
        return hashlib.blake2b(self.scalars[:, SAMPLES].numpy().tobytes(), digest_size=8).hexdigest()

    def evaluate(self, mlm_loss: float) -> Evaluation:
        """Held-out figures, logged beside the unigram loss."""
        with self.clock.spent("evaluation"):
            self.evaluation = evaluate(
                self.state.model,
                self.heldout,
                rank=self.job.rank,
                world_size=self.job.world_size,
                group=self.group,
                autocast=self.autocast,
                alive=lambda where: self.job.heartbeat.beat(where, self.state.step),
            )
        figures = dataclasses.asdict(self.evaluation)
        self.log(**figures, unigram_loss=self.unigram)
        self.job.say(
            f"step {self.state.step}  held-out MLM loss {self.evaluation.eval_mlm_loss:.4f} (unigram "
            f"{self.unigram:.4f}, training {mlm_loss:.4f}), MLM accuracy {self.evaluation.eval_mlm_accuracy:.3f}, "
            f"NSP accuracy {self.evaluation.eval_nsp_accuracy:.3f}"
        )
        return self.evaluation

    def save(self, *, permanent: bool) -> None:
        """Compare the ranks' states, then hand the state to rank 0's writer.

        Raises NodeFault or PeerLost when they differ, InUseError when a newer attempt has begun.
        """
        state = self.state
        self.job.heartbeat.beat("waiting", state.step)  # for the others and for the file system
        with self.clock.spent("checkpoint"):
            self.peers.compare(state.tensors(), state.step)
            if self.saver is None:
                return
            folder = self.saver.save(
                stage=self.job.stage,
                attempt=self.job.attempt.number,
                step=state.step,
                sample_position=state.batches * self.phase.global_batch,
                identity=state.identity,
                model=state.model.config.to_dict(),
                permanent=permanent,
                **state.arrays(),
            )
            state.saved = str(folder.relative_to(self.job.out))

    def finish_saving(self) -> None:
        """Wait for the writer; raises StorageError when the last state could not be saved."""
        if self.saver is not None:
            self.job.heartbeat.beat("waiting", self.state.step)
            with self.clock.spent("checkpoint"):
                self.saver.close()
