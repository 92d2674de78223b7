"""Lays the samples of one micro-batch out for attention, so that hardly any padding is computed.

A device other than a CPU gets a stream: the samples end to end. A CPU gets one where attention goes sample by
sample, else rows that are filled best fit first, longest sample first (best-fit decreasing; Johnson 1974, "Fast
algorithms for bin packing"; for BERT: Krell et al. 2021, arXiv 2107.02027). Attention stays inside a sample by `cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data_prep.errors import DataError

Ints = NDArray[np.int64]
LONGEST_ROW_BY_ROWS = 192  # slots: up to here a CPU attends by whole rows, beyond sample by sample


class Arrangement(NamedTuple):
    """``rows`` packed best fit, one sample per row (``padded``) or all end to end (``stream``).

    Rows and streams are as long as they must be, rounded up to ``multiple``: shapes that matmuls like.
    """

    kind: Literal["rows", "padded", "stream"]
    multiple: int


ROWS, PADDED = Arrangement("rows", 8), Arrangement("padded", 8)
END_TO_END, STREAM = Arrangement("stream", 1), Arrangement("stream", 256)


def arrangement(device_type: str, seq_len: int, *, predicting: bool = False) -> Arrangement:
    """How a device wants samples of at most ``seq_len`` tokens, by a fixed table, so that a resume repeats it.

    ``predicting``: without gradients a CPU attends sample by sample whatever their length.
    """
    if device_type != "cpu":
        return STREAM
    return END_TO_END if predicting or seq_len > LONGEST_ROW_BY_ROWS else ROWS


@dataclass(frozen=True)
class Batch:
    """One micro-batch of N samples with T tokens in R rows of S slots (R = 1 in a stream); all tensors int32.

    ``tokens, positions, segments`` are ``[R, S]``: token id, position inside the sample, and 0 for A and 1 for B.
    ``cu [C+1]`` are the flat slots at which the C stretches that attend to themselves alone begin, and R*S: the
    samples in the order of their slots, and between or behind them the pads; a stretch may be empty. ``first [N]``
    is the flat slot of each sample's [CLS] and ``length [N]`` its tokens, in the order of the samples; ``slot [T]``
    is the flat slot of each token in the order given to `layout`. No stretch is longer than ``seq_len``, which the
    host must know without asking the device.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    cu: Tensor
    first: Tensor
    length: Tensor
    slot: Tensor
    seq_len: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        """The batch whose `layout`, as tensors, and ``seq_len`` these are; others beside them are left alone."""
        return cls(**{field.name: inputs[field.name] for field in fields(cls)})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if name != "seq_len"}
        return replace(self, **moved)


def pack(
    tokens: ArrayLike, lengths: ArrayLike, b_start: ArrayLike, seq_len: int, arranged: Arrangement = ROWS
) -> Batch:
    """The `layout` of samples as a `Batch` of tensors on the CPU."""
    arrays = layout(tokens, lengths, b_start, seq_len, arranged)
    return Batch(**{name: torch.from_numpy(values) for name, values in arrays.items()}, seq_len=seq_len)


def layout(
    tokens: ArrayLike, lengths: ArrayLike, b_start: ArrayLike, seq_len: int, arranged: Arrangement = ROWS
) -> dict[str, NDArray[np.int32]]:
    """Lay whole samples of at most ``seq_len`` tokens out as ``arranged``; deterministic.

    ``tokens [T]`` holds the samples end to end, ``lengths [N]`` their token counts, ``b_start [N]`` the index
    inside the sample where segment B begins (the length itself when there is no B). Returns the tensors of `Batch`
    as arrays, by name; R*S is at most N * ``seq_len`` rounded up to the multiple, C at most 2N, in a stream
    N + ceil((multiple - 1) / ``seq_len``). DataError when a sample is empty or longer than ``seq_len``.
    """
    flat = np.asarray(tokens).astype(np.int64)
    length = np.asarray(lengths).astype(np.int64)
    _check(flat, length, seq_len)
    place = _stream if arranged.kind == "stream" else _rows
    shape, first, cu = place(length, seq_len, arranged)
    position = np.arange(flat.size) - np.repeat(np.cumsum(length) - length, length)
    slot = np.repeat(first, length) + position
    segment = position >= np.repeat(np.asarray(b_start).astype(np.int64), length)

    def laid(values: NDArray[np.generic]) -> NDArray[np.int32]:
        out = np.zeros(shape, np.int32)
        out.reshape(-1)[slot] = values
        return out

    return {
        "tokens": laid(flat),
        "positions": laid(position),
        "segments": laid(segment),
        "cu": cu.astype(np.int32),
        "first": first.astype(np.int32),
        "length": length.astype(np.int32),
        "slot": slot.astype(np.int32),
    }


def _check(tokens: Ints, length: Ints, seq_len: int) -> None:
    """Refuse samples that no row can hold."""
    if not length.size:
        raise DataError("a micro-batch of 0 samples cannot be packed")
    if length.sum() != tokens.size:
        raise DataError(f"sample lengths add up to {length.sum()} tokens, but {tokens.size} were given")
    if length.min() < 1 or length.max() > seq_len:
        worst = int(length.argmin() if length.min() < 1 else length.argmax())
        raise DataError(f"sample {worst} of the micro-batch has {length[worst]} tokens; a row holds 1 to {seq_len}")


def _up(slots: int, multiple: int) -> int:
    return -(-slots // multiple) * multiple


def _stream(length: Ints, seq_len: int, arranged: Arrangement) -> tuple[tuple[int, int], Ints, Ints]:
    """Shape, ``first`` and ``cu`` of samples end to end.

    The pads are cut into as many stretches as the longest padding would need, empty ones among them, so that the
    length of ``cu`` follows from N alone.
    """
    ends = np.cumsum(length)
    slots = _up(int(ends[-1]), arranged.multiple)
    pads = ends[-1] + seq_len * np.arange(1, -(-(arranged.multiple - 1) // seq_len) + 1)
    return (1, slots), ends - length, np.concatenate([[0], ends, np.minimum(pads, slots)])


def _rows(length: Ints, seq_len: int, arranged: Arrangement) -> tuple[tuple[int, int], Ints, Ints]:
    """Shape, ``first`` and ``cu`` of samples in rows."""
    if arranged.kind == "padded":
        row, column = np.arange(length.size), np.zeros_like(length)
    else:
        row, column = _best_fit_decreasing(length, seq_len)
    used = np.bincount(row, weights=length).astype(np.int64)
    width = min(seq_len, _up(int(used.max()), arranged.multiple))
    first = row * width + column
    pads = (np.arange(used.size) * width + used)[used < width]
    return (used.size, width), first, np.sort(np.concatenate([first, pads, [used.size * width]]))


def _best_fit_decreasing(length: Ints, seq_len: int) -> tuple[Ints, Ints]:
    """``(row, column)`` of each sample.

    Rows are kept by free space; bit s of ``open_spaces`` says that a row with s free slots exists, so the
    smallest space that fits is one shift and one lowest-bit away.
    """
    row, column = np.empty_like(length), np.empty_like(length)
    rows_with: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rows = open_spaces = 0
    for sample in np.argsort(-length, kind="stable").tolist():
        need = int(length[sample])
        fitting = open_spaces >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            chosen = rows_with[space].pop()
            if not rows_with[space]:
                open_spaces ^= 1 << space
        else:
            space, chosen, rows = seq_len, rows, rows + 1
        row[sample], column[sample] = chosen, seq_len - space
        rows_with[space - need].append(chosen)
        open_spaces |= 1 << (space - need)
    return row, column
