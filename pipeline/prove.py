"""``python -m pipeline.prove RUN --to BUNDLE``: what others need to check a training; ``--check BUNDLE --step N`` does.

A step is computed again from the checkpoint before it, by the checker's own code, on the CPU or a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.errors import NumericalError, run_command
from pipeline.run.rundir import RunDir
from pipeline.words import columns


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.prove", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="run directory")
    parser.add_argument("--to", type=Path, metavar="BUNDLE", help="the folder to write")
    parser.add_argument("--check", type=Path, metavar="BUNDLE", help="a bundle to check")
    parser.add_argument("--step", type=int, metavar="N", help="the step to compute again")
    parser.add_argument("--index", type=int, metavar="I", help="only this micro-batch of it, counted from 0")
    parser.add_argument("--stage", metavar="PHASE", help="its phase, where several have this step")
    options = parser.parse_args()
    making, checking = (options.run, options.to), (options.check, options.step)
    if (None in making) == (None in checking) or (any(making) and any(checking)):
        parser.error("name RUN and --to BUNDLE, or --check BUNDLE and --step N")
    from pipeline.pretrain import proof  # torch, which --help needs not wait for

    if options.run:
        steps = proof.bundle(RunDir(options.run), options.to)
        for name, numbers in steps.items():
            print(f"{options.to}: {name}, steps to check: {', '.join(map(str, numbers))}")
        return 0
    rows = proof.check(options.check, options.step, options.stage, options.index)
    words = [(row.figure, row.logged, row.computed, f"{row.apart:.1e} apart" if row.apart else "equal") for row in rows]
    print("\n".join(columns([("figure", "on record", "computed", ""), *words])))
    if far := [row.figure for row in rows if row.apart > row.rounding]:
        raise NumericalError(
            f"{options.check}, step {options.step}: {', '.join(far)} not reproduced: other samples, weights or code"
        )
    print("the same but for rounding" if any(row.apart for row in rows) else "equal bit for bit")
    return 0


if __name__ == "__main__":
    run_command(main)
