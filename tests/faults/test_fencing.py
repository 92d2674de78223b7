"""A tenth of the double starts and interleavings of the table (all of them with CHAOS=1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import fencing, traced
from faults.table import SCALE, passes, scratch


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", fencing.INJECTIONS)
def test_one_history_and_one_winner(name):
    if name != "double_starts" and traced.missing():
        pytest.skip(traced.missing())
    with scratch() as folder:
        passes(fencing.INJECTIONS[name](Path(folder), SCALE))
