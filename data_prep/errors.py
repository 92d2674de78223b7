"""The one error of the data stages; its exit code is what a command ends with."""

from pathlib import Path

from data_prep.publish import open_plain

POINTER = b"version https://git-lfs"


def escaped(text: str) -> str:
    """`text` with line ends, terminal escapes and undecodable bytes of file names shown as ``\\n``, ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DataError(Exception):
    """Input that cannot be used: one line saying what, where, the numbers and what to do."""

    exit_code = 3

    def __str__(self) -> str:
        return escaped(super().__str__())  # it may quote names and text of others


def refuse_pointer(path: Path, error: type[Exception] = DataError) -> None:
    """Raise ``error`` when the file ``path`` is what Git LFS leaves in place of a file that it has not fetched."""
    with open_plain(path) as file:
        if file.read(len(POINTER)) == POINTER:
            raise error(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned")
