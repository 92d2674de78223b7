"""HOW a site runs jobs; knows neither BERT nor torch."""

from __future__ import annotations

import csv
from pathlib import Path


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of a CSV file of this package."""
    with Path(__file__).with_name(table).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
