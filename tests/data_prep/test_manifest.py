"""A data folder is used only when its manifest is whole and every file matches it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep import manifest
from data_prep.errors import DataError
from data_prep.manifest import file_entry, load, load_verified, publish_manifest, read_manifest, verify, verify_share
from data_prep.publish import SEAL


def samples_folder(folder: Path) -> Path:
    shards = []
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        path = folder / f"{split}-{number:05d}.hdf5"
        path.write_bytes(f"{split} {number}".encode() * 100)
        shards.append({**file_entry(path), "split": split, "rows": 10 + number, "tokens": 300})
    publish_manifest(
        folder,
        {
            "format": 1,
            "seq_len": 128,
            "vocab_size": 30522,
            "vocab_sha256": "ab",
            "seed": 1,
            "special": {"pad": 0, "mask": 103},
            "shards": shards,
            "documents": 7,
        },
    )
    return folder


def test_a_whole_folder_loads(tmp_path: Path) -> None:
    samples = load_verified(samples_folder(tmp_path), "train")
    assert [shard.path.name for shard in samples.shards] == ["train-00000.hdf5", "train-00001.hdf5"]
    assert (samples.rows, samples.seq_len, samples.special["mask"]) == (21, 128, 103)
    assert len(samples.sha256) == 64
    assert len(load(tmp_path, "test").shards) == 1


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    samples_folder(tmp_path)
    path = tmp_path / "train-00001.hdf5"
    content = bytearray(path.read_bytes())
    content[5] ^= 4
    path.write_bytes(content)
    assert len(load(tmp_path, "train").shards) == 2  # sizes only
    assert len(load_verified(tmp_path, "test").shards) == 1  # not its split
    with pytest.raises(DataError, match=r"train-00001\.hdf5 has SHA-256"):
        load_verified(tmp_path, "train")
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"has 699 bytes, its manifest says 700"):
        load(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.hdf5 is missing"):
        load(tmp_path, "train")


def test_each_file_is_verified_once_by_one_rank_and_then_trusted_for_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load(samples_folder(tmp_path), "train")
    record = tmp_path / "record"
    assert [verify_share(samples, record, rank=rank, ranks=3) for rank in range(3)] == [1, 1, 0]
    assert [verify_share(samples, record, rank=rank, ranks=2) for rank in range(2)] == [0, 0]
    assert verify_share(samples, record) == 0  # a requeue on another number of ranks
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.manifest.TRUSTED_S", 0.0)
        assert verify_share(samples, record) == 2
    path = samples.shards[1].path
    content = path.read_bytes()
    path.write_bytes(content)  # the same bytes, changed later
    os.utime(path, (1, 1))
    assert verify_share(samples, record) == 1
    path.write_bytes(content[::-1])
    for rank, ranks in ((0, 1), (1, 2)):
        with pytest.raises(DataError, match=r"train-00001\.hdf5 has SHA-256"):
            verify_share(samples, record, rank=rank, ranks=ranks)
    path.unlink()
    path.write_bytes(content)  # a copy: another inode
    assert verify_share(samples, record) == 1
    for text in ("", "[]", '{"files": [7]}', '{"when": 1e99}', "[" * 3000, "7" * 5000):
        for file in record.iterdir():
            file.write_text(text)
        assert verify_share(samples, record) == 2
    for file in [*record.iterdir()]:  # nobody would ever write to these, or read what is written
        file.unlink()
        os.mkfifo(file)
    assert verify_share(samples, record) == 2


def test_a_record_is_opened_once_however_many_ranks_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, record = load(samples_folder(tmp_path), "train"), tmp_path / "record"
    assert verify_share(samples, record) == 2
    opened: list[Path] = []
    plain = manifest.open_plain
    monkeypatch.setattr(manifest, "open_plain", lambda path, most: (opened.append(path), plain(path, most))[1])
    assert [verify_share(samples, record, rank=rank, ranks=64) for rank in range(64)] == [0] * 64
    assert sorted(path.name for path in opened) == ["train-00000.hdf5.json", "train-00001.hdf5.json"]


@pytest.mark.slow
def test_every_changed_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = samples_folder(tmp_path) / "manifest.json"
    whole = path.read_bytes()
    value = json.loads(whole)
    for position in range(len(whole)):
        for flipped in (1, 8, 32):
            content = bytearray(whole)
            content[position] ^= flipped
            path.write_bytes(content)
            try:
                assert read_manifest(tmp_path) == value  # white space of another kind
            except DataError:
                continue
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_manifest(tmp_path)


def test_a_missing_or_foreign_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing: the stage .* has not finished"):
        load(tmp_path, "train")
    publish_manifest(tmp_path, {"format": 1, "shards": []})
    with pytest.raises(DataError, match="lacks 'seq_len'"):
        load(tmp_path, "train")
    for shards in (7, [7], [{"split": "train", "file": "a", "bytes": "x", "sha256": 1}], None):
        publish_manifest(tmp_path, {"format": 1, "shards": shards})
        with pytest.raises(DataError, match="is not the manifest of a samples folder"):
            load(tmp_path, "train")
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "7", "nul", "\ufeff{}"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json"):
            load(tmp_path, "train")
    publish_manifest(tmp_path, {"format": 9, "shards": []})
    with pytest.raises(DataError, match="has format 9, this version reads 1"):
        load(tmp_path, "train")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="only plain file names"):
        verify(tmp_path, [{"file": name, "bytes": 1, "sha256": "x"}])


def test_a_manifest_says_what_made_it_and_other_versions_make_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(manifest.RECIPE, "ab12")
    before = load(samples_folder(tmp_path), "train").sha256
    made_by = read_manifest(tmp_path)["made_by"]
    assert (made_by["data_recipe_sha256"], made_by["numpy"]) == ("ab12", np.__version__)
    monkeypatch.setattr(manifest, "versions", lambda: {"python": "4.0"})
    publish_manifest(tmp_path, {key: v for key, v in read_manifest(tmp_path).items() if key not in ("made_by", SEAL)})
    assert read_manifest(tmp_path)["made_by"] == {"data_recipe_sha256": "ab12", "python": "4.0"}
    assert load(tmp_path, "train").sha256 == before


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        ("vocab_size", "9", "vocab_size is '9', no int"),
        ("seq_len", True, "seq_len is 'True', no int"),
        ("special", [1], r"special is '\[1\]', no dict"),
        ("special", {}, "lacks 'mask'"),
        ("special", {"mask": None}, "mask is 'None', no int"),
        ("special", {"mask": 30522}, "special tokens, .* lie outside of its 30522 tokens"),
        ("special", {"mask": 3, "pad": -1}, "special tokens, .* lie outside"),
        ("vocab_size", 10**30, "special tokens, .* lie outside"),
        ("shards", [5], "not the manifest"),
        ("shards", [{"split": "train", "file": "x", "rows": 1.5}], "rows is '1.5', no int"),
    ],
)
def test_what_a_manifest_says_is_of_its_kind_and_in_range(tmp_path: Path, where: str, value: object, line: str) -> None:
    """It is sealed, but whoever wrote it may be another: a token out of range would be read beside the embeddings."""
    described = read_manifest(samples_folder(tmp_path))
    publish_manifest(tmp_path, {**{key: part for key, part in described.items() if key != SEAL}, where: value})
    with pytest.raises(DataError, match=line):
        load(tmp_path, "train")


@pytest.mark.timeout(20)
def test_a_pipe_for_a_manifest_or_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    samples_folder(tmp_path)
    (tmp_path / "train-00000.hdf5").unlink()
    os.mkfifo(tmp_path / "train-00000.hdf5")
    with pytest.raises(OSError, match="no plain file"):
        manifest.file_sha256(tmp_path / "train-00000.hdf5")
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(OSError, match="no plain file"):
        load(tmp_path, "train")
