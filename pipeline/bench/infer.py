"""How fast a model answers: sequences per second and latency for SQuAD and GLUE inputs, beside transformers.

The command ``python -m pipeline.bench infer`` and the stage ``inference``. The engines take turns within each
measurement, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.liveness import keep_freed_memory
from data_prep.publish import publish_json
from pipeline.config import PRECISIONS, InferenceConfig, restore
from pipeline.errors import ConfigError
from pipeline.run.files import to_write

if TYPE_CHECKING:
    import torch

    from pipeline.bench.engines import Engine
    from pipeline.bench.inputs import Workload
    from pipeline.bert.folder import ModelFolder

LEAST_ROUNDS = 5  # timed batches of each engine, however long they take
MOST_BATCHES = 32  # different ones, prepared before timing and each computed once before
PERCENTILES = (50, 90, 95, 99)
Row = dict[str, Any]
Timed = Mapping[str, Callable[[int], object]]  # by engine: what is timed, given the number of the round


class Job(Protocol):
    """What the benchmark needs of its caller; `pipeline.node.job.Job` has it."""

    @property
    def threads(self) -> int: ...
    def say(self, line: str) -> None: ...


@dataclass(frozen=True)
class CommandJob:
    """A job without a run; lines go nowhere: the command prints the table itself."""

    threads: int

    def say(self, line: str) -> None:
        """Nothing."""


def run(job: Job, *, config: InferenceConfig, model: Path, text: Path | None = None) -> dict[str, Any]:
    """Stage ``inference``: time the Hugging Face folder ``model`` on ``text``, a file in SQuAD's format.

    Returns ``rows``, ``device``, ``threads``, ``text``, ``environment`` (the versions) and ``model`` (its shape). A row
    has task, seq_len, batch, engine, part ("forward": prepared tokens to logits; "end_to_end": text to answers or
    labels), lengths ("real", or "full": every sequence is seq_len long), mean_tokens, precision, sequences_per_s,
    latency_ms of one batch, and rounds, how many were timed. Without transformers its rows are left out and one line
    says so. Raises ConfigError, DataError, CheckpointError and EnvironmentFault.
    """
    import torch

    from pipeline.bench.engines import transformers_is_there
    from pipeline.bench.environment import device_name, environment
    from pipeline.bench.inputs import workloads
    from pipeline.bert.config import shape_of
    from pipeline.bert.folder import ModelFolder
    from pipeline.engine.precision import autocast_for
    from pipeline.node.device import chosen_device

    folder, device = ModelFolder(model), chosen_device()
    longest = folder.config.max_position_embeddings
    for key in ("squad_seq_len", "glue_seq_len"):
        if getattr(config, key) > longest:
            raise ConfigError(f"inference.{key} = {getattr(config, key)} exceeds the model's {longest} positions")
    autocast_for(config.precision, device)  # refuses, or sets the matmuls of tf32
    torch.set_num_threads(job.threads)
    compare = config.compare and transformers_is_there()
    if config.compare and not compare:
        job.say("transformers is not installed, so its rows are left out (pip install transformers)")
    rows: list[Row] = []
    with torch.inference_mode():
        for workload in workloads(config, text, folder.tokenizer):
            rows += rows_of(workload, folder, config, device, compare=compare)
    result = {
        "rows": rows,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "text": text.name if text else "words of the vocabulary",
        "model": shape_of(folder.config),
        "environment": environment(torch.get_num_threads(), beside=compare),
    }
    for line in filter(None, table(result)):
        job.say(line)
    return result


def rows_of(
    workload: Workload, folder: ModelFolder, config: InferenceConfig, device: torch.device, *, compare: bool
) -> Iterator[Row]:
    """All rows of one task: real and full lengths, forward and end to end, every batch size, both engines."""
    import numpy as np

    from pipeline.bench.engines import Pipeline, Transformers
    from pipeline.bench.inputs import full_samples

    ours = Pipeline(workload.task, folder, workload.seq_len, device, config.precision)
    engines: list[Engine] = [ours, Transformers(ours, folder)] if compare else [ours]
    samples = ours.ask(workload.pairs)
    order = np.random.default_rng(0).permutation(len(workload.pairs))
    for batch in config.batches:
        count = min(MOST_BATCHES, -(-len(order) // batch))
        chosen = np.resize(order, (count, batch))
        real = [samples.take(members) for members in chosen]
        pairs = [[workload.pairs[i] for i in members] for members in chosen.tolist()]
        full = [full_samples(batch, workload.seq_len, folder.config.vocab_size)]
        for lengths, part, batches in (
            ("real", "forward", real),
            ("real", "end_to_end", pairs),
            ("full", "forward", full),
        ):
            if part == "forward":
                timed = {engine.name: _forward_of(engine, batches) for engine in engines}
            else:
                timed = {engine.name: _answers_of(engine, batches) for engine in engines}
            whole = full if lengths == "full" else real
            tokens = sum(len(each.tokens) for each in whole) / (len(whole) * batch)
            for name, times in interleaved(timed, config.seconds, len(batches)).items():
                yield {
                    "task": workload.task,
                    "seq_len": workload.seq_len,
                    "batch": batch,
                    "engine": name,
                    "part": part,
                    "lengths": lengths,
                    "mean_tokens": round(tokens, 1),
                    "precision": config.precision,
                    "sequences_per_s": round(batch * len(times) / sum(times), 3),
                    "latency_ms": {f"p{p}": round(1e3 * float(np.percentile(times, p)), 3) for p in PERCENTILES},
                    "rounds": len(times),
                }


def _forward_of(engine: Engine, batches: list[Any]) -> Callable[[int], object]:
    prepared = [engine.inputs(samples) for samples in batches]
    return lambda number: engine.forward(prepared[number])


def _answers_of(engine: Engine, batches: list[Any]) -> Callable[[int], object]:
    return lambda number: engine.answers(batches[number])


def interleaved(
    timed: Timed, seconds: float, batches: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call by name: the names take turns round by round, the first of a round alternating.

    Ends when all rounds together took ``seconds`` per name, after `LEAST_ROUNDS`. Before, untimed rounds warm up, until
    they took as long or each of the ``batches`` had one; only those that had one are timed.
    """
    warm = 0
    end = clock() + seconds * len(timed)
    while warm < batches and (warm < LEAST_ROUNDS or clock() < end):
        for call in timed.values():
            call(warm)
        warm += 1
    times: dict[str, list[float]] = {name: [] for name in timed}
    number, spent = 0, 0.0
    while number < LEAST_ROUNDS or spent < seconds * len(timed):
        names = list(timed)
        for name in names if number % 2 == 0 else reversed(names):
            began = clock()
            timed[name](number % warm)
            times[name].append(clock() - began)
            spent += times[name][-1]
        number += 1
    return times


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines for people; a line of ours ends with its speed relative to transformers', if measured."""
    yield f"{result['device']}, {result['threads']} threads; real lengths: {result['text']}"
    head = ""
    for row in result["rows"]:
        title = f"{row['task']} at {row['seq_len']} tokens, {row['precision']}"
        if title != head:
            head = title
            yield ""
            yield f"{title:39}{'sequences/s':>13}" + "".join(f"{f'p{p} ms':>10}" for p in PERCENTILES) + f"{'ratio':>8}"
        keys = ("task", "batch", "part", "lengths")
        peers = [r for r in result["rows"] if all(r[k] == row[k] for k in keys) and r["engine"] != row["engine"]]
        ratio = f"{row['sequences_per_s'] / peers[0]['sequences_per_s']:8.2f}" if peers else ""
        what = f"{row['lengths']} ({row['mean_tokens']:.0f}) {row['part'].replace('_', ' ')}"
        figures = "".join(f"{row['latency_ms'][f'p{p}']:10.2f}" for p in PERCENTILES)
        faster = ratio if row["engine"] == "pipeline" else ""
        yield f"{row['batch']:4} {what:22} {row['engine']:12}{row['sequences_per_s']:12.1f}{figures}{faster}"


def main(arguments: list[str]) -> int:
    """Measure and print the table or the JSON."""
    options = parser().parse_args(arguments)
    configs = [_config(options, precision) for precision in options.precision.split(",")]
    keep_freed_memory()
    if options.threads < 1:
        raise ConfigError(f"--threads {options.threads}: must be at least 1")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(options.model)
        if not model.is_dir():
            from pipeline.bench.inputs import write_shape

            model = Path(scratch)
            write_shape(options.model, model)
        for config in configs:
            found = run(CommandJob(options.threads), config=config, model=model, text=options.text)
            result = {**found, "rows": [*result.get("rows", []), *found["rows"]]}
    if options.out:
        publish_json(options.out, result)
    print(json.dumps(result, indent=1) if options.json else "\n".join(table(result)))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench infer", description=__doc__)
    defaults = {field.name: field.default for field in fields(InferenceConfig)}
    add = parser.add_argument
    add(
        "--model",
        default="base",
        metavar="FOLDER",
        help="a Hugging Face folder; base or large: that shape with random weights (default: base)",
    )
    add("--text", type=Path, metavar="FILE", help="SQuAD-format file to ask (default: invented texts)")
    add("--batches", default="1,8,32", metavar="N,N", help="sequences (default: %(default)s)")
    add("--seq", default="", metavar="TASK=N,…", help="tokens of squad and glue (default: squad=384,glue=128)")
    add("--seconds", type=float, default=defaults["seconds"], help="per row (default: %(default)s)")
    add(
        "--precision",
        default="fp32",
        metavar="NAMES",
        help=f"of {', '.join(PRECISIONS)}, separated by commas (default: %(default)s)",
    )
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads")
    add("--alone", action="store_true", help="do not time transformers")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--out", type=to_write, metavar="FILE", help="write the figures there, too")
    return parser  # fmt: skip


def _config(options: argparse.Namespace, precision: str) -> InferenceConfig:
    """The command line as configuration; ConfigError with a line for each bad value."""
    given: dict[str, Any] = {
        "batches": [int(n) if n.isdecimal() else n for n in options.batches.split(",")],
        "seconds": options.seconds,
        "precision": precision,
        "compare": not options.alone,
    }
    for setting in filter(None, options.seq.split(",")):
        task, equals, tokens = setting.partition("=")
        if task not in ("squad", "glue") or not equals:
            raise ConfigError(f"--seq {setting}: write it as squad=384,glue=128")
        given[f"{task}_seq_len"] = int(tokens) if tokens.isdecimal() else tokens
    return restore(InferenceConfig, given, "command line")
