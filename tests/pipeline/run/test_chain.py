"""Which stages run again, and why: fingerprints over configuration, inputs and needs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError
from pipeline.run.chain import Chain
from pipeline.run.rundir import RunDir
from pipeline.stage import fingerprints, function_of
from pipeline.stages import table
from pipeline.strict_toml import table_of
from pipeline.worker import resolve
from support.running import TWO_PHASES

ALL = [
    "extract",
    "shard",
    "vocab",
    "samples_128",
    "samples_512",
    "phase1",
    "phase2",
    "export",
    "squad",
    "mrpc",
    "sst2",
    "inference",
    "report",
]
AFTER_PHASE1 = ["phase1", "phase2", "export", "squad", "mrpc", "sst2", "inference", "report"]


def chain_of(path: Path, *settings: str, corpora: dict | None = None) -> Chain:
    recipe = load_recipe(TWO_PHASES, settings)
    path.mkdir(exist_ok=True)
    (path / "run.json").write_text(
        json.dumps(
            {
                "recipe": table_of(recipe),
                "profile": dataclasses.asdict(load_profile("local")),
                "corpora": corpora or {},
                "data_dir": ".",
            }
        )
    )
    return Chain.of(RunDir(path))


def finish(chain: Chain, *names: str) -> None:
    for number, name in enumerate(names or chain.stages):
        folder = chain.run.stage(name)
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "stage.json").write_text(json.dumps(chain.record(name)))
        folder.mark_done({**chain.record(name), "finished": number, "result": {}})


def test_the_chain_in_order(tmp_path):
    chain = chain_of(tmp_path / "run")
    assert list(chain.stages) == ALL
    for position, (_, stage) in enumerate(chain.stages.items()):
        assert set(stage.needs) <= set(ALL[:position])
    assert list(chain.todo()) == ALL


def test_a_named_vocabulary_and_absent_tasks_shorten_the_chain():
    recipe = dataclasses.replace(load_recipe("bert_large"), mrpc=None)
    names = list(table(recipe))
    assert "vocab" not in names
    assert "mrpc" not in names
    assert table(recipe)["samples_128"].corpora == ("vocab.txt",)


def test_files_that_are_only_looked_at_may_be_missing(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain, "extract")
    there = chain.run.data_dir / "sentiment-dev.tsv"
    there.write_text("")
    assert resolve(chain, chain.stages["shard"])["evaluation"] == [there]


@pytest.mark.parametrize("name", ALL)
def test_every_stage_function_takes_what_its_stage_gives(name):
    stage = table(load_recipe(TWO_PHASES))[name]
    function = function_of(stage.run)
    inspect.signature(function).bind(object(), **stage.config, **stage.inputs, **stage.looks_at)
    assert importlib.import_module(stage.run.split(":")[0]).__doc__


@pytest.mark.parametrize(
    ("setting", "redone"),
    [
        ("phase1.learning_rate=0.5", AFTER_PHASE1),
        ("phase2.steps=9", ["phase2", "export", "squad", "mrpc", "sst2", "inference", "report"]),
        ("train.seed=7", AFTER_PHASE1),
        ("data.dupe_factor=2", ["samples_128", "samples_512", *AFTER_PHASE1]),
        ("data.vocab_size=4096", ["vocab", "samples_128", "samples_512", *AFTER_PHASE1]),
        ("data.lowercase=false", ["vocab", "samples_128", "samples_512", *AFTER_PHASE1]),
        ("data.max_document_mb=3", ALL),
        ("sst2.epochs=9", ["sst2", "report"]),
        ("sst2.eval=other.tsv", ["sst2", "report"]),  # shard only looks at it
        ("train.checkpoint_every=3", []),
        ("phase1.micro_batch=4", []),
    ],
)
def test_one_value_changed_redoes_exactly_what_depends_on_it(tmp_path, setting, redone):
    finish(chain_of(tmp_path / "run"))
    chain = chain_of(tmp_path / "run", setting)
    todo = chain.todo()
    assert list(todo) == redone
    if redone:
        key, value = setting.split("=")
        assert key.split(".")[1] in todo[redone[0]]
        assert value in todo[redone[0]] or "False" in todo[redone[0]]


def test_another_corpus_redoes_everything_and_names_the_file(tmp_path):
    before = {"enwiki-sample.xml.bz2": {"bytes": 1, "digest": "a"}}
    finish(chain_of(tmp_path / "run", corpora=before))
    chain = chain_of(tmp_path / "run", corpora={"enwiki-sample.xml.bz2": {"bytes": 2, "digest": "b"}})
    todo = chain.todo()
    assert list(todo) == ALL
    assert "enwiki-sample.xml.bz2" in todo["extract"]
    assert "extract" in todo["shard"]


def test_everything_done_is_nothing_to_do(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain)
    assert chain.todo() == {}


def test_the_report_follows_any_change(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain)
    finish(chain, "sst2")  # number 0: older than the report
    assert chain.todo() == {}
    done = chain.run.stage("sst2").done or {}
    chain.run.stage("sst2").mark_done({**done, "finished": 99})
    assert list(chain.todo()) == ["report"]


def test_a_subset_needs_its_needs(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain, "extract")
    assert list(chain.select(["shard", "vocab"])) == ["shard", "vocab"]
    with pytest.raises(ConfigError, match="samples_128 needs shard, vocab"):
        chain.select(["samples_128"])
    with pytest.raises(ConfigError, match="no stage 'phase3'"):
        chain.select(["phase3"])


def test_where_the_code_of_a_stage_lies_and_its_version_are_no_part_of_its_fingerprint():
    stages = table(load_recipe(TWO_PHASES))
    moved = {n: dataclasses.replace(s, run="elsewhere:run", version=7) for n, s in stages.items()}
    assert fingerprints(moved, {}, {}) == fingerprints(stages, {}, {})
    renamed = {n: dataclasses.replace(s, inputs={**s.inputs, "more": "data:x"}) for n, s in stages.items()}
    assert not set(fingerprints(renamed, {}, {}).values()) & set(fingerprints(stages, {}, {}).values())


def test_a_corpus_of_another_kind_is_another_input(tmp_path):
    finish(chain_of(tmp_path / "run"))
    todo = chain_of(
        tmp_path / "run", 'data.books=["books", "boolq.jsonl"]', 'data.jsonl=["quac.jsonl", "reviews.jsonl"]'
    ).todo()
    assert "books was ['data:books'], is ['data:books', 'data:boolq.jsonl']" in todo["extract"]


def newer(chain: Chain, *names: str) -> Chain:
    stages = {n: dataclasses.replace(s, version=1 + (n in names)) for n, s in chain.stages.items()}
    return dataclasses.replace(chain, stages=stages)


def test_what_an_older_version_made_stays_done_and_is_named(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain)
    assert chain.older() == []
    assert newer(chain, "phase1", "mrpc", "report").older() == ["phase1", "mrpc"]
    assert newer(chain, "phase1", "mrpc", "report").todo() == {}


def test_a_stage_that_is_made_again_takes_its_followers_along(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain)
    again = chain.with_followers(["phase2"])
    assert again == ["phase2", "export", "squad", "mrpc", "sst2", "inference"]
    assert list(chain.todo(again)) == [*again, "report"]
    assert list(chain.select(["phase2", "export"], again)) == ["phase2", "export"]
    with pytest.raises(ConfigError, match="export needs phase2"):
        chain.select(["export"], again)
    with pytest.raises(ConfigError, match="--remake: no stage 'phase9'"):
        chain.with_followers(["phase9"])


def test_old_output_is_moved_aside_never_overwritten(tmp_path):
    chain = chain_of(tmp_path / "run")
    finish(chain)
    (chain.run.stage("vocab").path / "vocab.txt").write_text("old")
    first = chain.run.stage("vocab").move_aside()
    finish(chain, "vocab")
    second = chain.run.stage("vocab").move_aside()
    assert first is not None
    assert second is not None
    assert (first / "vocab.txt").read_text() == "old"
    assert first != second
