"""The one error of the data stages; its exit code is what a command ends with."""


class DataError(Exception):
    """Input that cannot be used: one line saying what, where, the numbers and what to do."""

    exit_code = 3
