"""A sample's mask is a function of (seed, id) and its tokens; counts and shares are the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.masking import mask_tokens, masked_counts
from data_prep.splitmix import bits, derived, key

CLS, SEP, MASK, VOCAB = 101, 102, 103, 30522
SETTINGS: dict[str, Any] = {
    "seed": 12345,
    "vocab_size": VOCAB,
    "special": {"cls": CLS, "sep": SEP, "mask": MASK},
    "masked_lm_prob": 0.15,
    "max_predictions": 20,
}


def batch(lengths: list[int], seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        sample = rng.integers(1000, VOCAB, length).astype(np.int32)
        sample[[0, length // 2, -1]] = CLS, SEP, SEP
        samples.append(sample)
    return np.concatenate(samples), np.array(lengths, np.int64)


def test_counts_are_the_reference_s() -> None:
    for prob, cap in ((0.15, 20), (0.15, 77), (0.1, 1000), (0.5, 10)):
        lengths = range(5, 513)
        expected = [min(cap, max(1, round(length * prob)), length - 3) for length in lengths]
        assert masked_counts(np.array(lengths), prob, cap).tolist() == expected
    assert masked_counts([128, 512, 10, 30], 0.15, 80).tolist() == [19, 77, 2, 4]  # halves go to even
    assert masked_counts([5, 6], 0.9, 80).tolist() == [2, 3]


@pytest.mark.parametrize("continuing", [None, np.zeros(VOCAB, bool)])
def test_the_only_word_of_a_sample_is_masked(continuing: Any) -> None:
    tokens, lengths = np.array([CLS, 1000, SEP, CLS, 1001, 1002, SEP], np.int32), np.array([3, 4])
    _, positions, labels = mask_tokens(tokens, lengths, np.arange(2), **SETTINGS, continuing=continuing)
    assert positions.tolist() in ([1, 4], [1, 5])
    assert (labels == tokens[positions]).all()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(5, 128), min_size=1, max_size=20), seed=st.integers(0, 100))
def test_the_result_fits_the_tokens(lengths: list[int], seed: int) -> None:
    tokens, sizes = batch(lengths, seed)
    before = tokens.copy()
    masked, positions, labels = mask_tokens(tokens, sizes, np.arange(len(sizes)), **SETTINGS)
    assert (tokens == before).all()
    assert masked.dtype == tokens.dtype
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    assert (labels == tokens[positions]).all()
    assert not set(labels.tolist()) & {CLS, SEP}
    untouched = np.ones(len(tokens), bool)
    untouched[positions] = False
    assert (masked[untouched] == tokens[untouched]).all()
    row = np.searchsorted(np.cumsum(sizes), positions, side="right")
    assert (np.bincount(row, minlength=len(sizes)) == masked_counts(sizes, 0.15, 20)).all()
    assert masked.min() >= 0
    assert masked.max() < VOCAB


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_sample_is_masked_alike_in_every_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(5, 90), min_size=2, max_size=12))
    chosen = data.draw(st.permutations(range(len(lengths))).map(lambda order: order[: len(order) // 2 + 1]))
    tokens, sizes = batch(lengths)
    ids = np.arange(len(sizes)) * 7919 + 5
    together, _, _ = mask_tokens(tokens, sizes, ids, **SETTINGS)
    starts = np.cumsum(sizes) - sizes
    pieces = [slice(starts[row], starts[row] + sizes[row]) for row in chosen]
    apart, _, _ = mask_tokens(
        np.concatenate([tokens[piece] for piece in pieces]), sizes[list(chosen)], ids[list(chosen)], **SETTINGS
    )
    assert (apart == np.concatenate([together[piece] for piece in pieces])).all()


def test_seed_and_id_both_matter() -> None:
    tokens, sizes = batch([100] * 3)
    ids = np.arange(3)
    base = mask_tokens(tokens, sizes, ids, **SETTINGS)[1].tolist()
    assert mask_tokens(tokens, sizes, ids, **SETTINGS)[1].tolist() == base
    for keywords, numbers in (
        (SETTINGS | {"seed": 12346}, ids),
        (SETTINGS | {"seed": 2**63 + 5}, ids),
        (SETTINGS, ids + 1),
    ):
        assert mask_tokens(tokens, sizes, numbers, **keywords)[1].tolist() != base
    # seed and id are not merely added
    assert mask_tokens(tokens, sizes, ids + 1, **SETTINGS | {"seed": 12344})[1].tolist() != base


def test_80_10_10_and_uniform_places_and_words() -> None:
    tokens, sizes = batch([128] * 20000)
    tokens[tokens == MASK] = 5000
    masked, positions, labels = mask_tokens(tokens, sizes, np.arange(20000), **SETTINGS)
    new = masked[positions]
    count = len(positions)
    assert count == 19 * 20000
    kept = (new == labels).mean()
    random = (new != labels) & (new != MASK)
    assert abs((new == MASK).mean() - 0.8) < 5 * (0.8 * 0.2 / count) ** 0.5 + 1e-4
    assert abs(kept - 0.1) < 5 * (0.1 * 0.9 / count) ** 0.5 + 1e-4
    words = np.bincount(new[random] * 64 // VOCAB, minlength=64)
    expected = random.sum() / 64
    assert (((words - expected) ** 2) / expected).sum() < 140  # chi-square with 63 degrees of freedom
    assert (new[random] < 1000).sum() > 0.02 * random.sum()  # special and unused entries too
    place = np.bincount(positions % 128, minlength=128)
    candidates = np.delete(place, [0, 64, 127])
    assert place.sum() == candidates.sum()
    expected = count / 125
    assert (((candidates - expected) ** 2) / expected).sum() < 230  # about 124 in the mean, hypergeometric less


def test_epochs_are_independent() -> None:
    tokens, sizes = batch([128] * 2000)
    first = set(mask_tokens(tokens, sizes, np.arange(2000), **SETTINGS)[1].tolist())
    second = set(mask_tokens(tokens, sizes, np.arange(2000, 4000), **SETTINGS)[1].tolist())
    assert abs(len(first & second) / len(first) - 19 / 125) < 0.01


def test_special_tokens_are_masked_only_when_nothing_else_is_left() -> None:
    tokens = np.array([CLS, SEP, SEP, 2000, SEP], np.int32)
    for sample in range(50):
        _, positions, labels = mask_tokens(tokens, np.array([5]), np.array([sample]), **SETTINGS)
        assert (positions.tolist(), labels.tolist()) == ([3], [2000])
    keywords = SETTINGS | {"masked_lm_prob": 0.5}
    _, positions, _ = mask_tokens(tokens, np.array([5]), np.array([1]), **keywords)
    assert len(positions) == masked_counts([5], 0.5, 20)[0] == 2


def test_no_samples_at_all() -> None:
    empty = np.zeros(0, np.int64)
    masked, positions, labels = mask_tokens(empty.astype(np.int32), empty, empty, **SETTINGS)
    assert len(masked) == len(positions) == len(labels) == 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_the_tokens_type_does_not_matter(dtype: type) -> None:
    tokens, sizes = batch([60] * 4)
    base = mask_tokens(tokens, sizes, np.arange(4), **SETTINGS)[0]
    assert mask_tokens(tokens.astype(dtype), sizes, np.arange(4), **SETTINGS)[0].tolist() == base.tolist()


def whole_words_by_the_rule(sample: list[int], count: int, rank: dict[int, int], goes_on: set[int]) -> list[int]:
    """google-research/bert's rule as its README tells it: words in random order; one that would be too many is passed
    over; here the rest is then filled from the first of those, for the count is fixed.
    """
    words: list[list[int]] = []
    for place, token in enumerate(sample):
        if token in (CLS, SEP):
            continue
        if token in goes_on and words and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    chosen: list[int] = []
    ordered = sorted(words, key=lambda word: rank[word[0]])
    for word in ordered:
        if len(chosen) + len(word) <= count:
            chosen += word
    whole = set(chosen)
    return sorted(chosen + [p for w in ordered if not set(w) & whole for p in w][: count - len(chosen)])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(5, 128), min_size=1, max_size=8), seed=st.integers(0, 100), share=st.floats(0, 1))
def test_whole_words_are_those_of_the_reference(lengths: list[int], seed: int, share: float) -> None:
    tokens, sizes = batch(lengths, seed)
    continuing = np.random.default_rng(seed).random(VOCAB) < share
    continuing[[CLS, SEP]] = False
    ids = np.arange(len(sizes))
    _, positions, labels = mask_tokens(tokens, sizes, ids, **SETTINGS, continuing=continuing)
    assert (labels == tokens[positions]).all()
    starts = np.cumsum(sizes) - sizes
    numbers = np.repeat(derived(key(SETTINGS["seed"], 0), ids), sizes)
    inside = np.arange(len(tokens), dtype=np.uint64) - np.repeat(starts.astype(np.uint64), sizes)
    order = (bits(numbers, inside) >> np.uint64(17) << np.uint64(16) | inside).tolist()
    counts = masked_counts(sizes, SETTINGS["masked_lm_prob"], SETTINGS["max_predictions"])
    expected = []
    for start, size, count in zip(starts.tolist(), sizes.tolist(), counts.tolist(), strict=True):
        sample = tokens[start : start + size].tolist()
        rank = {place: order[start + place] for place in range(size)}
        found = whole_words_by_the_rule(sample, count, rank, set(np.flatnonzero(continuing).tolist()))
        expected += [start + place for place in found]
    assert positions.tolist() == expected


def test_where_every_word_is_a_token_nothing_changes() -> None:
    tokens, sizes = batch([128, 7, 90, 31] * 20)
    ids = np.arange(len(sizes))
    words = mask_tokens(tokens, sizes, ids, **SETTINGS, continuing=np.zeros(VOCAB, bool))
    for whole, single in zip(words, mask_tokens(tokens, sizes, ids, **SETTINGS), strict=True):
        assert whole.tolist() == single.tolist()
