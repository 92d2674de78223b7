"""Start and end logits to answer texts: n-best lists, and the way back from WordPiece to the original words.

Method: the post-processing of google-research/bert's SQuAD task, with NVIDIA's per-window duplicate removal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import FinetuneConfig
from pipeline.finetune.squad import Feature, Squad, split_words

NO_PREDICTION = "empty"  # what is answered when no window offers any valid span
BasicTokens = Callable[[str], list[str]]
Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Candidate:
    """One possible answer with the logits of its first and last token."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        return self.start_logit + self.end_logit


def basic_tokenizer(*, lowercase: bool, strip_accents: bool) -> BasicTokens:
    """BERT's tokenisation before WordPiece: cleaned, normalised, split at blanks and punctuation."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer = BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    splitter = BertPreTokenizer()
    return lambda text: [token for token, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]


def answer_questions(
    squad: Squad,
    features: Sequence[Feature],
    logits: Iterable[tuple[Logits, Logits]],
    config: FinetuneConfig,
    *,
    vocabulary: Sequence[str],
    basic: BasicTokens,
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """``{id: answer}`` and ``{id: n-best entries}`` in question order.

    ``logits`` gives (start, end) of each feature in order, one value per token; values beyond the feature's
    tokens (padding) may take a place among the ``n_best`` but are never answers.
    """
    words = [split_words(context)[0] for context in squad.contexts]
    plain = cache(lambda word: " ".join(basic(word)))
    candidates: dict[str, list[Candidate]] = defaultdict(list)
    nulls: dict[str, Candidate] = {}
    for feature, (start, end) in zip(features, logits, strict=True):
        name = feature.question.id
        text = partial(_text, feature, words[feature.question.context], plain, vocabulary)
        candidates[name] += _candidates(feature, start, end, config, text)
        null = Candidate("", float(start[0]), float(end[0]))
        if name not in nulls or null.score < nulls[name].score:
            nulls[name] = null
    answers, n_best = {}, {}
    for question in squad.questions:
        pool = candidates[question.id]
        null_entry = nulls.get(question.id, Candidate("", 0.0, 0.0)) if config.version_2 else None
        if null_entry:
            pool = [*pool, null_entry]
        best = sorted(pool, key=lambda candidate: -candidate.score)[: config.n_best]
        best = best or [Candidate(NO_PREDICTION, 0.0, 0.0)]
        answers[question.id] = _choose(best, null_entry, config.null_threshold)
        n_best[question.id] = _with_probabilities(best)
    return answers, n_best


def _choose(best: list[Candidate], null: Candidate | None, threshold: float) -> str:
    if null is None:
        return best[0].text
    answered = next((candidate for candidate in best if candidate.text), None)
    return answered.text if answered and null.score - answered.score <= threshold else ""


def _with_probabilities(best: list[Candidate]) -> list[dict[str, Any]]:
    scores = np.array([candidate.score for candidate in best])
    weights = np.exp(scores - scores.max())
    return [
        {"text": c.text, "probability": float(p), "start_logit": c.start_logit, "end_logit": c.end_logit}
        for c, p in zip(best, weights / weights.sum(), strict=True)
    ]


def _candidates(
    feature: Feature, start: Logits, end: Logits, config: FinetuneConfig, text_of: Callable[[int, int], str]
) -> list[Candidate]:
    """The best valid spans of one window, at most ``n_best``, no text twice; ``text_of`` a first and a last token."""
    starts, ends = (np.argsort(-values, kind="stable")[: config.n_best] for values in (start, end))
    window = len(feature.word)
    inside = [(x >= feature.b_start) & (x < feature.b_start + window) for x in (starts, ends)]
    central = np.zeros(len(starts), bool)
    central[inside[0]] = feature.max_context[starts[inside[0]] - feature.b_start]
    length = ends[None, :] - starts[:, None] + 1
    valid = central[:, None] & inside[1][None, :] & (length >= 1) & (length <= config.max_answer_length)
    s, e = np.nonzero(valid)
    order = np.argsort(-(start[starts[s]] + end[ends[e]]), kind="stable")
    chosen: dict[str, Candidate] = {}
    for first, last in zip(starts[s[order]].tolist(), ends[e[order]].tolist(), strict=True):
        if len(chosen) == config.n_best:
            break
        text = text_of(first, last)
        if text not in chosen:
            chosen[text] = Candidate(text, float(start[first]), float(end[last]))
    return list(chosen.values())


def _text(
    feature: Feature, words: list[str], plain: Callable[[str], str], vocabulary: Sequence[str], first: int, last: int
) -> str:
    pieces = " ".join(vocabulary[token] for token in feature.tokens[first : last + 1].tolist())
    spoken = " ".join(pieces.replace(" ##", "").replace("##", "").split())
    begin, end = (int(feature.word[index - feature.b_start]) for index in (first, last))
    own = words[begin : end + 1]
    return original_text(spoken, " ".join(own), " ".join(plain(w) for w in own if plain(w)))


def original_text(spoken: str, original: str, plain: str) -> str:
    """The part of ``original`` that ``spoken`` stands for.

    ``spoken`` is an answer joined from WordPieces, ``original`` the whole words it lies in, ``plain`` the
    basic tokens of these words joined by blanks. Blanks aside, ``plain`` and ``original`` must have equally many
    characters, so that positions carry over; else, or when ``spoken`` is not found, ``original`` is returned.
    """
    begin = plain.find(spoken)
    if begin < 0:
        return original
    in_original = [i for i, character in enumerate(original) if character != " "]
    in_plain = [i for i, character in enumerate(plain) if character != " "]
    if len(in_original) != len(in_plain):
        return original
    number = {position: count for count, position in enumerate(in_plain)}
    last = begin + len(spoken) - 1
    if begin not in number or last not in number:
        return original
    return original[in_original[number[begin]] : in_original[number[last]] + 1]
