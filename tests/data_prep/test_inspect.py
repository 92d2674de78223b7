"""A sample in words is the sample that training reads, with its mask, and names its text."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_prep.wordpiece import SPECIAL, Vocabulary
from faults import training
from pipeline.pretrain.data import PretrainingData
from support.running import ROOT


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.inspect", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def samples_in_words(folder: Path, every_second: str = "") -> tuple[Vocabulary, Path]:
    """A vocabulary, in which every second word begins with something, and samples made with it."""
    vocab = folder / "vocab" / "vocab.txt"
    vocab.parent.mkdir()
    names = [SPECIAL[name] for name in ("pad", "unk", "cls", "sep", "mask")]
    vocab.write_text("\n".join([*names, *(f"{every_second * (n % 2)}w{n}" for n in range(5, training.VOCAB))]) + "\n")
    known = Vocabulary.load(vocab)
    return known, training.make_samples(folder / "samples", vocab_sha256=known.sha256)


def test_the_mask_is_that_of_training(tmp_path: Path) -> None:
    known, folder = samples_in_words(tmp_path)
    shard = folder / "train-00000.hdf5"
    options = ("--epoch", 1, "--max-predictions", training.PHASE.max_predictions)
    done = inspect(shard, "--sample", 3, *options)
    assert done.returncode == 0, done.stderr
    data = PretrainingData(folder, "train", training.PHASE, dataclasses.replace(training.TRAIN, masking="dynamic"))
    total = data.order.total
    place = next(p for p in range(total, 2 * total) if data.ids(np.array([p]))[0] == 3)
    sample = data.read(np.array([place]))
    seen = next(line for line in done.stdout.splitlines() if line.startswith("seen in epoch 1, seed 42:  "))
    assert seen.split(":  ")[1].split() == [known.tokens[token] for token in sample.tokens]
    first = [known.tokens[label] for label in sample.labels]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  ")] == first
    assert "its text shard is not in" in done.stdout


def test_whole_words_are_masked_in_training_and_shown(tmp_path: Path) -> None:
    """The data of a phase with ``masking_unit = "word"`` is asked for by its vocabulary, and the viewer agrees."""
    known, folder = samples_in_words(tmp_path, every_second="##")
    data = PretrainingData(folder, "train", training.PHASE, training.TRAIN, continuing=known.continuing)
    place = next(p for p in range(data.order.total) if data.ids(np.array([p]))[0] == 3)
    sample = data.read(np.array([place]))
    words = ("--masking-unit", "word", "--max-predictions", training.PHASE.max_predictions)
    done = inspect(folder / "train-00000.hdf5", "--sample", 3, *words)
    shown = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert shown == [known.tokens[label] for label in sample.labels]
    single = PretrainingData(folder, "train", training.PHASE, training.TRAIN).read(np.array([place]))
    assert single.positions.tolist() != sample.positions.tolist()


def test_what_is_no_sample_is_said_in_a_line(tmp_path: Path) -> None:
    folder = training.make_samples(tmp_path / "samples")
    for words, line in (
        ((folder / "train-00000.hdf5", "--sample", 99), "has samples 0 to 63, not 99"),
        ((folder / "train-00007.hdf5",), "does not list it"),
        ((tmp_path / "nothing" / "train-00000.hdf5",), "manifest.json is missing"),
    ):
        done = inspect(*words)
        assert done.returncode == 3
        assert line in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_vocabulary_of_others_writes_nothing_to_the_terminal(tmp_path: Path) -> None:
    _, folder = samples_in_words(tmp_path, every_second="\x1b]0;title\x07\x1b[2J")
    done = inspect(folder / "train-00000.hdf5", "--sample", 3)
    assert done.returncode == 0, done.stderr
    assert r"\x1b]0;title\x07" in done.stdout
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
