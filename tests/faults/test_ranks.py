"""A tenth of the trials with sick ranks (all of them, with the product's own patience, with CHAOS=1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import ranks
from faults.table import SCALE, passes, scratch


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ranks.INJECTIONS)
def test_a_sick_rank_is_named_and_leaves_no_trace(name):
    with scratch() as folder:
        passes(ranks.INJECTIONS[name](Path(folder), SCALE))
