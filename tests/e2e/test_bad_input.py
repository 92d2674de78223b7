"""Bad input to whole commands: one line, the documented exit code, nothing lost."""

from __future__ import annotations

import bz2
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.running import call, digests, one_line, states, submit

pytestmark = [pytest.mark.slow]

PAGE = "<page><title>A</title><ns>0</ns><id>1</id><revision><id>1</id><text>{}</text></revision></page>"
DUMP = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en"><siteinfo>'
    '<dbname>testwiki</dbname><namespaces><namespace key="0"/><namespace key="6">File</namespace></namespaces>'
    "</siteinfo>{}</mediawiki>"
)
TEXT = "The river runs to the sea. Many towns lie along it. Boats carry grain and timber. " * 20


def extract_only(folder: Path, run: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    for name in ("pairs.tsv", "sentiment.tsv", "qa.json"):
        (folder / name).touch()
    words = [word for setting in settings for word in ("--set", setting)]
    return submit(run, folder, "--stages", "extract,shard", *words)


WIKIPEDIA = ("data.wikipedia=['dump.xml']", "data.jsonl=[]")
CORPORA: dict[str, tuple[str, bytes, tuple[str, ...], tuple[str, ...]]] = {
    "truncated bz2": (
        "dump.xml.bz2",
        bz2.compress(DUMP.format(PAGE.format(TEXT) * 50).encode())[:-40],
        ("data.wikipedia=['dump.xml.bz2']", "data.jsonl=[]"),
        ("dump.xml.bz2",),
    ),
    "malformed XML": ("dump.xml", DUMP.format(PAGE.format("<open>")).encode(), WIKIPEDIA, ("dump.xml",)),
    "cut XML": ("dump.xml", DUMP.format(PAGE.format(TEXT))[:-20].encode(), WIKIPEDIA, ("dump.xml",)),
    "an empty dump": ("dump.xml", DUMP.format("").encode(), WIKIPEDIA, ("dump.xml",)),
    "invalid UTF-8 in a dump": (
        "dump.xml",
        DUMP.format(PAGE.format("@")).encode().replace(b"@", b"\xff"),
        WIKIPEDIA,
        ("dump.xml",),
    ),
    "invalid UTF-8 in a book": (
        "book.txt",
        b"good\n\nbad \xff\xfe\n",
        ("data.wikipedia=[]", "data.jsonl=[]", "data.books=['book.txt']"),
        ("book.txt", "UTF-8"),
    ),
    "malformed JSON": (
        "lines.jsonl",
        b'{"text": "a"}\n{"text": \n',
        ("data.wikipedia=[]", "data.jsonl=['lines.jsonl']"),
        ("lines.jsonl",),
    ),
    "a corpus of a single text": (
        "lines.jsonl",
        json.dumps({"text": TEXT}).encode() + b"\n",
        ("data.wikipedia=[]", "data.jsonl=['lines.jsonl']"),
        ("too few", "two are needed"),
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_that_cannot_be_read_whole(name, tmp_path):
    file, content, settings, words = CORPORA[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(content)
    one_line(extract_only(tmp_path / "data", tmp_path / "run", *settings), 3, *words)
    if (tmp_path / "run" / "run.json").exists():  # else it was seen at first sight, before anything ran
        assert "failed" in states(tmp_path / "run").values()


def test_a_book_without_blank_lines_is_one_document(tmp_path):
    folder = tmp_path / "data" / "books"
    folder.mkdir(parents=True)
    for number in range(80):
        (folder / f"{number}.txt").write_text(TEXT.replace(". ", ".\n") + f"The end of {number}.\n")
    done = extract_only(
        tmp_path / "data", tmp_path / "run", "data.wikipedia=[]", "data.jsonl=[]", "data.books=['books']"
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "stages" / "extract" / "manifest.json").read_text())
    assert manifest["counts"]["documents"] == 80


def test_a_vocabulary_without_mask(small_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(small_data, folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    done = submit(tmp_path / "run", folder, "--stages", "extract,shard,samples_64", "--set", "data.vocab='vocab.txt'")
    one_line(done, 3, "vocab.txt", "[MASK]")


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, symlinks=True)
    return to


def flip(path: Path, at: Callable[[int], int] = lambda size: size // 2) -> None:
    content = bytearray(path.read_bytes())
    content[at(len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_shard_is_named_and_nothing_is_trained_on_it(small_run, small_data, tmp_path, damage):
    run = copied(small_run, tmp_path / "run")
    shard = run / "stages" / "samples_64" / "train-00001.hdf5"
    if damage == "flipped":
        flip(shard)
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    done = submit(run, small_data, "--stages", "phase1", "--set", "phase1.learning_rate=0.02")
    one_line(done, 3, "train-00001.hdf5")
    assert not list((run / "stages" / "phase1" / "attempts").glob("*/metrics.jsonl"))
    assert (run / "old" / "phase1-1" / "done.json").exists()  # what was finished before is kept


def test_a_damaged_checkpoint_is_passed_over_and_without_another_refused(small_run, small_data, tmp_path):
    run = copied(small_run, tmp_path / "run")
    stage = run / "stages" / "phase1"
    (stage / "done.json").unlink()
    steps = sorted(stage.glob("attempts/*/step-*"))
    assert len(steps) >= 2
    flip(steps[-1] / "weights.safetensors")
    done = submit(run, small_data, "--stages", "phase1")
    assert done.returncode == 0, done.stderr
    assert f"using step {int(steps[-2].name[5:])}" in done.stdout
    assert digests_of_good(run)["phase1", 24] == digests(small_run)["phase1", 24]
    (stage / "done.json").unlink()
    for folder in stage.glob("attempts/*/step-*"):
        flip(folder / "optimizer.safetensors")
    attempts = len(list((stage / "attempts").iterdir()))
    one_line(submit(run, small_data, "--stages", "phase1"), 4, "no checkpoint can be used")
    assert states(run)["phase1"] == "failed"
    assert len(list((stage / "attempts").iterdir())) == attempts + 1


def digests_of_good(run: Path) -> dict[tuple[str, int], str]:
    found = json.loads(call("checkpoints", run, "--json", "--verify").stdout)["checkpoints"]
    return {(entry["stage"], entry["step"]): entry["digest"] for entry in found if entry["verified"]}


def test_a_table_with_a_missing_column(small_run, small_data, tmp_path):
    folder, run = tmp_path / "data", copied(small_run, tmp_path / "run")
    shutil.copytree(small_data, folder)
    (folder / "sentiment.tsv").write_text("sentence\tlabel\na fine film\t1\nno label here\n")
    done = submit(run, folder, "--stages", "sst2")
    one_line(done, 3, "sentiment.tsv:3")


def test_missing_files_are_all_named_before_anything_runs(tmp_path):
    done = submit(tmp_path / "run", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 5
    assert all("no such file" in line for line in done.stderr.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("submit", "--run", "x"), "name a --recipe and a --cluster"),
        (("submit", "--recipe", "tinny", "--cluster", "local", "--run", "x"), "did you mean 'tiny'"),
        (("status", "nowhere"), "not a run"),
        (("checkpoints", "nowhere"), "nowhere"),
        (("cancel", "nowhere"), "not a run"),
        (("report", "nowhere"), "not a run"),
    ],
)
def test_wrong_command_lines(words, expected, tmp_path):
    one_line(call(*words, cwd=tmp_path), 2, expected)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_starts(small_data, tmp_path):
    done = submit(
        tmp_path / "run", small_data, "--set", "model.hidden_size=8000000", "--set", "model.intermediate_size=8000000"
    )
    one_line(done, 6, "B are needed", "are free")
    assert not (tmp_path / "run").exists()
