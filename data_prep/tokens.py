"""Stage ``samples`` of any alphabet: token ids that others made, with a ``tokenizer.json`` that has [MASK] and [PAD].

The folder holds that file and sequences in HDF5, Parquet or JSON lines: ids under ``input_ids``, or a ``text`` that the
tokenizer encodes. A sample is ``[CLS] A [SEP]``, as far as the vocabulary has these two; a longer sequence is cut into
the fewest pieces, equal but for a token, so that none of it is lost. Nothing else is changed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep import formats
from data_prep.books import is_hidden, lines_of
from data_prep.document import printable
from data_prep.errors import DataError
from data_prep.fanout import Job, run_all
from data_prep.hdf5 import SHORTEST, Shard, native, token_dtype, write_shard
from data_prep.publish import file_sha256
from data_prep.records import batches, parquet_file
from data_prep.samples import SPLITS, publish_samples
from data_prep.splitmix import Ints
from data_prep.wordpiece import Vocabulary

IDS, TEXT = "input_ids", "text"
SUFFIXES = (".hdf5", ".h5", ".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2")
BLOCK_TOKENS = 4_000_000  # of an HDF5 file, and what is held in memory of a longer one
LINE_BYTES = 1 << 27

Sequences = tuple[NDArray[np.int64], Ints]
"""Ids end to end ``[T]`` and the length of each sequence ``[N]``."""


def run(job: Job, *, source: Path, vocab: Path, seq_len: int, test_fraction: float, seed: int) -> dict[str, Any]:
    """Write ``train-….hdf5``, ``test-….hdf5`` and ``manifest.json`` into ``job.out``; returns the manifest's counts.

    ``test_fraction`` of the sequences, chosen by a hash of (seed, ids), are held out. DataError for a file that is
    not of this form, for ids outside the vocabulary and for [MASK] among them; where nothing is held out or left.
    """
    vocabulary = Vocabulary.load(vocab, any_kind=True)
    files = files_of(source)
    if others := [path for path in _visible(source) if path not in files and path != vocab]:
        names = ", ".join(printable(str(path.relative_to(source))) for path in others[:5])
        job.say(f"{len(others)} files without sequences by their names, left out: {names}")
    read = run_all(
        functools.partial(_make, job.out, vocab, seq_len, test_fraction, seed),
        list(enumerate(files)),
        job.workers,
        lambda done, total: job.say(f"{done} of {total} files of sequences read", done / total),
        [path.stat().st_size for path in files],
    )
    rows = [row for file in read for row in file["shards"]]
    for split in SPLITS:
        if not any(row["split"] == split for row in rows):
            count = sum(file["sequences"] for file in read)
            raise DataError(
                f"{source}: none of {count} sequences is left for {split} with data.test_fraction = {test_fraction:g}"
            )
    if short := sum(file["short"] for file in read):
        job.say(f"{short} of {sum(file['sequences'] for file in read)} sequences are too short to be masked: left out")
    digest = hashlib.sha256("".join(file["sha256"] for file in read).encode()).hexdigest()
    return publish_samples(job, vocabulary, rows, digest, seq_len=seq_len, seed=seed, pairs=False)


def check(*, source: Path, vocab: Path, **others: object) -> None:
    """DataError for what is wrong at first sight: the tokenizer, or a folder without sequences."""
    Vocabulary.load(vocab, any_kind=True)
    files_of(source)


def files_of(source: Path) -> list[Path]:
    """The files with sequences, by name; DataError where there is none, or none of a known kind. No hidden ones."""
    files = [path for path in _visible(source) if path.name.lower().endswith(SUFFIXES)]
    if not files:
        raise DataError(f"{source} holds no sequences: they lie in files named …{', …'.join(SUFFIXES[:4])}")
    return files


def _visible(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file() and not is_hidden(path, source))


def _make(
    out: Path, vocab: Path, seq_len: int, test_fraction: float, seed: int, item: tuple[int, Path]
) -> dict[str, Any]:
    """The shards of one file of sequences."""
    number, path = item
    vocabulary, digest = Vocabulary.load(vocab, any_kind=True), file_sha256(path)
    blocks, rows, first, short = 0, [], 0, 0
    for ids, lengths in _blocks(_read(path, vocab)):
        _refuse_wrong(path, first, ids, lengths, vocabulary)
        held_out = _held_out(ids, lengths, test_fraction, seed)
        starts, bare = _bare(ids, lengths, vocabulary)
        for split in SPLITS:
            chosen = np.flatnonzero(held_out == (split == "test"))
            shard, dropped = _shard(ids, starts[chosen], bare[chosen], chosen + first, seq_len, vocabulary, seed)
            short += dropped
            if len(shard.b_start):
                target = out / f"{split}-{number:05d}{f'-{blocks:03d}' if blocks else ''}.hdf5"
                full = int((np.diff(shard.offsets) == seq_len).sum())
                unknown = int((shard.tokens == vocabulary.special.get("unk", -1)).sum())
                counts = {"text_tokens": int(bare[chosen].sum()), "unknown_tokens": unknown}
                facts = {**write_shard(target, shard), "full_rows": full, **counts}
                rows.append({"file": target.name, "split": split, **facts})
        first, blocks = first + len(lengths), blocks + 1
    return {"shards": rows, "sequences": first, "short": short, "sha256": digest}


def _held_out(ids: NDArray[np.int64], lengths: Ints, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which sequences belong to the test part: a property of their ids, so that equal ones are never in both."""
    rows = np.split(ids.astype("<u4"), np.cumsum(lengths)[:-1])
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8, salt=seed.to_bytes(16)).digest() for row in rows)
    return np.frombuffer(digests, ">u8") < fraction * 2.0**64


def _bare(ids: NDArray[np.int64], lengths: Ints, vocabulary: Vocabulary) -> tuple[Ints, Ints]:
    """Where each sequence begins in ``ids`` and how long it is, without a [CLS] and [SEP] that are there already."""
    starts, special = np.cumsum(lengths) - lengths, vocabulary.special
    if not {"cls", "sep"} <= special.keys():
        return starts, lengths
    last = np.maximum(starts + lengths - 1, 0)
    padded = np.append(ids, -1)  # an empty sequence may begin at the end
    wrapped = (lengths > 1) & (padded[starts] == special["cls"]) & (padded[last] == special["sep"])
    return starts + wrapped, lengths - 2 * wrapped


def _shard(
    ids: NDArray[np.int64], starts: Ints, lengths: Ints, numbers: Ints, seq_len: int, vocabulary: Vocabulary, seed: int
) -> tuple[Shard, int]:
    """Samples of the sequences ``numbers`` of a file, and how many of these are too short for one."""
    begin, end = ([vocabulary.special[name]] if name in vocabulary.special else [] for name in ("cls", "sep"))
    around = len(begin) + len(end)
    kept = lengths + around >= SHORTEST
    starts, lengths, numbers = starts[kept], lengths[kept], numbers[kept]
    # the pieces of each sequence, the longer ones first
    count = -(-lengths // (seq_len - around))
    owner = np.repeat(np.arange(len(lengths)), count)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    pieces = lengths[owner] // count[owner] + (rank < lengths[owner] % count[owner])
    # their tokens end to end, each with what stands around it
    offsets = np.append(0, np.cumsum(pieces))
    inside = np.arange(offsets[-1]) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = ids[inside + np.repeat(starts, lengths)]
    for special, places in ((begin, offsets[:-1]), (end, offsets[1:] + len(begin) * np.arange(1, len(offsets)))):
        tokens = np.insert(tokens, places, special[0]) if special else tokens
    shard = Shard(
        tokens=tokens.astype(token_dtype(vocabulary.size)),
        offsets=offsets + around * np.arange(len(offsets)),
        b_start=(pieces + around).astype(np.uint16),
        is_random_next=np.zeros(len(pieces), np.uint8),
        document=numbers[owner].astype(np.uint32),
        seq_len=seq_len,
        vocab_sha256=vocabulary.sha256,
        seed=seed,
        source="",
    )
    return shard, int((~kept).sum())


def _refuse_wrong(path: Path, first: int, ids: NDArray[np.int64], lengths: Ints, vocabulary: Vocabulary) -> None:
    """DataError naming the first sequence with an id that is no token, or that is masked or padded inside."""
    special = vocabulary.special
    for fault, wrong in (
        (f"an id outside the vocabulary of {vocabulary.size}", (ids < 0) | (ids >= vocabulary.size)),
        ("the id of [MASK]; training masks by itself, so give ids that are not masked", ids == special["mask"]),
        ("the id of [PAD] inside", ids == special["pad"]),
    ):
        if wrong.any():
            row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(wrong)), side="right"))
            raise DataError(f"{path}: sequence {first + row} (from 0) has {fault}")


def _blocks(parts: Iterator[Sequences]) -> Iterator[Sequences]:
    """The same sequences, joined to blocks of `BLOCK_TOKENS` or a little more."""
    held: list[Sequences] = []
    for ids, lengths in parts:
        if len(lengths):
            held.append((ids, lengths))
        if sum(len(part) for part, _ in held) >= BLOCK_TOKENS:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: Sequence[Sequences]) -> Sequences:
    ids, lengths = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(lengths)


def _read(path: Path, vocab: Path) -> Iterator[Sequences]:
    head = formats.head_of(path, 4)
    if head == b"\x89HDF":
        return _read_hdf5(path, Vocabulary.load(vocab, any_kind=True).special["pad"])
    records = _parquet(path) if head == b"PAR1" else _json_lines(path)
    return _of_records(path, records, vocab)


def _read_hdf5(path: Path, pad: int) -> Iterator[Sequences]:
    """``input_ids [N, S]`` with pads behind, or ``input_ids [T]`` cut by ``offsets [N + 1]``."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            ids = native(file, IDS, 2 if "offsets" not in file else 1)
            if ids.ndim == 2:
                step = max(1, BLOCK_TOKENS // max(1, ids.shape[1]))
                for start in range(0, len(ids), step):
                    rows = ids[start : start + step].astype(np.int64)
                    real = np.maximum.accumulate((rows != pad)[:, ::-1], axis=1)[:, ::-1]
                    yield rows[real], real.sum(axis=1)
                return
            offsets = native(file, "offsets", 1)[()].astype(np.int64)
            if len(offsets) < 1 or offsets[0] or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
                raise ValueError(f"offsets do not cut the {len(ids)} ids")
            at = 0
            while at < len(offsets) - 1:
                end = int(np.searchsorted(offsets, offsets[at] + BLOCK_TOKENS, side="right")) - 1
                end = max(end, at + 1)
                yield ids[offsets[at] : offsets[end]].astype(np.int64), np.diff(offsets[at : end + 1])
                at = end
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; wanted is {IDS} [N, S], or {IDS} [T] with offsets [N + 1]"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Which column has the ids, else the texts, and its values."""
    file = parquet_file(path)
    names = file.schema_arrow.names
    column = next((name for name in (IDS, TEXT) if name in names), None)
    if column is None:
        raise DataError(f"{path} has neither a column {IDS} nor {TEXT}: it has {', '.join(map(printable, names[:20]))}")
    for rows in batches(path, file, [column]):
        yield column, [row[column] for row in rows]


def _json_lines(path: Path) -> Iterator[tuple[str, list[Any]]]:
    with formats.opened(path) as file:
        for offset, _, pieces in lines_of(file, 0, formats.END, LINE_BYTES):
            if pieces and not b"".join(pieces).strip():
                continue
            try:
                row = json.loads(b"".join(pieces))
                key = IDS if IDS in row else TEXT
                yield key, [row[key]]
            except (ValueError, RecursionError, KeyError, TypeError):
                lines = f'{{"{IDS}": […]}} or {{"{TEXT}": …}}'
                raise DataError(f"{path} at byte {offset}: every line must be {lines}") from None


def _of_records(path: Path, records: Iterator[tuple[str, list[Any]]], vocab: Path) -> Iterator[Sequences]:
    """Lists of ids as they are, texts by the tokenizer without its special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vocab))
    number = 0
    for key, values in records:
        if key == TEXT and all(isinstance(value, str) for value in values):
            values = [encoding.ids for encoding in tokenizer.encode_batch_fast(values, add_special_tokens=False)]
        rows: list[NDArray[np.int64]] = []
        for value in values:
            if (
                not isinstance(value, list)
                or {type(item) for item in value} - {int}
                or max(value, default=0) >= 1 << 32
            ):
                raise DataError(f"{path}: sequence {number + len(rows)} (from 0) has no list of ids and no text")
            rows.append(np.array(value, np.int64))
        number += len(rows)
        yield np.concatenate([np.zeros(0, np.int64), *rows]), np.array([len(row) for row in rows], np.int64)
