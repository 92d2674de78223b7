"""Text shards become samples that decode back to the text; the bytes ignore workers, kills and reruns."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import samples
from data_prep.errors import DataError
from data_prep.hdf5 import read_shard
from data_prep.manifest import file_entry, load_verified, publish_manifest, read_manifest
from data_prep.wordpiece import SPECIAL, Encoder

REPOSITORY = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "seq_len": 64,
    "lowercase": True,
    "strip_accents": True,
    "dupe_factor": 2,
    "short_seq_prob": 0.1,
    "seed": 12345,
}
WORDS = [a + b + c for a in "bcdfgklmnprst" for b in "aeiou" for c in "nrstx"]


class FolderJob:
    def __init__(self, out: Path, workers: int = 1) -> None:
        out.mkdir(exist_ok=True)
        self.out, self.workers = out, workers

    def say(self, line: str, share: float | None = None) -> None:
        pass


def vocab_file(path: Path) -> Path:
    path.write_text("\n".join([*SPECIAL.values(), *WORDS, "##s", "."]) + "\n")
    return path


def text_folder(folder: Path, train: int = 3, documents: int = 60, seed: int = 1) -> Path:
    """Text shards whose sentences begin with a word of their own document; document 3 has no token."""
    folder.mkdir()
    source = random.Random(seed)
    entries = []
    for name in [*(f"train-{number:05d}.txt" for number in range(train)), "test-00000.txt"]:
        blocks = []
        for number in range(documents):
            sentences = [
                " ".join([WORDS[number], *source.choices(WORDS, k=source.choice([2, 5, 9, 30])), "."])
                for _ in range(source.choice([1, 2, 4, 20]))
            ]
            blocks.append("\n".join(["\u200b"] if number == 3 else sentences))
        path = folder / name
        path.write_text("".join(block + "\n\n" for block in blocks))
        entries.append({**file_entry(path), "split": name.split("-")[0]})
    publish_manifest(folder, {"shards": entries})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Any]]:
    """(text shards, vocabulary, samples, facts)"""
    folder = tmp_path_factory.mktemp("made")
    text, vocab = text_folder(folder / "text"), vocab_file(folder / "vocab.txt")
    facts = samples.run(FolderJob(folder / "out"), shards=text, vocab=vocab, **SETTINGS)
    return text, vocab, folder / "out", facts


def test_samples_decode_to_the_text(made: tuple[Path, Path, Path, dict[str, Any]]) -> None:
    text, vocab, out, _ = made
    encoder = Encoder(vocab, True, True)
    special = encoder.vocabulary.special
    for split in ("train", "test"):
        for entry in load_verified(out, split).shards:
            blocks = (text / entry.path.with_suffix(".txt").name).read_text().removesuffix("\n\n").split("\n\n")
            streams = [" " + " ".join(encoder.tokens(block)) + " " for block in blocks]
            shard = read_shard(entry.path)
            seen = set()
            for row in range(entry.rows):
                tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]].tolist()
                middle = int(shard.b_start[row])
                assert tokens[0] == special["cls"]
                assert tokens[middle - 1] == tokens[-1] == special["sep"]
                a, b = (
                    " ".join(encoder.vocabulary.tokens[token] for token in part)
                    for part in (tokens[1 : middle - 1], tokens[middle:-1])
                )
                own = streams[shard.document[row]]
                assert f" {a} " in own
                if shard.is_random_next[row]:
                    assert any(f" {b} " in stream for stream in streams)
                else:
                    assert f" {b} " in own
                    if len(tokens) < 64:  # nothing was cut
                        assert f" {a} {b} " in own
                seen.add(int(shard.document[row]))
            assert seen == set(range(60)) - {3}


def test_text_that_the_vocabulary_hardly_knows_is_told_before_training(tmp_path: Path) -> None:
    text, vocab = text_folder(tmp_path / "text"), tmp_path / "vocab.txt"
    said: list[str] = []
    job = FolderJob(tmp_path / "out")
    job.say = lambda line, share=None: said.append(line)  # type: ignore[method-assign]
    vocab.write_text("\n".join([*SPECIAL.values(), *WORDS[4:], "."]) + "\n")  # without four of the words
    facts = samples.run(job, shards=text, vocab=vocab, **SETTINGS)
    train = facts["train"]
    share = train["unknown_tokens"] / train["text_tokens"]
    assert share > 0.01
    assert facts["notes"][0].startswith(
        f"train text: {train['unknown_tokens']} of {train['text_tokens']} tokens ({share:.1%}) are [UNK]"
    )
    assert [line for line in said if "[UNK]" in line] == facts["notes"]
    vocab.write_text("\n".join([*SPECIAL.values(), *(word.title() for word in WORDS)]) + "\n")
    with pytest.raises(DataError, match=f"vocab.txt: {len(WORDS)} of {len(WORDS)} words have capitals"):
        samples.run(job, shards=text, vocab=vocab, **SETTINGS)


def test_the_manifest_counts_everything(made: tuple[Path, Path, Path, dict[str, Any]]) -> None:
    text, vocab, out, facts = made
    manifest = read_manifest(out)
    assert facts["notes"] == []
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "test-00000.hdf5",
        *(f"train-{number:05d}.hdf5" for number in range(3)),
    ]
    assert (manifest["vocab_size"], manifest["seq_len"], manifest["seed"]) == (len(WORDS) + 7, 64, 12345)
    assert manifest["special"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    train = facts["train"]
    assert train["shards"] == 3
    assert train["documents"] == 3 * 59
    assert train["documents_without_tokens"] == train["sentences_without_tokens"] == 3
    lines = [line for path in text.glob("train-*") for line in path.read_text().splitlines() if line]
    assert train["sentences"] == len(lines) - 3
    lengths = np.diff(Encoder(vocab, True, True).encode(lines)[1])
    assert train["text_tokens"] == lengths.sum()
    assert train["sentences_over_limit"] == (lengths > 61).sum()
    shards = [read_shard(entry.path) for entry in load_verified(out, "train").shards]
    assert train["rows"] == sum(len(shard.b_start) for shard in shards)
    assert train["random_next"] == sum(int(shard.is_random_next.sum()) for shard in shards)
    assert train["full_rows"] == sum(int((np.diff(shard.offsets) == 64).sum()) for shard in shards)
    assert train["padding"] == round(1 - train["tokens"] / (64 * train["rows"]), 4)
    assert shards[0].source == json.loads((text / "manifest.json").read_text())["shards"][0]["sha256"]
    # test text is paired once, train text twice: about half the rows a shard
    assert 0.3 < facts["test"]["rows"] / (train["rows"] / 3) < 0.7


def test_bytes_do_not_depend_on_workers(tmp_path: Path, made: tuple[Path, Path, Path, dict[str, Any]]) -> None:
    text, vocab, out, facts = made
    assert samples.run(FolderJob(tmp_path / "two", 2), shards=text, vocab=vocab, **SETTINGS) == facts
    assert contents(tmp_path / "two") == contents(out)


def test_shards_duplicates_and_seeds_differ(tmp_path: Path, made: tuple[Path, Path, Path, dict[str, Any]]) -> None:
    text, vocab, out, _ = made
    shard = read_shard(out / "train-00000.hdf5")
    again = np.flatnonzero(np.diff(shard.document.astype(int)) < 0) + 1  # the second duplicate begins
    assert len(again) == 1
    first = shard.tokens[: shard.offsets[again[0]]]
    assert first.tolist() != shard.tokens[shard.offsets[again[0]] :].tolist()
    samples.run(FolderJob(tmp_path / "out"), shards=text, vocab=vocab, **SETTINGS | {"seed": 1})
    assert contents(tmp_path / "out")["train-00000.hdf5"] != contents(out)["train-00000.hdf5"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from data_prep import samples
from test_samples import FolderJob, SETTINGS
if __name__ == "__main__":
    text, vocab, out = map(Path, sys.argv[1:])
    samples.run(FolderJob(out, 2), shards=text, vocab=vocab, **SETTINGS)
"""


@pytest.mark.slow
def test_killed_and_rerun(tmp_path: Path) -> None:
    text, vocab = text_folder(tmp_path / "text", train=6), vocab_file(tmp_path / "vocab.txt")
    samples.run(FolderJob(tmp_path / "undisturbed"), shards=text, vocab=vocab, **SETTINGS)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    out = tmp_path / "killed"
    out.mkdir()
    for stop_at in ("train-00001.hdf5", "train-00003.hdf5"):
        command = [sys.executable, str(script), str(text), str(vocab), str(out)]
        started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        while not (out / stop_at).exists() and started.poll() is None:
            time.sleep(0.002)
        started.send_signal(signal.SIGKILL)
        started.wait()
    kept = {path: path.stat().st_ino for path in out.glob("*.hdf5") if (out / f".{path.name}.note").exists()}
    assert kept
    samples.run(FolderJob(out), shards=text, vocab=vocab, **SETTINGS)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert all(path.stat().st_ino == number for path, number in kept.items())  # not made again


def test_what_another_setting_left_is_not_reused(tmp_path: Path) -> None:
    text, vocab = text_folder(tmp_path / "text"), vocab_file(tmp_path / "vocab.txt")
    samples.run(FolderJob(tmp_path / "fresh"), shards=text, vocab=vocab, **SETTINGS | {"seq_len": 32})
    job = FolderJob(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples.manifest, "finish", lambda *_: None)  # as if killed before the manifest
        samples.run(job, shards=text, vocab=vocab, **SETTINGS)
    samples.run(job, shards=text, vocab=vocab, **SETTINGS | {"seq_len": 32})
    assert contents(job.out) == contents(tmp_path / "fresh")


def test_special_names_in_the_text_are_not_special(tmp_path: Path) -> None:
    encoder = Encoder(vocab_file(tmp_path / "vocab.txt"), True, True)
    text = samples.tokenise(b"ban [SEP] bar\n[CLS] bas\n\nbat [MASK]\n\n", encoder, 61)
    special = encoder.vocabulary.special
    assert text.tokens.tolist()[1] == text.tokens.tolist()[3] == special["unk"]
    assert text.tokens.tolist()[-1] == special["mask"]  # as in the reference
    assert text.document_offsets.tolist() == [0, 2, 3]


def test_damaged_or_useless_text_is_named(tmp_path: Path) -> None:
    text, vocab = text_folder(tmp_path / "text"), vocab_file(tmp_path / "vocab.txt")
    path = text / "train-00001.txt"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a", b"e", 1))
    with pytest.raises(DataError, match=r"train-00001\.txt has SHA-256"):
        samples.run(FolderJob(tmp_path / "out"), shards=text, vocab=vocab, **SETTINGS)
    path.write_bytes("\u200b\n\n".encode())
    publish_manifest(text, {"shards": [{**file_entry(path), "split": "train"}]})
    with pytest.raises(DataError, match=r"train-00001\.txt holds no text"):
        samples.run(FolderJob(tmp_path / "out"), shards=text, vocab=vocab, **SETTINGS)
    vocab.write_text("[PAD]\n")
    with pytest.raises(DataError, match="lacks"):
        samples.run(FolderJob(tmp_path / "out"), shards=text, vocab=vocab, **SETTINGS)


def one_shard(folder: Path, documents: list[list[str]]) -> Path:
    folder.mkdir()
    path = folder / "train-00000.txt"
    path.write_text("".join("\n".join(sentences) + "\n\n" for sentences in documents))
    publish_manifest(folder, {"shards": [{**file_entry(path), "split": "train"}]})
    return folder


def test_text_without_full_stops_is_used_to_the_last_word(tmp_path: Path) -> None:
    """Transcripts: 12 documents of one sentence of 3,000 words each, every word another one."""
    words = [f"{a}{b}" for a in WORDS for b in WORDS][:36_000]
    transcripts = [[" ".join(words[start : start + 3000])] for start in range(0, 36_000, 3000)]
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*SPECIAL.values(), *words]) + "\n")
    said: list[str] = []
    job = FolderJob(tmp_path / "out")
    job.say = lambda line, share=None: said.append(line)  # type: ignore[method-assign]
    text = one_shard(tmp_path / "text", transcripts)
    facts = samples.run(job, shards=text, vocab=vocab, **SETTINGS | {"seq_len": 128})["train"]
    assert facts["tokens"] >= 2 * 36_000
    assert facts["sentences_over_limit"] == 12
    assert "12 of 12 sentences are too long for samples of 128 tokens: cut into pieces, all kept" in said
    used = np.unique(read_shard(tmp_path / "out" / "train-00000.hdf5").tokens)
    assert len(used) > 0.99 * 36_000
    assert 0.3 < facts["random_next"] / facts["rows"] < 0.8  # pieces of 125 tokens would all get a random next


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(2, 40), st.floats(0, 1), st.integers(0, 2**31)
)
def test_cut_places(lengths: list[int], limit: int, share: float, seed: int) -> None:
    continuing = np.array([False, True])
    tokens = (np.random.default_rng(seed).random(sum(lengths)) < share).astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cuts = samples.cut_places(tokens, offsets, limit, continuing)
    ends = np.union1d(offsets, cuts)
    assert len(ends) == len(offsets) + len(cuts)  # no cut where there is a cut already
    assert np.diff(ends).max() <= limit
    for first, last in itertools.pairwise(ends.tolist()):
        if last in cuts and tokens[last]:  # inside a word only where there is no other place
            assert tokens[first + 1 : last + 1].all() or tokens[last : first + limit + 1].all()
    whole = np.flatnonzero(np.diff(offsets) <= limit)
    assert not any(((cuts > offsets[i]) & (cuts < offsets[i + 1])).any() for i in whole)


def test_a_large_shard_becomes_several_files_of_whole_documents(
    tmp_path: Path, made: tuple[Path, Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, vocab, _, whole = made
    monkeypatch.setattr(samples, "BLOCK_BYTES", 8_000)
    monkeypatch.setattr(samples, "BLOCK_DUPLICATES", 1)
    facts = samples.run(FolderJob(tmp_path / "out"), shards=text, vocab=vocab, **SETTINGS)
    counted = ("documents", "sentences", "text_tokens", "sentences_over_limit", "documents_without_tokens")
    assert [facts["train"][key] for key in counted] == [whole["train"][key] for key in counted]
    assert facts["train"]["shards"] > 2 * whole["train"]["shards"]
    files = load_verified(tmp_path / "out", "train").shards
    names = [file.path.name for file in files if file.path.name.startswith("train-00001")]
    assert names[:3] == ["train-00001.hdf5", "train-00001-001.hdf5", "train-00001-002.hdf5"]
    blocks = (text / "train-00001.txt").read_text().split("\n\n")
    encoder = Encoder(vocab, True, True)
    seen: list[set[int]] = [set(), set()]
    for number, name in enumerate(names):
        shard = read_shard(tmp_path / "out" / name)
        seen[number % 2] |= set(shard.document.tolist())
        for row in range(0, len(shard.b_start), 7):
            a = shard.tokens[shard.offsets[row] + 1 : shard.offsets[row] + shard.b_start[row] - 1]
            words = " ".join(encoder.vocabulary.tokens[token] for token in a.tolist())
            assert words in " ".join(blocks[shard.document[row]].split())
    assert seen == [set(range(60)) - {3}] * 2


@pytest.mark.slow
def test_memory_grows_neither_with_the_shard_nor_with_the_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "BLOCK_BYTES", 100_000)
    vocab, peaks = vocab_file(tmp_path / "vocab.txt"), []
    for size, duplicates in ((1, 10), (8, 40)):
        text = one_shard(tmp_path / f"text{size}", [[" ".join(WORDS)] * 10] * 8 * size)
        tracemalloc.start()
        job = FolderJob(tmp_path / f"out{size}")
        samples.run(job, shards=text, vocab=vocab, **SETTINGS | {"dupe_factor": duplicates})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]  # all at once would be 32 times as much
