"""Exact match and F1 of answers, as the official SQuAD v1.1 evaluation defines them (Rajpurkar 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words that are compared: lower case, without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def exact_match(answer: str, reference: str) -> float:
    """1.0 when both have the same words in the same order, else 0.0."""
    return float(words(answer) == words(reference))


def f1(answer: str, reference: str, *, version_2: bool = False) -> float:
    """Harmonic mean of precision and recall over words, 0 to 1.

    Two texts without words share none: 0.0, but 1.0 under SQuAD 2.0, where no words means "no answer".
    """
    given, wanted = words(answer), words(reference)
    if version_2 and not (given and wanted):
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]], *, version_2: bool = False
) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent: best over each question's references, mean over all questions.

    ``answers`` and ``references`` are keyed by question id; a question without an answer counts 0.
    """
    exact = total = 0.0
    for question, accepted in references.items():
        if question in answers:
            exact += max(exact_match(answers[question], reference) for reference in accepted)
            total += max(f1(answers[question], reference, version_2=version_2) for reference in accepted)
    return {"exact_match": 100 * exact / len(references), "f1": 100 * total / len(references)}
