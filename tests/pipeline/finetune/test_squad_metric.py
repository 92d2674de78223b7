"""Exact match and F1: equal to the official SQuAD script and to torchmetrics on random texts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.finetune.squad_metric import exact_match, f1, score

WORDS = ["the", "a", "An", "fox,", "Fox", "(fox)", "it's", "its", "don't", "café", "theory", "-", "«no»", "1,000"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join) | st.text(max_size=12)
QUESTIONS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def official(carriers: Path) -> Any:
    spec = importlib.util.spec_from_file_location("squad_v1_evaluate", carriers / "squad_v1_evaluate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both_forms(drawn: list[tuple[str, list[str]]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    return {str(i): a for i, (a, _) in enumerate(drawn)}, {str(i): r for i, (_, r) in enumerate(drawn)}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(QUESTIONS)
def test_equals_the_official_script(official: Any, drawn: list[tuple[str, list[str]]]) -> None:
    answers, references = both_forms(drawn)
    qas = [{"id": key, "answers": [{"text": t} for t in texts]} for key, texts in references.items()]
    expected = official.evaluate([{"paragraphs": [{"qas": qas}]}], answers)
    assert score(answers, references) == pytest.approx(expected, abs=1e-12)


def test_the_golden_answers_score_as_the_official_script_says(official: Any) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "squad.json").read_text())
    articles = golden["dataset"]["data"]
    questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    references = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa in questions}
    by_rank = [{name: entries[rank]["text"] for name, entries in golden["nbest"].items()} for rank in range(20)]
    assert by_rank[0] == golden["answers"]
    found = [score(answers, references) for answers in by_rank]
    for own, answers in zip(found, by_rank, strict=True):
        assert own == pytest.approx(official.evaluate(articles, answers), abs=1e-12)
    assert len({own["f1"] for own in found}) > 2


@settings(max_examples=50, deadline=None)
@given(QUESTIONS)
def test_equals_torchmetrics(drawn: list[tuple[str, list[str]]]) -> None:
    # which scores texts without words as SQuAD 2.0 does
    from torchmetrics.functional.text import squad

    answers, references = both_forms(drawn)
    expected = squad(
        [{"id": key, "prediction_text": text} for key, text in answers.items()],
        [
            {"id": key, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for key, texts in references.items()
        ],
    )
    assert score(answers, references, version_2=True) == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-4
    )


def test_a_question_left_out_counts_zero() -> None:
    assert score({"1": "fox"}, {"1": ["fox"], "2": ["fox"]}) == {"exact_match": 50.0, "f1": 50.0}


def test_version_2_rewards_no_answer() -> None:
    assert f1("", "", version_2=True) == exact_match("", "") == 1.0
    assert f1("", "") == f1("fox", "", version_2=True) == f1("", "fox", version_2=True) == 0.0
    assert score({"1": ""}, {"1": [""]}, version_2=True) == {"exact_match": 100.0, "f1": 100.0}
