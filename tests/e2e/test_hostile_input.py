"""Files, names and configurations made to do harm: nothing is executed, nothing hangs, nothing passes unsaid."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.manifest import publish_manifest
from pipeline.config import load_recipe
from pipeline.errors import ConfigError
from pipeline.pretrain.data import PretrainingData
from support.running import ROOT, SMALL, TWO_PHASES, command, one_line, submit

pytestmark = [pytest.mark.slow]

TEXT = "The river runs to the sea. Many towns lie along it. Boats carry grain and timber. " * 20


# ---------------------------------------------------------------- shards


def swap(folder: Path) -> None:
    first, second = folder / "train-00000.hdf5", folder / "train-00001.hdf5"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest changed by somebody who knows how it is sealed."""
    described = json.loads((folder / "manifest.json").read_text())
    change(described)
    publish_manifest(folder, described)


def fewer(described: dict[str, Any]) -> None:
    described["vocab_size"] = 300


def other_vocabulary(described: dict[str, Any]) -> None:
    described["vocab_sha256"] = "0" * 64


def twice(described: dict[str, Any]) -> None:
    described["shards"][0] = {**described["shards"][1]}
    described["shards"][0]["rows"] += 1


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "swapped": (swap, "train-0000[01].hdf5 has"),
    "truncated": (lambda f: os.truncate(f / "train-00001.hdf5", 5000), "train-00001.hdf5 has 5000 bytes"),
    "emptied": (lambda f: os.truncate(f / "train-00001.hdf5", 0), "train-00001.hdf5 has 0 bytes"),
    "longer": (lambda f: os.truncate(f / "train-00001.hdf5", 1 << 20), "train-00001.hdf5 has 1048576 bytes"),
    "missing": (lambda f: (f / "train-00002.hdf5").unlink(), "train-00002.hdf5 is missing"),
    "of another length": (
        lambda f: shutil.copy(f.with_name("samples_128") / "train-00000.hdf5", f / "train-00000.hdf5"),
        "train-00000.hdf5 has",
    ),
    "all of another length": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("samples_128"), f)),
        "samples of length 128, the phase wants 64",
    ),
    "out of range": (lambda f: resealed(f, fewer), "holds token id"),
    "of another vocabulary": (lambda f: resealed(f, other_vocabulary), "has vocab_sha256"),
    "listed twice": (lambda f: resealed(f, twice), "has rows"),
    "a manifest without shards": (lambda f: resealed(f, lambda d: d.pop("shards")), "lacks 'shards'"),
    "a manifest of names outside": (
        lambda f: resealed(f, lambda d: d["shards"][0].update(file="../samples_128/train-00000.hdf5")),
        "only plain file names",
    ),
}


@pytest.fixture
def samples(small_run: Path, tmp_path: Path) -> Path:
    for name in ("samples_64", "samples_128"):
        shutil.copytree(small_run / "stages" / name, tmp_path / name)
    return tmp_path / "samples_64"


def open_samples(folder: Path) -> PretrainingData:
    recipe = load_recipe(str(SMALL))
    return PretrainingData(folder, "train", recipe.phases["phase1"], recipe.train)


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_that_are_not_those_of_the_manifest_are_refused(samples: Path, kind: str) -> None:
    damage, message = SHARDS[kind]
    assert len(open_samples(samples).shards) == 3
    damage(samples)
    with pytest.raises(DataError, match=message):
        open_samples(samples)


def test_a_file_too_many_is_not_read(samples: Path) -> None:
    before = open_samples(samples).order.total
    shutil.copy(samples / "train-00000.hdf5", samples / "train-00003.hdf5")
    assert open_samples(samples).order.total == before


def mutate(samples: Path, count: int) -> None:
    """Bytes overwritten at random places, in blocks of random length: refused every time, by digest."""
    draw, path = np.random.default_rng(3), samples / "train-00001.hdf5"
    whole = path.read_bytes()
    for _ in range(count):
        content, at = bytearray(whole), int(draw.integers(len(whole)))
        block = draw.integers(0, 256, int(draw.integers(1, 64))).astype(np.uint8).tobytes()
        content[at : at + len(block)] = block
        content = content[: len(whole)]
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-00001\.hdf5 has SHA-256"):
            open_samples(samples)


def test_mutated_shards_are_refused(samples: Path) -> None:
    mutate(samples, 50)


@pytest.mark.chaos
def test_many_mutated_shards_are_refused(samples: Path) -> None:
    mutate(samples, 500)


# ---------------------------------------------------------------- names, titles, pipes


def run_it(*words: object, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose output may be of any bytes."""
    return subprocess.run(
        command(str(words[0]), *words[1:]), capture_output=True, text=True, errors="surrogateescape", check=False,
        cwd=ROOT, timeout=timeout_s, env={**os.environ, **environment},
    )  # fmt: skip


def corpus(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Files for a run on one JSON-lines corpus; returns the words that name it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pairs.tsv", "sentiment.tsv", "qa.json"):
        (folder / name).touch()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("data.wikipedia=[]", "data.jsonl=['rows.jsonl']", "data.vocab_size=100")
    return [word for setting in settings for word in ("--set", setting)]


def harmless(text: str) -> bool:
    return all(c.isprintable() or c in "\n\xa0" for c in text)


def test_titles_cannot_write_to_the_terminal_nor_into_the_report(tmp_path: Path) -> None:
    titles = ["\x1b]0;owned\x07\x1b[31mred", "\x9b31m\u202egnp.exe", "<script>alert(1)</script>", "a\nFAILED\r b"]
    rows = [{"text": TEXT + f"Number {n}.", "title": titles[n % 4]} for n in range(60)]
    rows += [{"text": "123 456", "title": title} for title in titles]
    rows += [{"text": "A long one. " * 5000, "title": title} for title in titles]
    words = corpus(tmp_path / "data", rows)
    run = tmp_path / "run"
    settings = ("--set", "data.max_document_mb=0.05", "--stages", "extract,shard")
    done = run_it(
        "submit", "--recipe", SMALL, "--cluster", "local", "--run", run, "--data", tmp_path / "data", *words, *settings
    )
    assert done.returncode == 0, done.stderr
    report = run_it("report", run)
    assert report.returncode == 0, report.stderr
    assert r"\x1b]0;owned\x07\x1b[31mred" in done.stdout, "the skipped ones are named"
    told = [
        done.stdout,
        done.stderr,
        report.stdout,
        run_it("status", run).stdout,
        run_it("status", run, "--json").stdout,
    ]
    told += [path.read_text() for path in run.rglob("*") if path.suffix in (".txt", ".json", ".jsonl", ".html")]
    texts = {path.name for path in run.rglob("documents-*")}
    assert texts
    assert all(harmless(text) for text in told)
    page = (run / "report.html").read_text()
    assert "<script>alert" not in page


NAMES = {
    "blanks and quotes": 'a b it\'s "so"',
    "line end and escape": "line\nend \x1b[31m",
    "shell": "$(touch X)`touch X`;touch X|touch X&",
    "dashes and per cents": "-rf --no %s%j%A",
    "UTF-8 and not": "grüße 北京 \udcff",
    "long": "x" * 250,
}


@pytest.mark.parametrize("kind", NAMES)
def test_paths_of_any_name_work_or_are_refused(kind: str, tmp_path: Path) -> None:
    """Each flag that takes a path; the run is made, and no part of a name is executed."""
    base = tmp_path / NAMES[kind]
    words = corpus(base, [{"text": TEXT + f"Number {n}."} for n in range(60)])
    shutil.copy(SMALL, base / "r.toml")
    shutil.copy(ROOT / "slurm" / "profiles" / "local.toml", base / "c.toml")
    strict = {"PYTHONIOENCODING": "utf-8:strict"}  # what most sites' terminals say
    made = run_it(
        *("submit", "--recipe", base / "r.toml", "--cluster", base / "c.toml", "--run", base / "run", "--data", base),
        *("--stages", "extract,shard", *words), **strict,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    for again in (
        ("status", base / "run"),
        ("report", base / "run", "--out", base / "out.html"),
        ("checkpoints", base / "run"),
        ("cancel", base / "run"),
    ):
        done = run_it(*again, **strict)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), (again, done.stderr)
    assert (base / "out.html").stat().st_size > 1000
    written = run_it(
        *("submit", "--recipe", base / "r.toml", "--cluster", "generic", "--run", base / "slurm", "--data", base),
        *("--write-scripts", base / "scripts", "--set", "phase1.global_batch=64", "--set", "phase2.global_batch=64"),
        *words, **strict,
    )  # fmt: skip
    if written.returncode:
        assert written.returncode in (2, 3, 6, 9)
        assert "Traceback" not in written.stderr
    else:
        for script in (base / "scripts").iterdir():
            assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    refused = run_it("export", base / "none", base / "model", "--vocab", base / "none.txt")
    assert (refused.returncode in (2, 3, 4), harmless(refused.stderr)) == (True, True)
    assert not [*tmp_path.rglob("X"), *ROOT.glob("X")], "a part of the name was executed"


def not_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return [folder / "pipe", folder / "loop", folder / "file" / "below", folder / "folder"]


COMMANDS = (
    ("submit", "--recipe", "X", "--cluster", "local", "--run", "N"),
    ("submit", "--recipe", SMALL, "--cluster", "X", "--run", "N"),
    ("submit", "--recipe", SMALL, "--cluster", "local", "--run", "N", "--data", "X"),
    ("submit", "--run", "X"),
    ("status", "X"),
    ("report", "X"),
    ("checkpoints", "X"),
    ("cancel", "X"),
    ("plan", "--recipe", "X", "--cluster", "generic"),
    ("export", "X", "N"),
    ("export", "N", "N/out", "--vocab", "X"),
    ("finetune", "sst2", "--model", "X", "--train", SMALL, "--eval", SMALL, "--out", "N"),
    ("finetune", "sst2", "--model", "N", "--train", "X", "--eval", "X", "--out", "N/out"),
    ("worker", "X", "extract"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(map(str, words)).replace(str(SMALL), "R"))
def test_a_pipe_a_loop_or_a_folder_where_a_file_belongs_is_refused_at_once(
    words: tuple[Any, ...], tmp_path: Path
) -> None:
    for number, odd in enumerate(not_files(tmp_path)):
        if words[0] in ("finetune", "export") and number in (1, 2):
            continue  # importing torch four times proves nothing more
        given = [odd if word == "X" else tmp_path / word if str(word).startswith("N") else word for word in words]
        done = run_it(*given, timeout_s=30)
        assert done.returncode in (2, 3, 4, 6), (odd, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()


@pytest.mark.parametrize("key", ["data.wikipedia", "data.jsonl", "data.books", "data.vocab", "squad.train"])
def test_a_pipe_among_the_corpora_does_not_hang(key: str, tmp_path: Path) -> None:
    words = corpus(tmp_path, [{"text": TEXT}])
    os.mkfifo(tmp_path / "pipe")
    value = "pipe" if key in ("data.vocab", "squad.train") else "['pipe']"
    for more in (["--stages", "extract"], ["--dry-run"]):
        done = run_it(
            *("submit", "--recipe", SMALL, "--cluster", "local", "--run", tmp_path / "run", "--data", tmp_path),
            *(*words, "--set", f"{key}={value}", *more), timeout_s=30,
        )  # fmt: skip
        one_line(done, 2, "pipe", "neither a file nor a folder")


def test_a_link_out_of_the_books_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path / "data", [])
    (tmp_path / "data" / "books").mkdir()
    (tmp_path / "data" / "books" / "a.txt").write_text(TEXT)
    (tmp_path / "data" / "books" / "b.txt").symlink_to("/etc/passwd")
    words = [w for s in ("data.wikipedia=[]", "data.jsonl=[]", "data.books=['books']") for w in ("--set", s)]
    one_line(submit(tmp_path / "run", tmp_path / "data", "--stages", "extract", *words), 3, "b.txt", "/etc/passwd")


# ---------------------------------------------------------------- size and depth


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from data_prep import extract
class Job:
    out, workers = Path(sys.argv[1]), 1
    def say(self, line, share=None): pass
Job.out.mkdir()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = extract.run(Job(), wikipedia=[Path(sys.argv[2])], books=[], jsonl=[], max_document_mb=16)
grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"grown_mb": grown_mb, "skipped": facts["skipped"], "counts": facts["counts"]}))
"""
HEAD = '<mediawiki version="0.11"><siteinfo><dbname>x</dbname></siteinfo>'


def test_an_article_of_50_mb_is_skipped_in_little_memory(tmp_path: Path) -> None:
    page = "<page><title>{}</title><ns>0</ns><id>{}</id><revision><text>{}</text></revision></page>"
    path = tmp_path / "dump.xml"
    path.write_text(HEAD + page.format("A", 1, "word " * 10_000_000) + page.format("B", 2, "A word.") + "</mediawiki>")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "out", path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    facts = json.loads(done.stdout)
    assert facts["skipped"] == {"over max_document_mb (16)": 1}
    assert facts["counts"]["articles"] == 2
    assert facts["grown_mb"] < 100


DEEP = 100_000
TINY = Path(TWO_PHASES).read_text(encoding="utf-8")
TOML = {
    "arrays": "a = " + "[" * DEEP + "]" * DEEP,
    "tables": "a = " + "{a=" * DEEP + "1" + "}" * DEEP,
    "a section of many names": TINY + "\n[x" + ".a" * DEEP + "]\n",
    "a key of many names": TINY + "\nx" + ".a" * DEEP + " = 1\n",
    "a field of many names": TINY.replace('name = "tiny"', "name" + ".a" * DEEP + " = 1", 1),
    "many names in quotes": TINY + "\nx" + " . 'a b'" * DEEP + " = 1\n",
    "many names in a table": TINY + "\nx = {y" + ".a" * DEEP + " = 1}\n",
    "a number of 5000 digits": TINY.replace("steps = 700", "steps = " + "9" * 5000, 1),
    "a number of 300 digits": TINY.replace("steps = 700", "steps = " + "9" * 300, 1),
    "3 MB": TINY + "# comment\n" * 300_000,
    "betas of a diverging mean": TINY.replace("[optimizer]", "[optimizer]\nbetas = [2.0, -1.0]"),
    "an unknown language": TINY.replace("[data]", '[data]\nlanguage = "xq"'),
    "a file of the machine": TINY.replace('books = ["books"]', 'books = ["/etc"]'),
    "a file above the data": TINY.replace('books = ["books"]', 'books = ["a/../../x"]'),
    "no file": TINY.replace('books = ["books"]', 'books = [""]'),
    "the whole folder": TINY.replace('books = ["books"]', 'books = ["."]'),
    "an escape of eight bits": TINY.replace('books = ["books"]', 'books = ["\\u009b31m"]'),
    "a name of 5000 letters": TINY.replace('name = "tiny"', f'name = "{"a" * 5000}"', 1),
    "an array in a field": TINY.replace("steps = 700", "steps = " + "[" * 300 + "]" * 300, 1),
    "two of one name": TINY.replace("steps = 700", "steps = 700\nsteps = 7", 1),
    "two of one section": TINY + "\n[model]\n",
    "a list of sections": TINY.replace("[model]", "[[model]]"),
    "a byte order mark": "\ufeff" + TINY,
    "NUL": TINY + "\x00",
    "not UTF-8": 'name = "\udce4"',
    "a date": TINY.replace("steps = 700", "steps = 1979-05-27", 1),
    "words for a switch": TINY.replace("[data]", '[data]\nlowercase = "false"'),
    "a number for a switch": TINY.replace("[data]", "[data]\nlowercase = 0"),
    "another case": TINY.replace("[data]", "[data]\nLowercase = true"),
    "another alphabet": TINY.replace("[data]", '[data]\n"ſeed" = 3'),
    "three betas": TINY.replace("[optimizer]", "[optimizer]\nbetas = [0.9, 0.9, 0.9]"),
    "nan in a list": TINY.replace("[optimizer]", "[optimizer]\nbetas = [nan, 0.9]"),
    "a terminal escape": TINY.replace('books = ["books"]', 'books = ["\\u001b[31m"]'),
    "a line end in a name": TINY.replace('books = ["books"]', 'books = ["a\\nb"]'),
    "a lone surrogate": TINY.replace('books = ["books"]', 'books = ["\\ud800"]'),
    "no name": TINY.replace('name = "tiny"', 'name = ""', 1),
    "a path for a name": TINY.replace('name = "tiny"', 'name = "../x"', 1),
    "a command for a name": TINY.replace('name = "tiny"', 'name = "$(id)"', 1),
    "nothing": "",
    "JSON": '{"name": "tiny"}',
    "YAML": "name: tiny\n",
    "a YAML object": '!!python/object/apply:os.system ["touch X"]',
    "Python": "import os\nos.system('touch X')\n",
    "a zip": "PK\x03\x04" + "\x00" * 100,
}


@pytest.mark.parametrize("kind", TOML)
def test_a_recipe_that_is_none_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(TOML[kind], encoding="utf-8", errors="surrogateescape", newline="")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert "my.toml" in str(caught.value)
    assert harmless(str(caught.value))
    assert all(len(line) < 500 for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    "text", ["phase1.steps=1\n[model]", 'data.books=["a"]\nname="x"', "phase1.steps=" + "9" * 5000]
)
def test_a_setting_holds_one_value(text: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe("tiny", [text])
