"""``python -m pipeline.bench``."""

import sys

from pipeline.bench import data, gpu, infer, performance
from pipeline.errors import run_command

COMMANDS = {"data": data.main, "gpu": gpu.main, "performance": performance.main}


def main() -> int:
    """The command named first; `infer` keeps its own parser."""
    command = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    return command(sys.argv[2:]) if command else infer.main()


run_command(main)
