"""Samples of a shard, all documents in lockstep: which token ranges make ``[CLS] A [SEP] B [SEP]``, or a single one.

The procedure is BERT's (Devlin et al. 2019, appendix A.2, as in NVIDIA's ``create_pretraining_data``). Documents,
sentences and both parts of a sample are contiguous in one flat token array, also after truncation, so a sample
is four numbers and no token is touched before ``assemble``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.splitmix import Ints, Keys, below, bits, derived, mix, uniform

SPECIAL_TOKENS = 3  # [CLS], [SEP], [SEP]
BLOCK = 2048  # parts
AHEAD = 1 << 14  # draws that are made together, for some steps
PURPOSES = np.arange(4)[:, None]
"""the draws of one step of one document: where A ends, whether B is random, its document, its first sentence"""
HALF = np.uint64(1 << 63)
FIRST_COINS = np.packbits(np.tri(65, 64, -1, bool), axis=1).view("<u8").ravel()
"""the first n of 64 coins, from the highest bit of the lowest byte on"""
HEADS = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.uint8)
"""among 16 coins"""


@dataclass(frozen=True)
class Pairs:
    """Token ranges of N samples: A is ``tokens[a_start : a_start + a_length]``, B likewise; arrays ``[N]``."""

    a_start: Ints
    a_length: Ints
    b_start: Ints
    b_length: Ints
    is_random_next: NDArray[np.bool_]
    document: Ints  # of part A
    stream: Keys  # key of what is still to be drawn for the sample


def _targets(document_offsets: Ints, limit: int, short_seq_prob: float, keys: Keys) -> tuple[Ints, Keys, Ints]:
    """Each document in each pass: its number, the key of its draws, and the tokens that its samples aim at."""
    count = len(document_offsets) - 1
    documents = np.tile(np.arange(count), len(keys))
    streams = derived(np.repeat(keys, count), documents + 1)
    for_short, for_target = bits(mix(streams), PURPOSES[:2])
    targets = np.where(uniform(for_short) < short_seq_prob, 2 + below(for_target, limit - 1), np.int64(limit))
    return documents, streams, targets


def draw_pairs(sentence_offsets: Ints, document_offsets: Ints, limit: int, short_seq_prob: float, keys: Keys) -> Pairs:
    """One pass over all documents for each of ``keys``; every pass puts every sentence into a sample.

    ``sentence_offsets`` ``[n + 1]``: where each sentence begins in the token array (none is empty);
    ``document_offsets`` ``[D + 1]``: first sentence of each document (none is empty); ``limit``: tokens of A and B
    together, 2 at least. Samples come in the order of the keys, of the documents, and of the text.

    A document aims at ``limit`` tokens or, with ``short_seq_prob``, at uniform 2..limit. Whole sentences are
    taken until that is reached; a uniform cut gives A; B is the rest or, with probability 1/2 (always after a
    single sentence), text from a random sentence of another document on, and the unused rest is put back.
    """
    documents, streams, targets = _targets(document_offsets, limit, short_seq_prob, keys)
    # reached[place] is np.searchsorted(sentence_offsets, place)
    gaps = np.diff(sentence_offsets, prepend=-1, append=sentence_offsets[-1] + limit)
    reached = np.repeat(np.arange(len(gaps), dtype=np.int32), gaps)  # half as much of the cache
    active, at, last = np.arange(len(streams)), document_offsets[documents], document_offsets[documents + 1]
    steps: list[tuple[NDArray[Any], ...]] = []
    known = 0  # steps whose bits are drawn
    while len(active):  # many steps of few documents, so nothing is done here that the next step does not ask for
        if len(steps) == known:
            known += max(1, AHEAD // len(active))
            counters = 4 * np.arange(len(steps), known)[:, None, None] + PURPOSES[:2]
            for_cut, for_next = bits(streams[active], counters).swapaxes(0, 1)
            ahead = zip((for_cut >> np.uint64(32)).astype(np.int64), for_next < HALF, strict=True)
            target, place = targets[active], np.arange(len(active))
        for_cut, is_random = next(ahead)
        stop = np.minimum(reached[sentence_offsets[at] + target], last)
        last_cut = stop - at - 1
        cut = at + 1 + (for_cut[place] * last_cut >> 32)  # as `below` has it
        random_next = (last_cut == 0) | is_random[place]
        steps.append((active, at, cut, stop, random_next))
        at = np.where(random_next, cut, stop)
        unfinished = at < last
        if not unfinished.all():
            active, at, last, target, place = (row[unfinished] for row in (active, at, last, target, place))
    numbers = np.repeat(np.arange(len(steps)), [len(step[0]) for step in steps])
    columns = [numbers, *(np.concatenate(column) for column in zip(*steps, strict=True))]
    order = np.argsort(columns[1], kind="stable")
    numbers, active, a_first, a_last, stop, random_next = (column[order] for column in columns)
    a_start, a_length = sentence_offsets[a_first], sentence_offsets[a_last] - sentence_offsets[a_first]
    b_first, b_last = a_last, stop
    # B of a random next: whole sentences of another document
    drawn = np.flatnonzero(random_next)
    document, stream = documents[active[drawn]], streams[active[drawn]]
    for_document, for_start = bits(stream, 4 * numbers[drawn] + PURPOSES[2:])
    count = len(document_offsets) - 1
    other = below(for_document, max(1, count - 1))
    other += (other >= document) & (count > 1)
    first, last = document_offsets[other], document_offsets[other + 1]
    begin = first + below(for_start, last - first)
    need = np.maximum(1, targets[active[drawn]] - a_length[drawn])
    b_first[drawn] = begin
    b_last[drawn] = np.minimum(reached[sentence_offsets[begin] + need], last)
    b_start = sentence_offsets[b_first]
    return Pairs(
        a_start,
        a_length,
        b_start,
        sentence_offsets[b_last] - b_start,
        random_next,
        documents[active],
        derived(streams[active], a_first + 1),
    )


def draw_singles(
    sentence_offsets: Ints, document_offsets: Ints, limit: int, short_seq_prob: float, keys: Keys
) -> Pairs:
    """As `draw_pairs`, for ``[CLS] A [SEP]``: A is as many whole sentences of a document as its target takes.

    These are the DOC-SENTENCES of RoBERTa (Liu et al. 2019, 4.2). No sentence is cut (none is longer than ``limit``),
    none is left out, and each is in one sample of a pass.
    """
    documents, streams, targets = _targets(document_offsets, limit, short_seq_prob, keys)
    active, at = np.arange(len(streams)), document_offsets[documents]
    steps: list[tuple[NDArray[Any], ...]] = []
    while len(active):
        end = document_offsets[documents[active] + 1]
        fitting = np.searchsorted(sentence_offsets, sentence_offsets[at] + targets[active], side="right") - 1
        stop = np.minimum(np.maximum(fitting, at + 1), end)
        steps.append((active, at, stop))
        unfinished = stop < end
        active, at = active[unfinished], stop[unfinished]
    active, first, last = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(active, kind="stable")
    active, first, last = active[order], first[order], last[order]
    start, none = sentence_offsets[first], np.zeros(len(active), np.int64)
    return Pairs(
        start,
        sentence_offsets[last] - start,
        start,
        none,
        none.astype(bool),
        documents[active],
        derived(streams[active], first + 1),
    )


def truncate(pairs: Pairs, limit: int) -> Pairs:
    """Cut A and B to ``limit`` tokens together, token by token from the longer (B when equal).

    Each removed token comes from the front or the back with probability 1/2, so the number from the front is
    binomial. What is left in the end has a closed form: the shorter stays whole, or both get half, A the odd one.
    """
    a, b = pairs.a_length, pairs.b_length
    over = a + b > limit
    half = limit // 2
    a_kept = np.where(over, np.where(b <= half, limit - b, np.minimum(a, limit - half)), a)
    b_kept = np.where(over, limit - a_kept, b)
    return replace(
        pairs,
        a_start=pairs.a_start + _heads(a - a_kept, derived(pairs.stream, np.ones(1, np.int64))),
        a_length=a_kept,
        b_start=pairs.b_start + _heads(b - b_kept, derived(pairs.stream, np.full(1, 2))),
        b_length=b_kept,
    )


def _heads(tosses: Ints, keys: Keys) -> Ints:
    """Heads among ``tosses[i]`` fair coins of the stream of ``keys[i]``."""
    words = (tosses + 63) // 64
    ends = np.cumsum(words)
    starts = ends - words
    counters = np.arange(int(words.sum())) - np.repeat(starts, words)
    coins = bits(np.repeat(keys, words), counters)
    tossed = np.flatnonzero(words)
    coins[ends[tossed] - 1] &= FIRST_COINS[tosses[tossed] - 64 * (words[tossed] - 1)]
    heads = np.zeros(4 * len(coins) + 1, np.int64)
    np.cumsum(HEADS[coins.astype("<u8", copy=False).view("<u2")], out=heads[1:])
    heads_in: Ints = heads[4 * ends] - heads[4 * starts]
    return heads_in


def assemble(
    tokens: NDArray[np.unsignedinteger], pairs: Pairs, cls_id: int, sep_id: int
) -> tuple[NDArray[np.unsignedinteger], Ints, Ints]:
    """``[CLS] A [SEP] B [SEP]`` of every pair, end to end; ``[CLS] A [SEP]`` where B is empty.

    Returns the tokens ``[T]`` in the dtype of ``tokens``, ``offsets [N + 1]``, and where B begins inside each
    sample, ``[N]``: at its end, where there is none.
    """
    ends = np.cumsum(pairs.a_length + pairs.b_length + SPECIAL_TOKENS - (pairs.b_length == 0))
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    sep_at = offsets[:-1] + 1 + pairs.a_length
    source = np.stack([pairs.a_start, pairs.b_start], axis=1).ravel()
    target = np.stack([offsets[:-1] + 1, sep_at + 1], axis=1).ravel()
    # not token by token but in words of several: words[i] is tokens[i : i + wide]
    wide = 8 // tokens.itemsize
    padded = np.append(tokens, np.zeros(wide, tokens.dtype))
    words = np.ndarray(len(tokens), np.uint64, padded.data, 0, padded.strides).copy()
    # a word goes on with the part that its first token belongs to; parts that begin inside of it are mended below
    first = np.concatenate([np.zeros(1, np.int64), -(-target[1:] // wide), -(-offsets[-1:] // wide)])
    packed = np.empty(first[-1] + 2, np.uint64)
    for part in range(0, len(target), BLOCK):  # the index of some parts stays in the cache
        block = slice(part, part + BLOCK)
        begin, *_, end = first[part : part + BLOCK + 1].tolist()
        index = np.repeat(source[block] - target[block], np.diff(first[part : part + BLOCK + 1]))
        index += np.arange(wide * begin, wide * end, wide)
        np.take(words, index, out=packed[begin:end], mode="clip")
    tokens = packed.view(tokens.dtype)
    for place in reversed(range(wide - 1)):
        tokens[target + place] = padded[source + place]
    tokens[offsets[:-1]], tokens[sep_at], tokens[ends - 1] = cls_id, sep_id, sep_id
    return tokens[: offsets[-1]], offsets, pairs.a_length + 2
