"""``python -m pipeline.bench``."""

import sys

from pipeline.errors import ConfigError, run_command

COMMANDS = ("data", "gpu", "infer", "performance", "train")


def main() -> int:
    """The command named first, imported only now: help must not wait for NumPy and torch."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name and not name.startswith("-") and name not in COMMANDS:
        raise ConfigError(f"bench {name}: no such benchmark; choose from {', '.join(COMMANDS)}")
    if name == "data":
        from pipeline.bench import data

        return data.main(arguments)
    if name == "gpu":
        from pipeline.bench import gpu

        return gpu.main(arguments)
    if name == "performance":
        from pipeline.bench import performance

        return performance.main(arguments)
    if name == "train":
        from pipeline.bench import train

        return train.main(arguments)
    if name == "train":
        from pipeline.bench import train

        return train.main(arguments)
    from pipeline.bench import infer

    return infer.main()


run_command(main)
