"""What a classification score is worth: always the most frequent class, and words without their order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]
WORD = re.compile(r"\w+|[^\w\s]")


def majority(classes: Classes, count: int) -> Classes:
    """The most frequent of the training ``classes``, ``count`` times."""
    return np.full(count, np.bincount(classes).argmax())


def naive_bayes(train: Sequence[str], classes: Classes, texts: Sequence[str]) -> Classes:
    """The class of each of ``texts`` by multinomial naive Bayes over words and pairs of neighbours, add-one smoothed.

    A term counts once a text (Wang & Manning 2012, "Baselines and bigrams").
    """
    numbers: dict[str, int] = {}
    known = [[numbers.setdefault(term, len(numbers)) for term in set(terms(text))] for text in train]
    counts = np.ones((int(classes.max()) + 1, len(numbers)))
    for row, label in zip(known, classes, strict=True):
        counts[label, row] += 1
    log = np.log(counts / counts.sum(axis=1, keepdims=True))
    prior = np.log(np.bincount(classes, minlength=len(counts)) + 1)
    term_numbers = ([numbers[term] for term in set(terms(text)) if term in numbers] for text in texts)
    return np.array([(prior + log[:, row].sum(axis=1)).argmax() for row in term_numbers], np.int64)


def terms(text: str) -> Iterator[str]:
    """Words in lower case, and each with the next."""
    words = WORD.findall(text.lower())
    yield from words
    yield from map(" ".join, itertools.pairwise(words))
