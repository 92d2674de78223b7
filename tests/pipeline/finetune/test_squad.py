"""SQuAD reading and features: the golden vectors of the original, its official layout, and bad files."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.implementations import BertWordPieceTokenizer

from data_prep.errors import DataError
from pipeline.config import FinetuneConfig
from pipeline.finetune.options import defaults
from pipeline.finetune.squad import Feature, build_features, read_squad, split_words

GOLDEN = json.loads((Path(__file__).parent / "golden" / "squad.json").read_text())
VOCAB: list[str] = GOLDEN["vocab"]
CONFIG = defaults(
    "squad",
    dataset="golden",
    max_seq_len=GOLDEN["max_seq_length"],
    doc_stride=GOLDEN["doc_stride"],
    max_query_length=GOLDEN["max_query_length"],
)


def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """WordPiece by the tokenizers library itself, in the form `data_prep.wordpiece.Encoder.encode` gives."""
    tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(VOCAB)}, lowercase=True)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    flat = np.array([i for own in ids for i in own], np.uint32)
    return flat, np.concatenate([[0], np.cumsum([len(own) for own in ids])]).astype(np.int64)


def features(path: Path, *, training: bool, config: FinetuneConfig = CONFIG) -> tuple[list[Feature], list[str]]:
    return build_features(read_squad(path, version_2=config.version_2), encode, config, cls=2, sep=3, training=training)


def squad_file(folder: Path, *questions: dict[str, Any], context: str = "The quick brown fox .") -> Path:
    entries = [{"id": f"q{i}", "question": "who ?"} | q for i, q in enumerate(questions)]
    paragraphs = [{"context": context, "qas": entries}]
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def answer(text: str, start: int) -> dict[str, Any]:
    return {"answers": [{"text": text, "answer_start": start}]}


@pytest.mark.parametrize("part", ["train", "eval"])
def test_features_equal_the_originals(tmp_path: Path, part: str) -> None:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(GOLDEN["dataset"]))
    made, skipped = features(path, training=part == "train")
    assert skipped == []
    assert len(made) == len(GOLDEN[f"{part}_features"])
    for feature, expected in zip(made, GOLDEN[f"{part}_features"], strict=True):
        assert feature.question.id == f"q{expected['example_index'] + 1}"
        assert feature.window == expected["doc_span_index"]
        assert [VOCAB[i] for i in feature.tokens] == expected["tokens"]
        assert feature.b_start == expected["b_start"]
        assert feature.word.tolist() == expected["word"]
        assert (np.flatnonzero(feature.max_context) + feature.b_start).tolist() == expected["max_context"]
        if part == "train":
            assert (feature.start, feature.end) == (expected["start_position"], expected["end_position"])


def test_words_are_split_at_the_originals_five_blanks_only() -> None:
    words, owner = split_words(" a\u202fbc\t\r\nd\u00a0e ")
    assert words == ["a", "bc", "d\u00a0e"]
    assert owner.tolist() == [-1, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


@settings(deadline=None)
@given(st.text(alphabet="ab \t\n\u202f\u00a0é中𝔘", max_size=30))
def test_every_visible_character_belongs_to_its_word(context: str) -> None:
    words, owner = split_words(context)
    assert len(owner) == len(context)
    rebuilt = [""] * len(words)
    for character, word in zip(context, owner.tolist(), strict=True):
        if character not in " \t\r\n\u202f":
            rebuilt[word] += character
    assert rebuilt == words


def test_windows_cover_every_token_once_as_max_context(tmp_path: Path) -> None:
    path = squad_file(tmp_path, answer("fox", 16), context="The quick brown fox . " * 40)
    made, _ = features(path, training=False)
    assert len(made) > 10
    assert sum(int(feature.max_context.sum()) for feature in made) == 200
    assert all(len(feature.tokens) <= CONFIG.max_seq_len for feature in made)
    assert [feature.window for feature in made] == list(range(len(made)))


def test_max_context_prefers_a_much_longer_window(tmp_path: Path) -> None:
    # Windows of 320 and 200 tokens from 0 and 128: token 224 has 95 tokens after it in the first, 96 before it in
    # the second, but 95 + 3.2 > 96 + 2.0; token 225 has 94 and 97.
    path = squad_file(tmp_path, answer("fox", 16), context="The quick brown fox " * 82)
    config = replace(CONFIG, max_seq_len=325, doc_stride=128)
    (first, second), _ = features(path, training=False, config=config)
    assert (len(first.word), len(second.word)) == (320, 200)
    assert first.max_context.tolist() == [True] * 225 + [False] * 95
    assert second.max_context.tolist() == [False] * 97 + [True] * 103


def test_a_long_context_takes_memory_by_its_tokens_and_not_by_tokens_times_windows(tmp_path: Path) -> None:
    """40,000 tokens in 10,000 windows: 3 GB for each table of both, a few MB for one of tokens."""
    config = replace(CONFIG, max_seq_len=16, doc_stride=4)
    path = squad_file(tmp_path, answer("quick", 4), context="The quick brown fox " * 10_000)
    tracemalloc.start()
    try:
        made, _ = features(path, training=True, config=config)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert sum(int(feature.max_context.sum()) for feature in made) == 40_000


@pytest.mark.parametrize("word", ["false", 0, None])
def test_whether_a_question_is_impossible_is_true_or_false(tmp_path: Path, word: Any) -> None:
    path = squad_file(tmp_path, {**answer("fox", 16), "is_impossible": word})
    with pytest.raises(DataError, match=f"question 'q0': 'is_impossible' must be true or false, found {word!r}"):
        read_squad(path, version_2=True)
    assert len(read_squad(path).questions) == 1


def test_an_answer_inside_a_word_is_tightened_to_its_tokens(tmp_path: Path) -> None:
    (feature,), _ = features(squad_file(tmp_path, answer("fox", 1), context="(fox)."), training=True)
    assert [VOCAB[i] for i in feature.tokens[feature.start : feature.end + 1]] == ["fox"]


def test_an_answer_not_in_its_context_is_skipped_and_named(tmp_path: Path) -> None:
    path = squad_file(
        tmp_path, answer("cat", 4), answer("quick", 4), answer("fox", 400), answer("", 0), answer("fox", -3)
    )
    made, skipped = features(path, training=True)
    assert skipped == ["q0", "q2", "q3", "q4"]
    assert [feature.question.id for feature in made] == ["q1"]
    assert len(features(path, training=False)[0]) == 5  # evaluation asks every question


def test_impossible_questions_need_version_2_and_point_to_cls(tmp_path: Path) -> None:
    path = squad_file(tmp_path, {"answers": [], "is_impossible": True}, answer("fox", 16))
    with pytest.raises(DataError, match=r"squad\.json: question 'q0' has no answer.*--version-2"):
        read_squad(path)
    squad = read_squad(path, version_2=True)
    assert squad.references() == {"q0": [""], "q1": ["fox"]}
    made, skipped = build_features(squad, encode, CONFIG, cls=2, sep=3, training=True)
    assert (made[0].start, made[0].end, skipped) == (0, 0, [])
    assert made[1].start == made[1].end > 0


def test_questions_without_answers_can_be_read_to_predict(tmp_path: Path) -> None:
    path = squad_file(tmp_path, {})
    assert read_squad(path, answers=False).questions[0].answers == ()
    with pytest.raises(DataError, match="'q0' has no answer"):
        read_squad(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": [\n{]}', r"bad\.json:2: not valid JSON at column 2"),
        (b'{"data": "\xff"}', r"bad\.json: not UTF-8 at byte 10"),
        (b'{"data": ' + b"9" * 5000 + b"}", r"bad\.json: not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, r"bad\.json: nested too deeply"),
        (b"[]", "'data' is missing; found list"),
        (b'{"version": "1.1"}', "'data' is missing; found version"),
        (b'{"data": []}', "no question in it"),
        (b'{"data": [{"paragraphs": [{"qas": []}]}]}', "article 0, paragraph 0: 'context' is missing"),
        (
            b'{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}',
            "'context' must be a str, found int",
        ),
        (
            b'{"data": [{"paragraphs": [{"context": "\\ud800", "qas": []}]}]}',
            "half a surrogate pair",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_squad(path)


def test_bad_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="question 'q0': 'answer_start' must be a int, found str"):
        read_squad(squad_file(tmp_path, {"answers": [{"text": "fox", "answer_start": "16"}]}))
    with pytest.raises(DataError, match="question id 'q' stands twice"):
        read_squad(squad_file(tmp_path, {"id": "q"} | answer("fox", 16), {"id": "q"} | answer("fox", 16)))
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        read_squad(tmp_path / "none.json")
