"""``python -m pipeline.bench``."""

import importlib
import sys

from pipeline.errors import ConfigError, run_command

COMMANDS = ("data", "feed", "finetune", "gpu", "infer", "performance", "records", "scaling", "train")


def main() -> int:
    """The command named first, imported only now: help must not wait for NumPy and torch."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "-h"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(f"python -m pipeline.bench {{{','.join(COMMANDS)}}} [--help]")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"bench {name}: no such benchmark; choose from {', '.join(COMMANDS)}")
    return int(importlib.import_module(f"pipeline.bench.{name}").main(arguments))


run_command(main)
