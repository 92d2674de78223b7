"""Writes safetensors files whole or not at all, hashing them on the way, with equal bytes for equal tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.publish import publishing

DTYPES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "u1": "U8", "b1": "BOOL"}
PIECE = 1 << 20  # bytes hashed and written at once


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Write ``{name: array}`` as a safetensors file, whole or not at all; returns ``{"bytes", "sha256"}``.

    Equal names, dtypes, shapes and values give equal bytes, whatever the order of the mapping. The metadata
    says ``format: pt``, without which transformers refuses a file.
    """
    # wide dtypes first: every tensor then starts at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        array = tensors[name]
        start, end = end, end + array.nbytes
        dtype = DTYPES[array.dtype.str[1:]]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with publishing(path) as file:
        for flat in (memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(tensors[n]) for n in order)):
            for start in range(0, len(flat), PIECE):
                digest.update(flat[start : start + PIECE])
                file.write(flat[start : start + PIECE])
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _bytes_of(array: NDArray[Any]) -> memoryview:
    """The little-endian bytes of an array, not copied when it lies in memory like that."""
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data
