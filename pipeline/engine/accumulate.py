"""The gradients of one batch, summed over its micro-batches and over the ranks, and what the ranks tell each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import BatchPlan
from pipeline.bert.dropout import keyed
from pipeline.engine.cast import CastWeights
from pipeline.engine.feed import Fed, Feed, on_device
from pipeline.engine.metrics import Clock
from pipeline.engine.ranks import Ranks
from pipeline.engine.reduce import Reducer
from pipeline.engine.state import TrainingState
from pipeline.engine.task import Task

ASKED = ("stop", "save")  # what any rank may ask of all, agreed with each batch


@dataclass(frozen=True)
class Sums:
    """What a batch came to: the same on every rank.

    ``losses`` are means by name, ``shares [micro_batches, losses]`` what each micro-batch adds to them; ``counts`` are
    those of the whole batch by name; ``samples`` is a digest of the ids of all its samples in order; ``asked`` says
    what some rank asked for; ``seconds [ranks]`` of computing.
    """

    plan: BatchPlan
    losses: dict[str, float]
    shares: NDArray[np.float64]
    counts: dict[str, int]
    samples: str
    asked: dict[str, bool]
    seconds: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """What is minimised."""
        return sum(self.losses.values())


class Accumulator:
    """Leaves the gradient of a batch in the parameters' ``grad``, on every rank the same."""

    def __init__(
        self,
        stage: str,
        task: Task,
        ranks: Ranks,
        state: TrainingState,
        reducer: Reducer,
        autocast: torch.autocast,
        clock: Clock,
    ) -> None:
        self.stage, self.task, self.ranks, self.state = stage, task, ranks, state
        self.reducer, self.gradients, self.autocast, self.clock = reducer, reducer.gradients, autocast, clock
        self.cast = CastWeights(state.model, reducer.gradients, autocast)
        # Backward keeps to the types of the forward.
        self.plain = torch.autocast(ranks.device.type, enabled=False)
        self.counts = np.zeros(0)  # of the batch that comes next, over all ranks

    def begin(self, batch: int) -> None:
        """Count the batch that training begins with; the counts of every later one travel with the batch before."""
        settings = self.task.settings
        plan = BatchPlan(self.task.size(batch), settings.micro_batch, self.ranks.world_size)
        own = torch.tensor(self.task.counts(batch, plan.range_of(self.ranks.rank)), dtype=torch.float64)
        self.counts = self.ranks.sum(own.to(self.ranks.device)).cpu().numpy()

    def accumulate(self, feed: Feed, asks: Callable[[str], bool]) -> Sums:
        """The next batch of ``feed``. ``asks`` says whether this rank asks for one of `ASKED`."""
        ranks, clock = self.ranks, self.clock
        computed_before = clock.so_far("compute")
        with clock.spent("data"):
            batch = feed.batch()
        plan, counts = batch.plan, self.counts
        self.reducer.begin(plan)
        digests, counted = np.zeros(plan.micro_batches), counts.tolist()
        scale = 1.0 if self.state.scale is None else self.state.scale.scale
        of_batch = self.divisors(counted)
        gradient_of_batch = scale / of_batch  # of its sums of losses
        # Around all micro-batches: the weights are cast once.
        with self.autocast, self.cast:
            for index in plan.range_of(ranks.rank):
                ranks.alive("working")
                with clock.spent("data"):
                    fed = feed.micro_batch()
                with clock.spent("compute"), self.reducer.micro_batch(index) as scalars:
                    sums = torch.stack(list(self.sums(batch.number, fed)))
                    divisors = self.divisors_of(fed, plan, of_batch)
                    gradient = gradient_of_batch if divisors is of_batch else scale / divisors
                    self.backward(sums, gradient)
                    torch.div(sums.detach(), divisors, out=scalars)
                digests[index] = fed.digest
        with clock.spent("compute"):
            if ranks.device.type == "cuda":
                torch.cuda.current_stream(ranks.device).synchronize()  # what is left is waiting for others
        seconds = np.zeros(ranks.world_size)
        seconds[ranks.rank] = clock.so_far("compute") - computed_before
        sent = {"asked": np.array([float(asks(what)) for what in ASKED]), "counts": np.array(batch.next_counts, float)}
        ranks.alive("waiting")
        with clock.spent("communication"):
            losses, together = self.reducer.finish(np.concatenate([*sent.values(), seconds, digests]))
        ranks.alive("working")
        if self.state.scale is not None:
            self.gradients.flat.mul_(1 / scale)
        ends = np.cumsum([len(part) for part in (*sent.values(), seconds)])
        asked, self.counts, seconds, digests = np.split(together, ends)
        return Sums(
            plan=plan,
            losses=dict(zip(self.task.losses_named, losses.sum(0).tolist(), strict=True)),
            shares=losses.numpy(),
            counts=dict(zip(self.task.counts_named, counts.astype(int).tolist(), strict=True)),
            samples=hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest(),
            asked=dict(zip(ASKED, (asked > 0).tolist(), strict=True)),
            seconds=seconds,
        )

    def sums(self, batch: int, fed: Fed) -> Sequence[Tensor]:
        """A micro-batch's losses as sums; its dropout is keyed by (seed, stage, batch, micro-batch)."""
        keyed(self.task.settings.seed, self.stage, batch, fed.index)
        return self.task.losses(self.state.model, fed.inputs)

    def backward(self, sums: Tensor, gradient: Tensor) -> None:
        """Add to the gradients what a micro-batch's sums of losses ask for, times ``gradient [losses]``."""
        with self.plain:
            torch.autograd.backward(sums, gradient)

    def divisors(self, counts: Sequence[float]) -> Tensor:
        """The counts that divide sums of losses, fp32 ``[losses]``."""
        named = zip(counts, self.task.losses_named, strict=False)  # counts beyond the losses divide nothing
        filled = [torch.full((), float(int(count)), device=self.ranks.device) for count, _ in named]
        return torch.stack(filled)  # on the device: a copy from the host would wait

    def divisors_of(self, fed: Fed, plan: BatchPlan, of_batch: Tensor) -> Tensor:
        """Those of one micro-batch.

        With ``loss_mean = "global"`` they are those of the whole batch, made once; ``"micro"`` averages the means of
        the micro-batches, as NVIDIA does.
        """
        if self.task.settings.loss_mean == "global":
            return of_batch
        return self.divisors([count * plan.micro_batches for count in fed.counts])

    def losses(self, batch: int, fed: Fed, plan: BatchPlan, counts: Sequence[float]) -> Tensor:
        """A micro-batch's share of each loss, ``[losses]``; ``counts`` are those of the whole batch."""
        return torch.stack(list(self.sums(batch, fed))) / self.divisors_of(fed, plan, self.divisors(counts))

    def culprit(self, sums: Sums) -> str | None:
        """One line on the first of this rank's micro-batches with a gradient that is not finite; None: all are.

        ``sums`` are those of the batch that comes next by the state's count, computed again micro-batch by micro-batch.
        """
        number, model = self.state.batches, self.state.model
        for index in sums.plan.range_of(self.ranks.rank):
            self.ranks.alive("working")
            micro_batch = self.task.read(number, index)
            fed = Fed(index, on_device(micro_batch, self.ranks.device), micro_batch.counts, digest=0)
            self.gradients.zero_()
            with self.autocast:
                loss = self.losses(number, fed, sums.plan, list(sums.counts.values())).sum()
            torch.autograd.backward(loss)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                    ids = ", ".join(map(str, micro_batch.ids[:8])) + (" ..." if len(micro_batch.ids) > 8 else "")
                    value = float(loss.detach())
                    return (
                        f"micro-batch {index}: loss {value:.4g}, the gradient of {name} is not finite (samples {ids})"
                    )
        return None
