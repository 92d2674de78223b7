"""``python -m pipeline.bench performance FILE… > docs/performance.md``: the page of figures, made from JSON files.

FILE is what ``python -m pipeline.bench gpu`` wrote. Without one the page has goals and arithmetic alone, and says so.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.words import number, spoken

Facts = Mapping[str, Any]
PHASES = {"phase1": "128 tokens", "phase2": "512 tokens"}
INTRODUCTION = """\
# How fast BERT-large trains on one GPU

Written by `python -m pipeline.bench performance FILE…`, whose files `python -m pipeline.bench gpu --out FILE` makes in
at most 8 minutes on a machine with a GPU (`--pack FILE.py` makes one file of it for a machine without this repository).

Samples are random tokens, as long as real ones and packed without padding: two thirds of those of 128 tokens are full
(mean 109), those of 512 have about 250 (log-normal). TFLOP/s count the matrix products of these tokens only. bf16, one
GPU, forward and backward; a row named *loop* is whole steps of training with feed, optimizer and logging.

Whole steps on one or more GPUs, with neither corpus nor model, also `--beside transformers` on the same samples:
`python -m pipeline.bench train` (the phases of a recipe), `bench finetune squad|mrpc|sst2` (training and evaluation),
`bench infer` (answers and latency). Their JSON fills the published tables: `python -m pipeline.tables --from FILE …`.

## Goals

Sequences per second of one GPU. *Arithmetic* is the sum of the matrix products at 60 % of their peak and of the memory
traffic at the memory's speed: nothing was run for it.
"""


def main(arguments: list[str]) -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench performance", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON of python -m pipeline.bench gpu")
    print("\n".join(page([read(path) for path in parser.parse_args(arguments).files])))
    return 0


def read(path: Path) -> Facts:
    """The blocks of one file that is of full size."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        blocks: Facts = facts["blocks"]
        if facts["tiny"] or "env" not in blocks:
            raise ConfigError(f"{path}: measured with --tiny, or without the block env: no figures for the page")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a JSON file of `python -m pipeline.bench gpu`: {error}") from error
    return blocks


def page(measured: Sequence[Facts]) -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    yield from table(("GPU", "phase", "goal", "arithmetic", "measured"), _goals(measured))
    yield ""
    if not measured:
        yield "Nothing is measured yet: until somebody runs the command on a GPU, the figures above are arithmetic."
    for blocks in measured:
        yield from _machine(blocks)


def goals() -> list[dict[str, str]]:
    """The GPU models that have goals: peak (dense bf16), memory bandwidth, sequences/s by phase."""
    with open(Path(__file__).with_name("gpus.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _goals(measured: Sequence[Facts]) -> Iterator[Sequence[str]]:
    for goal in goals():
        own = [blocks for blocks in measured if goal["gpu"] in blocks["env"].get("gpu", "")]
        for phase, length in PHASES.items():
            rates = [number(row["sequences_per_s"]) for blocks in own if (row := _best(blocks, phase))]
            wanted, sums = goal[f"{phase}_goal"], goal[f"{phase}_arithmetic"]
            yield goal["gpu"], f"{phase}, {length}", f"{int(wanted):,}", sums or "-", ", ".join(rates) or "-"


def _best(blocks: Facts, phase: str) -> Facts:
    row: Facts = blocks.get(phase, {}).get("all_on", {})
    return row if "sequences_per_s" in row else {}


def _machine(blocks: Facts) -> Iterator[str]:
    """What was measured on one machine."""
    env = blocks["env"]
    yield f"## {env.get('gpu', 'no GPU')}"
    yield ""
    cpus = f"{env.get('cpus')} CPU cores"
    yield f"torch {env.get('torch')}, CUDA {env.get('cuda')}, driver {env.get('driver') or 'unknown'}, {cpus}."
    checks = [fact for facts in blocks.values() for fact in facts.values() if isinstance(fact, dict) and "ok" in fact]
    wrong = [name for name, facts in blocks.items() if not facts.get("ok")]
    failed = f"; blocks that failed: {', '.join(wrong)}" if wrong else ""
    yield f"{sum(bool(fact['ok']) for fact in checks)} of {len(checks)} checks hold{failed}."
    yield ""
    columns = ("micro_batch", "sequences_per_s", "tokens_per_s", "tflops", "memory_gib", "power_w")
    rows = [
        (phase, spoken(name), *(number(row[key]) if row.get(key) is not None else "-" for key in columns))
        for phase in PHASES
        for name, row in [*blocks.get(phase, {}).items(), *_others(blocks, phase)]
        if isinstance(row, dict) and "sequences_per_s" in row
    ]
    yield from table(("phase", "what", *map(spoken, columns)), rows)
    yield ""
    if any("autocast" in row for phase in PHASES for row in blocks.get(phase, {}).values() if isinstance(row, Mapping)):
        yield "Measured before compiled layers took weights cast once per step: each micro-batch cast them in all rows."
        yield ""
    for name in ("peak", "lamb", "save", "feed", "kernels", "sweep"):
        if facts := {key: value for key, value in blocks.get(name, {}).items() if key not in ("ok", "seconds")}:
            yield f"* **{name}**: " + "; ".join(f"{spoken(key)} {_said(value)}" for key, value in facts.items())
    yield ""


def _others(blocks: Facts, phase: str) -> list[tuple[str, Any]]:
    return [(name, blocks.get(name, {}).get(phase)) for name in ("loop", "transformers")]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ("tflops", "ms", "gb_per_s", "sequences_per_s", "memory_gib", "to_device_gb_s", "to_host_gb_s")
        wanted = [key for key in (*keys, "call_s", "next_step_s", "plain_step_s", "skipped", "error") if key in value]
        return ", ".join(f"{number(value[key])} {spoken(key)}" for key in wanted) or number(value.get("value"))
    return number(value)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
