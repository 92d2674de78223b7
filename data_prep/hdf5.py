"""The shard format: samples end to end in one HDF5 file that can be mapped into memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.manifest import SampleSet, ShardFile
from data_prep.publish import publish_bytes

FORMAT = 1
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
ARRAYS = ("tokens", "offsets", "b_start", "is_random_next", "document")
SHORTEST = 5  # [CLS] a [SEP] b [SEP]
SHORTEST_SINGLE = 3  # [CLS] a [SEP]: what is left of a document may be one word


@dataclass(frozen=True)
class Shard:
    """N samples, T tokens. Sample i is ``tokens[offsets[i] : offsets[i + 1]]``, unpadded and unmasked."""

    tokens: NDArray[np.unsignedinteger]  # ``[T]`` uint16 (uint32 for a vocabulary over 65536), with [CLS] and [SEP]
    offsets: NDArray[np.int64]  # ``[N + 1]``
    b_start: NDArray[np.uint16]  # ``[N]`` index of the first token of B inside the sample
    is_random_next: NDArray[np.uint8]  # ``[N]`` 1 when B is a random sentence of another document
    document: NDArray[np.uint32]  # ``[N]`` number of A's document in the text shard
    seq_len: int
    vocab_sha256: str
    seed: int
    source: str  # SHA-256 of the text shard the samples were made from


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest unsigned type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_shard(path: Path, shard: Shard) -> dict[str, Any]:
    """Write ``shard`` whole or not at all; the bytes depend on its content only.

    Returns ``{"rows", "tokens", "bytes", "sha256"}``. The file is built in memory: HDF5 on a full disk ends the
    process with a segmentation fault, ``publish_bytes`` raises OSError.
    """
    # every object at a multiple of 8 bytes, so that mapped arrays are aligned
    with h5py.File(
        "shard", "w", driver="core", backing_store=False, alignment_threshold=1, alignment_interval=8
    ) as file:
        file.attrs["format"] = FORMAT
        file.attrs["seq_len"] = shard.seq_len
        file.attrs["vocab_sha256"] = shard.vocab_sha256
        file.attrs["seed"] = shard.seed
        file.attrs["source"] = shard.source
        for name in ARRAYS:
            file.create_dataset(name, data=getattr(shard, name))
        file.flush()
        image: bytes = file.id.get_file_image()
    publish_bytes(path, image)
    return {
        "rows": len(shard.offsets) - 1,
        "tokens": len(shard.tokens),
        "bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
    }


def read_shard(path: Path) -> Shard:
    """Map a shard without copying it. Compare its digest first (``manifest.load_verified``): HDF5 trusts a file.

    Raises DataError for another format, a wrong type or shape, or offsets that do not fit.
    """
    try:
        # no locks: they fail on some parallel file systems, and a published shard never changes
        with h5py.File(path, "r", locking=False) as file:
            version = int(file.attrs["format"])
            if version != FORMAT:
                raise DataError(f"{path} has shard format {version}, this version reads {FORMAT}")
            for name in ARRAYS:  # a link may lead to another file, or to a pipe
                if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                    raise DataError(f"{path}: {name} is no dataset of this file but a link; make the shard again")
            rows = len(file["b_start"])
            wide = np.uint32 if file["tokens"].dtype == np.uint32 else np.uint16
            content = np.memmap(path, np.uint8, "r")
            shard = Shard(
                _mapped(content, file["tokens"], wide, len(file["tokens"])),
                _mapped(content, file["offsets"], np.int64, rows + 1),
                _mapped(content, file["b_start"], np.uint16, rows),
                _mapped(content, file["is_random_next"], np.uint8, rows),
                _mapped(content, file["document"], np.uint32, rows),
                int(file.attrs["seq_len"]),
                str(file.attrs["vocab_sha256"]),
                int(file.attrs["seed"]),
                str(file.attrs["source"]),
            )
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as a shard: {error}") from None
    _check(path, shard)
    return shard


def read_listed(samples: SampleSet, file: ShardFile) -> Shard:
    """Map a shard of a verified folder; DataError unless it is the one that the manifest describes.

    All token ids are compared with the size of the vocabulary: a larger one would address memory outside the
    embeddings.
    """
    shard = read_shard(file.path)
    listed = (file.rows, file.tokens, samples.seq_len, samples.vocab_sha256, samples.seed)
    actual = (len(shard.b_start), len(shard.tokens), shard.seq_len, shard.vocab_sha256, shard.seed)
    for name, own, theirs in zip(("rows", "tokens", "seq_len", "vocab_sha256", "seed"), actual, listed, strict=True):
        if own != theirs:
            raise DataError(
                f"{file.path} has {name} {str(own)[:12]}, its manifest says {str(theirs)[:12]}: it is a shard of "
                "another run; run the samples stage again"
            )
    highest = int(shard.tokens.max(initial=0))
    if highest >= samples.vocab_size:
        raise DataError(
            f"{file.path} holds token id {highest}, the vocabulary ends at {samples.vocab_size - 1}: run the samples "
            "stage again"
        )
    return shard


def native(file: Any, name: str, dimensions: int) -> Any:
    """A stranger's dataset of whole numbers; ValueError where it leads out of the ``file`` or needs a plug-in."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link, or missing")
    dataset = file[name]
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(number)[0] for number in range(plist.get_nfilters())}
    if dataset.external or dataset.is_virtual or not filters <= FILTERS:
        raise ValueError(f"{name} is stored outside the file or with a foreign filter")
    if dataset.dtype.kind not in "iu" or dataset.ndim != dimensions:
        raise ValueError(f"{name} is {dataset.dtype} with {dataset.ndim} dimensions")
    return dataset


def _mapped(content: NDArray[np.uint8], dataset: Any, dtype: type[np.generic], length: int) -> NDArray[Any]:
    if dataset.dtype != dtype or dataset.shape != (length,):
        raise ValueError(
            f"{dataset.name} is {dataset.dtype}{list(dataset.shape)} where {np.dtype(dtype)}[{length}] belongs"
        )
    if length == 0:
        return np.empty(0, dtype)
    start = dataset.id.get_offset()
    if start is None:
        raise ValueError(f"{dataset.name} is not stored contiguously")
    piece = content[start : start + dataset.nbytes]
    return np.asarray(piece.view(dtype))  # a plain array: indexing np.memmap objects is slower


def _check(path: Path, shard: Shard) -> None:
    lengths = np.diff(shard.offsets)
    sound = (
        shard.offsets[0] == 0
        and shard.offsets[-1] == len(shard.tokens)
        and bool(((lengths >= SHORTEST_SINGLE) & (lengths <= shard.seq_len)).all())
        and bool((((shard.b_start >= 3) & (shard.b_start < lengths - 1)) | (shard.b_start == lengths)).all())
        and bool((shard.is_random_next <= 1).all())
    )
    if not sound:
        raise DataError(
            f"{path} is damaged: its offsets do not cut {len(shard.tokens)} tokens into samples of at most "
            f"{shard.seq_len}, in one part of {SHORTEST_SINGLE} or more or in two parts; run the samples stage again"
        )
