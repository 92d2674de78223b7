"""Keeps the memory that a process gives back, where that is glibc's to decide: the next step wants it again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = (1 << 30, 1 << 25)  # bytes; glibc before 2.35 knows nothing larger than the second


def keep_memory() -> None:
    """Let this process, and those it forks, take large blocks from a heap that never shrinks, where glibc is there.

    Training allocates its tensors anew in every step, and each fresh mapping costs a page fault per 4 KiB.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT[0])
        any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
