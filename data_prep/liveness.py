"""Worker processes as the kernel sees them: whether they stand still, and what they do with memory they freed."""

import ctypes
import time
from pathlib import Path

WATCH_S = 2.0  # between two looks at the workers
STOPPED_S = 40.0  # a worker that was stopped, or a task that shows no life, is given up
STUCK_S = 1200.0  # so is one that waits for its disk or its peer without using any processor time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = (1 << 30, 1 << 25)  # bytes; glibc before 2.35 knows nothing larger than the second


class Watch:
    """Notices processes that are stopped, or that use no processor time, by what /proc says of them."""

    def __init__(self) -> None:
        self.since: dict[int, tuple[str, float]] = {}

    def fault(self, pid: int) -> str:
        """Why the process is given up, or ""."""
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:  # gone (its pipe says so), or no Linux
            return ""
        stopped, now = state in "Tt", time.monotonic()
        life = "stopped" if stopped else f"{fields[10]} {fields[11]}"  # clock ticks in user and system mode
        known, since = self.since.get(pid, ("", now))
        if life != known:
            self.since[pid] = (life, now)
        elif now - since > (STOPPED_S if stopped else STUCK_S):
            how = "is stopped (SIGSTOP)" if stopped else "has used no processor time"
            return f"{how} for {now - since:.0f} s"
        return ""


def keep_freed_memory() -> None:
    """Have glibc's malloc reuse large arrays instead of returning each to the kernel; does nothing elsewhere.

    By default each array over 32 MiB at most is new memory, which the kernel fills with zeros page by page (a third of
    the time of a data stage).
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT[0])
        any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
