"""The command that lists a run's checkpoints as a table or JSON, and reads and hashes them with --verify."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.engine.checkpoint import listing
from pipeline.errors import run_command
from pipeline.run.rundir import RunDir
from pipeline.words import columns

COLUMNS = ("stage", "attempt", "step", "verified", "digest")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.checkpoints", description="List the checkpoints of a run."
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="the run directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its SHA-256")
    options = parser.parse_args()
    _ = RunDir(options.run).settings  # refuses what is not a run
    rows = listing(options.run, check=options.verify)
    for row in rows:
        if fault := row.pop("fault", None):
            print(fault, file=sys.stderr)
    print(json.dumps({"checkpoints": rows}, indent=1) if options.json else table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of ``listing`` in aligned columns, digests shortened."""
    words = {None: "not asked", True: "yes", False: "NO"}
    cells = [
        (row["stage"], str(row["attempt"]), str(row["step"]), words[row["verified"]], (row["digest"] or "?")[:12])
        for row in rows
    ]
    return "\n".join(columns([COLUMNS, *cells])) if rows else "no checkpoints yet"


if __name__ == "__main__":
    run_command(main)
