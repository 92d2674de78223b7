"""Every single-field difference of the table: refused, said, or of no importance."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import identity
from faults.table import SCALE, passes, scratch


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused_or_named():
    with scratch() as folder:
        passes(identity.single_fields(Path(folder), SCALE))


def test_at_least_25_differences_are_refused():
    refused = {each.key for each in identity.DIFFERENCES if each.outcome == identity.REFUSED}
    assert len(refused) >= 25
