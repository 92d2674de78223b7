"""Samples in an order computed by arithmetic: step s uses order[s*G .. (s+1)*G), whatever the number of ranks.

The position in the data is one integer, so resuming is a jump and nothing about the order is ever saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.hdf5 import Shard, read_listed
from data_prep.manifest import SampleSet, load_verified
from data_prep.masking import mask_tokens, masked_counts
from data_prep.splitmix import Ints, derived, key, mix
from pipeline.config import PhaseConfig, TrainConfig

WINDOW = 16  # shards whose samples are shuffled together: reading stays nearly sequential
ROUNDS = 4


def permuted(index: Ints, size: Ints | int, keys: NDArray[np.uint64]) -> Ints:
    """A keyed bijection of ``0 <= index < size``, element by element, without a table.

    A balanced Feistel network over the next even power of two, walked until it lands inside (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains", cycle walking).
    """
    size = np.broadcast_to(np.asarray(size, np.int64), index.shape)
    keys = np.broadcast_to(keys, index.shape)
    bits = np.maximum(1, -(-np.ceil(np.log2(np.maximum(size, 2))).astype(np.int64) // 2)).astype(np.uint64)
    low = (np.uint64(1) << bits) - np.uint64(1)
    permuted = index.astype(np.uint64)
    walking = np.ones(index.shape, bool)
    while walking.any():
        value, shift, mask, own_key = permuted[walking], bits[walking], low[walking], keys[walking]
        left, right = value >> shift, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(right + own_key + np.uint64(number + 1)) & mask)
        permuted[walking] = (left << shift) | right
        walking = permuted >= size.astype(np.uint64)
    return permuted.astype(np.int64)


class SampleOrder:
    """A keyed shuffle of all rows of all shards, epoch after epoch: every sample once per epoch."""

    def __init__(self, rows: Sequence[int], seed: int, window: int = WINDOW) -> None:
        self.rows = np.asarray(rows, np.int64)
        self.total = int(self.rows.sum())
        self.seed, self.window = seed, window
        self._epochs: dict[int, tuple[Ints, Ints]] = {}

    def __getitem__(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """``(epoch, shard, row)`` of each position, int64 arrays of one shape."""
        epochs, inside = positions // self.total, positions % self.total
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shard[chosen], row[chosen] = self._in_epoch(int(epoch), inside[chosen])
        return epochs, shard, row

    def _in_epoch(self, epoch: int, position: Ints) -> tuple[Ints, Ints]:
        shards, ends = self._layout(epoch)
        window_ends = np.append(ends[self.window - 1 : -1 : self.window], ends[-1])
        window_starts = np.append(0, window_ends[:-1])
        window = np.searchsorted(window_ends, position, side="right")
        start, size = window_starts[window], (window_ends - window_starts)[window]
        keys = derived(key(self.seed, epoch, 1), np.arange(len(window_ends)))
        shuffled = start + permuted(position - start, size, keys[window])
        place = np.searchsorted(ends, shuffled, side="right")
        return shards[place], shuffled - np.append(0, ends[:-1])[place]

    def _layout(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in this epoch's order, and where each one's rows end."""
        if epoch not in self._epochs:
            numbers = np.arange(len(self.rows), dtype=np.uint64)
            shards = np.argsort(derived(key(self.seed, epoch, 0), numbers), kind="stable").astype(np.int64)
            self._epochs = {epoch: (shards, np.cumsum(self.rows[shards]))}
        return self._epochs[epoch]


@dataclass(frozen=True)
class MaskedSamples:
    """Some samples end to end, masked: their ``ids [N]`` in the split, ``tokens [T]`` int64, ``lengths [N]``,
    ``b_start [N]``, ``nsp [N]``, ``positions [K]`` (masked places in ``tokens``) and their original ids ``labels [K]``.
    """

    ids: Ints
    tokens: Ints
    lengths: Ints
    b_start: Ints
    nsp: Ints
    positions: Ints
    labels: Ints


class PretrainingData:
    """One split of a samples folder, read in the keyed order and masked when read.

    ``verified`` loads it once its hashes have been compared: by this process, or shared by several. Whole words are
    masked where it is known which pieces are ``continuing`` one (`data_prep.wordpiece.Vocabulary.continuing`).
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        phase: PhaseConfig,
        train: TrainConfig,
        verified: Callable[[Path, str], SampleSet] = load_verified,
        continuing: NDArray[np.bool_] | None = None,
    ) -> None:
        self.manifest = verified(folder, split)
        if self.manifest.seq_len != phase.seq_len:
            raise DataError(f"{folder}: samples of length {self.manifest.seq_len}, the phase wants {phase.seq_len}")
        self.phase, self.train, self.continuing = phase, train, continuing
        self.shards = [read_listed(self.manifest, shard) for shard in self.manifest.shards]
        rows = [len(shard.offsets) - 1 for shard in self.shards]
        self.first_id = np.append(0, np.cumsum(rows))[:-1].astype(np.int64)
        self.order = SampleOrder(rows, train.seed)
        if self.order.total == 0:
            raise DataError(f"{folder}: no {split} samples; the corpus is too small for seq_len {phase.seq_len}")

    def ids(self, positions: Ints) -> Ints:
        """Sample id (row number over all shards of the split) at each position of the order."""
        _, shard, row = self.order[positions]
        return self.first_id[shard] + row

    def lengths(self, positions: Ints) -> Ints:
        """Tokens of the sample at each position."""
        _, shard, row = self.order[positions]
        lengths = np.empty_like(row)
        for number in np.unique(shard):
            chosen = shard == number
            offsets = self.shards[number].offsets
            lengths[chosen] = offsets[row[chosen] + 1] - offsets[row[chosen]]
        return lengths

    def masked_counts(self, lengths: Ints) -> Ints:
        """How many tokens of samples of these lengths are masked."""
        return masked_counts(lengths, self.train.masked_lm_prob, self.phase.max_predictions)

    def read(self, positions: Ints) -> MaskedSamples:
        """The samples at these positions, masked by (seed, epoch or 0, sample id)."""
        epoch, shard, row = self.order[positions]
        samples = (sample(self.shards[number], place) for number, place in zip(shard, row, strict=True))
        parts, b_start, nsp = zip(*samples, strict=True)
        lengths = np.array([len(part) for part in parts], np.int64)
        ids = self.first_id[shard] + row
        if self.train.masking == "dynamic":
            ids = ids + epoch * self.order.total  # another epoch masks like another sample
        tokens, places, labels = mask_tokens(
            np.concatenate(parts).astype(np.int32),
            lengths,
            ids,
            seed=self.train.seed,
            vocab_size=self.manifest.vocab_size,
            special=self.manifest.special,
            masked_lm_prob=self.train.masked_lm_prob,
            max_predictions=self.phase.max_predictions,
            continuing=self.continuing,
        )
        return MaskedSamples(
            ids=self.first_id[shard] + row,
            tokens=tokens.astype(np.int64),
            lengths=lengths,
            b_start=np.array(b_start, np.int64),
            nsp=np.array(nsp, np.int64),
            positions=places.astype(np.int64),
            labels=labels.astype(np.int64),
        )


def sample(shard: Shard, row: int) -> tuple[NDArray[np.integer], int, int]:
    """Tokens, start of B and NSP label of one row."""
    tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]
    return tokens, int(shard.b_start[row]), int(shard.is_random_next[row])
