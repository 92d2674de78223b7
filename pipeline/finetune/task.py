"""Fine-tuning as a task of the engine: one seed of SQuAD or of a GLUE task, from a model folder to scores.

Called by the stages squad, mrpc and sst2 (and by squad-1, squad-2, … where there are several seeds), and by
``python -m pipeline.finetune``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import DataError
from data_prep.publish import file_sha256, json_sha256, publish_json
from pipeline.batch import BatchPlan
from pipeline.bert.encoder import initialise
from pipeline.bert.folder import POOLER, ModelFolder
from pipeline.bert.heads import Model
from pipeline.bert.packing import Batch, arrangement, layout
from pipeline.config import FinetuneConfig, OptimizerConfig, science
from pipeline.engine.loop import train as train_task
from pipeline.engine.precision import autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.task import MicroBatch, Settings
from pipeline.errors import ConfigError
from pipeline.finetune.options import MODES, SQUAD
from pipeline.finetune.predict import predict
from pipeline.finetune.problems import Problem, problem_of
from pipeline.finetune.samples import Samples
from pipeline.finetune.scores import in_words, record_of_seed
from pipeline.node.device import chosen_device, device_of
from pipeline.node.distributed import joined, peers_named
from pipeline.node.job import Job
from pipeline.run.files import read_json

SKIPPED = "skipped_train_examples.json"
MISMATCHED = "mismatched"
MAX_GRAD_NORM = 1.0
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What one fine-tuning does, and with what.

    ``modes``: train, eval (predict and score), prediction (labels are not needed); without train the folder ``model``
    must hold one of this task. ``mismatched`` is MNLI's second evaluation file, whose scores rank nothing. With
    ``scratch`` the weights are drawn from the seed instead: what the task's own examples teach, the baseline of all
    pretraining. Raises DataError for what is no file: a pipe would be waited for.
    """

    task: str
    config: FinetuneConfig
    model: Path
    train: Path | None
    eval: Path | None
    mismatched: Path | None = None
    modes: Sequence[str] = ("train", "eval")
    max_steps: int | None = None
    scratch: bool = False

    def __post_init__(self) -> None:
        for path in (self.train, *self.evaluations.values()):
            if path is not None and not path.is_file():
                raise DataError(f"{path}: cannot be read: {'no file' if path.exists() else 'there is no such file'}")

    @property
    def evaluations(self) -> dict[str, Path]:
        """The files to predict, by the name that their scores end in."""
        return {name: path for name, path in (("", self.eval), (MISMATCHED, self.mismatched)) if path is not None}

    @functools.cached_property
    def identity(self) -> str:
        """A digest of everything that decides the scores of one seed; how it is called and computed does not."""
        files = {"train": self.train, "eval": self.eval, "mismatched": self.mismatched}
        content = {
            "task": self.task,
            "modes": sorted(self.modes),
            "config": science(dataclasses.replace(self.config, dataset="")),
            "files": {name: file_sha256(path) for name, path in files.items() if path is not None},
            "model": ModelFolder(self.model).sha256,
            "max_steps": self.max_steps,
            **({"scratch": True} if self.scratch else {}),
        }
        return json_sha256(content)

    def check(self, out: Path) -> None:
        """Refuse what cannot work, before anything is read or written into ``out``."""
        config, longest = self.config, ModelFolder(self.model).config.max_position_embeddings
        lines = [f"mode {one!r} is unknown; choose from {', '.join(MODES)}" for one in self.modes if one not in MODES]
        if config.max_seq_len > longest:
            lines.append(f"max_seq_len = {config.max_seq_len} exceeds the model's {longest} positions")
        if self.task == SQUAD and config.max_query_length + 4 > config.max_seq_len:
            room = f"no room for a context in max_seq_len = {config.max_seq_len}"
            lines.append(f"max_query_length = {config.max_query_length} leaves {room}")
        if "train" in self.modes and self.model.resolve().is_relative_to(out.resolve()):
            lines.append(f"{self.model} lies in the output folder {out}, where training would replace it")
        if lines:
            raise ConfigError("\n".join(f"{self.task}: {line}" for line in lines))
        autocast_for(config.precision, chosen_device())  # EnvironmentFault where this device cannot do it


def run(
    job: Job, *, task: str, config: FinetuneConfig, model: Path, train: Path, eval: Path, scratch: bool = False
) -> Record:
    """Fine-tune the Hugging Face folder ``model`` on file ``train`` with ``config``'s one seed; score on ``eval``."""
    return finetune(job, Spec(task=task, config=config, model=model, train=train, eval=eval, scratch=scratch))


def finetune(job: Job, spec: Spec) -> Record:
    """Do what ``spec`` says; a result that an earlier start of the same made is returned as it is.

    Leaves scores.json, predictions.json (squad: nbest_predictions.json too) and the folder ``model`` in ``job.out``;
    returns the content of scores.json. Raises ConfigError, DataError, CheckpointError and what
    `pipeline.engine.loop.train` raises.
    """
    spec.check(job.out)
    scores = read_json(job.out / "scores.json") or {}
    if scores.get("identity") == spec.identity:
        job.say(f"finished earlier, {in_words(scores['scores'])}")
        return scores
    if job.rank == 0:
        (job.out / "scores.json").unlink(missing_ok=True)  # those of another start
    if "train" in spec.modes:
        train_task(job, lambda ranks: Finetuning(job, ranks.device, spec))
        return read_json(job.out / "scores.json") or {}  # the task's last deed
    device = device_of(job)
    with joined(job, device) as (group, _), peers_named(job):
        ranks = Ranks(job.rank, job.world_size, group, device, job.heartbeat)
        return Finetuning(job, ranks.device, spec).predict_only(ranks)


class Finetuning:
    """One seed of one task on one model folder."""

    losses_named: tuple[str, ...] = ("loss",)
    counts_named: tuple[str, ...] = ("samples", "tokens")

    def __init__(self, job: Job, device: torch.device, spec: Spec) -> None:
        self.job, self.spec = job, spec
        self.config = config = spec.config
        self.arranged = arrangement(device.type, config.max_seq_len)
        self.seed = config.seeds[0]
        self.source = ModelFolder(spec.model)
        unnamed = "train" in spec.modes or spec.scratch or spec.task == SQUAD
        self.named = () if unnamed else self.source.labels
        self.problem = self._problem(self.named)
        self.facts: Record = {"task": spec.task, "dataset": config.dataset, "unit": "percent"}
        self.samples = self._read_train() if spec.train is not None and "train" in spec.modes else None
        self.evaluations = self._read_evaluations()
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_SETTINGS}
        self.facts |= {**settings, "notes": list(filter(None, self._notes()))}
        for line in self.facts["notes"]:
            job.say(line)
        self.steps_in_epoch = math.ceil(len(self.samples or ()) / config.batch)
        steps = min(config.epochs * self.steps_in_epoch, spec.max_steps or config.epochs * self.steps_in_epoch)
        self.settings = Settings(
            steps=steps,
            say_every=max(1, steps // 10),
            seed=self.seed,
            micro_batch=config.micro_batch,
            precision=config.precision,
            reduction=config.reduction,
            optimizer=OptimizerConfig(name="adamw", weight_decay=config.weight_decay),
            learning_rate=config.learning_rate,
            warmup=config.warmup,
            schedule="linear",
            max_grad_norm=MAX_GRAD_NORM,
            checkpoint_every=config.checkpoint_every,
        )
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] = (-1, np.zeros(0, np.int64))

    def _problem(self, labels: tuple[str, ...]) -> Problem:
        """The task; the classes of one's own are ``labels``, or those of the training file."""
        file = self.spec.train if "train" in self.spec.modes else self.spec.eval
        return problem_of(self.spec.task, self.config, self.source.tokenizer, file, labels)

    def _read_train(self) -> Samples:
        assert self.spec.train is not None
        samples, counts, skipped = self.problem.read_train(self.spec.train)
        self.facts |= counts
        if self.job.rank == 0:
            publish_json(self.job.out / SKIPPED, skipped)
        if skipped:
            more = f" and {len(skipped) - 5} more, all in {SKIPPED}" if len(skipped) > 5 else ""
            self.job.say(
                f"{self.spec.train}: {len(skipped)} examples are left out of training, their answer is not in their "
                f"context: {', '.join(skipped[:5])}{more}"
            )
        if not len(samples):
            raise DataError(f"{self.spec.train}: no example is left to train on")
        return samples

    def _read_evaluations(self) -> dict[str, tuple[Problem, Samples]]:
        evaluations = {}
        for name, path in self.spec.evaluations.items() if {"eval", "prediction"} & set(self.spec.modes) else ():
            problem = self._problem(self.named or self.problem.labels)
            samples, counts = problem.read_eval(path, labelled="eval" in self.spec.modes)
            evaluations[name] = problem, samples
            self.facts |= {ending(key, name): count for key, count in counts.items()}
        return evaluations

    def _notes(self) -> Iterator[str]:
        """What people should know of the model and of the files' text."""
        named, labels = list(self.named), self.problem.labels
        if named and sorted(map(str.lower, named)) != sorted(labels):
            yield f"{self.spec.model}: its classes {', '.join(named)} are taken for {', '.join(labels)}, in this order"
        begun = "train" in self.spec.modes and not self.spec.scratch
        if begun and self.problem.head == "classifier." and f"{POOLER}dense.weight" not in self.source.state:
            yield f"{self.spec.model} has no pooler: it is drawn anew, from the seed"
        read = {self.spec.evaluations[name]: samples for name, (_, samples) in self.evaluations.items()}
        if self.spec.train is not None and self.samples is not None:
            read[self.spec.train] = self.samples
        for path, samples in read.items():
            yield self.source.tokenizer.unknown_note(str(path), samples.tokens)

    # ---------------------------------------------------------------- where it begins

    def optimizer(self) -> None:
        return None

    def model(self) -> Model:
        """The source's weights with a new head drawn from the seed."""
        return self._model(self.seed)

    def _model(self, seed: int | None) -> Model:
        model = self.problem.new_model(self.source.config)
        if self.spec.scratch and seed is not None:
            initialise(model, self.source.config, torch.Generator().manual_seed(seed))
        else:
            self.source.load_into(model, self.problem.head, seed)
        return model

    def identity(self) -> Mapping[str, Any]:
        """All that decides the scores of this seed, as one digest."""
        return {"finetune": self.spec.identity}

    # ---------------------------------------------------------------- a batch

    def size(self, batch: int) -> int:
        """The last batch of an epoch takes what is left."""
        assert self.samples is not None
        first = batch % self.steps_in_epoch * self.config.batch
        return min(self.config.batch, len(self.samples) - first)

    def counts(self, batch: int, indices: range) -> Sequence[int]:
        assert self.samples is not None
        chosen = self._chosen(batch, indices)
        return (len(chosen), int(self.samples.lengths[chosen].sum()))

    def read(self, batch: int, index: int) -> MicroBatch:
        assert self.samples is not None
        chosen = self._chosen(batch, range(index, index + 1))
        samples = self.samples.take(chosen)
        assert samples.targets is not None
        arrays = layout(samples.tokens, samples.lengths, samples.b_start, self.config.max_seq_len, self.arranged)
        return MicroBatch(
            ids=chosen,
            arrays={**arrays, "targets": samples.targets.astype(np.int32)},
            counts=(len(chosen), len(samples.tokens)),
            sizes={"seq_len": self.config.max_seq_len},
        )

    def _chosen(self, batch: int, indices: range) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of the samples of consecutive micro-batches; the order of an epoch follows from (seed, epoch)."""
        assert self.samples is not None
        epoch, place = divmod(batch, self.steps_in_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        if not indices:
            return np.zeros(0, np.int64)
        plan = BatchPlan(self.size(batch), self.settings.micro_batch, world_size=1)
        first = place * self.config.batch
        members = slice(first + plan.samples_of(indices[0]).start, first + plan.samples_of(indices[-1]).stop)
        return self._order[1][members]

    def losses(self, model: Model, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return (self.problem.loss_sum(model(Batch.of(inputs)), inputs["targets"].long()),)

    def evaluate(self, model: Model, ranks: Ranks) -> Mapping[str, float]:
        """Nothing on the way: a task is scored at its end."""
        return {}

    def in_words(self, figures: Mapping[str, float]) -> str:
        return in_words(figures)

    # ---------------------------------------------------------------- the result

    def finish(self, model: Model, ranks: Ranks) -> Mapping[str, Any]:
        """Predictions, scores, and the model as a folder. scores.json comes last: where it stands, all is whole.

        What it was trained from is not needed any more: its checkpoints go.
        """
        scores = self.predict(model, ranks)
        if ranks.rank == 0:
            shutil.rmtree(self.job.out / "model", ignore_errors=True)  # of a start that came no further
            self.source.save(model, self.job.out / "model", self.problem.labels, self._card(scores))
            record = record_of_seed(self.seed, scores, self.problem.metric) | {"steps": self.settings.steps}
            self._publish(record | {"baselines": self._baselines()}, scores)
            for attempt in self.job.run.stage(self.job.stage).attempts:
                for folder in attempt.path.glob("step-*"):
                    shutil.rmtree(folder)
        ranks.wait_for_all()
        return {"scores": scores}

    def _baselines(self) -> dict[str, dict[str, float]]:
        """What the scores are worth: those of no model at all, by name."""
        baselines: dict[str, dict[str, float]] = {}
        for ending_, (problem, _) in self.evaluations.items():
            assert self.spec.train is not None
            for name, scores in problem.baselines(self.spec.train).items() if "eval" in self.spec.modes else ():
                baselines.setdefault(name, {}).update({ending(key, ending_): value for key, value in scores.items()})
        return baselines

    def predict_only(self, ranks: Ranks) -> Record:
        """Score and predict with the head that the folder has."""
        torch.set_num_threads(self.job.threads)
        scores = self.predict(self._model(None).to(ranks.device), ranks)
        record = self._publish({}, scores) if ranks.rank == 0 else {}
        ranks.wait_for_all()
        return record

    def predict(self, model: Model, ranks: Ranks) -> dict[str, float]:
        """Predict every evaluation file, the ranks together; rank 0 writes the predictions. Returns the scores."""
        every: dict[str, float] = {}
        for name, (problem, samples) in self.evaluations.items():
            files, scores = problem.judge(predict(model, problem, samples, self.config, ranks), ranks)
            if ranks.rank == 0:
                for file, content in files.items():
                    publish_json(self.job.out / (f"{name}_{file}" if name else file), content)
            self.job.say(f"predicted {len(samples)} samples; {in_words(scores)}")
            every |= {ending(metric, name): value for metric, value in scores.items()}
        return every

    def _publish(self, more: Record, scores: Mapping[str, float]) -> Record:
        record = {**self.facts, "scores": scores, **more, "identity": self.spec.identity}
        publish_json(self.job.out / "scores.json", record)
        return record

    def _card(self, scores: Mapping[str, float]) -> str:
        return (
            f"---\nlibrary_name: transformers\n---\n\n# BERT fine-tuned on {self.config.dataset}\n\n"
            f"File format {self.spec.task}, seed {self.seed}. On the evaluation file, in percent: {in_words(scores)}.\n"
        )


NO_SETTINGS = ("dataset", "seeds", "checkpoint_every", "reduction", "baseline")  # not shown beside scores


def ending(key: str, name: str) -> str:
    """A key of the figures of an evaluation file."""
    return f"{key}_{name}" if name else key
