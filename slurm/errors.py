"""The one error of this package: Slurm refused, did not answer, or cannot run here."""

from __future__ import annotations


class SlurmError(Exception):
    """One line saying what, where and what to do; ``exit_code`` 9 for the command that meets it."""

    exit_code = 9


class ControllerDown(SlurmError):
    """slurmctld (or the munge socket before it) did not answer; asking again later may help."""


class Refused(SlurmError):
    """sbatch understood and said no."""


class FlagError(SlurmError):
    """A flag, name or value that sbatch would refuse or misread; a configuration error."""

    exit_code = 2
