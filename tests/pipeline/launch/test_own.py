"""One's own text and model in one command: the recipe that is written, what is refused, and a run from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import load_recipe
from pipeline.errors import ConfigError
from pipeline.launch.own import HIGHEST, LOWEST, files_in, kind_of, vocab_size
from pipeline.run.files import read_jsonl
from pipeline.run.rundir import RunDir
from pipeline.words import absent_model
from support.running import ROOT, call
from support.toys import VOCAB

SENTENCE = "Der alte Mann ging über die Brücke. Er sah den Fluss und dachte an das Meer. "


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty small texts in a folder."""
    folder = tmp_path / "texte"
    folder.mkdir()
    for number in range(40):
        words = " ".join(f"Wort{(number * 7 + i) % 50} steht hier." for i in range(30))
        (folder / f"{number}.txt").write_text(f"{SENTENCE * 3}{words}\n", encoding="utf-8")
    return folder


def submit(*words: object):
    return call("submit", *words)


@pytest.mark.slow
def test_work_goes_on_though_nobody_reads_what_it_says(tmp_path, texts):
    """``submit … | head -1``: it ended in the middle, with 0."""
    words = ("--text", texts, "--language", "de", "--run", tmp_path / "run", "--stages", "extract,shard")
    command = [sys.executable, "-m", "pipeline.submit", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, cwd=ROOT, env=environment) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(), said) == (0, b"")
    assert all((tmp_path / "run/stages" / name / "done.json").exists() for name in ("extract", "shard"))


@pytest.mark.slow
def test_a_folder_of_texts_becomes_a_recipe_of_ten_lines(tmp_path, texts):
    done = submit("--text", texts, "--language", "deutsch", "--run", tmp_path / "mine", "--dry-run")
    assert done.returncode == 0, done.stderr
    written = tmp_path / "mine" / "recipe.toml"
    assert written.read_text() in done.stdout
    assert len([line for line in written.read_text().splitlines() if line]) <= 12
    recipe = load_recipe(str(written))
    assert (recipe.data.books, recipe.data.language, recipe.data.lowercase) == (("texte",), "de", False)
    assert recipe.model.num_hidden_layers == 2
    again = submit("--text", texts, "--language", "de", "--run", tmp_path / "mine", "--dry-run")
    assert again.returncode == 0, again.stderr
    other = submit("--text", texts, "--run", tmp_path / "mine", "--dry-run")
    assert other.returncode == 2
    assert "says something else" in other.stderr


@pytest.mark.slow
def test_general_text_to_replay_is_named_and_time_and_memory_are_told(tmp_path, texts):
    (tmp_path / "general.jsonl").write_text('{"text": "One."}\n' * 9)
    words = ("--text", texts, "--replay", tmp_path / "general.jsonl", "--run", tmp_path / "mine", "--dry-run")
    done = submit(*words)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(tmp_path / "mine" / "recipe.toml"))
    assert (recipe.data.replay, recipe.data.corpora) == (("general.jsonl",), ("texte", "general.jsonl"))
    assert re.search(r"pretraining: about .* \(a micro-batch of each phase timed .*\); 0\.\d GB of memory", done.stdout)
    table = 'name = "x"\nbase = "small"\n[data]\nbooks = ["a/t.txt"]\n'
    for replay in ('["b/t.txt"]', '["a/t.txt"]'):
        (tmp_path / "r.toml").write_text(f"{table}replay = {replay}\n")
        with pytest.raises(ConfigError, match="replay must name some of the corpora"):
            load_recipe(str(tmp_path / "r.toml"))


def test_everything_wrong_is_said_at_once(tmp_path):
    words = ("--text", tmp_path / "nothing", "--language", "klingonisch", "--start", "google/bert-base")
    done = submit(*words, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"--text {tmp_path / 'nothing'}: there is no such file or folder" in done.stderr
    assert "hf download google/bert-base --local-dir bert-base" in done.stderr
    assert "--language is 'klingonisch', which is unknown" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "give no --recipe" in submit("--text", tmp_path, "--recipe", "tiny", "--run", tmp_path / "run").stderr
    assert "need --text" in submit("--start", tmp_path, "--run", tmp_path / "run").stderr


def test_names_say_what_files_are(tmp_path):
    kinds = {"a.xml.bz2": "wikipedia", "b.jsonl.gz": "jsonl", "c.csv": "jsonl", "d.txt": "books", "e": "books"}
    kinds |= {"enwiki-latest-pages-articles1.xml-p1p41242.bz2": "wikipedia", "F.XML": "wikipedia", "G.JSONL": "jsonl"}
    kinds |= {"h.ndjson.GZ": "jsonl", "v1.2-p3 notes": "books"}
    assert {name: kind_of(Path(name)) for name in kinds} == kinds
    for name in ("a.xml", "d.txt"):
        (tmp_path / name).write_text("x")
    done = submit("--text", tmp_path, "--run", tmp_path / "run", "--dry-run")
    assert "holds books and wikipedia: name its files one by one, by kind" in done.stderr
    (tmp_path / "a.xml").rename(tmp_path / ".git.xml")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.csv").write_text("x")
    assert [path.name for path in files_in(tmp_path)] == ["d.txt"]


def test_a_name_that_is_no_text_is_refused(tmp_path, texts):
    odd = texts.rename(tmp_path / os.fsdecode(b"t\xff"))
    done = submit("--text", odd, "--run", tmp_path / "run", "--dry-run")
    assert done.returncode == 2
    assert "has no UTF-8 name" in done.stderr


@given(st.floats(1, 1e12))
def test_a_vocabulary_grows_with_the_text_within_bounds(size):
    assert LOWEST <= vocab_size(size) <= vocab_size(2 * size) <= HIGHEST


def test_a_path_is_not_taken_for_a_name_on_the_hub():
    assert "hf download" not in absent_model(Path("/models/bert"), "--start")
    assert "hf download" not in absent_model(Path("bert.pt"), "--start")


def test_a_model_of_masked_words_alone_goes_on_with_masked_words_alone(tmp_path, texts):
    import transformers

    words = [*VOCAB, *(f"wort{i}" for i in range(50))]
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"max_position_embeddings": 64}
    folder, run = tmp_path / "model", tmp_path / "run"
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    given = ("--text", texts, "--start", folder, "--run", run, "--dry-run")
    done = submit(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = load_recipe(str(run / "recipe.toml"))
    assert (recipe.train.objective, recipe.phases["phase1"].seq_len) == ("mlm", 64)
    done = submit(*given, "--set", "train.objective=mlm+nsp")
    assert done.returncode == 4
    assert 'train.objective = "mlm" needs neither pooler' in done.stderr


@pytest.mark.slow
def test_going_on_from_a_model_shows_what_it_knew_before(tmp_path, texts):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    words = [*VOCAB, *(f"wort{i}" for i in range(50))]
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, **shape)
    folder = tmp_path / "model"
    transformers.BertForPreTraining(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    run = tmp_path / "run"
    given = ("--text", texts, "--start", folder, "--run", run, "--set", "phase1.steps=2", "--processes", "1")
    done = submit(*given, "--stages", "extract,shard,samples_128,phase1")
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = load_recipe(str(run / "recipe.toml"))
    assert (recipe.model.hidden_size, recipe.data.vocab, recipe.phases["phase1"].start) == (
        64,
        "model/vocab.txt",
        "model",
    )
    lines = read_jsonl(RunDir(run).stage("phase1").attempts[-1].metrics)
    assert [line["step"] for line in lines if "eval_mask_gain" in line] == [0, 2]
    shutil.rmtree(folder)
    assert json.loads((run / "run.json").read_text())["recipe"]["name"] == "run"
