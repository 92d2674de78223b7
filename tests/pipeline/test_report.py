"""The report: one safe, self-contained page about a run in any state."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.chain import Chain
from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError
from pipeline.facts import gather
from pipeline.report import render
from pipeline.rundir import Attempt, RunDir, append_jsonl

UNIGRAM = 6.553
VOID = {"meta", "br"}
RESULTS = {
    "extract": {
        "articles_in": 1204,
        "documents_out": 1100,
        "skipped": {"redirect": 90, "no text": 14},
        "bytes": 3_140_000,
    },
    "shard": {
        "documents_in": 1100,
        "skipped": {"no text": 0},
        "train": {"documents": 1067, "sentences": 24310, "words": 501234, "bytes": 3_040_000, "shards": 8},
        "test": {"documents": 33, "sentences": 802, "words": 15678, "bytes": 98_000, "shards": 2},
    },
    "vocab": {"vocab_size": 8192, "asked": 8192, "sha256": "ab" * 32},
    "samples_128": {"samples": 6120, "tokens": 720345, "bytes": 1_600_000},
    "samples_512": {"samples": 1702, "tokens": 698111, "bytes": 1_500_000},
    "export": {"model": "model", "parameters": 5_530_000},
}
SCORES = {
    "squad": ("extractive QA stand-in", {"exact_match": 11.25, "f1": 19.75}, 400),
    "mrpc": ("sentence-pair stand-in", {"accuracy": 62.0, "f1": 76.5, "mean": 69.25}, 500),
    "sst2": ("sentiment stand-in", {"accuracy": 71.4, "f1": 70.1}, 872),
}


def begin(path: Path, recipe: str = "tiny", profile: str = "local", *settings: str) -> Chain:
    path.mkdir(parents=True, exist_ok=True)
    values = {
        "format": 1,
        "recipe": dataclasses.asdict(load_recipe(recipe, settings)),
        "profile": dataclasses.asdict(load_profile(profile)),
        "nodes": 1,
        "corpora": {"enwiki-sample.xml.bz2": {"bytes": 1_234_567, "digest": "0123456789abcdef"}},
        "data_dir": "../data",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "073b38b1",
    }
    (path / "run.json").write_text(json.dumps(values))
    run = RunDir(path)
    append_jsonl(path / "events.jsonl", {"time": 1.7e9, "event": "submitted", "recipe": recipe, "cluster": profile})
    return Chain.of(run)


def start(chain: Chain, name: str) -> Attempt:
    folder = chain.run.stage(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "stage.json").write_text(json.dumps(chain.record(name)))
    attempt = folder.new_attempt("launch")
    chain.run.event("started", stage=name, attempt=attempt.number, world_size=2)
    return attempt


def finish(chain: Chain, name: str, result: dict[str, object], duration_s: float = 12.5) -> None:
    record = {**chain.record(name), "finished": 1.7e9, "duration_s": duration_s, "result": result}
    chain.run.stage(name).mark_done(record)


def train(attempt: Attempt, phase: str, first: int, last: int, resumed: dict | None, total: int) -> None:
    """The metric lines that the training loop writes, every 5 steps, evaluated every 25."""
    (attempt.path / "attempt.json").write_text(json.dumps({"resumed_from": resumed}))
    head = {"stage": phase, "attempt": attempt.number}
    for step in range(first, last + 1):
        share = step / total
        mlm = 4.9 + 4.1 * math.exp(-4 * share) + 0.15 * math.sin(step * 1.7) * math.cos(step)
        line = {**head, "step": step, "time": 1.7e9 + step}
        if step % 5 == 0:
            rate = 0.01 * min(share / 0.1, (1 - share) / 0.9)
            figures = {"loss": mlm + 0.66, "mlm_loss": mlm, "nsp_loss": 0.66, "learning_rate": rate, "grad_norm": 1.1}
            speed = 61 + 3 * math.sin(step) - (25 if step < first + 5 else 0)
            append_jsonl(
                attempt.metrics,
                {**line, **figures, "sequences_per_s": speed, "tokens_per_s": 117 * speed, "step_s": 64 / speed},
            )
        if step % 25 == 0:
            held = {
                "eval_mlm_loss": 5.05 + 3.9 * math.exp(-4 * share),
                "eval_mlm_accuracy": 0.24 * share,
                "eval_nsp_accuracy": 0.5 + 0.18 * share,
            }
            append_jsonl(attempt.metrics, {**line, **held, "unigram_loss": UNIGRAM})


def finished_run(path: Path) -> Chain:
    chain = begin(path)
    for name in ("extract", "shard", "vocab", "samples_128", "samples_512"):
        start(chain, name)
        finish(chain, name, RESULTS[name])
    train(start(chain, "phase1"), "phase1", 1, 187, None, 400)
    train(start(chain, "phase1"), "phase1", 176, 400, {"attempt": 1, "step": 175}, 400)
    finish(chain, "phase1", {"checkpoint": "attempts/0002/step-00000400", "step": 400, "samples": 25600}, 222.0)
    train(start(chain, "phase2"), "phase2", 1, 30, None, 30)
    finish(chain, "phase2", {"checkpoint": "attempts/0001/step-00000030", "step": 30, "samples": 480}, 41.0)
    start(chain, "export")
    finish(chain, "export", RESULTS["export"])
    for task, (dataset, scores, examples) in SCORES.items():
        start(chain, task)
        record = {"task": task, "dataset": dataset, "scores": scores, "examples": examples, "train_examples": 2000}
        record |= {"seed": 1, "epochs": 2, "unit": "percent", "seeds": [{"seed": 1, "scores": scores}]}
        record |= {"mean": scores, "deviation": dict.fromkeys(scores)}
        (chain.run.stage(task).path / "scores.json").write_text(json.dumps(record))
        finish(chain, task, record)
    return chain
