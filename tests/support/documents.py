"""A job for a data stage, and what the stage left in its folder."""

import hashlib
import json
from pathlib import Path
from typing import Any


class FakeJob:
    """A job whose lines are kept."""

    def __init__(self, out: Path, workers: int = 1) -> None:
        self.out, self.workers = out, workers
        self.lines: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def say(self, line: str, share: float | None = None) -> None:
        self.lines.append(line)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def texts(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted(folder.glob("documents-*")) for line in path.read_text().split("\n")[:-1]
    ]
