"""``python -m pipeline.compare RUN RUN …``: what differs, and whether it matters; of one RUN, its older results."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.publish import publish_text
from pipeline.errors import run_command
from pipeline.report.compare import as_page, in_terminal, sides_of
from pipeline.run.files import to_write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first is the yardstick")
    parser.add_argument("--html", type=to_write, metavar="FILE", help="write the tables with curves as one page, too")
    arguments = parser.parse_args()
    sides, changes = sides_of(arguments.runs)
    lines = in_terminal(sides, changes)
    if arguments.html:
        publish_text(arguments.html, as_page(sides, changes))  # before a reader of what follows goes away
        lines.append(str(arguments.html))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_command(main)
