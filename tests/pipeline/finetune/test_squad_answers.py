"""SQuAD post-processing: the original's answers and n-best lists, and the way back to the original words."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.implementations import BertWordPieceTokenizer

from pipeline.finetune.options import defaults
from pipeline.finetune.squad import Feature, Question, Squad, build_features, read_squad
from pipeline.finetune.squad_answers import answer_questions, basic_tokenizer, original_text

GOLDEN = json.loads((Path(__file__).parent / "golden" / "squad.json").read_text())
VOCAB: list[str] = GOLDEN["vocab"]
CONFIG = defaults(
    "squad",
    dataset="golden",
    max_seq_len=GOLDEN["max_seq_length"],
    doc_stride=GOLDEN["doc_stride"],
    max_query_length=GOLDEN["max_query_length"],
    n_best=GOLDEN["n_best_size"],
    max_answer_length=GOLDEN["max_answer_length"],
)
BASIC = basic_tokenizer(lowercase=True, strip_accents=True)


def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(VOCAB)}, lowercase=True)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    flat = np.array([i for own in ids for i in own], np.uint32)
    return flat, np.concatenate([[0], np.cumsum([len(own) for own in ids])]).astype(np.int64)


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Squad, list[Feature]]:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(GOLDEN["dataset"]))
    squad = read_squad(path)
    return squad, build_features(squad, encode, CONFIG, cls=2, sep=3, training=False)[0]


def golden_logits(features: list[Feature]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The logits the golden vectors were made with; they run over the padding too."""
    position = np.arange(CONFIG.max_seq_len)
    for number in range(len(features)):
        phase = 0.7 * position + 0.31 * number
        yield np.round(5 * np.sin(phase), 6), np.round(5 * np.sin(phase + 1.3), 6)


def test_answers_and_n_best_equal_the_originals(golden: tuple[Squad, list[Feature]]) -> None:
    squad, features = golden
    answers, n_best = answer_questions(squad, features, golden_logits(features), CONFIG, vocabulary=VOCAB, basic=BASIC)
    assert answers == GOLDEN["answers"]
    assert list(n_best) == list(GOLDEN["nbest"])
    for question, expected in GOLDEN["nbest"].items():
        assert [entry["text"] for entry in n_best[question]] == [entry["text"] for entry in expected]
        for key in ("probability", "start_logit", "end_logit"):
            np.testing.assert_allclose(
                [entry[key] for entry in n_best[question]], [entry[key] for entry in expected], rtol=1e-12
            )


def one_feature() -> tuple[Squad, Feature]:
    question = Question("q", "who ?", 0, (("the", 0),))
    squad = Squad(["the quick brown fox"], [question])
    (feature,), _ = build_features(squad, encode, CONFIG, cls=2, sep=3, training=False)
    return squad, feature


def peaks(feature: Feature, *spans: tuple[int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    start, end = np.full((2, len(feature.tokens)), -20.0)
    for first, last, height in spans:
        start[first], end[last] = height, height
    return start, end


def only_answer(squad: Squad, feature: Feature, *spans: tuple[int, int, float], **changed: object) -> str:
    config = replace(CONFIG, **changed)  # type: ignore[arg-type]
    logits = [peaks(feature, *spans)]
    answers, _ = answer_questions(squad, [feature], logits, config, vocabulary=VOCAB, basic=BASIC)
    return answers["q"]


def test_only_spans_inside_the_window_and_not_too_long_are_answers() -> None:
    squad, feature = one_feature()
    b = feature.b_start
    assert only_answer(squad, feature, (b, b + 2, 9.0)) == "the quick brown"
    assert only_answer(squad, feature, (b, b + 2, 9.0), (b + 3, b + 3, 1.0), max_answer_length=1) == "fox"
    assert only_answer(squad, feature, (0, 0, 9.0), (1, b - 1, 8.0), (b + 1, b + 1, 1.0)) == "quick"
    assert only_answer(squad, feature, (b + 2, b + 1, 9.0), (b + 3, b + 3, 1.0), n_best=1) == "empty"


def test_a_question_without_any_window_is_answered_empty() -> None:
    squad, _ = one_feature()
    answers, n_best = answer_questions(squad, [], [], CONFIG, vocabulary=VOCAB, basic=BASIC)
    assert answers == {"q": "empty"}
    config = replace(CONFIG, version_2=True)
    assert answer_questions(squad, [], [], config, vocabulary=VOCAB, basic=BASIC)[0] == {"q": ""}  # no words, no answer
    assert n_best["q"] == [{"text": "empty", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0}]


def test_version_2_prefers_no_answer_by_more_than_the_threshold() -> None:
    squad, feature = one_feature()
    spans = ((0, 0, 3.0), (feature.b_start, feature.b_start, 2.0))  # no answer leads by 6 - 4 = 2
    assert only_answer(squad, feature, *spans) == "the"
    assert only_answer(squad, feature, *spans, version_2=True) == ""
    assert only_answer(squad, feature, *spans, version_2=True, null_threshold=1.9) == ""
    assert only_answer(squad, feature, *spans, version_2=True, null_threshold=2.0) == "the"


def test_version_2_uses_each_questions_own_lowest_null_score() -> None:
    squad, feature = one_feature()
    other = replace(feature, question=Question("r", "who ?", 0, ()))
    squad = Squad(squad.contexts, [feature.question, other.question])
    low = peaks(feature, (0, 0, -3.0), (feature.b_start, feature.b_start, 1.0))
    high = peaks(feature, (0, 0, 5.0), (feature.b_start, feature.b_start, 1.0))
    answers, n_best = answer_questions(
        squad,
        [feature, feature, other],
        [high, low, high],
        replace(CONFIG, version_2=True),
        vocabulary=VOCAB,
        basic=BASIC,
    )
    assert answers == {"q": "the", "r": ""}
    null = {name: next(e for e in entries if not e["text"]) for name, entries in n_best.items()}
    assert (null["q"]["start_logit"], null["r"]["start_logit"]) == (-3.0, 5.0)


@pytest.mark.parametrize(
    ("spoken", "original", "expected"),
    [
        ("smith", "Smith's", "Smith"),
        ("steve smith", "(Steve Smith),", "Steve Smith"),
        ("cafe", "«Café»", "Café"),
        ("[UNK]", "un-affable!", "un-affable!"),  # not found: the whole original
        ("fi", "ﬁx it", "ﬁx it"),  # NFD leaves the ligature alone, so it is not found
        ("a b", "a\u00ad b!", "a\u00ad b!"),  # a dropped soft hyphen: positions do not carry over
    ],
)
def test_original_text(spoken: str, original: str, expected: str) -> None:
    assert original_text(spoken, original, " ".join(BASIC(original))) == expected


@settings(deadline=None)
@given(st.lists(st.text(alphabet="abé,.'(中", min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_original_is_recovered_for_any_run_of_its_tokens(words: list[str], data: st.DataObject) -> None:
    original = " ".join(words)
    tokens = BASIC(original)
    first = data.draw(st.integers(0, len(tokens) - 1))
    last = data.draw(st.integers(first, len(tokens) - 1))
    spoken = " ".join(tokens[first : last + 1])
    found = original_text(spoken, original, " ".join(tokens))
    assert found in original
    assert " ".join(BASIC(found)) == spoken
