"""Every document lands whole in exactly one shard, the same one whatever the workers, kills and reruns."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import repeats, shard
from data_prep.errors import DataError
from data_prep.manifest import file_entry, publish_manifest, read_manifest, verify

REPOSITORY = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "language": "en",
    "splitter": "sentencex",
    "train_shards": 4,
    "test_shards": 2,
    "test_fraction": 0.1,
    "seed": 7,
}


class FolderJob:
    def __init__(self, out: Path, workers: int = 1) -> None:
        out.mkdir(exist_ok=True)
        self.out, self.workers = out, workers

    def say(self, line: str, share: float | None = None) -> None:
        pass


def documents_folder(folder: Path, count: int, files: int = 3, seed: int = 1) -> Path:
    """``count`` documents of 1 to 30 distinct sentences; number 5 is empty."""
    folder.mkdir()
    source = random.Random(seed)
    texts = [
        "\n".join(
            " ".join(f"Document {number} line {line} says w{source.randrange(99)}." for _ in range(2))
            for line in range(source.choice([1, 2, 3, 15]))
        )
        for number in range(count)
    ]
    if count > 5:
        texts[5] = " \n\t "
    for number in range(files):
        lines = [
            json.dumps({"id": f"doc-{at}", "title": "t", "source": "s", "text": text})
            for at, text in enumerate(texts)
            if at * files // count == number
        ]
        (folder / f"documents-{number:05d}.jsonl").write_text("".join(line + "\n" for line in lines))
    publish_manifest(folder, {"files": [file_entry(path) for path in sorted(folder.glob("*.jsonl"))]})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_are_conserved_and_whole(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 200)
    facts = shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS)
    expected = Counter()
    for path in source.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            sentences = json.loads(line)["text"].replace(". ", ".\n").split("\n")
            expected["\n".join(sentence.strip() for sentence in sentences if sentence.strip())] += 1
    assert expected.pop("") == 1
    found = Counter()
    for path in (tmp_path / "out").glob("*.txt"):
        blocks = path.read_text().split("\n\n")
        assert blocks.pop() == ""
        found.update(blocks)
    assert found == expected
    assert facts["documents_in"] == 200
    assert facts["skipped"] == {"no text": 1}
    assert facts["train"]["documents"] + facts["test"]["documents"] == 199
    manifest = read_manifest(tmp_path / "out")
    assert len(verify(tmp_path / "out", manifest["shards"])) == 6
    words = sum(len(block.split()) for block in found)
    assert facts["train"]["words"] + facts["test"]["words"] == words
    assert facts["train"]["sentences"] + facts["test"]["sentences"] == sum(b.count("\n") + 1 for b in found)
    sizes = [entry["bytes"] for entry in manifest["shards"] if entry["split"] == "train"]
    assert max(sizes) - min(sizes) <= max(len(block) + 2 for block in found)
    assert sorted(contents(tmp_path / "out")) == [
        "manifest.json",
        "test-00000.txt",
        "test-00001.txt",
        *(f"train-{number:05d}.txt" for number in range(4)),
    ]


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_or_on_what_a_killed_try_left(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 100)
    shard.run(FolderJob(tmp_path / "one"), documents=source, **SETTINGS)
    shard.run(FolderJob(tmp_path / "three", 3), documents=source, **SETTINGS)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.slow
def test_replayed_text_is_its_share_of_training_and_never_held_out(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 2000, files=4)
    for path in sorted(source.glob("*.jsonl"))[1:]:  # three quarters are general text, of a folder
        path.write_text(path.read_text().replace('"source": "s"', '"source": "general/a.txt"'))
    publish_manifest(source, {"files": [file_entry(path) for path in sorted(source.glob("*.jsonl"))]})
    replay = {"replay": ["corpora/general"], "replay_share": 0.2}
    facts = shard.run(FolderJob(tmp_path / "out", 2), documents=source, **SETTINGS, **replay)
    own = shard.run(FolderJob(tmp_path / "own"), documents=source, **SETTINGS, replay=["general"], replay_share=1e-9)
    general = facts["train"]["bytes"] - own["train"]["bytes"]
    assert general / facts["train"]["bytes"] == pytest.approx(0.2, abs=0.02)
    assert facts["test"] == own["test"]
    assert facts["skipped"]["beyond the share to replay"] > 1000
    assert facts["documents_in"] == 2000
    every = shard.run(FolderJob(tmp_path / "every"), documents=source, **SETTINGS, replay=["general"], replay_share=0.9)
    assert "beyond the share to replay" not in every["skipped"]
    shard.run(FolderJob(tmp_path / "again"), documents=source, **SETTINGS, **replay)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from data_prep import repeats, shard
from test_shard import FolderJob, SETTINGS
if __name__ == "__main__":
    shard.run(FolderJob(Path(sys.argv[2]), 2), documents=Path(sys.argv[1]), **SETTINGS)
"""


def test_killed_while_it_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = documents_folder(tmp_path / "documents", 60)
    shard.run(FolderJob(tmp_path / "whole"), documents=source, **SETTINGS)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name.endswith(".rows.npy"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS)
    shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_and_rerun(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 1500)
    shard.run(FolderJob(tmp_path / "undisturbed"), documents=source, **SETTINGS)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    out = tmp_path / "killed"
    out.mkdir()
    for stop_at in (".documents-00001.jsonl.index.npy", "train-00001.txt", "test-00000.txt"):
        command = [sys.executable, str(script), str(source), str(out)]
        started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        while not (out / stop_at).exists() and started.poll() is None:
            time.sleep(0.002)
        started.send_signal(signal.SIGKILL)
        started.wait()
    (out / ".train-00003.txt.99-ab.tmp").write_bytes(b"half")
    kept = {path: path.stat().st_ino for path in out.glob("*.txt") if (out / f".{path.name}.note").exists()}
    assert kept
    shard.run(FolderJob(out), documents=source, **SETTINGS)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert all(path.stat().st_ino == number for path, number in kept.items())  # not written again


@pytest.mark.parametrize("change", [{"seed": 8}, {"splitter": "punkt"}])
def test_what_another_setting_left_is_not_reused(tmp_path: Path, change: dict[str, Any]) -> None:
    source = documents_folder(tmp_path / "documents", 100)
    path = source / "documents-00001.jsonl"
    path.write_text(path.read_text().replace(". ", ".) (", 9))  # the splitters cut quotations differently
    publish_manifest(source, {"files": [file_entry(path) for path in sorted(source.glob("*.jsonl"))]})
    shard.run(FolderJob(tmp_path / "fresh"), documents=source, **SETTINGS | change)
    job = FolderJob(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "_finish", lambda *_: [])  # as if killed before the manifest
        shard.run(job, documents=source, **SETTINGS)
    left = contents(job.out)
    shard.run(job, documents=source, **SETTINGS | change)
    assert contents(job.out) == contents(tmp_path / "fresh")
    assert contents(job.out) != {name: left.get(name) for name in contents(job.out)}


def test_the_held_out_part_is_a_property_of_the_document() -> None:
    ids = [f"wiki-{number}" for number in range(20000)]
    chosen = {document for document in ids if shard.held_out(document, 0.1, 1)}
    assert 0.09 < len(chosen) / len(ids) < 0.11
    assert chosen <= {document for document in ids if shard.held_out(document, 0.2, 1)}
    assert chosen != {document for document in ids if shard.held_out(document, 0.1, 2)}
    assert not any(shard.held_out(document, 0.0, 1) for document in ids)
    assert all(shard.held_out(document, 1.0, 1) for document in ids)
    assert shard.held_out("wiki-12", 0.5, 3) == shard.held_out("wiki-12", 0.5, 3)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000) | st.integers(1, 5), min_size=2, max_size=400),
    shards=st.integers(1, 9),
    files=st.integers(1, 4),
)
def test_every_document_is_planned_once_and_shards_are_balanced(sizes: list[int], shards: int, files: int) -> None:
    indexes = {}
    for number, part in enumerate(np.array_split(np.array(sizes), files)):
        index = np.zeros(len(part), shard.INDEX)
        index["bytes"] = part
        indexes[f"f{number}"] = index
    if len(sizes) < 2:
        with pytest.raises(DataError, match="two are needed at least"):
            shard.plan(indexes, "train", shards)
        return
    plans = shard.plan(indexes, "train", shards)
    shards = min(shards, len(sizes) // 2)
    assert len(plans) == shards
    seen = Counter((s.file, at) for plan in plans for s in plan.spans for at in range(s.first, s.last))
    assert seen == Counter((name, at) for name, index in indexes.items() for at in range(len(index)))
    weights = [sum(indexes[s.file]["bytes"][s.first : s.last].sum() for s in plan.spans) for plan in plans]
    assert all(sum(s.last - s.first for s in plan.spans) >= 2 for plan in plans)
    if len(sizes) > 4 * shards:
        run = sum(sizes) // (shard.RUNS_PER_SHARD * shards)
        assert max(weights) - min(weights) <= 2 * (max(sizes) + run)


def test_a_small_corpus_makes_fewer_shards_and_says_what_else_to_set(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 6)
    with pytest.raises(DataError, match=r"test documents of \d are too few.*set data\.test_fraction to 0\.50"):
        shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS | {"test_fraction": 0.001})
    facts = shard.run(
        FolderJob(tmp_path / "out"),
        documents=source,
        **SETTINGS | {"test_fraction": 0.0},
    )
    assert facts["train"]["shards"] == 2
    assert (facts["train"]["documents"], facts["test"]["documents"]) == (5, 0)


def test_a_broken_document_is_named(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 20, files=1)
    path = source / "documents-00000.jsonl"
    lines = path.read_text().splitlines()
    for broken in ("{", '{"id": 3, "text": "a"}', '{"id": "a"}', '{"id": "a", "text": "\\ud800"}'):
        path.write_text("\n".join([*lines[:3], broken, *lines[3:]]))
        publish_manifest(source, {"files": [file_entry(path)]})
        with pytest.raises(DataError, match=r"documents-00000\.jsonl line 4 is not a document"):
            shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"documents-00000\.jsonl has \d+ bytes, its manifest says"):
        shard.run(FolderJob(tmp_path / "out"), documents=source, **SETTINGS)


def repetitive_folder(folder: Path, files: int = 3) -> list[tuple[int, str]]:
    """Documents some of which, and some long and short lines of which, repeat; (1 where held out, text) of each."""
    source, folder_files = random.Random(3), [[] for _ in range(files)]
    lines = [f"Line {n} " + "of many words " * source.choice([1, 9, 9]) + "ends." for n in range(200)]
    texts = ["\n".join(source.choices(lines, k=source.choice([1, 1, 2, 4]))) for _ in range(150)]
    for number, text in enumerate(texts):
        row = {"id": f"doc-{number}", "title": "t", "source": "s", "text": text}
        folder_files[number * files // len(texts)].append(json.dumps(row) + "\n")
    folder.mkdir()
    for number, rows in enumerate(folder_files):
        (folder / f"documents-{number:05d}.jsonl").write_text("".join(rows))
    publish_manifest(folder, {"files": [file_entry(path) for path in sorted(folder.glob("*.jsonl"))]})
    return [(int(shard.held_out(f"doc-{number}", 0.1, 7)), text) for number, text in enumerate(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_repeats_is_counted_and_left_out_by_the_first_that_came(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "ROWS_AT_A_TIME", 40)  # compared in several turns
    documents = repetitive_folder(tmp_path / "documents")
    kept, texts, lines, again = [], set(), set(), 0
    long = [(test, line) for test, text in documents for line in text.split("\n") if len(line) >= repeats.LONG_LINE]
    held_out, trained = [line for test, line in long if test], {line for test, line in long if not test}
    for _, text in documents:
        rest = []
        for line in text.split("\n") if text not in texts else ():
            if len(line) < repeats.LONG_LINE or line not in lines:
                rest.append(line)
            again += len(line) >= repeats.LONG_LINE and line in lines
            lines.add(line)
        texts.add(text)
        kept += ["\n".join(rest)] if rest else []
    run = {"documents": tmp_path / "documents", **SETTINGS}
    every = shard.run(FolderJob(tmp_path / "all", workers), **run)
    out = FolderJob(tmp_path / "once", workers)
    once = shard.run(out, **run, deduplicate=True)
    found = [block for path in out.out.glob("*.txt") for block in path.read_text().split("\n\n")[:-1]]
    assert Counter(found) == Counter(kept)
    assert once["train"]["documents"] + once["test"]["documents"] == len(kept)
    assert once["skipped"]["repeats an earlier document"] == len(documents) - len(kept)
    assert (once["repeated"]["documents"], once["repeated"]["lines"]) == (len(documents) - len(texts), again)
    assert {**every["repeated"], "left_out": True} == once["repeated"]
    assert every["train"]["documents"] + every["test"]["documents"] == len(documents)
    in_both = sum(line in trained for line in held_out)
    assert once["repeated"]["test_lines"] == len(held_out) > in_both == once["repeated"]["test_lines_in_train"] > 0
    assert {path.suffix for path in out.out.iterdir()} == {".txt", ".json"}


def test_ones_own_text_is_kept_where_text_to_be_replayed_repeats_it(tmp_path: Path) -> None:
    source = documents_folder(tmp_path / "documents", 100, files=1)
    (own := source / "documents-00001.jsonl").write_text((source / "documents-00000.jsonl").read_text())
    general = own.with_name("documents-00000.jsonl")
    general.write_text(general.read_text().replace('"source": "s"', '"source": "general"'))
    publish_manifest(source, {"files": [file_entry(path) for path in (general, own)]})
    run = {"documents": source, **SETTINGS, "deduplicate": True, "replay": ["general"], "replay_share": 0.5}
    facts = shard.run(FolderJob(tmp_path / "out"), **run)
    assert facts["skipped"]["repeats an earlier document"] == 99
    assert facts["test"]["documents"] > 0
    alone = shard.run(
        FolderJob(tmp_path / "alone"), documents=source, **SETTINGS, replay=["general"], replay_share=1e-9
    )
    assert (facts["train"], facts["test"]) == (alone["train"], alone["test"])
