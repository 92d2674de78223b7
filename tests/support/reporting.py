"""Runs made of files, for tests of what is said about them, and the report's page taken apart."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

from pipeline.config import load_profile, load_recipe
from pipeline.report.facts import gather
from pipeline.report.render import render
from pipeline.run.chain import Chain
from pipeline.run.files import append_jsonl
from pipeline.run.rundir import Attempt, RunDir
from pipeline.strict_toml import table_of
from support.running import TWO_PHASES

HOSTILE = "<script>alert(1)</script>\"'>&\x1b[31m\u202eevil"
UNIGRAM = 6.553
CONTEXT_FREE = 5.942
VOID = {"meta", "br"}
RESULTS = {
    "extract": {
        "inputs": [
            {
                "name": "enwiki-sample.xml.bz2",
                "bytes": 1_695_871,
                "sha256": "cd" * 32,
                "counts": {
                    "articles": 1154,
                    "documents": 1050,
                    "pages": 1300,
                    "text_bytes": 2_600_000,
                    "words": 411_255,
                },
                "skipped": {"no prose": 90, "too long": 14},
            },
            {
                "name": "books",
                "files": 11,
                "counts": {"articles": 50, "documents": 50, "text_bytes": 4_700_000, "words": 853_949},
                "skipped": {},
            },
        ],
        "counts": {"articles": 1204, "documents": 1100, "pages": 1300, "text_bytes": 7_300_000, "words": 1_265_204},
        "skipped": {"no prose": 90, "too long": 14},
        "examples": {"no prose": ["List of anthropologists", "A<b>"], "too long": []},
    },
    "shard": {
        "documents_in": 1100,
        "skipped": {"no text": 0},
        "train": {"documents": 1067, "sentences": 24310, "words": 501234, "bytes": 3_040_000, "shards": 8},
        "test": {"documents": 33, "sentences": 802, "words": 15678, "bytes": 98_000, "shards": 2},
    },
    "vocab": {"vocab_size": 8192, "asked": 8192, "sha256": "ab" * 32},
    "samples_128": {
        "seq_len": 128,
        "vocab_sha256": "ab" * 32,
        "train": {
            "rows": 6120,
            "tokens": 720345,
            "bytes": 1_600_000,
            "unknown_tokens": 51,
            "random_next": 3672,
            "padding": 0.1565,
        },
        "test": {
            "rows": 112,
            "tokens": 12345,
            "bytes": 27_000,
            "unknown_tokens": 0,
            "random_next": 56,
            "padding": 0.0636,
        },
    },
    "samples_512": {
        "train": {
            "rows": 1702,
            "tokens": 698111,
            "bytes": 1_500_000,
            "unknown_tokens": 51,
            "random_next": 900,
            "padding": 0.5942,
        },
        "test": {
            "rows": 30,
            "tokens": 12222,
            "bytes": 25_000,
            "unknown_tokens": 0,
            "random_next": 15,
            "padding": 0.3634,
        },
    },
    "export": {"model": "model", "parameters": 5_530_000, "step_of": "step 30 of phase2", "vocab_size": 8192},
    "inference": {
        "device": "Example CPU",
        "threads": 2,
        "rows": [
            {
                "task": "squad",
                "seq_len": 384,
                "batch": 32,
                "engine": engine,
                "part": part,
                "lengths": "real",
                "precision": "bf16",
                "sequences_per_s": rate,
                "latency_ms": {"p50": 3.2e4 / rate, "p90": 3.3e4 / rate, "p95": 3.4e4 / rate},
            }
            for engine, part, rate in (
                ("pipeline", "forward", 61.5),
                ("pipeline", "end_to_end", 48.0),
                ("transformers", "forward", 40.25),
            )
        ],
    },
}
SCORES = {
    "squad": ("extractive QA stand-in", {"exact_match": 11.25, "f1": 19.75}, 400),
    "mrpc": ("sentence-pair stand-in", {"accuracy": 62.0, "f1": 76.5, "mean": 69.25}, 500),
    "sst2": ("sentiment stand-in", {"accuracy": 71.4, "f1": 70.1}, 872),
}


# The figures below belong to these values, whatever the tiny recipe becomes.
TINY = (
    "phase1.steps=400",
    "phase1.global_batch=64",
    "phase1.micro_batch=32",
    "phase1.learning_rate=1e-2",
    "phase2.steps=30",
    "phase2.global_batch=16",
    "phase2.micro_batch=4",
    "phase2.learning_rate=2e-3",
)


def begin(path: Path, recipe: str = TWO_PHASES, profile: str = "local", *settings: str) -> Chain:
    path.mkdir(parents=True, exist_ok=True)
    given = dict(value.split("=", 1) for value in (*(TINY if recipe == TWO_PHASES else ()), *settings))
    values = {
        "format": 1,
        "recipe": table_of(load_recipe(recipe, [f"{key}={value}" for key, value in given.items()])),
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


def start(chain: Chain, name: str, world: int = 2) -> Attempt:
    folder = chain.run.stage(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "stage.json").write_text(json.dumps(chain.record(name)))
    attempt = folder.new_attempt("launch")
    chain.run.event("started", stage=name, attempt=attempt.number, world_size=world)
    return attempt


def finish(chain: Chain, name: str, result: dict[str, object], duration_s: float = 12.5) -> None:
    record = {**chain.record(name), "finished": 1.7e9, "duration_s": duration_s, "result": result}
    chain.run.stage(name).path.mkdir(parents=True, exist_ok=True)
    chain.run.stage(name).mark_done(record)


def train(
    attempt: Attempt, phase: str, first: int, last: int, resumed: dict | None, total: int, gain: float | None = 1.2
) -> None:
    """The metric lines that the training loop writes, every 5 steps, evaluated every 25."""
    (attempt.path / "attempt.json").write_text(json.dumps({"resumed_from": resumed}))
    head = {"stage": phase, "attempt": attempt.number}
    for step in range(first, last + 1):
        share = step / total
        mlm = 4.9 + 4.1 * math.exp(-4 * share) + 0.15 * math.sin(step * 1.7) * math.cos(step)
        line = {**head, "step": step, "time": time.time() + step}
        if step % 5 == 0 or step == total:
            rate = 0.01 * min(share / 0.1, (1 - share) / 0.9)
            figures = {"loss": mlm + 0.66, "mlm_loss": mlm, "nsp_loss": 0.66, "learning_rate": rate, "grad_norm": 1.1}
            speed = 61 + 3 * math.sin(step) - (25 if step < first + 5 else 0)
            append_jsonl(
                attempt.metrics,
                {**line, **figures, "sequences_per_s": speed, "tokens_per_s": 117 * speed, "step_s": 64 / speed},
            )
        if step % 25 == 0 or step == total:
            held = {
                "eval_mlm_loss": 5.05 + 3.9 * math.exp(-4 * share),
                "eval_mlm_accuracy": 0.24 * share,
                "eval_nsp_accuracy": 0.5 + 0.18 * share,
                "eval_mask_gain": gain,
                "eval_mask_gain_se": None if gain is None else 0.03,
                "eval_mask_loss": UNIGRAM - (gain or 0.0),
                "eval_mask_accuracy": 0.21 * share,
                "unigram_loss": UNIGRAM,
                "unigram_mask_loss": UNIGRAM,
                "unigram_mask_accuracy": 0.04,
                "context_free_loss": CONTEXT_FREE,
                "nsp_majority": 0.55,
            }
            append_jsonl(attempt.metrics, {**line, **held})


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
    for name in ("export", *(["inference"] if "inference" in chain.stages else [])):
        start(chain, name)
        finish(chain, name, RESULTS[name])
    for task, (dataset, scores, examples) in SCORES.items():
        start(chain, task)
        record = {"task": task, "dataset": dataset, "scores": scores, "examples": examples, "train_examples": 2000}
        record |= {"seed": 1, "epochs": 2, "unit": "percent", "seeds": [{"seed": 1, "scores": scores}]}
        record |= {"mean": scores, "deviation": dict.fromkeys(scores)}
        record |= {"ranked_by": next(iter(scores)), "baselines": {"majority": dict.fromkeys(scores, 50.07)}}
        (chain.run.stage(task).path / "scores.json").write_text(json.dumps(record))
        finish(chain, task, record)
    return chain


class Page(HTMLParser):
    """Balanced tags, the text of the page, and everything that would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(chain: Chain, *, held: bool = False) -> Page:
    html = render(gather(chain.run, held=held))
    page = Page(html)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    attributes = {key for _, attrs in page.tags for key in attrs}
    assert not attributes & {"src", "xlink:href", "style"}
    assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] or "" for _, attrs in page.tags if "href" in attrs]
    assert {f"#{name}" for name in ids} >= set(links)  # nothing but places of the page
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)
    return page
