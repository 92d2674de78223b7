"""Both splitters find the sentences of plain English and lose no character of any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sentences import LANGUAGES, PUNKT_MODELS, splitter


@pytest.mark.parametrize("name", ["sentencex", "punkt"])
def test_plain_english(name: str) -> None:
    split = splitter("en", name)
    assert split("Dr. Smith went home. He was  tired.\tWas he? ") == [
        "Dr. Smith went home.",
        "He was tired.",
        "Was he?",
    ]
    assert split("He was  tired. ") == split("He was\u2028tired.") == ["He was tired."]
    assert split("") == split(" \u2028 ") == []


def test_punkt_knows_german_abbreviations() -> None:
    assert splitter("de", "punkt")("Das gilt z.B. hier. Und dort.") == ["Das gilt z.B. hier.", "Und dort."]


@pytest.mark.parametrize("name", ["sentencex", "punkt"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80) | st.text(alphabet='ab. !?\n"()。\u2028\x1c', max_size=80))
def test_no_character_is_lost_and_each_sentence_is_one_line(name: str, text: str) -> None:
    sentences = splitter("en", name)(text)
    assert "".join(sentences).replace(" ", "") == "".join(text.split())
    assert all(sentence and sentence == " ".join(sentence.split()) for sentence in sentences)


def test_refusals_say_what_to_set() -> None:
    with pytest.raises(DataError, match=r"data\.splitter is 'nltk'"):
        splitter("en", "nltk")
    with pytest.raises(DataError, match=r"no model for language 'bg'.*sentencex"):
        splitter("bg", "punkt")


@pytest.mark.parametrize(
    ("language", "near"),
    [("English", "'en'"), ("deu", "'de'"), ("DE", "'de'"), ("german", "'de'"), ("xq", "'und'"), ("", "'und'"),
     ("de\n", "'de'"), ("../de", "'de'"), ("q" * 10_000, "'und'")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sentencex", "punkt"])
def test_an_unknown_language_is_refused_with_the_known_ones_near_it(language: str, near: str, name: str) -> None:
    with pytest.raises(DataError, match=r"data\.language is .*unknown.*ISO 639") as caught:
        splitter(language, name)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_known_language_has_a_splitter() -> None:
    for language in (*LANGUAGES, "zh-hans", "be-tarask"):
        assert splitter(language, "sentencex")("Ein Satz.") == ["Ein Satz."]
    assert set(PUNKT_MODELS) <= LANGUAGES


def test_the_language_decides_where_a_sentence_ends() -> None:
    text = "Das war am 3. Oktober. Es war kalt."
    assert splitter("de", "sentencex")(text) == ["Das war am 3. Oktober.", "Es war kalt."]
    assert len(splitter("en", "sentencex")(text)) == 3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencex", None)
    with pytest.raises(DataError, match="pip install sentencex"):
        splitter("en", "sentencex")
