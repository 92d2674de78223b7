"""Pairs have the reference's distribution: against a plain transcription, itself proved by golden vectors."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pairs import Pairs, assemble, draw_pairs, draw_singles, truncate
from data_prep.splitmix import key

GOLDEN = json.loads((Path(__file__).parent / "golden" / "instance_creation.json").read_text())
Document = list[list[Any]]


def reference_pass(
    documents: list[Document], max_seq_length: int, short_seq_prob: float, rng: random.Random, finish: Any
) -> list[Any]:
    """One pass of the reference over all documents, one token at a time; ``finish(a, b, is_random)`` per pair."""
    made = []
    limit = max_seq_length - 3
    for number, document in enumerate(documents):
        target = limit
        if rng.random() < short_seq_prob:
            target = rng.randint(2, limit)
        chunk: Document = []
        length = 0
        at = 0
        while at < len(document):
            chunk.append(document[at])
            length += len(document[at])
            if at == len(document) - 1 or length >= target:
                a_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                a = [token for sentence in chunk[:a_end] for token in sentence]
                b: list[Any] = []
                is_random = len(chunk) == 1 or rng.random() < 0.5
                if is_random:
                    need = target - len(a)
                    for _ in range(10):
                        other = rng.randint(0, len(documents) - 1)
                        if other != number:
                            break
                    is_random = other != number
                    start = rng.randint(0, len(documents[other]) - 1)
                    for sentence in documents[other][start:]:
                        b.extend(sentence)
                        if len(b) >= need:
                            break
                    at -= len(chunk) - a_end
                else:
                    b = [token for sentence in chunk[a_end:] for token in sentence]
                while len(a) + len(b) > limit:
                    longer = a if len(a) > len(b) else b
                    if rng.random() < 0.5:
                        del longer[0]
                    else:
                        longer.pop()
                made.append(finish(a, b, is_random))
                chunk, length = [], 0
            at += 1
    return made


def masked_instance(a: list[str], b: list[str], is_random: bool, case: Any, rng: random.Random) -> Any:
    tokens = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
    candidates = [at for at, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]
    rng.shuffle(candidates)
    count = min(case["max_predictions_per_seq"], max(1, round(len(tokens) * case["masked_lm_prob"])))
    output, chosen = list(tokens), []
    for at in candidates[:count]:
        if rng.random() < 0.8:
            new = "[MASK]"
        elif rng.random() < 0.5:
            new = tokens[at]
        else:
            new = GOLDEN["vocab"][rng.randint(0, len(GOLDEN["vocab"]) - 1)]
        output[at] = new
        chosen.append(at)
    chosen.sort()
    return {
        "tokens": output,
        "segment_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1),
        "masked_lm_positions": chosen,
        "masked_lm_labels": [tokens[at] for at in chosen],
        "next_sentence_label": int(is_random),
    }


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_the_oracle_reproduces_the_golden_instances(number: int) -> None:
    case = GOLDEN["cases"][number]
    documents = [[line.split() for line in block.split("\n") if line] for block in GOLDEN["shard_text"].split("\n\n")]
    rng = random.Random(case["random_seed"])
    rng.shuffle(documents)
    made = []
    for _ in range(case["dupe_factor"]):
        made += reference_pass(
            documents,
            case["max_seq_length"],
            case["short_seq_prob"],
            rng,
            lambda a, b, is_random: masked_instance(a, b, is_random, case, rng),
        )
    rng.shuffle(made)
    assert made == case["instances"]


def corpus(seed: int, documents: int = 400) -> list[Document]:
    """Documents with lengths like Wikipedia's (log-normal), each token a number of its own."""
    rng = np.random.default_rng(seed)
    numbers = iter(range(10**9))
    return [
        [[next(numbers) for _ in range(max(1, int(rng.gamma(3.0, 8.0))))] for _ in range(int(size))]
        for size in np.maximum(1, rng.lognormal(1.9, 1.1, documents))
    ]


def arrays(documents: list[Document]) -> tuple[Any, Any, Any]:
    lengths = [len(sentence) for document in documents for sentence in document]
    tokens = np.array([token for document in documents for sentence in document for token in sentence], np.uint32)
    return (
        tokens,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64),
    )


def measures(table: Any, seq_len: int) -> list[float]:
    """Count, mean lengths of A and B, random-next share, share of full rows, spread of the lengths."""
    total = table[:, 0] + table[:, 1]
    return [len(table), *table.mean(axis=0), (total == seq_len - 3).mean(), total.std()]


@pytest.mark.parametrize(("seq_len", "short"), [(128, 0.0), (512, 0.1), (64, 0.6)])
def test_the_distribution_is_the_reference_s(seq_len: int, short: float) -> None:
    """Over 10 seeds no measure differs by more than 4 standard errors."""
    documents = corpus(1, 1200)
    _, sentences, starts = arrays(documents)
    ours, theirs = [], []
    for seed in range(10):
        rng = random.Random(seed)
        pairs = reference_pass(documents, seq_len, short, rng, lambda a, b, r: (len(a), len(b), r))
        theirs.append(measures(np.array(pairs, float), seq_len))
        made = truncate(draw_pairs(sentences, starts, seq_len - 3, short, key(seed, 9)), seq_len - 3)
        table = np.stack([made.a_length, made.b_length, made.is_random_next], axis=1).astype(float)
        ours.append(measures(table, seq_len))
    errors = ((np.var(ours, axis=0, ddof=1) + np.var(theirs, axis=0, ddof=1)) / len(ours)) ** 0.5
    difference = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    assert (np.abs(difference) < 4 * errors).all(), difference / errors


def test_more_than_half_of_the_pairs_are_random_as_in_the_reference() -> None:
    _, sentences, starts = arrays(corpus(3, 2000))
    shares = [draw_pairs(sentences, starts, 125, 0.1, key(seed)).is_random_next.mean() for seed in range(4)]
    assert 0.54 < np.mean(shares) < 0.62


@st.composite
def small_corpora(draw: st.DrawFn) -> list[Document]:
    shape = draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=7))
    numbers = iter(range(10**6))
    return [[[next(numbers) for _ in range(size)] for size in document] for document in shape]


@settings(max_examples=300, deadline=None)
@given(
    documents=small_corpora(),
    limit=st.integers(2, 40),
    short=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_sound(documents: list[Document], limit: int, short: float, seed: int) -> None:
    tokens, sentences, starts = arrays(documents)
    whole = draw_pairs(sentences, starts, limit, short, key(seed))
    cut = truncate(whole, limit)
    flat, offsets, b_start = assemble(tokens, cut, 10**6, 10**6 + 1)
    document_of_token = np.repeat(np.arange(len(documents)), np.diff(sentences[starts]))
    begins = set(sentences.tolist())
    covered: set[int] = set()
    for row in range(len(cut.document)):
        sample = flat[offsets[row] : offsets[row + 1]].tolist()
        a, b = sample[1 : b_start[row] - 1], sample[b_start[row] : -1]
        assert sample == [10**6, *a, 10**6 + 1, *b, 10**6 + 1]
        assert 2 <= len(a) + len(b) <= limit
        for part in (a, b):
            assert part
            assert part == list(range(part[0], part[0] + len(part)))  # contiguous text
            assert len(set(document_of_token[part].tolist())) == 1
        assert document_of_token[a[0]] == cut.document[row]
        own, other = document_of_token[a[0]], document_of_token[b[0]]
        a_end = whole.a_start[row] + whole.a_length[row]
        if cut.is_random_next[row]:
            assert own != other or len(documents) == 1
        else:
            assert own == other
            assert a_end == whole.b_start[row]  # B follows A
        assert {whole.a_start[row], a_end, whole.b_start[row]} <= begins  # whole sentences before truncation
        if whole.a_length[row] + whole.b_length[row] <= limit:
            assert (len(a), len(b)) == (whole.a_length[row], whole.b_length[row])
        covered.update(range(whole.a_start[row], a_end))
        if not cut.is_random_next[row]:
            covered.update(range(whole.b_start[row], whole.b_start[row] + whole.b_length[row]))
    assert covered == set(range(len(tokens)))  # every sentence occurs, in its own place
    assert (np.diff(cut.document) >= 0).all()


@settings(max_examples=300, deadline=None)
@given(a=st.integers(1, 60), b=st.integers(1, 60), limit=st.integers(2, 50))
def test_truncation_keeps_what_the_reference_keeps(a: int, b: int, limit: int) -> None:
    left_a, left_b = a, b
    while left_a + left_b > limit:
        if left_a > left_b:
            left_a -= 1
        else:
            left_b -= 1
    one = np.ones(1, np.int64)
    cut = truncate(Pairs(0 * one, a * one, 100 * one, b * one, one > 0, one, key(1)), limit)
    assert (cut.a_length[0], cut.b_length[0]) == (left_a, left_b)
    assert 0 <= cut.a_start[0] <= a - left_a
    assert 100 <= cut.b_start[0] <= 100 + b - left_b


def test_truncation_takes_from_both_ends_alike() -> None:
    many = np.ones(20000, np.int64)
    cut = truncate(
        Pairs(0 * many, 30 * many, 0 * many, 3 * many, many > 0, many, key(1) + np.arange(20000, dtype=np.uint64)), 13
    )
    removed = 20
    assert abs(cut.a_start.mean() - removed / 2) < 0.1
    assert abs(cut.a_start.var() - removed / 4) < 0.2  # binomial, not uniform
    assert not cut.b_start.any()


def test_a_faster_way_draws_the_same_samples() -> None:
    sentences = np.concatenate([[0], np.cumsum(np.arange(900) * 7919 % 299 + 1)])
    documents = np.unique(np.concatenate([[0, 900], np.arange(70) * 613 % 900]))
    found = hashlib.sha256()
    for limit in (2, 29, 509):
        pairs = truncate(draw_pairs(sentences, documents, limit, 0.3, np.concatenate([key(1), key(2)])), limit)
        for array in assemble(np.arange(sentences[-1], dtype=np.uint32), pairs, 1, 2):
            found.update(array.astype("<i8").tobytes())
    assert found.hexdigest()[:16] == "d490c94b0755d951"


def test_passes_are_keyed_one_by_one() -> None:
    _, sentences, starts = arrays(corpus(2, 100))
    keys = np.concatenate([key(5), key(6), key(7)])
    together = vars(draw_pairs(sentences, starts, 61, 0.1, keys))
    apart = [vars(draw_pairs(sentences, starts, 61, 0.1, one)) for one in np.split(keys, 3)]
    assert all((together[name] == np.concatenate([one[name] for one in apart])).all() for name in together)
    assert apart[0]["a_length"].tolist() != apart[1]["a_length"].tolist()


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=1, max_size=6),
    short=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 50),
)
def test_singles_are_whole_sentences_in_order_as_many_as_fit(lengths, short, seed) -> None:
    limit = 20
    sentences = np.cumsum([0, *(n for document in lengths for n in document)])
    documents = np.cumsum([0, *map(len, lengths)])
    found = draw_singles(sentences, documents, limit, short, key(seed, 0))
    ends = found.a_start + found.a_length
    for number in range(len(lengths)):
        own = found.document == number
        assert found.a_start[own][0] == sentences[documents[number]]
        assert ends[own][-1] == sentences[documents[number + 1]]
        assert (found.a_start[own][1:] == ends[own][:-1]).all()  # nothing twice, nothing left out
    assert set(ends.tolist()) <= set(sentences.tolist())
    assert (found.a_length <= limit).all()
    if short == 0:
        following = sentences[np.minimum(np.searchsorted(sentences, ends) + 1, len(sentences) - 1)]
        last = np.isin(ends, sentences[documents])
        assert ((following - found.a_start)[~last] > limit).all()
    tokens, offsets, b_start = assemble(np.arange(100, 100 + sentences[-1], dtype=np.uint16), found, 1, 2)
    assert (b_start == np.diff(offsets)).all()
    kept = tokens[~np.isin(tokens, [1, 2])]
    assert kept.tolist() == list(range(100, 100 + sentences[-1]))
