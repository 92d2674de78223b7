"""Masked language modelling as a pure function of (seed, sample id): which tokens, replaced by what."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.splitmix import Ints, Keys, below, bits, derived, key, mix, uniform

SPECIAL_TOKENS = 3  # [CLS], [SEP], [SEP] of each sample are never masked
MASK_PROBABILITY = 0.8
KEEP_PROBABILITY = 0.1
POSITION_BITS = np.uint64(16)


def boundaries(special: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of [CLS] and [SEP], as far as a vocabulary has them."""
    return tuple(special[name] for name in ("cls", "sep") if name in special)


def masked_counts(lengths: ArrayLike, masked_lm_prob: float, max_predictions: int) -> Ints:
    """How many tokens of a sample are masked, int64 of the shape of ``lengths`` (which count [CLS] and [SEP]).

    ``min(max_predictions, max(1, round(length * masked_lm_prob)))``, halves to even as Python rounds, and never
    more than there are ordinary tokens: one in ``[CLS] a [SEP]``.
    """
    lengths = np.asarray(lengths, np.int64)
    wanted = np.maximum(1, np.rint(lengths * masked_lm_prob).astype(np.int64))
    counts: Ints = np.minimum(np.minimum(max_predictions, wanted), np.maximum(1, lengths - SPECIAL_TOKENS))
    return counts


def mask_tokens(
    tokens: NDArray[np.int32],
    lengths: Ints,
    sample_ids: Ints,
    *,
    seed: int,
    vocab_size: int,
    special: Mapping[str, int],
    masked_lm_prob: float,
    max_predictions: int,
    continuing: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int32], Ints, NDArray[np.int32]]:
    """Mask N samples that lie end to end in ``tokens [T]`` with ``lengths [N]``.

    Returns the masked tokens ``[T]``, the masked positions ``[K]`` (flat, ascending) and the original ids
    there, ``[K]``; sample i contributes ``masked_counts(lengths)[i]`` of them. 80 % become [MASK], 10 % stay, 10 %
    become any of the ``vocab_size`` entries. [CLS] and [SEP], whose ids ``special`` has beside that of [MASK], are
    chosen only if a sample has too few others. A sample's mask depends on (seed, its id) and its own tokens alone.
    With ``continuing [V]``, which says what pieces go on with a word (``##s``), whole words are chosen.
    """
    # One key per sample; each token's random number follows from it and from the place inside the sample.
    starts = np.cumsum(lengths) - lengths
    counts = masked_counts(lengths, masked_lm_prob, max_predictions)
    keys = derived(key(seed, 0), sample_ids)
    inside = np.arange(len(tokens), dtype=np.uint64) - np.repeat(starts.astype(np.uint64), lengths)
    is_special = np.zeros(len(tokens), bool)
    for number in boundaries(special):
        is_special |= tokens == number
    # Special ones last, else random, the position in the lowest bits.
    order = bits(np.repeat(keys, lengths), inside) >> np.uint64(1) | is_special.astype(np.uint64) << np.uint64(63)
    order = order >> POSITION_BITS << POSITION_BITS | inside
    # The tokens with the smallest numbers of each sample, or the words.
    if continuing is None:
        positions = _smallest(order, starts, lengths, counts)
    else:
        begins = ~continuing[tokens] | is_special
        begins[starts] = True
        begins[1:] |= is_special[:-1]
        positions = _whole_words(order, begins, starts, counts)
    # What takes their place: [MASK], the token itself, or any other, by a second draw.
    labels = tokens[positions]
    row = np.repeat(np.arange(len(lengths)), counts)
    draws = mix(bits(keys[row], inside[positions]))
    kind = uniform(draws)
    anything = below(mix(draws), vocab_size).astype(tokens.dtype)
    masked = tokens.copy()
    masked[positions] = np.where(
        kind < MASK_PROBABILITY,
        np.asarray(special["mask"], tokens.dtype),
        np.where(kind < MASK_PROBABILITY + KEEP_PROBABILITY, labels, anything),
    )
    return masked, positions, labels


def _smallest(order: Keys, starts: Ints, lengths: Ints, counts: Ints) -> Ints:
    """Flat positions of the ``counts[i]`` smallest numbers of each sample i, ascending."""
    if len(lengths) == 0:
        return np.zeros(0, np.int64)
    width = int(lengths.max())
    rows = np.full((len(lengths), width), np.iinfo(np.uint64).max)
    rows[np.arange(width) < lengths[:, None]] = order
    rows.sort(axis=1)
    most = int(counts.max())
    chosen = np.arange(most) < counts[:, None]
    places = (rows[:, :most] & ((np.uint64(1) << POSITION_BITS) - np.uint64(1))).astype(np.int64)
    return np.sort((places + starts[:, None])[chosen])


def _whole_words(order: Keys, begins: NDArray[np.bool_], starts: Ints, counts: Ints) -> Ints:
    """Flat positions of ``counts[i]`` tokens of each sample i, whole words in the order of their first tokens' numbers.

    A word of more tokens than are left is passed over (whole word masking of google-research/bert, 2019). Where no
    word fits what is left, pieces of those are taken, for the number of masked tokens is known by a sample's length.
    """
    words = np.flatnonzero(begins)
    row = np.searchsorted(starts, words, side="right") - 1
    ranked = np.lexsort((order[words], row))
    firsts, ends = words[ranked].tolist(), np.append(words[1:], len(order))[ranked].tolist()
    special = (order[words[ranked]] >> np.uint64(63)).tolist()  # those come last
    chosen: list[int] = []
    at = 0
    for count, left in zip(np.bincount(row, minlength=len(starts)).tolist(), counts.tolist(), strict=True):
        passed_over: list[int] = []
        for place in range(at, at + count):
            if left == 0:
                break
            word = range(firsts[place], ends[place])
            if len(word) > left or special[place]:
                passed_over.extend(word)
            else:
                chosen.extend(word)
                left -= len(word)
        chosen.extend(passed_over[:left])
        at += count
    return np.sort(np.array(chosen, np.int64))
