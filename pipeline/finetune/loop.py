"""Fine-tuning of a task from start to scores: every seed is trained, the best one's predictions are published.

Called as the stages squad, mrpc and sst2, and by ``python -m pipeline.finetune``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import DataError
from data_prep.publish import file_sha256, publish_json, sync_folder
from pipeline.config import FinetuneConfig
from pipeline.engine.precision import autocast_for
from pipeline.errors import ConfigError
from pipeline.finetune.fit import fit, predict, total_steps
from pipeline.finetune.model_folder import ModelFolder
from pipeline.finetune.options import MODES, SQUAD
from pipeline.finetune.problems import Problem, problem_of
from pipeline.finetune.samples import Samples
from pipeline.run.rundir import Attempt, append_jsonl, read_json

SKIPPED = "skipped_train_examples.json"
MISMATCHED = "mismatched"
Record = dict[str, Any]


class Job(Protocol):
    """What the loop needs of its caller; `pipeline.node.job.Job` has it."""

    @property
    def out(self) -> Path: ...
    @property
    def stage(self) -> str: ...
    @property
    def attempt(self) -> Attempt: ...
    @property
    def threads(self) -> int: ...
    def say(self, line: str) -> None: ...


def run(job: Job, *, task: str, config: FinetuneConfig, model: Path, train: Path, eval: Path) -> Record:
    """Fine-tune the Hugging Face folder ``model`` on file ``train`` and score it on file ``eval``.

    Leaves scores.json, predictions.json (squad: nbest_predictions.json too) and a link ``model`` to the best
    seed's Hugging Face folder in ``job.out``; returns the content of scores.json. Seeds that an earlier, killed
    start finished are reused. Raises ConfigError, DataError, CheckpointError and NumericalError.
    """
    return finetune(job, task=task, config=config, model=model, train=train, eval=eval, modes=("train", "eval"))


def finetune(
    job: Job,
    *,
    task: str,
    config: FinetuneConfig,
    model: Path,
    train: Path | None,
    eval: Path | None,
    modes: tuple[str, ...],
    mismatched: Path | None = None,
) -> Record:
    """As `run`, doing only ``modes``: train, eval (predict and score), prediction (labels are not needed).

    Without "train" the folder ``model`` must hold a model of this task; without "eval" nothing is scored.
    ``mismatched`` is MNLI's second evaluation file: its scores end in ``_mismatched`` and rank nothing.
    """
    folder = ModelFolder(model)
    _check(task, config, folder, job.out, modes)
    torch.set_num_threads(job.threads)
    (job.out / "scores.json").unlink(missing_ok=True)  # those of another start; its seeds are kept
    task_run = TaskRun(job, task, config, folder, train, {"": eval, MISMATCHED: mismatched}, modes)
    if "train" not in modes:
        scores = task_run.predict_and_publish(job.out, task_run.load(None))
        return task_run.publish({**task_run.facts, "scores": scores})
    records: list[Record] = []
    for seed in config.seeds:
        records.append(task_run.seed(seed))
        best = task_run.best(records)
    if not task_run.folder_of(best["seed"]).joinpath("model").is_dir():  # it was not the best of other seeds
        best = task_run.seed(best["seed"], again=True)
    task_run.point_to(best["seed"])
    named = {"best_seed": best["seed"], "ranked_by": task_run.problem.metric, "steps": best["steps"]}
    return task_run.publish({**task_run.facts, "scores": best["scores"], **named, **summary(records)})


def summary(records: list[Record]) -> Record:
    """Every seed's scores, and their mean and deviation (n-1; none for a single seed)."""
    names = records[0]["scores"]
    columns = {name: [record["scores"][name] for record in records] for name in names}
    return {
        "seeds": [{"seed": record["seed"], "scores": record["scores"]} for record in records],
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "deviation": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
    }


def _check(task: str, config: FinetuneConfig, folder: ModelFolder, out: Path, modes: tuple[str, ...]) -> None:
    """Refuse what cannot work, before anything is read or written."""
    lines = [f"mode {mode!r} is unknown; choose from {', '.join(MODES)}" for mode in modes if mode not in MODES]
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        lines.append(f"seeds = {list(config.seeds)}: give at least one, none twice")
    if "train" in modes and "eval" not in modes and len(config.seeds) > 1:
        lines.append(f"{len(config.seeds)} seeds cannot be compared without mode eval; give one seed")
    longest = folder.config.max_position_embeddings
    if config.max_seq_len > longest:
        lines.append(f"max_seq_len = {config.max_seq_len} exceeds the model's {longest} positions")
    if task == SQUAD and config.max_query_length + 4 > config.max_seq_len:
        lines.append(
            f"max_query_length = {config.max_query_length} leaves no room for a context in max_seq_len = "
            f"{config.max_seq_len}"
        )
    if "train" in modes and folder.path.resolve().is_relative_to(out.resolve()):
        lines.append(f"{folder.path} lies in the output folder {out}, where training would replace it")
    if (out / "model").is_dir() and not (out / "model").is_symlink():
        lines.append(f"{out / 'model'} was not made by this command; choose another output folder")
    if lines:
        raise ConfigError("\n".join(f"{task}: {line}" for line in lines))
    autocast_for(config.precision, chosen_device())  # EnvironmentFault where this device cannot do it


class TaskRun:
    """One task on one model folder: its samples, and what is done for each seed."""

    def __init__(
        self,
        job: Job,
        task: str,
        config: FinetuneConfig,
        source: ModelFolder,
        train: Path | None,
        evals: Mapping[str, Path | None],
        modes: tuple[str, ...],
    ) -> None:
        self.job, self.config, self.source, self.modes = job, config, source, modes
        self.device = chosen_device()
        self.problem: Problem = problem_of(task, config, source.tokenizer)
        names = {field.name for field in dataclasses.fields(FinetuneConfig)} - {"dataset", "seeds"}
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
        self.facts: Record = {"task": task, "dataset": config.dataset, "unit": "percent"}
        self.train_samples: Samples | None = None
        self.evaluations: dict[str, tuple[Problem, Samples]] = {}  # by the name that their scores end in
        if "train" in modes:
            assert train is not None
            self.train_samples, counts, skipped = self.problem.read_train(train)
            self.facts |= counts
            publish_json(job.out / SKIPPED, skipped)
            if skipped:
                more = f" and {len(skipped) - 5} more, all in {SKIPPED}" if len(skipped) > 5 else ""
                job.say(
                    f"{train}: {len(skipped)} examples are left out of training, their answer is not in their "
                    f"context: {', '.join(skipped[:5])}{more}"
                )
            if not len(self.train_samples):
                raise DataError(f"{train}: no example is left to train on")
        for name, path in evals.items() if {"eval", "prediction"} & set(modes) else ():
            if path:
                problem = problem_of(task, config, source.tokenizer)
                samples, counts = problem.read_eval(path, labelled="eval" in modes)
                self.evaluations[name] = problem, samples
                self.facts |= {_with(key, name): count for key, count in counts.items()}
        self.facts |= settings
        files = {"model": source.sha256}
        named = {"train": train, **{_with("eval", name): path for name, path in evals.items()}}
        files |= {name: file_sha256(path) for name, path in named.items() if path}
        self.identity = {"task": task, "modes": sorted(modes), "config": settings, "files": files}

    def folder_of(self, seed: int) -> Path:
        """Where a seed's results lie."""
        return self.job.out / "seeds" / str(seed)

    def load(self, seed: int | None) -> torch.nn.Module:
        """The source's weights with a new head drawn from ``seed``, or with its own head when None."""
        model = self.problem.new_model(self.source.config)
        self.source.load_into(model, self.problem.head, seed)
        return model.to(self.device)

    def seed(self, seed: int, *, again: bool = False) -> Record:
        """Train, predict and score one seed, or take its result from an earlier start with the same identity.

        A seed's scores.json is written last: where it stands, everything else is whole.
        """
        folder = self.folder_of(seed)
        identity = hashlib.sha256(json.dumps({**self.identity, "seed": seed}, sort_keys=True).encode()).hexdigest()
        found = read_json(folder / "scores.json")
        if not again and found and found.get("identity") == identity:
            self.job.say(f"seed {seed}: finished earlier, {_show(found['scores'])}")
            return found
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        assert self.train_samples is not None
        model = self.load(seed)
        began = time.perf_counter()
        fit(
            model,
            self.problem,
            self.train_samples,
            self.config,
            seed=seed,
            device=self.device,
            log=lambda figures: self._log(seed, figures),
        )
        took = time.perf_counter() - began
        count = self.config.epochs * len(self.train_samples)
        self.job.say(f"seed {seed}: trained on {count} samples in {took:.1f} s, {count / took:.1f} sequences/s")
        scores = self.predict_and_publish(folder, model)
        self.source.save(model, folder / "model", self.problem, self._card(seed, scores))
        record = {
            "scores": scores,
            "seed": seed,
            "steps": total_steps(len(self.train_samples), self.config),
            "identity": identity,
        }
        publish_json(folder / "scores.json", record)
        return record

    def _card(self, seed: int, scores: Mapping[str, float]) -> str:
        task, dataset = self.facts["task"], self.facts["dataset"]
        return (
            f"---\nlibrary_name: transformers\n---\n\n# BERT fine-tuned on {dataset}\n\n"
            f"File format {task}, seed {seed}. On the evaluation file, in percent: {_show(scores)}.\n"
        )

    def _log(self, seed: int, figures: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, its steps counted over all seeds, and now and then a line for people."""
        assert self.train_samples is not None
        steps, step = total_steps(len(self.train_samples), self.config), int(figures["step"])
        head = {
            "stage": self.job.stage,
            "attempt": self.job.attempt.number,
            "step": self.config.seeds.index(seed) * steps + step,
            "time": time.time(),
            "seed": seed,
        }
        append_jsonl(self.job.attempt.metrics, {**figures, **head})
        if step % max(1, steps // 10) == 0 or step == steps:
            self.job.say(
                f"seed {seed}: step {step}/{steps}  loss {figures['loss']:.4f}  "
                f"lr {figures['learning_rate']:.3g}  {figures['sequences_per_s']:.1f} sequences/s"
            )

    def predict_and_publish(self, folder: Path, model: torch.nn.Module) -> dict[str, float]:
        """Predict every evaluation file, write the predictions into ``folder``, return the scores."""
        every: dict[str, float] = {}
        for name, (problem, samples) in self.evaluations.items():
            began = time.perf_counter()
            logits = predict(model, problem, samples, self.config, self.device)
            took = time.perf_counter() - began
            files, scores = problem.judge(logits)
            for file, content in files.items():
                publish_json(folder / (f"{name}_{file}" if name else file), content)
            rate = len(samples) / took
            self.job.say(f"predicted {len(samples)} samples, {rate:.1f} sequences/s; {_show(scores)}")
            every |= {_with(metric, name): value for metric, value in scores.items()}
        return every

    def best(self, records: list[Record]) -> Record:
        """The record with the highest metric, the first on a tie; only its model is kept."""
        metric = self.problem.metric
        best = max(records, key=lambda record: record["scores"].get(metric, 0.0))
        for record in records:
            if record is not best:
                shutil.rmtree(self.folder_of(record["seed"]) / "model", ignore_errors=True)
        return best

    def point_to(self, seed: int) -> None:
        """Publish the best seed's predictions, and its model as a link."""
        for path in sorted(self.folder_of(seed).glob("*predictions.json")):
            content = read_json(path)
            assert content is not None
            publish_json(self.job.out / path.name, content)
        link = self.job.out / f".model.{os.getpid()}.tmp"
        link.symlink_to(self.folder_of(seed).relative_to(self.job.out) / "model")
        os.replace(link, self.job.out / "model")
        sync_folder(self.job.out)

    def publish(self, scores: Record) -> Record:
        """Write scores.json, last of all; returns it."""
        publish_json(self.job.out / "scores.json", scores)
        return scores


def chosen_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with(key: str, name: str) -> str:
    return f"{key}_{name}" if name else key


def _show(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items()) or "not scored"
