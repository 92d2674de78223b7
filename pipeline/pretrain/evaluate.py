"""Held-out figures during pretraining, each beside what it would be without context.

A tenth of the predicted words stay visible and a tenth are replaced by any word, so that the total loss falls far
below the words' own entropy for a model that only copies what it sees. What was learnt shows where [MASK] stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from data_prep.masking import boundaries
from data_prep.splitmix import bits, derived, key
from pipeline.bert.heads import correct
from pipeline.bert.packing import Batch
from pipeline.config import Precision
from pipeline.engine.feed import on_device
from pipeline.engine.precision import autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch
from pipeline.pretrain.data import MaskedSamples, PretrainingData

UNIGRAM_TOKENS = 20_000_000  # training tokens counted for the unigram line
MASKED_SHARE = 0.15  # of held-out tokens, whatever share training masks: figures of different runs stay comparable
KINDS = ("mask", "kept", "random")  # what stands where a word is to be predicted


@dataclass(frozen=True)
class WordShares:
    """``log [V]``: logarithms of the training tokens' shares, one added to each count; and the id of [MASK].

    They are all that a model without context can know.
    """

    log: NDArray[np.float64]
    mask_id: int

    @classmethod
    def of(cls, train: PretrainingData) -> WordShares:
        """Counted over the first tokens of the training shards."""
        counts = np.ones(train.manifest.vocab_size, np.float64)
        left = UNIGRAM_TOKENS
        for shard in train.shards:
            part = shard.tokens[:left]
            counts += np.bincount(part, minlength=len(counts))
            left -= len(part)
            if left <= 0:
                break
        special = train.manifest.special
        counts[list(boundaries(special))] = 0  # never a target
        return cls(np.log(np.maximum(counts, 1.0) / counts.sum()), special["mask"])

    def loss(self, labels: NDArray[np.integer]) -> float:
        """Cross-entropy in nats of the original words ``labels`` under these shares, the unigram loss."""
        return float(-self.log[labels].mean())

    def context_free_losses(self, labels: NDArray[np.integer], seen: NDArray[np.integer]) -> NDArray[np.float64]:
        """The least expected loss ``[K]`` in nats of who knows the shares and the word ``seen``, but no context.

        Of V words, one of share u that is seen was kept with the chance k = V u / (V u + 1), for as many words are
        kept as are replaced by any of V; the original word is then that one, else it is drawn from the shares.
        """
        of_seen = np.exp(self.log[seen])
        kept = len(self.log) * of_seen / (len(self.log) * of_seen + 1)
        known = np.log(kept + (1 - kept) * of_seen)
        visible = np.where(seen == labels, known, np.log1p(-kept) + self.log[labels])
        losses: NDArray[np.float64] = -np.where(seen == self.mask_id, self.log[labels], visible)
        return losses


def heldout(data: PretrainingData, samples: int, micro_batch: int) -> list[MaskedSamples]:
    """The first ``samples`` held-out samples of a fixed order, masked once, in micro-batches."""
    count = min(samples, data.order.total)
    return [data.read(np.arange(start, min(start + micro_batch, count))) for start in range(0, count, micro_batch)]


def shuffled(masked: MaskedSamples, special: Mapping[str, int]) -> MaskedSamples:
    """The same words in random order: inside each sample, what is neither special nor to be predicted changes place."""
    row = np.repeat(np.arange(len(masked.lengths)), masked.lengths)
    movable = ~np.isin(masked.tokens, boundaries(special))
    movable[masked.positions] = False
    places = np.flatnonzero(movable)
    order = np.lexsort((bits(derived(key(0), masked.ids)[row[places]], places), row[places]))
    tokens = masked.tokens.copy()
    tokens[places] = masked.tokens[places[order]]
    return dataclasses.replace(masked, tokens=tokens)


def marked(micro_batch: MicroBatch, masked: MaskedSamples, mask_id: int) -> MicroBatch:
    """``micro_batch`` with what `evaluate` needs: of each predicted word its place in `KINDS` and its sample."""
    seen = masked.tokens[masked.positions]
    kind = np.select([seen == mask_id, seen == masked.labels], [0, 1], 2)
    sample = np.searchsorted(np.cumsum(masked.lengths), masked.positions, side="right")
    arrays = {"kind": kind.astype(np.int32), "sample": sample.astype(np.int32)}
    return dataclasses.replace(micro_batch, arrays={**micro_batch.arrays, **arrays})


def baselines(parts: Sequence[MaskedSamples], shares: WordShares) -> dict[str, float | None]:
    """What the figures of `evaluate` are without context, at the same positions: nats, and shares of 1.

    ``unigram_loss`` of all predicted words and of each of `KINDS`, ``unigram_mask_accuracy`` of always saying the most
    frequent word, ``context_free_loss`` of the best model that sees no context, ``nsp_majority`` of always saying
    the more frequent answer. None where no position is of a kind.
    """
    labels = np.concatenate([part.labels for part in parts])
    seen = np.concatenate([part.tokens[part.positions] for part in parts])
    nsp = np.concatenate([part.nsp for part in parts])
    hidden = seen == shares.mask_id
    of_kind = {"mask": hidden, "kept": ~hidden & (seen == labels), "random": ~hidden & (seen != labels)}
    losses = {kind: shares.loss(labels[which]) if which.any() else None for kind, which in of_kind.items()}
    common = labels[hidden] == shares.log.argmax()
    return {
        "unigram_loss": shares.loss(labels),
        **{f"unigram_{kind}_loss": loss for kind, loss in losses.items()},
        "unigram_mask_accuracy": float(common.mean()) if hidden.any() else None,
        "context_free_loss": float(shares.context_free_losses(labels, seen).mean()),
        "nsp_majority": float(max(nsp.mean(), 1 - nsp.mean())),
    }


def evaluate(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    shares: WordShares,
    precision: Precision,
    ranks: Ranks,
) -> dict[str, float | None]:
    """Figures of a model on ``micro_batches`` (see `marked`), shared among the ranks; every rank returns the same.

    ``eval_mlm_loss`` (nats a predicted word), ``eval_mlm_accuracy``, ``eval_nsp_accuracy``; loss and accuracy of each
    of `KINDS` (``eval_mask_loss`` …); and ``eval_mask_gain``, how far the loss lies below the unigram's where [MASK]
    stands. ``…_se`` of the total loss, of gain and accuracy at [MASK] and of NSP are standard errors, samples being
    independent and the words of a sample not. None where there is no such word.
    """
    kinds = len(KINDS)
    sums = torch.zeros(3 * kinds + 2 + 3 * 6, dtype=torch.float64, device=ranks.device)
    model.eval()
    with torch.inference_mode(), autocast_for(precision, ranks.device):
        for micro_batch in micro_batches[ranks.rank :: ranks.world_size]:
            ranks.alive("working")
            inputs = on_device(micro_batch, ranks.device)
            labels, nsp, kind = inputs["labels"], inputs["nsp"], inputs["kind"].long()
            mlm_logits, nsp_logits = model(Batch.of(inputs), inputs["masked"])
            losses = functional.cross_entropy(mlm_logits.float(), labels.long(), reduction="none").double()
            each = torch.ones_like(losses)
            right = correct(mlm_logits, labels).double()
            # Kind by kind [3, kinds]: how many words, their losses, how many are right.
            by_kind = torch.stack([each, losses, right]) @ functional.one_hot(kind, kinds).double()
            # Sample by sample: the loss; at [MASK] what is gained on the word counts and what is right; the places.
            of_counts = torch.from_numpy(-shares.log[micro_batch.arrays["labels"]]).to(ranks.device)
            hidden = each * (kind == 0)
            places = torch.stack([each, hidden, hidden])
            values = torch.stack([places, torch.stack([losses, of_counts - losses, right]) * places])
            words, value = values.new_zeros(2, 3, len(nsp)).index_add_(2, inputs["sample"].long(), values)
            products = torch.stack([words, value, value.square(), value * words, words.square(), words.sign()])
            # What standard errors need of each figure [6, 3] (see `ratio_and_error`), and the pairs' answers.
            pairs = torch.stack([correct(nsp_logits, nsp).double(), torch.ones(len(nsp), device=ranks.device)])
            sums += torch.cat([by_kind.flatten(), pairs.sum(1), products.sum(2).T.flatten()])
    model.train()
    # The same cuts of the sum over all ranks.
    flat = ranks.sum(sums).cpu().numpy()
    (counts, summed, hits), (nsp_hits, answers) = flat[: 3 * kinds].reshape(3, -1), flat[3 * kinds :][:2]
    (_, loss_error), (gain, gain_error), (_, accuracy_error) = (
        ratio_and_error(*figure) for figure in flat[3 * kinds + 2 :].reshape(3, 6)
    )
    nsp_accuracy = float(nsp_hits / answers)
    at = {
        f"eval_{kind}_{name}": float(value / count) if count else None
        for name, values in (("loss", summed), ("accuracy", hits))
        for kind, value, count in zip(KINDS, values, counts, strict=True)
    }
    return {
        "eval_mlm_loss": float(summed.sum() / counts.sum()),
        "eval_mlm_loss_se": loss_error,
        "eval_mlm_accuracy": float(hits.sum() / counts.sum()),
        "eval_nsp_accuracy": nsp_accuracy,
        "eval_nsp_accuracy_se": math.sqrt(nsp_accuracy * (1 - nsp_accuracy) / (answers - 1)) if answers > 1 else None,
        **at,
        "eval_mask_accuracy_se": accuracy_error,
        "eval_mask_gain": gain,
        "eval_mask_gain_se": gain_error,
    }


def ratio_and_error(
    words: float, value: float, value_squared: float, value_words: float, words_squared: float, samples: float
) -> tuple[float | None, float | None]:
    """Mean value of ``words`` and its standard error from sums over samples (ratio estimator, Cochran 1977, 6.4)."""
    if not words:
        return None, None
    mean = value / words
    if samples < 2:
        return float(mean), None
    squares = value_squared - 2 * mean * value_words + mean**2 * words_squared
    return float(mean), math.sqrt(max(0.0, squares) * samples / (samples - 1)) / float(words)
