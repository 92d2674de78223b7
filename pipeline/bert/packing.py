"""Packs the samples of one micro-batch whole into rows, so that hardly any padding is computed.

The rows are filled best fit first, longest sample first (best-fit decreasing; Johnson 1974, "Fast algorithms
for bin packing"; for BERT: Krell et al. 2021, arXiv 2107.02027). Attention stays inside a sample by `block`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data_prep.errors import DataError

ROW_MULTIPLE = 8  # rows are as long as the fullest one, rounded up to this: a shape that matmuls like


@dataclass(frozen=True)
class Batch:
    """One micro-batch of N samples with T tokens in R rows of S slots; all tensors int32.

    ``tokens, positions, segments, block`` are ``[R, S]``: token id, position inside the sample, 0 for A and 1
    for B, and the number of the sample inside its row (-1 at a pad). ``first [N]`` is the flat slot of each
    sample's [CLS] and ``length [N]`` its tokens, in the order of the samples; ``slot [T]`` is the flat slot
    of each token in the order given to `pack`.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    block: Tensor
    first: Tensor
    length: Tensor
    slot: Tensor

    @property
    def fill(self) -> float:
        """Share of slots that hold a real token."""
        return self.slot.numel() / self.tokens.numel()

    def row_position(self, token_position: Tensor) -> Tensor:
        """Flat slots ``[K]`` (as in ``hidden.flatten(0, 1)``) of the flat token positions ``[K]``."""
        return self.slot[token_position]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Batch:
        """The batch whose `layout` these tensors are; others beside them are left alone."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved = (getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        return Batch(*moved)


def pack(
    tokens: ArrayLike,
    lengths: ArrayLike,
    b_start: ArrayLike,
    seq_len: int,
    *,
    one_per_row: bool = False,
    pad_id: int = 0,
) -> Batch:
    """The `layout` of samples as a `Batch` of tensors on the CPU."""
    arrays = layout(tokens, lengths, b_start, seq_len, one_per_row=one_per_row, pad_id=pad_id)
    return Batch.of({name: torch.from_numpy(values) for name, values in arrays.items()})


def layout(
    tokens: ArrayLike,
    lengths: ArrayLike,
    b_start: ArrayLike,
    seq_len: int,
    *,
    one_per_row: bool = False,
    pad_id: int = 0,
) -> dict[str, NDArray[np.int32]]:
    """Lay whole samples into as few rows of at most ``seq_len`` slots as best fit finds; deterministic.

    ``tokens [T]`` holds the samples end to end, ``lengths [N]`` their token counts, ``b_start [N]`` the index
    inside the sample where segment B begins (the length itself when there is no B). ``one_per_row`` keeps the
    classic padded layout, row i = sample i. Returns the fields of `Batch` as arrays, by name. DataError when a
    sample is empty or longer than ``seq_len``.
    """
    flat = np.asarray(tokens).astype(np.int64)
    length = np.asarray(lengths).astype(np.int64)
    _check(flat, length, seq_len)
    if one_per_row:
        row, column = np.arange(length.size), np.zeros_like(length)
        ordinal = np.zeros_like(length)
    else:
        row, column, ordinal = _best_fit_decreasing(length, seq_len)
    width = min(seq_len, -(-int((column + length).max()) // ROW_MULTIPLE) * ROW_MULTIPLE)
    shape = (int(row.max()) + 1, width)
    first = row * width + column
    position = np.arange(flat.size) - np.repeat(np.cumsum(length) - length, length)
    slot = np.repeat(first, length) + position
    segment = position >= np.repeat(np.asarray(b_start).astype(np.int64), length)

    def rows(values: NDArray[Any], empty: int) -> NDArray[np.int32]:
        laid = np.full(shape, empty, dtype=np.int32)
        laid.reshape(-1)[slot] = values
        return laid

    return {
        "tokens": rows(flat, pad_id),
        "positions": rows(position, 0),
        "segments": rows(segment, 0),
        "block": rows(np.repeat(ordinal, length), -1),
        "first": first.astype(np.int32),
        "length": length.astype(np.int32),
        "slot": slot.astype(np.int32),
    }


def _check(tokens: NDArray[np.int64], length: NDArray[np.int64], seq_len: int) -> None:
    """Refuse samples that no row can hold."""
    if not length.size:
        raise DataError("a micro-batch of 0 samples cannot be packed")
    if length.sum() != tokens.size:
        raise DataError(f"sample lengths add up to {length.sum()} tokens, but {tokens.size} were given")
    if length.min() < 1 or length.max() > seq_len:
        worst = int(length.argmin() if length.min() < 1 else length.argmax())
        raise DataError(f"sample {worst} of the micro-batch has {length[worst]} tokens; a row holds 1 to {seq_len}")


def _best_fit_decreasing(
    length: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """``(row, column, ordinal inside the row)`` of each sample.

    Rows are kept by free space; bit s of ``open_spaces`` says that a row with s free slots exists, so the
    smallest space that fits is one shift and one lowest-bit away.
    """
    row, column, ordinal = np.empty_like(length), np.empty_like(length), np.empty_like(length)
    rows_with: list[list[int]] = [[] for _ in range(seq_len + 1)]
    held: list[int] = []
    open_spaces = 0
    for sample in np.argsort(-length, kind="stable").tolist():
        need = int(length[sample])
        fitting = open_spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            chosen = rows_with[space].pop()
            if not rows_with[space]:
                open_spaces ^= 1 << space
        else:
            space, chosen = seq_len, len(held)
            held.append(0)
        row[sample], column[sample], ordinal[sample] = chosen, seq_len - space, held[chosen]
        held[chosen] += 1
        rows_with[space - need].append(chosen)
        open_spaces |= 1 << (space - need)
    return row, column, ordinal
