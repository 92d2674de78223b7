"""``python -m pipeline.cancel RUN``: stop a run's chain after its next checkpoint; submit continues it."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.publish import publish_text
from pipeline.errors import run_command
from pipeline.rundir import RunDir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.cancel", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    run = RunDir(parser.parse_args().run)
    run.settings  # noqa: B018 - refuses what is not a run
    if not run.is_held():
        print(f"{run.path}: nothing is running")
        return 0
    publish_text(run.cancel_request, "")
    print(f"{run.path}: asked to stop; it saves first, then ends")
    return 0


if __name__ == "__main__":
    run_command(main)
