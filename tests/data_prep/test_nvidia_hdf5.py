"""Shards survive the way to NVIDIA's schema and back; foreign files that do not fit are named with their row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep import nvidia_hdf5
from data_prep.errors import DataError
from data_prep.hdf5 import Shard, read_shard, write_shard
from data_prep.manifest import load_verified, publish_manifest
from data_prep.masking import masked_counts
from data_prep.nvidia_hdf5 import SCHEMA, from_nvidia, main, read_rows, write_rows
from data_prep.wordpiece import SPECIAL, Vocabulary

VOCAB_SIZE = 30522


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL.values(), *(f"w{number}" for number in range(VOCAB_SIZE - 5))]))
    return path


def samples_folder(folder: Path, vocab: Path, seq_len: int = 128) -> Path:
    folder.mkdir()
    vocabulary = Vocabulary.load(vocab)
    entries = []
    for number, split in enumerate(("train", "train", "test")):
        rng = np.random.default_rng(number)
        lengths = rng.integers(5, seq_len + 1, 40)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = rng.integers(5, VOCAB_SIZE, offsets[-1]).astype(np.uint16)
        b_start = np.array([rng.integers(3, length - 1) for length in lengths], np.uint16)
        tokens[offsets[:-1]] = vocabulary.special["cls"]
        tokens[offsets[:-1] + b_start - 1] = tokens[offsets[1:] - 1] = vocabulary.special["sep"]
        nsp = rng.integers(0, 2, 40).astype(np.uint8)
        document = np.zeros(40, np.uint32)
        shard = Shard(tokens, offsets, b_start, nsp, document, seq_len, vocabulary.sha256, 7, "x")
        name = f"{split}-{number % 2:05d}.hdf5"
        entries.append({"file": name, "split": split, **write_shard(folder / name, shard)})
    keys = {"format": 1, "seq_len": seq_len, "vocab_size": VOCAB_SIZE, "vocab_sha256": vocabulary.sha256, "seed": 7}
    publish_manifest(folder, {**keys, "special": vocabulary.special, "shards": entries})
    return folder


@pytest.mark.parametrize(("seq_len", "columns"), [(128, 20), (512, 80)])
def test_round_trip(tmp_path: Path, vocab: Path, seq_len: int, columns: int) -> None:
    ours = samples_folder(tmp_path / "ours", vocab, seq_len)
    assert main(["to-nvidia", str(ours), str(tmp_path / "theirs")]) == 0
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == ["samples_test_0.hdf5", "samples_training_0.hdf5", "samples_training_1.hdf5"]
    with h5py.File(tmp_path / "theirs" / "samples_training_1.hdf5") as file:
        assert {name: file[name].dtype.str for name in file} == {name: dtype for name, (dtype, _) in SCHEMA.items()}
        assert all(file[name].compression == "gzip" for name in file)
        assert file["masked_lm_ids"].shape == (40, columns)
    command = ["from-nvidia", str(tmp_path / "theirs"), str(tmp_path / "back"), "--vocab", str(vocab)]
    assert main(command) == 0
    for split in ("train", "test"):
        before, after = load_verified(ours, split), load_verified(tmp_path / "back", split)
        assert (after.seq_len, after.vocab_size, after.special) == (seq_len, VOCAB_SIZE, before.special)
        for one, two in zip(before.shards, after.shards, strict=True):
            first, second = read_shard(one.path), read_shard(two.path)
            for name in ("tokens", "offsets", "b_start", "is_random_next"):
                assert np.array_equal(getattr(first, name), getattr(second, name))
                assert getattr(first, name).dtype == getattr(second, name).dtype


def labels_as_nvidia_s_loader_sees_them(rows: Any, row: int, max_predictions: int) -> Any:
    """The six-dataset loader, transcribed: labels are -1 but at the positions before the first zero."""
    labels = np.full(rows["input_ids"].shape[1], -1)
    positions = rows["masked_lm_positions"][row]
    zeros = np.flatnonzero(positions == 0)
    index = zeros[0] if len(zeros) else max_predictions
    labels[positions[:index]] = rows["masked_lm_ids"][row][:index]
    return labels


def test_a_loader_of_nvidia_s_schema_sees_the_same_samples(tmp_path: Path, vocab: Path) -> None:
    ours = samples_folder(tmp_path / "ours", vocab)
    main(["to-nvidia", str(ours), str(tmp_path / "theirs"), "--workers", "2"])
    rows = read_rows(tmp_path / "theirs" / "samples_training_0.hdf5")
    shard = read_shard(ours / "train-00000.hdf5")
    for row in range(40):
        tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]].astype(int)
        labels = labels_as_nvidia_s_loader_sees_them(rows, row, 20)
        assert (labels >= 0).sum() == masked_counts(len(tokens), 0.15, 20)
        restored = np.where(labels >= 0, labels, rows["input_ids"][row])
        assert restored[: len(tokens)].tolist() == tokens.tolist()
        assert not restored[len(tokens) :].any()
        assert rows["input_mask"][row].tolist() == [1] * len(tokens) + [0] * (128 - len(tokens))
        middle = int(shard.b_start[row])
        expected = [0] * middle + [1] * (len(tokens) - middle) + [0] * (128 - len(tokens))
        assert rows["segment_ids"][row].tolist() == expected
        assert rows["next_sentence_labels"][row] == shard.is_random_next[row]
    assert (rows["input_ids"] == 4).sum() > 300  # masked


def one_file(path: Path) -> dict[str, Any]:
    """Three rows of [CLS] 10 [SEP] 11 12 [SEP] with token 11 masked, as a foreign tool might write them."""
    ids = np.zeros((3, 8), np.int64)
    ids[:, :6] = [2, 10, 3, 4, 12, 3]
    mask = np.zeros((3, 8), np.uint8)
    mask[:, :6] = 1
    segments = np.zeros((3, 8), np.int32)
    segments[:, 3:6] = 1
    positions = np.tile([3, 0, 0, 0, 0], (3, 1))
    labels = np.tile([11, 0, 0, 0, 0], (3, 1))
    arrays = (ids, mask, segments, positions, labels, np.array([0, 1, 0]))
    rows = dict(zip(SCHEMA, arrays, strict=True))
    write_raw(path, rows)
    return rows


def write_raw(path: Path, rows: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, value in rows.items():
            file[name] = value


def test_other_integer_types_and_widths_are_read(tmp_path: Path, vocab: Path) -> None:
    one_file(tmp_path / "wiki_training_10.hdf5")
    one_file(tmp_path / "wiki_training_9.hdf5")
    made = from_nvidia(tmp_path, tmp_path / "out", vocab=vocab)
    assert [entry["rows"] for entry in made["shards"]] == [3, 3]
    shard = read_shard(tmp_path / "out" / "train-00000.hdf5")
    assert shard.tokens.tolist() == [2, 10, 3, 11, 12, 3] * 3
    assert shard.is_random_next.tolist() == [0, 1, 0]


@pytest.mark.parametrize("how", ["gzip", "lzf"])
def test_both_compressions_of_h5py_are_read(tmp_path: Path, vocab: Path, how: str) -> None:
    one_file(tmp_path / "plain.hdf5")
    with h5py.File(tmp_path / "plain.hdf5") as plain, h5py.File(tmp_path / "wiki_training_0.hdf5", "w") as file:
        for name in plain:
            file.create_dataset(name, data=plain[name][()], compression=how)
    (tmp_path / "plain.hdf5").unlink()
    assert from_nvidia(tmp_path, tmp_path / "out", vocab=vocab)["shards"][0]["rows"] == 3


def test_every_column_may_be_used(tmp_path: Path, vocab: Path) -> None:
    rows = one_file(tmp_path / "a.hdf5")
    rows["masked_lm_positions"] = rows["masked_lm_positions"][:, :1]
    rows["masked_lm_ids"] = rows["masked_lm_ids"][:, :1]
    write_raw(tmp_path / "a.hdf5", rows)
    from_nvidia(tmp_path / "a.hdf5", tmp_path / "out", vocab=vocab)
    assert read_shard(tmp_path / "out" / "train-00000.hdf5").tokens.tolist() == [2, 10, 3, 11, 12, 3] * 3


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("input_ids", (1, 4), 40000, "row 1: an id is outside the vocabulary"),
        ("input_ids", (2, 0), 5, r"row 2: the first token is not \[CLS\]"),
        ("input_mask", (1, 2), 0, "row 1: input_mask"),
        ("segment_ids", (1, 4), 0, "row 1: segment_ids"),
        ("segment_ids", (0, 7), 1, "row 0: segment_ids"),
        ("masked_lm_positions", (1, 0), 7, "row 1: a masked position"),
        ("masked_lm_positions", (1, 0), -1, "row 1: a masked position"),
        ("masked_lm_ids", (1, 0), -7, "row 1: an id"),
        ("next_sentence_labels", (1,), 2, "row 1: next_sentence_labels"),
    ],
)
def test_unsound_rows_are_named(
    tmp_path: Path, vocab: Path, name: str, at: tuple[int, ...], value: int, message: str
) -> None:
    rows = one_file(tmp_path / "a.hdf5")
    rows[name][at] = value
    write_raw(tmp_path / "a.hdf5", rows)
    with pytest.raises(DataError, match=message):
        from_nvidia(tmp_path, tmp_path / "out", vocab=vocab)


def test_other_files_are_one_line(tmp_path: Path, vocab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = one_file(tmp_path / "a.hdf5")
    rows["segment_ids"] = rows["segment_ids"][:, :-1]
    write_raw(tmp_path / "a.hdf5", rows)
    with pytest.raises(DataError, match="shapes of its datasets do not agree"):
        read_rows(tmp_path / "a.hdf5")
    for content in (b"", b"text"):
        (tmp_path / "a.hdf5").write_bytes(content)
        with pytest.raises(DataError, match="not a file of NVIDIA's schema"):
            read_rows(tmp_path / "a.hdf5")
    (tmp_path / "empty").mkdir()
    assert main(["from-nvidia", str(tmp_path / "empty"), str(tmp_path / "out"), "--vocab", str(vocab)]) == 3
    assert capsys.readouterr().err == f"error: {tmp_path / 'empty'} holds no .hdf5 file\n"


def test_a_split_without_a_row_is_refused(tmp_path: Path, vocab: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = one_file(tmp_path / "one.hdf5")
    write_raw(source / "test_0.hdf5", rows)
    write_raw(source / "train_0.hdf5", {name: column[:0] for name, column in rows.items()})
    job = SimpleNamespace(out=tmp_path / "out", workers=1, say=print)
    job.out.mkdir()
    with pytest.raises(DataError, match="holds no train sample"):
        nvidia_hdf5.run(job, source=source, vocab=vocab, seq_len=rows["input_ids"].shape[1])


def test_data_outside_the_file_is_not_followed(tmp_path: Path) -> None:
    rows = one_file(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        del file["next_sentence_labels"]
        outside = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("next_sentence_labels", (3,), "i1", external=outside)
    with pytest.raises(DataError, match="stored outside the file"):
        read_rows(tmp_path / "a.hdf5")
    write_rows(tmp_path / "b.hdf5", rows)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        del file["next_sentence_labels"]
        file["next_sentence_labels"] = h5py.ExternalLink(str(tmp_path / "b.hdf5"), "next_sentence_labels")
    with pytest.raises(DataError, match="not a file of NVIDIA's schema"):
        read_rows(tmp_path / "a.hdf5")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        for name, (kind, dimensions) in SCHEMA.items():
            file.create_dataset(name, (1 << 32, 512)[:dimensions], kind, chunks=True, compression="gzip")
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="more than 4 GB of samples; split it"):
        read_rows(path)
