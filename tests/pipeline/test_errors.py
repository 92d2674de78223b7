"""What an exception becomes: its line and its exit code."""

from __future__ import annotations

import errno
import os

import pytest

from pipeline.errors import cause_of, describe, exit_code_of


@pytest.mark.parametrize("name", ["ESHUTDOWN", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "ESTALE", "ECONNRESET"])
def test_a_file_server_that_went_away_is_no_end(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """76 is started again; ESHUTDOWN is a BrokenPipeError to Python, but nobody stopped reading our output."""
    number = getattr(errno, name)

    def work() -> int:
        raise OSError(number, os.strerror(number), "/runs/a/stage.json")

    assert exit_code_of(work) == 76
    assert capsys.readouterr().err.startswith(f"storage: {os.strerror(number)}: /runs/a/stage.json; start me again")
    assert cause_of(OSError(number, "x")) == "disk"


def test_a_full_disk_still_ends_it_and_memory_is_asked_for() -> None:
    assert describe(OSError(errno.ENOSPC, "No space left on device", "f"))[1] == 6
    lacking = (
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),  # of mmap and fork
        ImportError("libtorch_python.so: failed to map segment from shared object"),
    )
    for error in lacking:
        line, code = describe(error)
        assert (code, "out of memory" in line, cause_of(error)) == (2, True, "memory")
    for number, where in ((errno.EMFILE, "ulimit -n"), (errno.EAGAIN, "ulimit -u")):
        line, code = describe(OSError(number, os.strerror(number)))
        assert (code, line.endswith(f"raise the limit, see {where}")) == (7, True)
