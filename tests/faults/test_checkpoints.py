"""A tenth of the checkpoint faults of the table (all of them with CHAOS=1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import checkpoints, checkpoints_damage, checkpoints_full, traced
from faults.table import SCALE, passes, scratch

INJECTIONS = {**checkpoints.INJECTIONS, **checkpoints_damage.INJECTIONS, **checkpoints_full.INJECTIONS}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", INJECTIONS)
def test_nothing_corrupt_nothing_lost(name):
    if name in checkpoints.INJECTIONS and traced.missing():
        pytest.skip(traced.missing())
    with scratch() as folder:
        passes(INJECTIONS[name](Path(folder), SCALE))
