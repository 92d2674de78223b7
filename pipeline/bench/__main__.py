"""``python -m pipeline.bench``."""

import importlib
import sys

from pipeline.errors import ConfigError, run_command

COMMANDS = ("data", "feed", "gpu", "infer", "performance", "scaling", "train")


def main() -> int:
    """The command named first, imported only now: help must not wait for NumPy and torch."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in COMMANDS and name != "infer":
        return int(importlib.import_module(f"pipeline.bench.{name}").main(arguments))
    if name and not name.startswith("-") and name != "infer":
        raise ConfigError(f"bench {name}: no such benchmark; choose from {', '.join(COMMANDS)}")
    from pipeline.bench import infer

    return infer.main()


run_command(main)
