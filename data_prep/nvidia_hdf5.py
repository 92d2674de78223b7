"""Convert shards from and to the six-dataset HDF5 schema of NVIDIA's BERT (padded rows, masks drawn beforehand).

python -m data_prep.nvidia_hdf5 from-nvidia SRC DST --vocab vocab.txt
python -m data_prep.nvidia_hdf5 to-nvidia SRC DST
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.errors import DataError
from data_prep.fanout import Job, run_all
from data_prep.hdf5 import SHORTEST, Shard, native, read_shard, token_dtype, write_shard
from data_prep.masking import mask_tokens
from data_prep.publish import file_sha256, publish_bytes, publishing
from data_prep.wordpiece import Vocabulary

SCHEMA = {
    "input_ids": ("<i4", 2),
    "input_mask": ("|i1", 2),
    "segment_ids": ("|i1", 2),
    "masked_lm_positions": ("<i4", 2),
    "masked_lm_ids": ("<i4", 2),
    "next_sentence_labels": ("|i1", 1),
}
MOST_BYTES = 4 << 30  # of a file in memory; NVIDIA's own have a tenth
Rows = dict[str, NDArray[Any]]


def run(job: Job, *, source: Path, vocab: Path, seq_len: int, pairs: bool = True) -> dict[str, Any]:
    """Stage ``samples`` where they were made before: a samples folder of this pipeline, or NVIDIA's files, converted.

    Ours are linked, or copied from another file system, and verified. Returns the counts of the manifest. DataError
    where they have another length or vocabulary, where ``pairs`` are wanted and they are none, or none is held out.
    """
    ours = (source / manifest.NAME).exists()
    value = manifest.read_manifest(source) if ours else from_nvidia(source, job.out, vocab=vocab, workers=job.workers)
    if value["seq_len"] != seq_len:
        raise DataError(f"{source} holds samples of {value['seq_len']} tokens, the phase wants {seq_len}")
    if value["vocab_sha256"] != Vocabulary.load(vocab, any_kind=True).sha256:
        raise DataError(f"{source} was made with another vocabulary than {vocab}")
    if pairs and not value.get("pairs", True):
        raise DataError(f'{source} holds single texts and no pairs: train.objective = "mlm" trains on them')
    parts = {split: [row for row in value["shards"] if row["split"] == split] for split in ("train", "test")}
    for split, rows in parts.items():
        if not any(row["rows"] for row in rows):
            raise DataError(
                f"{source} holds no {split} sample; of NVIDIA's files those with `test` in their name are held out"
            )
    if ours:
        splits = [manifest.load_verified(source, split) for split in ("train", "test")]
        for shard in (shard for samples in splits for shard in samples.shards):
            _take(shard.path, job.out / shard.path.name)
        publish_bytes(job.out / manifest.NAME, (source / manifest.NAME).read_bytes())
    counts = {split: {"shards": len(rows), "rows": sum(row["rows"] for row in rows)} for split, rows in parts.items()}
    return {**counts, "seq_len": seq_len, "vocab_size": value["vocab_size"]}


def _take(path: Path, target: Path) -> None:
    """Link a file, or copy it where that cannot be done."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        with publishing(target) as file, open(path, "rb") as given:
            shutil.copyfileobj(given, file)


def to_rows(
    shard: Shard, first_id: int, special: dict[str, int], vocab_size: int, masked_lm_prob: float, max_predictions: int
) -> Rows:
    """The six arrays of a shard: padded with zeros to ``[N, seq_len]`` and ``[N, max_predictions]``, masked.

    Masks are those of epoch 0, the ids of the samples counting from ``first_id``.
    """
    lengths = np.diff(shard.offsets)
    count, width = len(lengths), shard.seq_len
    tokens, positions, labels = mask_tokens(
        shard.tokens.astype(np.int32),
        lengths,
        first_id + np.arange(count),
        seed=shard.seed,
        vocab_size=vocab_size,
        special=special,
        masked_lm_prob=masked_lm_prob,
        max_predictions=max_predictions,
    )
    # Each row padded to the width.
    column = np.arange(width)
    real = column < lengths[:, None]
    input_ids = np.zeros((count, width), np.int32)
    input_ids[real] = tokens
    # Each masked token at its rank among those of its row.
    row = np.searchsorted(shard.offsets, positions, side="right") - 1
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    masked_positions = np.zeros((count, max_predictions), np.int32)
    masked_ids = np.zeros((count, max_predictions), np.int32)
    masked_positions[row, rank] = positions - shard.offsets[row]
    masked_ids[row, rank] = labels
    return {
        "input_ids": input_ids,
        "input_mask": real.astype(np.int8),
        "segment_ids": (real & (column >= shard.b_start[:, None])).astype(np.int8),
        "masked_lm_positions": masked_positions,
        "masked_lm_ids": masked_ids,
        "next_sentence_labels": shard.is_random_next.astype(np.int8),
    }


def from_rows(rows: Rows, cls_id: int, vocabulary: Vocabulary, name: str, source: str) -> Shard:
    """Undo ``to_rows``: the original tokens are put back, the padding goes.

    The number of predictions of a row is the index of the first zero in its positions (0 is [CLS], never masked),
    whatever the number of columns. Raises DataError with the row (from 0) that is no sample of this vocabulary.
    """
    ids, positions = rows["input_ids"].astype(np.int64), rows["masked_lm_positions"].astype(np.int64)
    count, width = ids.shape
    mask = rows["input_mask"].astype(bool)
    lengths = mask.sum(axis=1)
    b_start = (mask & (rows["segment_ids"] == 0)).sum(axis=1)
    used = np.cumsum(positions == 0, axis=1) == 0
    _refuse(
        name,
        {
            "input_mask is not ones then zeros": mask != (np.arange(width) < lengths[:, None]),
            f"fewer than {SHORTEST} tokens": lengths < SHORTEST,
            "segment_ids is not 0 for A, then 1 for B": (
                (rows["segment_ids"] != (mask & (np.arange(width) >= b_start[:, None])))
                | ((b_start < 3) | (b_start >= lengths - 1))[:, None]
            ),
            "a masked position is outside the sample": (positions < 0) | (used & (positions >= lengths[:, None])),
            "next_sentence_labels is neither 0 nor 1": rows["next_sentence_labels"] >> 1 != 0,
        },
    )
    # The original tokens back in their places; only now can they be looked up in the vocabulary.
    row = np.nonzero(used)[0]
    ids[row, positions[used]] = rows["masked_lm_ids"][used]
    _refuse(
        name,
        {
            f"an id is outside the vocabulary of {vocabulary.size}": ((ids < 0) | (ids >= vocabulary.size)) & mask,
            f"the first token is not [CLS] ({cls_id})": ids[:, 0] != cls_id,
        },
    )
    return Shard(
        tokens=ids[mask].astype(token_dtype(vocabulary.size)),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        b_start=b_start.astype(np.uint16),
        is_random_next=rows["next_sentence_labels"].astype(np.uint8),
        document=np.zeros(count, np.uint32),
        seq_len=width,
        vocab_sha256=vocabulary.sha256,
        seed=0,
        source=source,
    )


def _refuse(name: str, faults: dict[str, NDArray[np.bool_]]) -> None:
    """DataError for the first fault that a row ``[N]``, or a place in one ``[N, S]``, has."""
    for fault, wrong in faults.items():
        rows = np.asarray(wrong.any(axis=tuple(range(1, wrong.ndim))))
        if rows.any():
            raise DataError(f"{name} row {int(np.argmax(rows))}: {fault} ({int(rows.sum())} of {len(rows)} rows)")


def read_rows(path: Path) -> Rows:
    """The six datasets of a file; DataError when one is missing, of another kind, or stored outside the file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            rows, left = {}, MOST_BYTES
            for name, (_, dimensions) in SCHEMA.items():
                dataset = native(file, name, dimensions)
                left -= dataset.size * dataset.dtype.itemsize
                if left < 0:  # a few kB of gzip can say terabytes
                    raise ValueError(f"more than {MOST_BYTES >> 30} GB of samples; split it")
                rows[name] = dataset[()]
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is not a file of NVIDIA's schema: {error}") from None
    count, width = rows["input_ids"].shape
    shapes = {name: array.shape for name, array in rows.items()}
    predictions = shapes["masked_lm_positions"][1]
    expected = [(count, width)] * 3 + [(count, predictions)] * 2 + [(count,)]
    if list(shapes.values()) != expected:
        raise DataError(f"{path}: the shapes of its datasets do not agree: {shapes}")
    return rows


def write_rows(path: Path, rows: Rows) -> None:
    """Write the six datasets with gzip, as NVIDIA's files have them; whole or not at all."""
    with h5py.File("rows", "w", driver="core", backing_store=False) as file:
        for name, (dtype, _) in SCHEMA.items():
            file.create_dataset(name, data=rows[name], dtype=dtype, compression="gzip")
        file.flush()
        image: bytes = file.id.get_file_image()
    publish_bytes(path, image)


def to_nvidia(
    source: Path, target: Path, *, masked_lm_prob: float = 0.15, max_predictions: int | None = None, workers: int = 1
) -> list[str]:
    """Write every shard of a samples folder as ``samples_training_<i>.hdf5`` or ``samples_test_<i>.hdf5``.

    ``max_predictions`` (columns) is 20 up to 128 tokens and 80 above, unless given. Returns the file names.
    """
    target.mkdir(parents=True, exist_ok=True)
    work = []
    for split, label in (("train", "training"), ("test", "test")):
        samples = manifest.load(source, split)
        columns = max_predictions or (20 if samples.seq_len <= 128 else 80)
        first_id = 0
        for number, shard in enumerate(samples.shards):
            path = target / f"samples_{label}_{number}.hdf5"
            work.append((shard, path, first_id, samples.special, samples.vocab_size, masked_lm_prob, columns))
            first_id += shard.rows
    return [str(name) for name in run_all(_to_file, work, workers)]


def _to_file(work: tuple[manifest.ShardFile, Path, int, dict[str, int], int, float, int]) -> str:
    shard, path, first_id, special, vocab_size, masked_lm_prob, columns = work
    manifest.verify_file(shard.path, shard.bytes, shard.sha256)
    write_rows(path, to_rows(read_shard(shard.path), first_id, special, vocab_size, masked_lm_prob, columns))
    return path.name


def from_nvidia(source: Path, target: Path, *, vocab: Path, workers: int = 1) -> dict[str, Any]:
    """Turn a file or folder of NVIDIA's ``.hdf5`` files into a samples folder with a manifest.

    Files named ``…test…`` become the test split, all others the training split, in the order of their numbers.
    Returns the manifest.
    """
    vocabulary = Vocabulary.load(vocab)
    files = [source] if source.is_file() else sorted(source.rglob("*.hdf5"), key=_natural)
    if not files:
        raise DataError(f"{source} holds no .hdf5 file")
    target.mkdir(parents=True, exist_ok=True)
    work, counts = [], {"train": 0, "test": 0}
    for path in files:
        split = "test" if "test" in path.name and "training" not in path.name else "train"
        work.append((path, target / f"{split}-{counts[split]:05d}.hdf5", split))
        counts[split] += 1
    rows = run_all(functools.partial(_from_file, vocabulary), work, workers)
    lengths = {row.pop("seq_len") for row in rows}
    if len(lengths) > 1:
        raise DataError(f"{source} holds files of {sorted(lengths)} tokens a row: convert each length by itself")
    digest = hashlib.sha256("".join(row["source_sha256"] for row in rows).encode()).hexdigest()
    value = {
        "format": manifest.FORMAT,
        "seq_len": lengths.pop(),
        "vocab_size": vocabulary.size,
        "vocab_sha256": vocabulary.sha256,
        "seed": 0,
        "special": vocabulary.special,
        "source_manifest": digest,
        "shards": rows,
    }
    manifest.publish_manifest(target, value)
    return value


def _natural(path: Path) -> list[Any]:
    pieces = re.split(r"(\d+)", str(path))
    return [int(piece) if piece.isdecimal() else piece for piece in pieces]


def _from_file(vocabulary: Vocabulary, work: tuple[Path, Path, str]) -> dict[str, Any]:
    path, target, split = work
    source = file_sha256(path)
    shard = from_rows(read_rows(path), vocabulary.special["cls"], vocabulary, str(path), source)
    facts = write_shard(target, shard)
    return {"file": target.name, "split": split, **facts, "source_sha256": source, "seq_len": shard.seq_len}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 done, 3 unusable data, 6 storage."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.nvidia_hdf5", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-nvidia", help="a samples folder of this pipeline -> NVIDIA's files")
    out.add_argument("--masked-lm-prob", type=float, default=0.15, help="share of masked tokens (0.15)")
    out.add_argument("--max-predictions", type=int, help="columns for them (20 up to 128 tokens, else 80)")
    back = commands.add_parser("from-nvidia", help="NVIDIA's files -> a samples folder of this pipeline")
    back.add_argument("--vocab", type=Path, required=True, help="the vocab.txt that the ids belong to")
    for command in (out, back):
        command.add_argument("source", type=Path, metavar="SRC")
        command.add_argument("target", type=Path, metavar="DST")
        command.add_argument("--workers", type=int, default=1, help="processes (1)")
    given = parser.parse_args(arguments)
    try:
        if given.command == "to-nvidia":
            names = to_nvidia(
                given.source,
                given.target,
                masked_lm_prob=given.masked_lm_prob,
                max_predictions=given.max_predictions,
                workers=given.workers,
            )
            print(f"{len(names)} files written to {given.target}")
        else:
            published = from_nvidia(given.source, given.target, vocab=given.vocab, workers=given.workers)
            rows = sum(shard["rows"] for shard in published["shards"])
            print(f"{rows} samples of up to {published['seq_len']} tokens written to {given.target}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
