"""``python -m pipeline.guard [options] -- COMMAND``: any command that goes on by itself, run as a stage is run."""

from __future__ import annotations

import sys

from pipeline.errors import run_command
from pipeline.launch import request
from pipeline.launch.start import start


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return start(request.of(words[:end], command=words[end + 1 :]))


if __name__ == "__main__":
    run_command(main)
