"""How long training stands still for a checkpoint: the saver against torch.save of the same state, alternating.

``python benchmarks/save_cost.py`` takes weights and two moments of BERT-large (336 million parameters, 4.0 GB),
``--small`` those of one of its layers and the embeddings. A loop of matrix products goes on while the saver writes,
as training would. Needs 8 GB of memory and of disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.heads import BertForPreTraining
from pipeline.config import load_recipe
from pipeline.engine.checkpoint import Saver

FIELDS = {"stage": "phase1", "attempt": 1, "identity": {}, "model": {}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/save_cost.py", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one layer instead of 24")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind (default 3)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    state = state_of(1 if options.small else 24)
    with tempfile.TemporaryDirectory(prefix="save-cost-", dir=options.folder) as name:
        facts = measure(Path(name), state, options.rounds)
    facts |= {"gb": round(sum(a.nbytes for part in state.values() for a in part.values()) / 1e9, 2)}
    facts |= {"torch": torch.__version__, "load": os.getloadavg()[0]}
    facts |= {"cores": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps(facts, indent=1))
    return 0


def state_of(layers: int) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Weights and two moments of BERT-large with this many layers, random."""
    recipe = load_recipe("bert_large")
    model = dataclasses.asdict(recipe.model) | {"num_hidden_layers": layers}
    with torch.device("meta"):
        weights = BertForPreTraining(BertConfig(vocab_size=padded_vocab(30522), **model)).named_parameters()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights}
    dice = np.random.default_rng(0)
    parts = [{name: dice.random(shape, dtype=np.float32) for name, shape in shapes.items()} for _ in range(3)]
    moments = {f"{kind}.{name}": value for kind, part in zip(("m", "v"), parts[1:], strict=True)
               for name, value in part.items()}  # fmt: skip
    return {"weights": parts[0], "optimizer": moments}


def measure(folder: Path, state: dict[str, dict[str, NDArray[np.float32]]], rounds: int) -> dict[str, object]:
    """Seconds of each save, and steps a second of the loop alone and beside a save."""
    attempt = folder / "attempts" / "0001"
    attempt.mkdir(parents=True)
    (attempt / "attempt.json").write_text('{"resumed_from": null}')
    saver = Saver(attempt, keep=1)
    tensors = {kind: {name: torch.from_numpy(a) for name, a in part.items()} for kind, part in state.items()}
    saver.prepare(**state)
    alone = steps_per_s(2.0)
    saver.wait()
    stalls, writes, torch_saves, beside = [], [], [], []
    for step in range(1, rounds + 1):
        path = folder / "torch.pt"
        began = time.perf_counter()
        torch.save(tensors, path)
        torch_saves.append(time.perf_counter() - began)
        path.unlink()
        saver.save(step=step, sample_position=step, **FIELDS, **state)
        stalls.append(saver.stall_s)
        beside.append(steps_per_s(600.0, lambda: not writing()))
        saver.wait()
        writes.append(saver.write_s)
    shutil.rmtree(attempt)
    ratio = [slow / quick for slow, quick in zip(torch_saves, stalls, strict=True)]
    return {
        "torch_save_s": rounded(torch_saves),
        "stall_s": rounded(stalls),
        "write_s": rounded(writes),
        "torch_save_over_stall": rounded(ratio),
        "steps_per_s_alone": round(alone, 2),
        "steps_per_s_while_writing": rounded(beside),
        "median_ratio": round(statistics.median(ratio), 2),
    }


def writing() -> bool:
    """Whether the saver's thread is at work."""
    return any(thread.name == "checkpoint" for thread in threading.enumerate())


def steps_per_s(at_most_s: float, until: Callable[[], bool] = lambda: False) -> float:
    """Matrix products a second of one thread, as a stand-in for training steps."""
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < at_most_s and not until():
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


if __name__ == "__main__":
    sys.exit(main())
