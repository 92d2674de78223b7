"""The scores of one seed and of several: best, mean and deviation; and which model is published."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import publish_bytes, publish_json, sync_folder
from pipeline.config import FinetuneConfig
from pipeline.node.job import Job
from pipeline.run.files import read_json

Record = dict[str, Any]


def in_words(scores: Mapping[str, float]) -> str:
    """Scores in a line."""
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items()) or "not scored"


def record_of_seed(seed: int, scores: Mapping[str, float], metric: str) -> Record:
    """What scores.json says of a single seed, in the form that several have."""
    return {"best_seed": seed, "ranked_by": metric, **summary([(seed, scores)])}


def summary(seeds: Sequence[tuple[int, Mapping[str, float]]]) -> Record:
    """Every seed's scores, and their mean and deviation (n-1; none for a single seed)."""
    names = seeds[0][1]
    columns = {name: [scores[name] for _, scores in seeds] for name in names}
    return {
        "seeds": [{"seed": seed, "scores": scores} for seed, scores in seeds],
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "deviation": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
    }


def run(job: Job, *, task: str, config: FinetuneConfig, seeds: list[Path]) -> Record:
    """The stage that comes after one stage per seed: publishes the best one's results and everybody's figures."""
    return collect(job.out, seeds)


def collect(out: Path, folders: Sequence[Path]) -> Record:
    """Gather finished seeds into ``out``: predictions and a link ``model`` of the best, scores.json of all.

    The best is the one with the highest metric, the first on a tie; the other seeds' models are deleted.
    """
    records = {folder: read_json(folder / "scores.json") or {} for folder in folders}
    best = max(folders, key=lambda folder: records[folder]["scores"].get(records[folder].get("ranked_by"), 0.0))
    for path in sorted(best.glob("*predictions.json")):
        publish_bytes(out / path.name, path.read_bytes())
    if (best / "model").is_dir():
        link = out / f".model.{os.getpid()}.tmp"
        link.symlink_to(os.path.relpath(best / "model", out))
        os.replace(link, out / "model")
    for folder in folders:
        if folder != best:
            shutil.rmtree(folder / "model", ignore_errors=True)
    seeds = [(record["best_seed"], record["scores"]) for record in records.values() if "best_seed" in record]
    scores = {**records[best], **(summary(seeds) if seeds else {})}
    publish_json(out / "scores.json", scores)
    sync_folder(out)
    return scores
