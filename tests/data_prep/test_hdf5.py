"""Shards come back as written, mapped and not copied; damage is noticed before HDF5 sees the file."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.hdf5 import ARRAYS, Shard, read_listed, read_shard, token_dtype, write_shard
from data_prep.manifest import load_verified, publish_manifest


def shard(lengths: list[int], dtype: Any = np.uint16, seed: int = 0) -> Shard:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Shard(
        tokens=rng.integers(0, 30000, offsets[-1]).astype(dtype),
        offsets=offsets,
        b_start=np.array([rng.integers(3, length - 1) for length in lengths], np.uint16),
        is_random_next=rng.integers(0, 2, len(lengths)).astype(np.uint8),
        document=np.arange(len(lengths), dtype=np.uint32),
        seq_len=512,
        vocab_sha256="ab" * 32,
        seed=7,
        source="cd" * 32,
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(5, 512), max_size=40),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    seed=st.integers(0, 9),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: Any, seed: int) -> None:
    path = tmp_path_factory.mktemp("shards") / "train-00000.hdf5"
    made = shard(lengths, dtype, seed)
    facts = write_shard(path, made)
    found = read_shard(path)
    for name in ARRAYS:
        ours, theirs = getattr(made, name), getattr(found, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
        assert theirs.flags.aligned
    assert (found.seq_len, found.vocab_sha256, found.seed, found.source) == (512, "ab" * 32, 7, "cd" * 32)
    assert (facts["rows"], facts["tokens"]) == (len(lengths), sum(lengths))
    assert facts["bytes"] == path.stat().st_size
    with h5py.File(path) as file:  # what any HDF5 tool sees
        assert set(file) == set(ARRAYS)
        assert np.array_equal(file["tokens"][:], made.tokens)
        assert all(file[name].chunks is None and file[name].compression is None for name in ARRAYS)


def test_the_last_word_of_a_document_alone_is_a_sample(tmp_path: Path) -> None:
    """Without pairs a sample is [CLS] A [SEP], and what is left of a document for A may be one token or two."""
    lengths = [512, 3, 4]
    made = replace(shard([512, 5, 5]), offsets=np.append(0, np.cumsum(lengths)).astype(np.int64))
    made = replace(made, tokens=made.tokens[: sum(lengths)], b_start=np.array(lengths, np.uint16))
    write_shard(tmp_path / "a.hdf5", made)
    assert np.diff(read_shard(tmp_path / "a.hdf5").offsets).tolist() == lengths
    write_shard(tmp_path / "b.hdf5", replace(made, b_start=np.array([512, 2, 4], np.uint16)))
    with pytest.raises(DataError, match=r"in one part of 3 or more or in two parts"):
        read_shard(tmp_path / "b.hdf5")


def test_the_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write_shard(path, shard([300] * 2000))
    found = read_shard(path)
    base: Any = found.tokens
    while not isinstance(base, np.memmap):
        base = base.base
    assert not found.tokens.flags.writeable


def test_the_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    first, second = tmp_path / "a.hdf5", tmp_path / "b.hdf5"
    assert write_shard(first, shard([20, 30])) == write_shard(second, shard([20, 30]))
    assert first.read_bytes() == second.read_bytes()


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda _path, *_rest: real("/dev/full", os.O_WRONLY))
        with pytest.raises(OSError) as caught:
            write_shard(tmp_path / "a.hdf5", shard([20] * 100))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.hdf5"))


def samples_folder(folder: Path, lengths: list[int]) -> Path:
    path = folder / "train-00000.hdf5"
    facts = write_shard(path, shard(lengths))
    known = {"mask": 4}
    keys = {"format": 1, "seq_len": 512, "vocab_size": 30000, "vocab_sha256": "ab" * 32, "seed": 7, "special": known}
    publish_manifest(folder, {**keys, "shards": [{"file": path.name, "split": "train", **facts}]})
    return path


def test_every_flipped_bit_and_every_cut_is_noticed_before_hdf5_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = samples_folder(tmp_path, [40] * 30)
    assert read_shard(load_verified(tmp_path, "train").shards[0].path).seq_len == 512
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    monkeypatch.setattr(h5py, "File", None)  # a call of it would be a TypeError
    for trial in range(500):
        content = bytearray(whole)
        if trial % 5 == 0:
            del content[rng.integers(len(whole)) :]
        else:
            content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-00000\.hdf5 has"):
            load_verified(tmp_path, "train")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows", 29, "has rows 30, its manifest says 29"),
        ("tokens", 1199, "has tokens 1200, its manifest says 1199"),
        ("seq_len", 128, "has seq_len 512, its manifest says 128"),
        ("vocab_sha256", "cd" * 32, "has vocab_sha256 abababab"),
        ("seed", 8, "has seed 7, its manifest says 8"),
        ("vocab_size", 300, "holds token id"),
    ],
)
def test_a_shard_of_another_run_under_a_whole_manifest_is_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    samples_folder(tmp_path, [40] * 30)
    samples = load_verified(tmp_path, "train")
    assert read_listed(samples, samples.shards[0]).seq_len == 512
    described = json.loads((tmp_path / "manifest.json").read_text())
    (described["shards"][0] if key in ("rows", "tokens") else described)[key] = value
    publish_manifest(tmp_path, described)
    samples = load_verified(tmp_path, "train")
    with pytest.raises(DataError, match=rf"train-00000\.hdf5 {message}"):
        read_listed(samples, samples.shards[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", np.zeros(50, np.int32)),
        ("offsets", np.array([0, 20, 50], np.int32)),
        ("offsets", np.array([0, 20, 49])),
        ("offsets", np.array([1, 20, 50])),
        ("offsets", np.array([0, 48, 50])),
        ("offsets", np.array([0, 50])),
        ("b_start", np.array([2, 7], np.uint16)),
        ("b_start", np.array([19, 7], np.uint16)),
        ("is_random_next", np.array([0, 2], np.uint8)),
        ("document", np.zeros(3, np.uint32)),
        ("seq_len", 29),
    ],
)
def test_a_file_that_is_no_sound_shard_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "a.hdf5"
    write_shard(path, shard([20, 30]))
    read_shard(path)
    write_shard(path, replace(shard([20, 30]), **{field: value}))
    with pytest.raises(DataError, match=r"a\.hdf5"):
        read_shard(path)


def test_other_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    for content in (b"", b"not HDF5", os.urandom(3000)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a shard"):
            read_shard(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read as a shard"):
        read_shard(path)
    with h5py.File(path, "w") as file:
        file["input_ids"] = np.zeros((2, 5))
    with pytest.raises(DataError, match="cannot be read as a shard"):
        read_shard(path)
    write_shard(path, shard([20, 30]))
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 2
    with pytest.raises(DataError, match="has shard format 2, this version reads 1"):
        read_shard(path)


def test_compressed_datasets_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write_shard(path, shard([20, 30]))
    with h5py.File(path, "r+") as file:
        tokens = file["tokens"][:]
        del file["tokens"]
        file.create_dataset("tokens", data=tokens, compression="gzip")
    with pytest.raises(DataError, match="tokens is not stored contiguously"):
        read_shard(path)


@pytest.mark.parametrize("name", ["tokens", "b_start"])
@pytest.mark.parametrize("kind", ["external", "pipe", "soft", "loop"])
def test_a_link_is_never_followed(tmp_path: Path, name: str, kind: str) -> None:
    """Not to another file, whose places in this one hold other tokens, nor to a pipe, which would be waited for."""
    path = tmp_path / "shard.hdf5"
    write_shard(path, shard([20, 30]))
    other = path.with_name("other.hdf5")
    other.write_bytes(path.read_bytes())
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "r+") as file:
        file.move(name, "aside")
        file[name] = {
            "external": h5py.ExternalLink(other.name, f"/{name}"),
            "pipe": h5py.ExternalLink(str(tmp_path / "pipe"), f"/{name}"),
            "soft": h5py.SoftLink("/aside"),
            "loop": h5py.SoftLink(f"/{name}"),
        }[kind]
    with pytest.raises(DataError, match=f"{name} is no dataset of this file but a link"):
        read_shard(path)


def test_token_type_by_vocabulary() -> None:
    assert token_dtype(30522) is np.uint16
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32
