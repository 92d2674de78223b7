"""What a user gets wrong: each is answered by what, where and what to do, before anything is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.publish import publish_json
from pipeline import cancel
from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.launch import request
from pipeline.launch.corpora import corpora_of
from pipeline.launch.start import start
from pipeline.run.rundir import RunDir
from support.reporting import begin, finish
from support.running import SMALL, call

RUN = ["--run", "RUN"]
KNOWN = ["--recipe", "tiny", "--cluster", "local", *RUN]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory of these commands: a text, a file, and what is no model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("one")
    (tmp_path / "text.txt").write_text("One sentence.\n\nAnother one.\n")
    (tmp_path / "alone.pt").write_bytes(b"no weights")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.pt").write_bytes(b"PK\x03\x04 no weights")
    (tmp_path / "cut" / "bert_config.json").write_text(
        '{"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}'
    )
    (tmp_path / "cut" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    return tmp_path


WORDS = {
    "nothing": ([], ["arguments are required: --run", "--text FOLDER --run"]),
    "no run": (["--recipe", "tiny"], ["arguments are required: --run"]),
    "only a run": (RUN, ["RUN is not a run yet", "--recipe", "--text"]),
    "the run is a file": ([*KNOWN, "--run", "file"], ["file: is a file", "folder"]),
    "no nodes": ([*KNOWN, "--nodes", "0"], ["--nodes=0: at least 1"]),
    "nodes in words": ([*KNOWN, "-N", "abc"], ["--nodes=abc", "as 16 or 16-32"]),
    "nodes backwards": ([*KNOWN, "--nodes", "2-1"], ["--nodes=2-1", "the smaller number first"]),
    "nodes of this machine": ([*KNOWN, "--nodes", "4"], ["--nodes 4", "--processes N", "--cluster"]),
    "an empty setting": ([*KNOWN, "--set", ""], ["--set", "key=value"]),
    "a key without its table": ([*KNOWN, "--set", "steps=10"], ["--set steps: unknown", "mean phase1.steps?"]),
    "a table that is not": ([*KNOWN, "--set", "fase1.steps=10"], ["--set fase1: unknown key; did you mean 'phase1'?"]),
    "an option of fine-tuning": ([*KNOWN, "--epochs", "3"], ["--epochs: a value of the recipe", "--set squad.epochs="]),
    "an option of others": ([*KNOWN, "--precision", "fp16"], ["--set train.precision="]),
    "an option of none": ([*KNOWN, "--bogus"], ["--bogus: no option of submit", "--help"]),
    "a word of no option": ([*KNOWN, "extra"], ["extra: belongs to no option"]),
    "Slurm's on this machine": ([*KNOWN, "-p", "gpu"], ["--partition", "'local', which has no Slurm"]),
    "a language that is none": ([*RUN, "--text", "text.txt", "--language", "deutsh"], ["'deutsh'", "mean 'de'"]),
    "no such text": ([*RUN, "--text", "none.txt"], ["--text none.txt: there is no such file"]),
    "a name on the hub": ([*RUN, "--text", "text.txt", "--start", "a/bert"], ["--start a/bert", "hf download"]),
    "a file without its shape": ([*RUN, "--text", "text.txt", "--start", "alone.pt"], ["alone.pt", "bert_config.json"]),
    "a file cut short": ([*RUN, "--text", "text.txt", "--start", "cut/model.pt"], ["cannot be read", "copy it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_that_cannot_be_meant(folder, name):
    words, parts = WORDS[name]
    with pytest.raises(Exception) as refused:
        request.of(words)
    assert refused.value.exit_code in (2, 4), refused.value
    assert all(part in str(refused.value) for part in parts), refused.value
    assert not (folder / "RUN").exists()


def test_blanks_between_stages_are_nothing(folder):
    assert request.of([*KNOWN, "--stages", "extract, shard"]).stages == ("extract", "shard")


def test_a_setting_twice_is_said_and_the_last_counts(folder, capsys):
    asked = request.of([*KNOWN, "--set", "data.seed=1", "--set", "data.seed=2"])
    assert asked.recipe.data.seed == 2
    assert capsys.readouterr().err == "--set data.seed: given 2 times, the last one counts\n"


def test_a_run_of_another_recipe_is_taken_over_only_when_told(folder):
    (folder / "RUN" / "stages" / "extract").mkdir(parents=True)
    publish_json(
        folder / "RUN" / "run.json", {"recipe": {"name": "bert_base"}, "profile": {}, "corpora": {}, "data_dir": "."}
    )
    publish_json(folder / "RUN" / "stages" / "extract" / "done.json", {})
    with pytest.raises(ConfigError, match="RUN is a run of recipe 'bert_base', not 'tiny', and has finished extract"):
        request.of(KNOWN)
    assert request.of([*KNOWN, "--replace"]).recipe.name == "tiny"


@pytest.mark.parametrize("stages", ["fase1", "phase1"])
def test_stages_that_cannot_be_run_are_refused_before_the_run_takes_new_settings(folder, stages):
    (folder / "own.toml").write_text('name = "own"\nbase = "small"\n[data]\nbooks = ["text.txt"]\n')
    own = ["--recipe", "own.toml", "--cluster", "local", *RUN, "--data", "."]
    with pytest.raises(ConfigError, match=r"--stages: (no stage 'fase1'|phase1 needs samples_32)"):
        start(request.of([*own, "--stages", stages]))
    assert not (folder / "RUN").exists()


def test_a_precision_that_needs_a_gpu_is_refused_before_the_data_are_made(folder):
    (folder / "own.toml").write_text('name = "own"\nbase = "small"\n[data]\nbooks = ["text.txt"]\n')
    own = ["--recipe", "own.toml", "--cluster", "local", *RUN, "--data", ".", "--set", "train.precision=tf32"]
    with pytest.raises(EnvironmentFault, match=r"train.precision = tf32 needs a CUDA device"):
        start(request.of(own))
    assert not (folder / "RUN").exists()
    start(request.of([*own, "--stages", "extract", "--dry-run"]))  # text needs none


@pytest.mark.slow
def test_a_refused_text_can_be_named_again_as_it_was_meant(folder):
    """The recipe of the call that was refused does not stand in the way of the next."""
    refused = call("submit", "--text", "text.txt", *RUN, "--stages", "fase1", cwd=folder)
    assert "no stage 'fase1'" in refused.stderr
    assert not (folder / "RUN" / "recipe.toml").exists()
    meant = call("submit", "--text", "text.txt", "--language", "de", *RUN, "--dry-run", cwd=folder)
    assert meant.returncode == 0, meant.stderr


COMMANDS = {
    "no data": ("submit", ["--recipe", SMALL, "--cluster", "local", *RUN, "--data", "none", "--dry-run"], 2,
                ["none/", "no such file", "--data DIR"]),
    "a name to export": ("export", ["bert-base-uncased", "out"], 2, ["hf download bert-base-uncased"]),
    "a name to fine-tune": ("finetune", ["sst2", "--model", "bert-base-uncased", "--train", "file", "--out", "out"], 2,
                            ["--model bert-base-uncased", "hf download"]),
    "a name to measure": ("bench", ["infer", "--model", "bert-base-uncased"], 2, ["hf download", "base and large"]),
    "no run to report": ("report", ["none"], 2, ["none: not a run"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_cannot_work(folder, name):
    module, words, code, parts = COMMANDS[name]
    done = call(module, *words, cwd=folder)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.mark.slow
def test_text_that_is_none_is_found_before_anything_runs(folder):
    (folder / "rows.txt").write_text('{"text": "One."}\n')
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_bytes("Это был долгий день. ".encode("utf-16"))
    (folder / "t.csv").write_text("body\nOne.\n")
    for name, more, line in (
        ("rows.txt", [], "rows.txt is JSON"),
        ("books", [], "books/a.txt is UTF-16 text"),
        ("t.csv", ["--set", "data.text_column=words"], "t.csv has no column 'words'"),
    ):
        done = call("submit", "--text", name, "--run", f"run-{name}", "--cluster", "local", *more, cwd=folder)
        assert (done.returncode, line in done.stderr, "Traceback" in done.stderr) == (3, True, False), done.stderr
        assert not (folder / f"run-{name}" / "run.json").exists()


@pytest.mark.slow
def test_what_is_wrong_inside_files_is_said_together_before_anything_runs(folder):
    sizes = "epochs = 1\nbatch = 2\nlearning_rate = 1e-4\nwarmup = 0.1\nmax_seq_len = 64"
    (folder / "recipe.toml").write_text(f"""\
name = "mine"
base = "small"
[data]
books = ["none.txt"]
vocab = "words.txt"
[phase1]
start = "some/bert"
[squad]
dataset = "own"
train = "broken.json"
eval = "qa.json"
{sizes}
[sst2]
dataset = "own"
train = "sst2.tsv"
eval = "labels.tsv"
{sizes}
""")
    (folder / "words.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (folder / "broken.json").write_text('{"data": [')
    (folder / "qa.json").write_text('{"data": []}')
    (folder / "sst2.tsv").write_text("sentence\tlabel\ngood\t1\n")
    (folder / "labels.tsv").write_text("text\tlabel\ngood\t1\n")
    words = ["--recipe", "recipe.toml", "--cluster", "local", "--data", ".", *RUN]
    for more in ([], ["--dry-run"]):
        done = call("submit", *words, *more, cwd=folder)
        lines = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        expected = ("none.txt: no such file", "[MASK]", "phase1.start some/bert", "broken.json", "labels.tsv")
        assert all(any(part in line for line in lines) for part in expected), lines
        assert "Traceback" not in done.stderr
    assert not (folder / "RUN").exists()
    (folder / "none.txt").write_text("A text.\n")  # several faults of data alone are lines, too, and short ones
    (folder / "labels.tsv").write_text("{" + "x" * 100_000 + "\n")
    lines = call("submit", *words, "--set", "phase1.start=cut/model.pt", cwd=folder).stderr.splitlines()
    assert len(lines) >= 3, lines
    assert max(map(len, lines)) < 300


@pytest.mark.slow
def test_weights_to_start_from_are_looked_at_before_the_data_are_made(folder):
    words = ["--recipe", "small", "--cluster", "local", "--data", ".", *RUN, "--set", 'data.books=["text.txt"]']
    words += ["--set", "data.vocab=cut/vocab.txt", "--set", "phase1.start=cut/model.pt"]
    done = call("submit", *words, cwd=folder)
    assert done.returncode == 4, done.stderr
    assert "cut/model.pt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "RUN").exists()


def begun(folder: Path, **changed: Any) -> Path:
    """A run, some parts of whose run.json are others, or (None) missing."""
    run = RunDir(folder / "run")
    begin(run.path)
    settings = {**run.settings, **changed}
    (run.path / "run.json").unlink()
    (run.path / "run.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    (run.path / "run.json").chmod(0o644)
    return run.path


@pytest.mark.parametrize("value", [None, 5, "x", [], [1], True, 1e400])
@pytest.mark.parametrize("key", ["recipe", "profile", "corpora"])
def test_a_damaged_run_is_said_to_be(tmp_path: Path, key: str, value: object, monkeypatch) -> None:
    run = begun(tmp_path, **{key: value})
    monkeypatch.setattr("sys.argv", ["cancel", str(run)])
    for go_on in (lambda: request.of(["--run", str(run)]), lambda: request.of(["--run", str(run)], []), cancel.main):
        with pytest.raises(ConfigError, match=rf"run.json: damaged: {key} missing or of another kind"):
            go_on()


@pytest.mark.parametrize("part", [{"setup": ["touch x"]}, {"env": {"LD_PRELOAD": "/x.so"}}, {"python": "x"}, {}])
def test_what_jobs_run_is_not_taken_from_a_file_that_others_may_write(tmp_path: Path, part: dict[str, Any]) -> None:
    """But a profile that comes with the pipeline is as it is there."""
    profile = dataclasses.asdict(load_profile("generic"))
    run = begun(tmp_path, profile={**profile, **part})
    assert request.of(["--run", str(run)]).profile.setup == tuple(part.get("setup", ()))
    (run / "run.json").chmod(0o664)
    if not part:
        assert request.of(["--run", str(run)]).profile.name == "generic"
        return
    with pytest.raises(ConfigError, match=r"others may write it.* name it again by --cluster"):
        request.of(["--run", str(run)])
    assert request.of(["--run", str(run), "--cluster", "generic"]).profile.env == {}


def test_a_profile_of_others_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    own = tmp_path / "evil.toml"
    own.write_text(f'name = "{own}"\nsetup = ["touch x"]\n')
    run = begun(tmp_path, profile=dataclasses.asdict(load_profile(str(own))))
    (run / "run.json").chmod(0o664)
    with pytest.raises(ConfigError, match=r"others may write it"):
        request.of(["--run", str(run)])


def test_a_stage_is_not_made_again_without_its_files(tmp_path):
    chain = begin(tmp_path / "run", str(SMALL))
    settings = chain.run.settings
    settings["corpora"] = {name: {"bytes": 1, "digest": "0" * 16} for name in corpora_of(load_recipe(str(SMALL)))}
    publish_json(chain.run.path / "run.json", settings)
    for name in ("extract", "shard"):
        finish(chain, name, {})
    done = call("submit", "--run", chain.run.path, "--data", tmp_path / "none", "--remake", "extract")
    assert (done.returncode, "no such file" in done.stderr) == (2, True), done.stderr
    assert [path.name for path in sorted(chain.run.path.glob("stages/*"))] == ["extract", "shard"]
    assert not (chain.run.path / "old").exists()


def test_a_stage_alone_is_not_cancelled_on_this_machine(tmp_path):
    with pytest.raises(ConfigError, match="leave 'phase1' out to stop it"):
        cancel.cancel(begin(tmp_path / "run", str(SMALL)).run, "phase1")
