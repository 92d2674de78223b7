"""The bars that need no GPU: what a micro-batch and a step may ask of one, and what the product asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEVICE = "cuda:1"  # the only one that may be touched


class Bar(NamedTuple):
    """A figure and the most that it may be."""

    what: str
    found: float
    most: float


def seen(folder: Path) -> dict[str, Any]:
    """What `traced.py` sees in a child process, over the device guard that is compiled in ``folder``; needs g++."""
    sys.path.insert(0, str(HERE))
    from fake_gpu import compiler_command

    library = folder / "guard.so"
    subprocess.run(compiler_command(HERE / "guard.cpp", library), check=True)
    paths = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, str(HERE / "traced.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def bars(traced: dict[str, Any]) -> list[Bar]:
    """All bars on what was `seen`."""
    found = []
    for what in ("bf16", "fp32", "squad"):
        facts = traced[what]
        accumulations = facts["outside"].count("add_")
        found += [
            Bar(f"{what}: copies and waits that stop the host, in a micro-batch", len(facts["waits"]), 0),
            Bar(f"{what}: other devices touched", len(set(facts["devices"]) - {DEVICE}), 0),
            Bar(f"{what}: kernels outside compiled regions", len(facts["outside"]) - accumulations, 60),
            Bar(f"{what}: accumulations per parameter", accumulations / facts["parameters"], 1),
            Bar(f"{what}: casts of a weight after the first micro-batch", facts["casts"], 0),
        ]
    optimizer = traced["optimizer"]
    found.append(Bar("LAMB, BERT-large: waits in a step", len(optimizer["waits"]), 1))
    found.append(Bar("LAMB, BERT-large: gigabytes moved in a step", optimizer["gigabytes"], 18))
    return found
