"""Documents and long lines that stand in the corpus more than once: counted, and left out where that is asked for.

The first pass over a documents file leaves a row for each of its documents, then one for each of their long lines;
``find`` compares the rows of all files, some of the hashes at a time. The first of equal ones is kept: in the order of
files and places, so it is the same one for any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.splitmix import Ints

LONG_LINE = 100  # bytes: shorter lines are headings, names and phrases that texts may well share
ROWS_AT_A_TIME = 4_000_000
ROW = np.dtype([("hash", "<u8"), ("bytes", "<u4")])

Array = NDArray[Any]


def rows_of(data: bytes) -> list[tuple[int, int]]:
    """What ROW holds of a document's text, and of each of its long lines.

    64 bits of BLAKE2b: among 10^8 lines two unequal ones pass for equal with a probability of 0.0003.
    """
    parts = [data, *(line for line in data.split(b"\n") if len(line) >= LONG_LINE)]
    hashes = (int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little") for part in parts)
    return list(zip(hashes, map(len, parts), strict=True))


def without(text: str, repeated: set[int], first: int) -> str:
    """``text`` without those of its long lines whose numbers, counted on from ``first``, are ``repeated``."""
    kept = []
    for line in text.split("\n"):
        if len(line.encode()) >= LONG_LINE:
            first += 1
            if first - 1 in repeated:
                continue
        kept.append(line)
    return "\n".join(kept)


def find(splits: Sequence[Array], lines: Sequence[Array], rows: Sequence[Array]) -> tuple[dict[str, int], Array, Array]:
    """Which documents and long lines repeat an earlier one.

    For each file ``splits [documents]`` (0 train, 1 test, more: no text), ``lines [documents]``, how many long lines
    each has, and ``rows [documents + lines] of ROW``. Returns counts, and for the documents and long lines of all
    files together whether each is a repetition; the lines of a repeated document are none of their own. Memory: 10
    bytes a document, one a long line, and 300 MB for the rows that are compared.
    """
    split = np.concatenate(splits)
    hashes = np.concatenate([row["hash"][: len(own)] for row, own in zip(rows, splits, strict=True)])
    document = np.flatnonzero(split < 2)
    documents = np.zeros(len(split), bool)
    documents[document] = _repeats(hashes[document])
    counts = {"documents": int(documents.sum()), "lines": 0, "line_bytes": 0, "test_lines": 0, "test_lines_in_train": 0}

    file_starts = np.cumsum([0, *(len(row) - len(own) for row, own in zip(rows, splits, strict=True))])
    repeated = np.zeros(file_starts[-1], bool)
    first_document = np.cumsum([0, *map(len, splits)])
    turns = 1 + len(repeated) // ROWS_AT_A_TIME
    for turn in range(turns):
        places: list[Ints] = []
        chosen: list[Array] = []
        owners: list[Ints] = []
        for number, (count, row) in enumerate(zip(lines, rows, strict=True)):
            own = row[len(count) :]
            in_turn = np.flatnonzero(own["hash"] % np.uint64(turns) == turn)
            places.append(file_starts[number] + in_turn)
            chosen.append(own[in_turn])
            owners.append(first_document[number] + np.repeat(np.arange(len(count)), count)[in_turn])
        line, place, owner = np.concatenate(chosen), np.concatenate(places), np.concatenate(owners)
        test = split[owner] == 1
        counts["test_lines"] += int(test.sum())
        counts["test_lines_in_train"] += int(np.isin(line["hash"][test], line["hash"][~test]).sum())
        kept = np.flatnonzero(~documents[owner])
        again = kept[_repeats(line["hash"][kept])]
        repeated[place[again]] = True
        counts["lines"] += len(again)
        counts["line_bytes"] += int(line["bytes"][again].sum())
    return counts, documents, repeated


def _repeats(hashes: Array) -> Array:
    """Whether each is equal to an earlier one."""
    repeats = np.ones(len(hashes), bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats
