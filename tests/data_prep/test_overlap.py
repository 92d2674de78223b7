"""Evaluation texts are found in the training text, and only there; the shards are the same with and without them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep import overlap, shard
from data_prep.manifest import file_entry, publish_manifest

SETTINGS: dict[str, Any] = {
    "language": "en", "splitter": "sentencex", "train_shards": 3, "test_shards": 1, "test_fraction": 0.3, "seed": 7,
}  # fmt: skip
WORDS = [a + b + c + "o" for a in "bcdfglmnprst" for b in "aeiou" for c in "nrst"]


class FolderJob:
    def __init__(self, out: Path, workers: int = 1) -> None:
        out.mkdir(exist_ok=True)
        self.out, self.workers = out, workers
        self.said: list[str] = []

    def say(self, line: str, share: float | None = None) -> None:
        self.said.append(line)


def sentence(source: random.Random) -> str:
    return f"{' '.join(source.sample(WORDS, 12)).capitalize()}."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """(documents, sentences for training, sentences held out)"""
    folder, source = tmp_path_factory.mktemp("corpus"), random.Random(2)
    train: list[str] = []
    test: list[str] = []
    for file in range(3):
        rows = []
        for number in range(40):
            document, text = f"doc-{file}-{number}", [sentence(source) for _ in range(4)]
            (test if shard.held_out(document, 0.3, 7) else train).extend(text)
            rows.append(json.dumps({"id": document, "title": "t", "source": "s", "text": " ".join(text)}) + "\n")
        (folder / f"documents-{file:05d}.jsonl").write_text("".join(rows))
    publish_manifest(folder, {"files": [file_entry(path) for path in sorted(folder.glob("*.jsonl"))]})
    return folder, train, test


def evaluation(folder: Path, train: list[str], test: list[str]) -> list[Path]:
    """Of ten contexts three are trained on; of six rows two, in the form of GLUE's files."""
    folder.mkdir()
    source = random.Random(3)
    contexts = [f"{sentence(source)} {other} {sentence(source)}" for other in [*train[:3], *test[:2]]]
    contexts += [sentence(source) for _ in range(5)]
    squad = folder / "dev.json"
    paragraphs = [{"context": text, "qas": [{"question": train[50], "answers": []}]} for text in contexts]
    squad.write_text(json.dumps({"data": [{"title": train[51], "paragraphs": paragraphs}]}))
    rows = [train[90].lower().replace(".", " ."), train[91].replace(" ", " , ", 3), test[5], *map(str, range(3))]
    table = folder / "dev.tsv"
    table.write_text("sentence\tother\tlabel\n" + "".join(f"{sentence(source)}\t{row}\t1\n" for row in rows))
    return [squad, table]


@pytest.mark.slow
def test_what_is_trained_on_is_found_whatever_its_form(
    corpus: tuple[Path, list[str], list[str]], tmp_path: Path
) -> None:
    documents, train, test = corpus
    files = evaluation(tmp_path / "evaluation", train, test)
    jobs = [FolderJob(tmp_path / "out"), FolderJob(tmp_path / "two", 2), FolderJob(tmp_path / "without")]
    found, again = (shard.run(job, documents=documents, **SETTINGS, evaluation=files) for job in jobs[:2])
    without = shard.run(jobs[2], documents=documents, **SETTINGS)
    assert found == again
    assert found.pop("evaluation") == [
        {
            "file": "evaluation/dev.json",
            "texts": 10,
            "texts_in_training": 3,
            "sentences": 20,
            "sentences_in_training": 3,
        },
        {"file": "evaluation/dev.tsv", "texts": 6, "texts_in_training": 2, "sentences": 9, "sentences_in_training": 2},
    ]
    lines = found["notes"][1:]
    assert lines[0].startswith("evaluation/dev.json: 3 of 10 evaluation texts share a sentence with the training text")
    assert jobs[0].said[-2:] == lines
    assert {**found, "notes": found["notes"][:1]} == without
    names = [path.name for path in jobs[2].out.iterdir()]
    for job in jobs[:2]:
        assert {path.name: path.read_bytes() for path in job.out.iterdir()} == {
            name: (jobs[2].out / name).read_bytes() for name in names
        }


def test_what_a_killed_try_found_is_kept_for_the_same_files_only(
    corpus: tuple[Path, list[str], list[str]], tmp_path: Path
) -> None:
    documents, train, test = corpus
    files = evaluation(tmp_path / "evaluation", train, test)
    whole = shard.run(FolderJob(tmp_path / "whole"), documents=documents, **SETTINGS, evaluation=files)
    job = FolderJob(tmp_path / "out")
    for before in ([], files):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard, "_finish", lambda *_: {"notes": []})  # as if killed before the manifest
            shard.run(job, documents=documents, **SETTINGS, evaluation=before)
        written = {path: path.stat().st_ino for path in job.out.glob("train-*.txt")}
        found = shard.run(job, documents=documents, **SETTINGS, evaluation=files)
        assert found == whole
        assert (written == {path: path.stat().st_ino for path in written}) == (before == files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'sentence,label\n"It said ""no, not now"" to all of them again.",1\n'),
        ("a.jsonl", '{"idx": 3, "sentence": "It said \\"no, not now\\" to all of them again."}\n'),
        ("a.tsv", "\ufeffit said ` no , not now ' to all of them again .\t0\r\n"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "Ha. It said \u201cno\u201d."}, '
         '{"context": "It said \\"no, not now\\" to all of them again."}]}]}'),
    ],
)  # fmt: skip
def test_every_form_of_evaluation_file_is_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    sought = overlap.wanted((tmp_path / name,), "en", "sentencex")
    assert list(sought.numbers) == [b"itsaidnonotnowtoallofthemagain"]
    assert sought.texts == {tmp_path / name: [[0]]}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "{"), ("a.json", "[" * 100_000), ("a.jsonl", "{}\nx\n"), ("a.tsv", "version https://git-lfs.x/v1\n")],
)
def test_what_cannot_be_read_is_named_and_stops_nothing(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "whole.jsonl").write_text(json.dumps({"text": "It said no, not now, to all of them, again."}))
    sought = overlap.wanted((tmp_path / name, tmp_path / "whole.jsonl"), "en", "sentencex")
    assert list(sought.texts) == [tmp_path / "whole.jsonl"]
    (row, line), _ = overlap.told(sought, set())
    assert row["file"].endswith(name)
    assert name in line
    assert line.endswith("not looked for in the training text")
