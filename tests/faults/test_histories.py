"""A tenth of the histories of the table (all of them with CHAOS=1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import histories
from faults.table import SCALE, passes, scratch


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", histories.INJECTIONS)
def test_the_training_is_what_it_would_have_been(name):
    with scratch() as folder:
        passes(histories.INJECTIONS[name](Path(folder), SCALE))
