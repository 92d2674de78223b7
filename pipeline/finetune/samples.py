"""Tokenised examples of any task, end to end in flat arrays, as the fine-tuning loop packs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Samples:
    """N samples of T tokens in all.

    ``tokens [T]`` int64 holds [CLS] A [SEP] or [CLS] A [SEP] B [SEP] of each sample, ``offsets [N+1]`` where
    each begins, ``b_start [N]`` the index inside the sample where B begins (its length when there is no B).
    ``targets`` is ``[N]`` (class), ``[N, 2]`` (first and last token of the answer inside the sample, 0 for
    none) or None when only predictions are wanted.
    """

    tokens: NDArray[np.int64]
    offsets: NDArray[np.int64]
    b_start: NDArray[np.int64]
    targets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.b_start)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample ``[N]``."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, pieces: Sequence[NDArray[np.int64]], b_start: ArrayLike, targets: ArrayLike | None = None) -> Samples:
        """Samples from the tokens of each one."""
        return cls(
            np.concatenate([np.zeros(0, np.int64), *pieces]),
            np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64),
            np.asarray(b_start, np.int64),
            None if targets is None else np.asarray(targets, np.int64),
        )

    def take(self, chosen: NDArray[np.int64]) -> Samples:
        """The samples ``chosen [K]``, in that order."""
        pieces = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in chosen.tolist()]
        return Samples.of(pieces, self.b_start[chosen], None if self.targets is None else self.targets[chosen])


def join(
    columns: Sequence[Sequence[NDArray[np.int64]]], *, cls: int, sep: int, targets: ArrayLike | None = None
) -> Samples:
    """Samples [CLS] a [SEP] of one column of texts, [CLS] a [SEP] b [SEP] of two."""
    samples = [
        np.concatenate([[cls], *(part for text in texts for part in (text, [sep]))])
        for texts in zip(*columns, strict=True)
    ]
    return Samples.of(samples, [len(first) + 2 for first in columns[0]], targets)
