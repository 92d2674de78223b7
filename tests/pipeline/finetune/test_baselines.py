"""What a score is compared with: the majority, words without a model, the same model without pretraining."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import load_recipe
from pipeline.finetune import glue
from pipeline.finetune.baselines import majority, naive_bayes, terms
from pipeline.finetune.table import read_table
from pipeline.finetune.task import Finetuning, Spec, run
from pipeline.stages import table
from support.toys import config_of, examples, write_model

from .test_task import job


def by_hand(train: list[str], classes: list[int], text: str) -> int:
    """Naive Bayes from its definition, one text and one class at a time, with fractions instead of arrays."""
    vocabulary = {term for each in train for term in terms(each)}
    scores = []
    for label in sorted(set(classes)):
        own = [set(terms(each)) for each, of in zip(train, classes, strict=True) if of == label]
        total = sum(len(each) for each in own) + len(vocabulary)
        score = math.log(len(own) + 1)  # what the prior is smoothed by
        for term in set(terms(text)) & vocabulary:
            score += math.log((sum(term in each for each in own) + 1) / total)
        scores.append(score)
    return int(np.argmax(scores))


def test_naive_bayes_is_its_definition() -> None:
    dice = np.random.default_rng(0)
    words = np.array(["good", "bad", "film", "plot", "dull", "fine", "not", "a", "the", "."])
    texts = [" ".join(dice.choice(words, 6)) for _ in range(60)]
    classes = [int("good" in text) for text in texts]
    found = naive_bayes(texts[:40], np.array(classes[:40]), texts[40:])
    assert found.tolist() == [by_hand(texts[:40], classes[:40], text) for text in texts[40:]]
    assert glue.accuracy(found, np.array(classes[40:])) > 70  # what it counts carries the class
    assert majority(np.array([1, 0, 1]), 2).tolist() == [1, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder)
    return folder


@pytest.mark.slow
def test_scores_stand_beside_their_baselines(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "mrpc"), replace(config_of("mrpc"), epochs=1)
    given = {"task": "mrpc", "config": config, "model": model, "train": data, "eval": data}
    scores = run(job(tmp_path / "out"), **given)
    classes = read_table(data, glue.TASKS["mrpc"]).classes
    assert classes is not None
    common = np.bincount(read_table(data, glue.TASKS["mrpc"]).classes).argmax()
    assert scores["baselines"]["majority"]["accuracy"] == pytest.approx(100 * (classes == common).mean())
    assert set(scores["baselines"]["bag_of_words"]) == {"accuracy", "f1", "mean"}
    scratch = run(job(tmp_path / "scratch"), **given, scratch=True)
    assert scratch["identity"] != scores["identity"]
    weights = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("out", "scratch")]
    assert len(weights[0]) == len(weights[1])


def test_a_baseline_is_a_stage_of_its_own_and_changes_no_other() -> None:
    recipe = load_recipe("tiny", ["mrpc.baseline=false", "sst2.baseline=false"])
    asked = load_recipe("tiny", ["mrpc.baseline=true", "sst2.baseline=false"])
    before, after = table(recipe), table(asked)
    assert set(after) - set(before) == {"mrpc-scratch"}
    assert after["mrpc-scratch"].width == "ranks"
    assert before["mrpc"].record({"export": "x"}, {}) == after["mrpc"].record({"export": "x"}, {})


def test_without_pretraining_nothing_of_the_folder_is_left(tmp_path: Path, model: Path) -> None:
    data, config = examples(tmp_path, "sst2"), config_of("sst2")
    spec = Spec(task="sst2", config=config, model=model, train=data, eval=data, modes=("train",))
    tasks = [
        Finetuning(job(tmp_path / str(s), "sst2"), torch.device("cpu"), replace(spec, scratch=s)) for s in (False, True)
    ]
    kept, drawn = (task.model().state_dict() for task in tasks)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(kept[name], drawn[name])
    assert drawn[name].std() == pytest.approx(0.02, rel=0.2)
