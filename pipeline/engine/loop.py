"""THE training loop: one optimizer step after the other, whatever is trained, on any number of ranks.

What a step computes depends on the step alone: its samples, the dropout and the divisors of the loss are functions of
(seed, batch, micro-batch), never of the rank. Read `Loop.run` from top to bottom; everything else serves it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.batch import BatchPlan
from pipeline.bert.regions import compile_regions
from pipeline.config import science
from pipeline.engine import backend, checkpoint
from pipeline.engine.accumulate import Accumulator, Sums
from pipeline.engine.feed import Feed
from pipeline.engine.metrics import MOST_SHARES, Clock, rounded, write_line
from pipeline.engine.peers import Peers
from pipeline.engine.precision import LossScale, autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.reduce import GradientBuffer, Reducer
from pipeline.engine.schedule import learning_rate
from pipeline.engine.state import TrainingState, begin
from pipeline.engine.storage import preflight
from pipeline.engine.task import Task
from pipeline.engine.tensorboard import Board
from pipeline.errors import NumericalError, StoppedCleanly, StorageError
from pipeline.monitor.cpu import computes_bf16
from pipeline.node.device import device_of
from pipeline.node.distributed import joined, peers_named
from pipeline.node.job import Job
from slurm.verdict import made_progress

SAVE_EVERY_S = 300.0  # where the task names no interval in steps


def train(job: Job, task_of: Callable[[Ranks], Task]) -> dict[str, Any]:
    """Train a task to its last step, from its newest verified checkpoint on; every rank of the stage calls this.

    ``task_of`` makes the task once the ranks have met. Returns ``checkpoint`` (relative to the stage's folder),
    ``step``, ``samples`` and what the task's `finish` adds. Raises StoppedCleanly (75) after saving when asked to
    stop, NumericalError (5) on NaN or inf that comes again, PeerLost (76), NodeFault (77).
    """
    device = device_of(job)
    torch.set_num_threads(job.threads)
    with joined(job, device) as (group, store), peers_named(job):
        ranks = Ranks(job.rank, job.world_size, group, device, job.heartbeat, store)
        task = job.patiently(lambda: task_of(ranks))  # may be done again by one rank: it meets, and sums nothing
        with peers_named(job, task.settings.micro_batch):
            return Loop(job, ranks, task).run()


class Loop:
    """One rank: its state, its feed, and the loop over steps."""

    def __init__(self, job: Job, ranks: Ranks, task: Task) -> None:
        self.job, self.ranks, self.task = job, ranks, task
        self.settings = settings = task.settings
        identity = task.identity()
        model = job.patiently(task.model).to(ranks.device)
        self.peers = Peers(job, ranks, identity, type(task).__module__)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.gradients = GradientBuffer([parameter for _, parameter in trained])
        self.state = TrainingState(
            model,
            backend.of_config(settings.optimizer, trained, self.gradients),
            LossScale() if settings.precision == "fp16" else None,
            {
                "stage": job.stage,
                "micro_batch": settings.micro_batch,
                **identity,
                **{key: self.peers.own[key] for key in ("threads", "code", "torch", "cpu")},
                **({"compiled": True} if compile_regions(ranks.device) else {}),
            },
        )
        self.autocast = autocast_for(settings.precision, ranks.device)
        self.clock = Clock()
        reducer = Reducer(self.gradients, job.rank, ranks.group, settings.reduction, scalars=len(task.losses_named))
        self.accumulator = Accumulator(job.stage, task, ranks, self.state, reducer, self.autocast, self.clock)
        self.saver: checkpoint.Saver | None = None
        if job.rank == 0:
            keep = settings.keep_checkpoints
            self.saver = checkpoint.Saver(job.attempt.path, keep=keep, warn=job.warn, saved=made_progress)
        self.board: Board | None = None
        self.rolled_back = False
        self.saved_at = time.monotonic()
        self.saved_step = -1  # of the newest checkpoint

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the stage's result."""
        state, settings, job = self.state, self.settings, self.job
        self.begin()
        self.introduce()
        job.heartbeat.beat("starting", state.step)
        try:
            if settings.evaluate_first and state.step == settings.first_step and self.evaluate():
                self.save(permanent=False)
            while state.step < settings.steps:
                began = time.perf_counter()
                job.heartbeat.beat("working", state.step)

                # ------------------------------------------------------------ the step
                sums = self.accumulator.accumulate(self.feed, self.asks)
                rate = learning_rate(
                    settings.schedule,
                    base=settings.learning_rate,
                    warmup=settings.warmup,
                    steps=settings.steps,
                    step=state.step + 1,
                )
                with self.clock.spent("compute"):
                    if self.saver is not None:
                        self.saver.before_update()
                    norm = state.optimizer.step(rate, max_grad_norm=settings.max_grad_norm)
                if not math.isfinite(norm + sums.loss):
                    self.overcome(sums)
                    continue
                state.advance(sums.plan.global_batch)
                # ------------------------------------------------------------

                took = time.perf_counter() - began
                last = state.step == settings.steps
                self.peers.put_slow_on_record(sums.seconds, sums.plan, state.step)

                # What is due after a step: a line (so that others can check it, for one after a checkpoint), held-out
                # figures, a checkpoint.
                if state.step % settings.log_every == 0 or last or state.step == self.saved_step + 1:
                    self.log_step(sums, rate, norm, took)
                is_due = last or any(sums.asked.values())
                if settings.eval_every is not None and (state.step % settings.eval_every == 0 or last):
                    is_due = self.evaluate() or is_due
                if is_due or (settings.checkpoint_every is not None and state.step % settings.checkpoint_every == 0):
                    self.save(permanent=last)

                # A stop is agreed by all ranks at the same step, and nothing is lost.
                if sums.asked["stop"] and not last:
                    self.stop()
                if self.saver is not None:
                    job.stop.after_step(time.perf_counter() - began, self.saver.stall_s + self.saver.write_s)
        except BaseException:
            self.close()
            raise

        # The end: the last state is on disk before the task makes its result of it.
        self.finish_saving()
        self.ranks.wait_for_all()  # should rank 0 die while it saves, the others notice here
        with self.clock.spent("evaluation"):
            best = self.go_to_the_best()
            result = self.task.finish(state.model, self.ranks)
        line = write_line(job, self.clock, state.step)  # where the time after the last step went
        if self.board is not None:
            self.board.add(state.step, {"scores": result.get("scores", {})}, line["time"])
        self.close()
        return {"checkpoint": state.saved, "step": state.step, "samples": state.samples, **best, **result}

    def close(self) -> None:
        self.feed.close()
        if self.board is not None:
            self.board.close()

    def asks(self, what: str) -> bool:
        """Whether this rank asks all of them to ``stop``, or to ``save`` although no number of steps says so."""
        if what == "stop":
            return self.job.stop.asked()
        by_clock = self.settings.checkpoint_every is None and self.job.rank == 0
        return by_clock and time.monotonic() - self.saved_at > SAVE_EVERY_S

    # ---------------------------------------------------------------- where it begins, and goes back to

    def begin(self, *, again: bool = False) -> None:
        """Bring the state to where training begins or goes on."""
        begin(self.state, self.job, self.ranks, self.task, again=again)
        self.saved_step = self.state.step if self.state.saved else -1
        self.accumulator.begin(self.state.batches)
        self.feed = Feed(self.task, self.job.rank, self.job.world_size, self.ranks.device, self.state.batches)
        self.state.model.train()
        if self.job.rank == 0:
            if self.board is not None:
                self.board.close()
            checkpoint_bytes = 3 * sum(p.nbytes for p in self.state.model.parameters())  # weights and two moments
            self.job.say(preflight(self.job.out, checkpoint_bytes, self.settings.keep_checkpoints))
            if self.saver is not None and not again:
                self.saver.prepare(**self.state.named())
            settings = dataclasses.asdict(self.settings)
            self.board = Board(self.job.out, after_step=self.state.step, settings=settings, warn=self.job.warn)

    def introduce(self) -> None:
        """Say how a batch is shared."""
        plan = BatchPlan(self.task.size(self.state.batches), self.settings.micro_batch, self.job.world_size)
        self.job.say(
            f"{plan.global_batch} samples a step = {plan.world_size} ranks x up to {plan.accumulation} micro-batches "
            f"of {plan.micro_batch}; {self.ranks.device.type}, {self.settings.precision}"
        )
        if (self.ranks.device.type, self.settings.precision) == ("cpu", "bf16") and not computes_bf16():
            self.job.say('this CPU imitates bf16, many times slower than fp32: choose fp32, or "auto" in a recipe')
        if plan.world_size > plan.micro_batches:
            self.job.say(
                f"{plan.world_size - plan.micro_batches} of {plan.world_size} ranks have no micro-batch "
                f"and wait; {self.job.option('micro_batch', plan.global_batch // plan.world_size)} shares better"
            )

    def overcome(self, sums: Sums) -> None:
        """A batch with a loss or gradient that is not finite, of which nothing was applied.

        In fp16 the loss scale was too high: it is lowered and the batch skipped. Else training goes back to the
        last checkpoint, once: what a flipped bit or a sick device did does not come again. What comes again raises
        NumericalError, which names rank, parameter and samples.
        """
        state = self.state
        if state.scale is not None and state.scale.lowered():
            state.skip(sums.plan.global_batch)
            return
        self.feed.close()  # the batch is read again
        suspect = self.accumulator.culprit(sums)
        line = f"step {state.step + 1}, rank {self.job.rank}, {suspect or 'not finite in the sum over ranks only'}"
        if state.scale is not None:
            line += f", at the lowest loss scale ({state.scale.scale:g}): the loss itself is beyond fp16"
        if self.rolled_back:
            if suspect is None:
                time.sleep(1.0)  # let a rank that has a culprit write its verdict first
            raise NumericalError(
                f"{line}; it came again after going back to the last checkpoint, which is untouched; lower the "
                "learning rate or look at these samples"
            )
        self.rolled_back = True
        if suspect is not None or self.job.rank == 0:
            self.job.warn(f"{line}; going back to the last checkpoint, once")
        if self.saver is not None:
            with contextlib.suppress(StorageError):  # then an older checkpoint serves
                self.saver.wait()
        facts = {"stage": self.job.stage, "attempt": self.job.attempt.number, "step": state.step + 1}
        self.begin(again=True)
        if self.job.rank == 0:
            self.job.run.event("rolled_back", **facts, to_step=state.step, line=line)

    # ---------------------------------------------------------------- what happens beside the step

    def log(self, **figures: Any) -> None:
        """One line of metrics.jsonl, and of TensorBoard's files."""
        line = write_line(self.job, self.clock, self.state.step, **figures)
        if self.board is not None:
            self.board.add(self.state.step, line, line["time"])

    def log_step(self, sums: Sums, rate: float, norm: float, took: float) -> None:
        """The figures of a step, and a line for people now and then."""
        step, steps, scale = self.state.step, self.settings.steps, self.state.scale
        scaled = {} if scale is None else {"loss_scale": scale.scale, "skipped": self.state.skipped}
        checkable = step == self.saved_step + 1 and sums.plan.micro_batches <= MOST_SHARES
        tokens = sums.counts[self.task.counts_named[-1]]
        self.log(
            loss=sums.loss,
            **{name: value for name, value in sums.losses.items() if name != "loss"},
            learning_rate=rate,
            grad_norm=norm,
            samples=sums.samples,
            sequences_per_s=sums.plan.global_batch / took,
            tokens_per_s=tokens / took,
            step_s=took,
            **scaled,
            **({"shares": [[rounded(share) for share in each] for each in sums.shares.tolist()]} if checkable else {}),
        )
        if step % self.settings.say_every == 0 or step == steps:
            self.job.say(
                f"step {step}/{steps}  loss {sums.loss:.4f}  lr {rate:.3g}  "
                f"{sums.plan.global_batch / took:.1f} sequences/s  {tokens / took:.0f} tokens/s",
                step / steps,
            )

    def evaluate(self) -> bool:
        """Held-out figures, on record and in words; whether they are the best so far, where that is asked."""
        with self.clock.spent("evaluation"):
            figures = self.task.evaluate(self.state.model, self.ranks)
        self.log(**figures)
        self.job.say(f"step {self.state.step}  {self.task.in_words(figures)}")
        value, best = figures.get(self.settings.best_by or ""), self.state.best
        if value is None or (best is not None and value >= best["value"]):
            return False
        self.state.best = {"attempt": self.job.attempt.number, "step": self.state.step, "value": value}
        return True

    def go_to_the_best(self) -> dict[str, Any]:
        """Take the weights of the best checkpoint; returns what the stage's result says of it.

        One that could not be saved, for the disk was full then, is no reason to lose the training: the last one stays.
        """
        state, best = self.state, self.state.best
        if best is None or best["step"] == state.step:
            return {"best": best} if best else {}
        folder = checkpoint.step_folder(self.job.out / "attempts" / f"{best['attempt']:04d}", best["step"])
        lost = torch.tensor(float(self.job.rank == 0 and not folder.is_dir()), device=self.ranks.device)
        if self.ranks.sum(lost).item():
            self.job.say(f"step {best['step']} was the best but could not be saved: the result is the last step")
            return {}
        if self.job.rank == 0:
            state.load_weights(checkpoint.read(folder, tensors=("weights",)))
        state.saved = str(folder.relative_to(self.job.out))
        state.share(self.ranks)
        self.job.say(f"the result is step {best['step']}, {self.settings.best_by} {best['value']:.4f}")
        self.task.evaluate(state.model, self.ranks)  # whose figures the end tells
        return {"best": best}

    def save(self, *, permanent: bool) -> None:
        """Compare the ranks' states, then hand the state to rank 0's writer.

        Raises NodeFault or PeerLost when they differ, InUseError when a newer attempt has begun.
        """
        state = self.state
        self.ranks.alive("waiting")  # for the others and for the file system
        self.saved_at, self.saved_step = time.monotonic(), state.step
        with self.clock.spent("checkpoint"):
            self.peers.compare(state.tensors(), state.step)
            if self.saver is None:
                return
            folder = self.saver.save(
                stage=self.job.stage,
                attempt=self.job.attempt.number,
                step=state.step,
                sample_position=state.samples,
                identity=science(state.identity),
                model=state.model.config.to_dict(),
                permanent=permanent,
                best=state.best,
                **state.named(),
            )
            state.saved = str(folder.relative_to(self.job.out))

    def stop(self) -> None:
        """Leave when the state is on disk; raises StoppedCleanly."""
        self.finish_saving()
        self.ranks.wait_for_all()  # srun kills all when one leaves, and rank 0 may still be writing
        write_line(self.job, self.clock, self.state.step)  # where the time of the last save went
        raise StoppedCleanly(
            f"asked to stop ({self.job.stop.reason or 'by another rank'}); "
            f"step {self.state.step} of {self.settings.steps} is saved",
            self.job.stop.cause,
        )

    def finish_saving(self) -> None:
        """Wait for the writer; raises StorageError when the last state could not be saved."""
        if self.saver is not None:
            self.ranks.alive("waiting")
            with self.clock.spent("checkpoint"):
                self.saver.wait()
