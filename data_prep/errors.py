"""The one error of the data stages; its exit code is what a command ends with."""


def escaped(text: str) -> str:
    """`text` with line ends, terminal escapes and undecodable bytes of file names shown as ``\\n``, ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DataError(Exception):
    """Input that cannot be used: one line saying what, where, the numbers and what to do."""

    exit_code = 3

    def __str__(self) -> str:
        return escaped(super().__str__())  # it may quote names and text of others
