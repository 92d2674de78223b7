"""Recipes and profiles: strict, all errors at once, each with file, line, key and a suggestion."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import (
    RECIPES,
    OptimizerConfig,
    Recipe,
    differences,
    load_profile,
    load_recipe,
    restore,
    science,
)
from pipeline.errors import ConfigError
from pipeline.monitor.cpu import computes_bf16
from pipeline.stages import table
from pipeline.strict_toml import table_of
from slurm.profile import PROFILES
from support.running import TWO_PHASES

TINY = Path(TWO_PHASES).read_text(encoding="utf-8")


def refusal(tmp_path, text: str, *settings: str) -> list[str]:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), settings)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_under_its_own_name(path):
    """Those that are only bases of others once they have what these must say."""
    model = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    needs = {"small": [], "standard": [], "further": [f"model.{key}=4" for key in model]}
    settings = [*needs[path.stem], 'data.books=["books"]'] if path.stem in needs else []
    assert load_recipe(path.stem, settings).name == path.stem


def test_a_recipe_changes_its_base_table_by_table(tmp_path):
    (tmp_path / "own.toml").write_text('name = "own"\nbase = "small"\n[data]\nbooks = ["x"]\n[phase1]\nsteps = 7\n')
    (tmp_path / "more.toml").write_text('name = "more"\nbase = "own.toml"\n[phase1]\nwarmup = 0.5\n')
    small, more = load_recipe("small", ['data.books=["x"]']), load_recipe(str(tmp_path / "more.toml"))
    changed = dataclasses.replace(small.phases["phase1"], steps=7, warmup=0.5)
    assert more == dataclasses.replace(small, name="more", phases={**small.phases, "phase1": changed})
    (tmp_path / "own.toml").write_text('name = "own"\nbase = "more.toml"\n')
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(str(tmp_path / "more.toml"))
    (tmp_path / "own.toml").write_text('name = "own"\nbase = "smal"\n')
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        load_recipe(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_loads_under_its_own_name(path):
    assert load_profile(path.stem).name == path.stem


def test_nvidias_two_phase_science():
    recipe = load_recipe("bert_large")
    model, one, two = recipe.model, *recipe.phases.values()
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (1024, 24, 16)
    assert (model.intermediate_size, model.hidden_act) == (4096, "tanh")
    assert (one.seq_len, one.max_predictions, one.global_batch, one.steps) == (128, 20, 65536, 7038)
    assert (two.seq_len, two.max_predictions, two.global_batch, two.steps) == (512, 80, 32768, 1563)
    assert (one.learning_rate, one.warmup, two.learning_rate, two.warmup) == (6e-3, 0.2843, 4e-3, 0.128)
    assert one.schedule == two.schedule == "poly"
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.variant, optimizer.betas) == ("lamb", "apex", (0.9, 0.999))
    assert (optimizer.eps, optimizer.weight_decay, recipe.train.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert recipe.squad is not None
    assert recipe.mrpc is not None
    assert recipe.sst2 is not None
    assert (recipe.squad.max_seq_len, recipe.squad.doc_stride, recipe.squad.batch) == (384, 128, 256)
    assert (recipe.mrpc.learning_rate, recipe.mrpc.batch, recipe.sst2.batch) == (1.8e-5, 128, 1024)


MUTATIONS = [
    ("steps = 700", "step = 400", "did you mean 'steps'", "my.toml:"),
    ("steps = 700", 'steps = "400"', "expected a whole number, found a string", "phase1.steps"),
    ("steps = 700", "steps = 700.5", "expected a whole number", "phase1.steps"),
    ("steps = 700", "steps = true", "expected a whole number, found true or false", "phase1.steps"),
    ("steps = 700", "steps = 0", "at least 1", "phase1.steps"),
    ("learning_rate = 1e-3", "learning_rate = nan", "finite", "phase1.learning_rate"),
    ("learning_rate = 1e-3", "learning_rate = -1.0", "greater than 0", "phase1.learning_rate"),
    ("warmup = 0.05", "warmup = 1.5", "at most 1", "warmup"),
    ('name = "adamw"', 'name = "adam"', "did you mean 'adamw'", "optimizer.name"),
    ('precision = "bf16"', 'precision = "fp8"', "fp", "train.precision"),
    ("[optimizer]", "[optimiser]", "did you mean 'optimizer'", "optimiser"),
    ("hidden_size = 256", "hidden_size = 255", "not divisible", "model.num_attention_heads"),
    ("seq_len = 512", "seq_len = 1024", "exceeds", "phase2.seq_len"),
    ("max_predictions = 20", "max_predictions = 128", "must be below", "phase1.max_predictions"),
    ('books = ["books"]', 'books = "books"', "expected a list", "data.books"),
    ('books = ["books"]', "books = [1]", "expected a string", "data.books"),
    ("max_seq_len = 64", "max_seq_len = 4096", "exceeds", "sst2.max_seq_len"),
    ('dataset = "question and', 'datasets = "question and', "did you mean 'dataset'", "mrpc"),
    ("[model]", "[model", "not valid TOML", "my.toml"),
    ("[phase2]", "[phase_2]", "did you mean 'phase", "phase_2"),
    ("[phase2]", "[phase0]", "unknown key", "phase0"),
    ('name = "tiny"', 'name = "tiny"\nphases = ["phase3"]', "no table [phase3]", "my.toml:3: phases"),
    ('name = "tiny"', 'name = "tiny"\nphases = ["phase1", "phase1"]', "different tables", "phases"),
    ('name = "tiny"', 'name = "tiny"\nphases = []', "at least one", "phases"),
    ('name = "tiny"', 'name = "tiny"\nphases = "phase1"', "a list", "phases"),
    ('name = "tiny"', 'name = "tiny"\nphase3 = 7', "expected a table", "phase3"),
]


@pytest.mark.parametrize(("old", "new", "reason", "where"), MUTATIONS, ids=[new for _, new, _, _ in MUTATIONS])
def test_a_wrong_value_is_one_line_with_place_and_reason(tmp_path, old, new, reason, where):
    assert old in TINY
    lines = refusal(tmp_path, TINY.replace(old, new, 1))
    assert any(reason in line and where in line for line in lines), lines


def test_the_line_number_is_that_of_the_key(tmp_path):
    text = TINY.replace("steps = 700", "steps = -4")
    number = text.splitlines().index("steps = -4") + 1
    assert f"my.toml:{number}: phase1.steps" in refusal(tmp_path, text)[0]


def test_all_errors_at_once(tmp_path):
    lines = refusal(
        tmp_path, TINY.replace("steps = 700", "step = 400").replace("[optimizer]", "[optimiser]"), "train.sed=3"
    )
    text = "\n".join(lines)
    for word in ("phase1.step:", "steps is missing", "optimiser", "--set train.sed", "did you mean 'seed'"):
        assert word in text, word


def test_a_setting_beats_the_file_and_is_named_in_its_errors(tmp_path):
    assert load_recipe(TWO_PHASES, ["phase1.steps=7"]).phases["phase1"].steps == 7
    assert load_recipe(TWO_PHASES, ["optimizer.name=adamw"]).optimizer.name == "adamw"
    assert refusal(tmp_path, TINY, "phase1.steps=0") == ["--set phase1.steps = 0: must be at least 1"]
    assert "key=value" in refusal(tmp_path, TINY, "phase1.steps")[0]


def test_an_unknown_recipe_lists_what_there_is():
    with pytest.raises(ConfigError, match="did you mean 'bert_large'"):
        load_recipe("bert_larg")
    with pytest.raises(ConfigError, match="no cluster profile"):
        load_profile("nowhere.toml")


def test_a_deeply_nested_file_is_refused_not_a_crash(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", [TWO_PHASES, "bert_large"])
def test_what_a_run_stores_restores_equal(name):
    recipe = load_recipe(name)
    assert restore(Recipe, table_of(recipe), "run.json") == recipe


def test_phases_are_taken_by_number_or_as_selected():
    second = dataclasses.asdict(load_recipe(TWO_PHASES).phases["phase2"])
    third = [f"phase10.{key}={value}" for key, value in second.items() if value is not None]
    assert list(load_recipe(TWO_PHASES, third).phases) == ["phase1", "phase2", "phase10"]
    for names in (["phase1"], ["phase2"], ["phase10", "phase1"]):
        recipe = load_recipe(TWO_PHASES, [*third, f"phases={names}"])
        assert list(recipe.phases) == names
        assert restore(Recipe, json.loads(json.dumps(table_of(recipe))), "run.json") == recipe
        assert [name for name in table(recipe) if name.startswith("phase")] == names
        assert table(recipe)["export"].inputs["checkpoint"] == f"{names[-1]}#checkpoint"


def test_a_phase_that_starts_from_weights_of_its_own_leaves_out_those_before():
    recipe = load_recipe(TWO_PHASES, ["phase2.start=bert", "data.vocab=vocab.txt"])
    assert list(recipe.phases) == ["phase2"]
    assert "samples_128" not in table(recipe)
    assert table(recipe)["phase2"].inputs["start"] == "data:bert"
    first = load_recipe(TWO_PHASES, ["phase1.start=bert", "data.vocab=vocab.txt"])
    assert list(first.phases) == ["phase1", "phase2"]
    assert table(first)["phase1"].inputs["start"] == "data:bert"
    assert table(first)["phase2"].inputs["start"] == "phase1#checkpoint"


def test_only_what_is_stored_may_hold_what_only_a_newer_version_knows(capsys):
    recipe = load_recipe(TWO_PHASES)
    stored = {**table_of(recipe), "later": 1}
    stored["train"] = {**stored["train"], "later": {"a": 1}}
    for _ in range(2):
        assert restore(Recipe, stored, "later/run.json") == recipe
    assert (
        capsys.readouterr().err == "later/run.json: later, train.later means nothing to this version and is left out\n"
    )
    for setting in ("later=2", "train.later=2", "train.later.a=2"):
        with pytest.raises(ConfigError, match="unknown key"):
            restore(Recipe, stored, "later/run.json", [setting])


def spelled_out(value):
    """The science as version 0.1.0 wrote it: every scientific field, also at its default."""
    if not dataclasses.is_dataclass(value):
        return value
    kept = [f.name for f in dataclasses.fields(value) if f.metadata.get("science", True)]
    return {name: spelled_out(getattr(value, name)) for name in kept}


CHANGES = st.sampled_from(
    [
        {},
        {"weight_decay": 0.5},
        {"backend": "torch"},
        {"betas": (0.9, 0.99)},
        {"name": "adamw", "variant": "nvlamb"},
        {"eps": 1e-6},
    ]
)


@given(CHANGES, CHANGES, st.booleans())
def test_absent_means_default_on_both_sides(before, now, spelled):
    before, now = OptimizerConfig(**before), OptimizerConfig(**now)
    written = spelled_out(before) if spelled else science(before)
    written = json.loads(json.dumps({"optimizer": written}))
    same = science(before) == science(now)
    assert (differences(written, {"optimizer": now}) == []) == same
    assert same == (dataclasses.replace(before, backend="auto") == dataclasses.replace(now, backend="auto"))


def test_differences_name_every_key_with_both_values():
    now = {"optimizer": OptimizerConfig(eps=1e-8), "task": "squad", "steps": 3}
    assert differences({"optimizer": {"gone": 1}, "task": "mrpc"}, now, defaults={"steps": 3}) == [
        "optimizer.gone was 1, is (absent)",
        "optimizer.eps was 1e-06, is 1e-08",
        "task was mrpc, is squad",
    ]
    assert differences({}, {"steps": 3}) == ["steps was (absent), is 3"]
    assert (
        differences({"optimizer": {"backend": "torch"}}, {"optimizer": OptimizerConfig()}) == []
    )  # no science any more


def test_what_was_no_science_has_no_value_that_was():
    plain, kept, other = (
        load_recipe(TWO_PHASES, ["train.eval_every=7", *more]).train
        for more in ([], ["train.keep_best=true"], ["train.keep_best=true", "train.eval_samples=99"])
    )
    assert differences(science(plain), kept) == ["keep_best was False, is True"]
    assert differences(science(kept), other) == [f"eval_samples was {kept.eval_samples}, is 99"]


def test_only_scientific_fields_reach_the_fingerprint():
    base = load_recipe(TWO_PHASES)
    same = load_recipe(TWO_PHASES, ["train.checkpoint_every=7", "train.log_every=2", "phase1.micro_batch=8"])
    other = load_recipe(TWO_PHASES, ["train.seed=7"])
    assert science(base) == science(same)
    assert science(base) != science(other)


@given(st.text(max_size=40))
def test_no_setting_makes_a_traceback(text):
    with contextlib.suppress(ConfigError):
        load_recipe(TWO_PHASES, [text])


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_this_cpu_multiplies_in_every_table(monkeypatch, able, precision):
    monkeypatch.setattr(config, "computes_bf16", lambda: able)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # no GPU either
    recipe = load_recipe("tiny")
    tables = [recipe.train, recipe.squad, recipe.mrpc, recipe.sst2, recipe.inference]
    assert {table.precision for table in tables} == {precision}
    asked = load_recipe("tiny", ["train.precision=fp32", "squad.precision=auto"])
    assert (asked.train.precision, asked.squad.precision) == ("fp32", precision)
    assert load_recipe("tiny", gpus=True).train.precision == "bf16"


def test_whether_this_cpu_multiplies_bf16_is_known():
    assert computes_bf16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
