"""Sentence pairs of a shard, all documents in lockstep: which token ranges make ``[CLS] A [SEP] B [SEP]``.

The procedure is BERT's (Devlin et al. 2019, appendix A.2, as in NVIDIA's ``create_pretraining_data``). Documents,
sentences and both parts of a sample are contiguous in one flat token array, also after truncation, so a sample
is four numbers and no token is touched before ``assemble``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SPECIAL_TOKENS = 3  # [CLS], [SEP], [SEP]


@dataclass(frozen=True)
class Pairs:
    """Token ranges of N samples: A is ``tokens[a_start : a_start + a_length]``, B likewise; arrays ``[N]``."""

    a_start: Ints
    a_length: Ints
    b_start: Ints
    b_length: Ints
    is_random_next: NDArray[np.bool_]
    document: Ints
    """of part A"""


class Draws:
    """Random numbers of one (seed, …) key, from Philox's raw bits: the same on every machine and NumPy."""

    def __init__(self, *key: int) -> None:
        self._philox = np.random.Philox(np.random.SeedSequence(key))

    def raw(self, *shape: int) -> NDArray[np.uint64]:
        """Uniform 64-bit integers."""
        return np.asarray(self._philox.random_raw(shape), np.uint64)


def below(raw: NDArray[np.uint64], bound: Ints) -> Ints:
    """Uniform integers ``0 <= x < bound`` (bounds under 2**32)."""
    return ((raw >> np.uint64(32)) * bound.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def chance(raw: NDArray[np.uint64], probability: float) -> NDArray[np.bool_]:
    """True with this probability."""
    return (raw >> np.uint64(11)) * 2.0**-53 < probability


def draw_pairs(
    sentence_offsets: Ints, document_offsets: Ints, limit: int, short_seq_prob: float, draws: Draws
) -> Pairs:
    """One pass over all documents; every sentence goes into at least one sample.

    ``sentence_offsets`` ``[n + 1]``: where each sentence begins in the token array (none is empty);
    ``document_offsets`` ``[D + 1]``: first sentence of each document (none is empty); ``limit``: tokens of A and B
    together, 2 at least. Samples come in the order of the documents and, inside one, of the text.

    A document aims at ``limit`` tokens or, with ``short_seq_prob``, at uniform 2..limit. Whole sentences are
    taken until that is reached; a uniform cut gives A; B is the rest or, with probability 1/2 (always after a
    single sentence), text from a random sentence of another document on, and the unused rest is put back.
    """
    count = len(document_offsets) - 1
    raw = draws.raw(2, count)
    targets = np.where(chance(raw[0], short_seq_prob), 2 + below(raw[1], np.full(count, limit - 1)), np.int64(limit))
    active = np.arange(count)
    at = document_offsets[:-1].copy()
    steps: list[tuple[NDArray[np.int64], ...]] = []
    while len(active):
        target, end = targets[active], document_offsets[active + 1]
        stop = np.searchsorted(sentence_offsets, sentence_offsets[at] + target)
        stop = np.minimum(stop, end)
        sentences = stop - at
        raw = draws.raw(4, len(active))
        cut = at + np.where(sentences > 1, 1 + below(raw[0], np.maximum(sentences - 1, 1)), 1)
        random_next = (sentences == 1) | chance(raw[1], 0.5)
        # B of a random next: whole sentences of another document
        other = below(raw[2], np.full(len(active), max(1, count - 1)))
        other += (other >= active) & (count > 1)
        first, last = document_offsets[other], document_offsets[other + 1]
        begin = first + below(raw[3], last - first)
        need = np.maximum(1, target - (sentence_offsets[cut] - sentence_offsets[at]))
        until = np.minimum(np.searchsorted(sentence_offsets, sentence_offsets[begin] + need), last)
        b_first = np.where(random_next, begin, cut)
        b_last = np.where(random_next, until, stop)
        steps.append((active, at, cut, b_first, b_last, random_next.astype(np.int64)))
        at = np.where(random_next, cut, stop)
        unfinished = at < end
        active, at = active[unfinished], at[unfinished]
    columns = (np.concatenate(column) for column in zip(*steps, strict=True))
    document, a_first, a_last, b_first, b_last, random_next = columns
    order = np.argsort(document, kind="stable")
    a_start, b_start = sentence_offsets[a_first[order]], sentence_offsets[b_first[order]]
    return Pairs(
        a_start,
        sentence_offsets[a_last[order]] - a_start,
        b_start,
        sentence_offsets[b_last[order]] - b_start,
        random_next[order].astype(bool),
        document[order],
    )


def truncate(pairs: Pairs, limit: int, draws: Draws) -> Pairs:
    """Cut A and B to ``limit`` tokens together, token by token from the longer (B when equal).

    Each removed token comes from the front or the back with probability 1/2, so the number from the front is
    binomial. What is left in the end has a closed form: the shorter stays whole, or both get half, A the odd one.
    """
    a, b = pairs.a_length, pairs.b_length
    over = a + b > limit
    half = limit // 2
    a_kept = np.where(over, np.where(b <= half, limit - b, np.minimum(a, limit - half)), a)
    b_kept = np.where(over, limit - a_kept, b)
    return Pairs(
        pairs.a_start + _fair_coins(a - a_kept, draws),
        a_kept,
        pairs.b_start + _fair_coins(b - b_kept, draws),
        b_kept,
        pairs.is_random_next,
        pairs.document,
    )


def _fair_coins(tosses: Ints, draws: Draws) -> Ints:
    """Heads among ``tosses`` fair coins, for each element."""
    ends = np.cumsum(tosses)
    total = int(ends[-1]) if len(ends) else 0
    bits = np.unpackbits(draws.raw(total // 64 + 1).astype("<u8").view(np.uint8), count=total)
    heads = np.zeros(total + 1, np.int64)
    np.cumsum(bits, out=heads[1:])
    found: Ints = heads[ends] - heads[ends - tosses]
    return found


def assemble(
    tokens: NDArray[np.unsignedinteger], pairs: Pairs, cls_id: int, sep_id: int
) -> tuple[NDArray[np.unsignedinteger], Ints, Ints]:
    """``[CLS] A [SEP] B [SEP]`` of every pair, end to end.

    Returns the tokens ``[T]`` in the dtype of ``tokens``, ``offsets [N + 1]``, and where B begins inside each
    sample, ``[N]``.
    """
    count = len(pairs.a_start)
    source = np.concatenate([tokens, np.array([cls_id, sep_id], tokens.dtype)])
    cls_at, sep_at = np.full(count, len(tokens)), np.full(count, len(tokens) + 1)
    one = np.ones(count, np.int64)
    starts = np.stack([cls_at, pairs.a_start, sep_at, pairs.b_start, sep_at], axis=1).ravel()
    lengths = np.stack([one, pairs.a_length, one, pairs.b_length, one], axis=1).ravel()
    ends = np.cumsum(lengths)
    index = np.repeat(starts - (ends - lengths), lengths)
    index += np.arange(len(index))
    offsets = np.concatenate([np.zeros(1, np.int64), ends[4::5]])
    return source[index], offsets, pairs.a_length + 2
