"""Bundles that strangers can check: a training's record, the checkpoints kept of it, and the samples of the steps
that follow them. Checking runs the checker's own code on the bundle's numbers; nothing of a bundle is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_prep.errors import DataError
from data_prep.hdf5 import Shard
from data_prep.manifest import SampleSet
from data_prep.publish import file_sha256, is_sealed, publish_bytes, publish_sealed, publish_text
from data_prep.wordpiece import Vocabulary
from pipeline.batch import BatchPlan
from pipeline.bert.config import BertConfig
from pipeline.bert.heads import BertForPreTraining
from pipeline.bert.packing import arrangement
from pipeline.config import PhaseConfig, Recipe, TrainConfig, restore
from pipeline.engine import backend, checkpoint
from pipeline.engine.accumulate import Accumulator, Sums
from pipeline.engine.checkpoint_folder import is_whole, step_folder
from pipeline.engine.feed import Batch, Fed, Feed, digest48, on_device
from pipeline.engine.metrics import Clock, rounded
from pipeline.engine.precision import LossScale, autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.reduce import GradientBuffer, Reducer
from pipeline.engine.schedule import learning_rate
from pipeline.engine.state import TrainingState
from pipeline.errors import ConfigError
from pipeline.launch import code
from pipeline.node.device import chosen_device
from pipeline.pretrain.data import PretrainingData, SampleOrder, sample
from pipeline.pretrain.task import Pretraining, settings_of
from pipeline.run.files import read_jsonl
from pipeline.run.rundir import RunDir
from pipeline.stages import samples_name, training_of
from pipeline.words import is_number

FORMAT = 1
PROOF = "proof.json"
ROUNDING = {"fp32": 1e-5}  # relative: what another processor or number of ranks may change; 1e-3 for other precisions
ROUNDED_UPDATE = 0.05  # of an update's length: an optimizer enlarges what rounding does to small gradients
Arrays = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure as logged and as computed, how far apart (0: equal bit for bit), and how far rounding may be."""

    figure: str
    logged: str
    computed: str
    apart: float
    rounding: float = 0.0


def row(figure: str, logged: float, computed: float, rounding: float) -> Row:
    return Row(figure, repr(logged), repr(computed), abs(logged - computed) / max(abs(logged), 1e-30), rounding)


def bundle(run: RunDir, out: Path) -> dict[str, list[int]]:
    """Write the bundle ``out`` of a run; returns the steps of each phase that can be checked by it.

    ConfigError where ``out`` exists, or no checkpoint is kept before a step whose figures were logged.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: name a folder that does not")
    settings = run.settings
    recipe = training_of(settings, str(run.path / "run.json"))
    steps: dict[str, list[int]] = {}
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    data = {name: _add(run, temporary / name, recipe, name, steps) for name in recipe.phases}
    if not any(steps.values()):
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(
            f"{run.path}: no step to prove: no checkpoint is kept after which a step was made; train with a "
            "larger train.keep_checkpoints"
        )
    wanted = code.of_run(settings)
    root = next((r for r in (code.folder(run, wanted), code.ROOT) if r.is_dir() and code.digest(r) == wanted), None)
    for name in code.shipped(root) if root else ():
        (temporary / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile((root or Path()) / name, temporary / "code" / name)
    files = {str(p.relative_to(temporary)): file_sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
    keys = ("recipe", "corpora", "versions", "commit")
    record = {"format": FORMAT, **{key: settings.get(key) for key in keys}, "code": wanted}
    publish_sealed(temporary / PROOF, {**record, "data": data, "steps": steps, "files": files})
    temporary.rename(out)
    return {name: numbers for name, numbers in steps.items() if numbers}


def _add(run: RunDir, to: Path, recipe: Recipe, name: str, steps: dict[str, list[int]]) -> dict[str, Any]:
    """Add a phase's record, kept checkpoints and samples to the folder ``to``; returns what its data are."""
    phase, stage = recipe.phases[name], run.stage(name)
    kept = {checkpoint.step_of(f): f for f in checkpoint.lineage(stage.path) if is_whole(f)}
    lines = [line for line in stage.metrics() if "loss" in line]
    steps[name] = [step for step in sorted(line["step"] for line in lines) if step - 1 in kept]
    if not kept:
        return {}
    to.mkdir(parents=True)
    publish_text(to / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    data = PretrainingData(run.stage(samples_name(phase.seq_len)).path, "train", phase, recipe.train)
    named = recipe.data.vocabulary
    vocab = run.data_dir / named if named else run.stage("vocab").path / "vocab.txt"
    words = {"continuing": Vocabulary.load(vocab).continuing} if recipe.train.masking_unit == "word" else {}
    for step, folder in kept.items():
        shutil.copytree(folder, step_folder(to, step))
        if step + 1 in steps[name]:
            first = checkpoint.read(folder, tensors=()).sample_position
            _, shard, row = data.order[np.arange(first, first + phase.global_batch)]
            publish_bytes(_samples_file(to, step + 1), save(_excerpt(data.shards, shard, row) | words))
    set_ = data.manifest
    hashes = [{"rows": file.rows, "sha256": file.sha256} for file in set_.shards]
    facts = {key: getattr(set_, key) for key in ("seq_len", "vocab_size", "vocab_sha256", "seed", "special", "sha256")}
    return {**facts, "shards": hashes}


def _excerpt(shards: list[Shard], shard: NDArray[np.int64], row: NDArray[np.int64]) -> Arrays:
    """Some rows of some shards, each once: their places, lengths and content."""
    places = np.unique(np.stack([shard, row], axis=1), axis=0)
    tokens, b_start, is_random_next = zip(*(sample(shards[s], r) for s, r in places), strict=True)
    return {
        "places": places,
        "lengths": np.array([len(part) for part in tokens], np.int64),
        "tokens": np.concatenate(tokens),
        "b_start": np.array(b_start, np.int64),
        "is_random_next": np.array(is_random_next, np.int64),
    }


class Excerpt(PretrainingData):
    """The data of a bundle: the order over all rows of all shards, of which only some are there."""

    def __init__(self, facts: Mapping[str, Any], arrays: Arrays, phase: PhaseConfig, train: TrainConfig) -> None:
        own = {field.name: facts[field.name] for field in dataclasses.fields(SampleSet) if field.name in facts}
        self.phase, self.train, self.continuing = phase, train, arrays.get("continuing")
        self.manifest = SampleSet(**{**own, "shards": ()})
        rows = [int(shard["rows"]) for shard in facts["shards"]]
        self.first_id = np.append(0, np.cumsum(rows))[:-1].astype(np.int64)
        self.order = SampleOrder(rows, train.seed)
        ends = np.cumsum(arrays["lengths"])
        self.shards = []
        for number, count in enumerate(rows):
            own_rows = np.flatnonzero(arrays["places"][:, 0] == number)
            at, full = arrays["places"][own_rows, 1], np.zeros((3, count), np.int64)
            for values, key in zip(full, ("lengths", "b_start", "is_random_next"), strict=True):
                values[at] = arrays[key][own_rows]
            parts = [arrays["tokens"][ends[i] - arrays["lengths"][i] : ends[i]] for i in own_rows]
            tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
            offsets = np.append(0, np.cumsum(full[0]))
            self.shards.append(Shard(tokens, offsets, full[1], full[2], full[1], self.manifest.seq_len, "", 0, ""))


class Replay(Pretraining):
    """A phase of which single steps are computed again."""

    def __init__(self, recipe: Recipe, phase: PhaseConfig, data: PretrainingData, device: torch.device) -> None:
        self._aim(recipe.train)
        self.phase, self.data = phase, data
        self.arranged = arrangement(device.type, phase.seq_len)
        self.settings = settings_of(recipe.train, recipe.optimizer, phase)


def fed(task: Replay, number: int, index: int, device: torch.device) -> Fed:
    """A micro-batch of a batch as `Feed` gives it."""
    read = task.read(number, index)
    return Fed(index, on_device(read, device), read.counts, digest48(read))


class OneBatch:
    """A feed of one batch, all of whose micro-batches are this process's."""

    def __init__(self, task: Replay, number: int, device: torch.device) -> None:
        self.task, self.number, self.device = task, number, device
        self.plan = BatchPlan(task.size(number), task.settings.micro_batch, 1)
        self.left = iter(self.plan.range_of(0))

    def batch(self) -> Batch:
        return Batch(self.number, self.plan, [0] * len(self.task.counts_named))

    def micro_batch(self) -> Fed:
        return fed(self.task, self.number, next(self.left), self.device)


def restored(task: Replay, saved: checkpoint.Checkpoint, device: torch.device) -> Accumulator:
    """A model and its training in the state of a checkpoint, about to read the batch that follows."""
    settings = task.settings
    torch.set_num_threads(int(saved.identity.get("threads", 1)))
    model = BertForPreTraining(BertConfig.from_dict(saved.model)).to(device).train()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = GradientBuffer([parameter for _, parameter in trained])
    optimizer = backend.of_config(settings.optimizer, trained, gradients)
    state = TrainingState(model, optimizer, LossScale() if settings.precision == "fp16" else None, saved.identity)
    state.restore(saved, task.size(0))
    reducer = Reducer(gradients, 0, None, settings.reduction, scalars=len(task.losses_named))
    autocast = autocast_for(settings.precision, device)
    accumulator = Accumulator(saved.stage, task, Ranks(0, 1, None, device), state, reducer, autocast, Clock())
    accumulator.begin(state.batches)
    return accumulator


def computed(task: Replay, accumulator: Accumulator) -> tuple[Sums, float]:
    """The next step: its sums and the norm of its gradient. The accumulator's state is then that after it."""
    settings, state = task.settings, accumulator.state
    sums = accumulator.accumulate(cast(Feed, OneBatch(task, state.batches, accumulator.ranks.device)), lambda _: False)
    rate = learning_rate(settings.schedule, base=settings.learning_rate, warmup=settings.warmup, steps=settings.steps,
                         step=state.step + 1)  # fmt: skip
    return sums, state.optimizer.step(rate, max_grad_norm=settings.max_grad_norm)


def shares_of(task: Replay, accumulator: Accumulator, index: int) -> list[float]:
    """What one micro-batch of the next step adds to each loss."""
    number = accumulator.state.batches
    micro_batch = fed(task, number, index, accumulator.ranks.device)
    plan = BatchPlan(task.size(number), task.settings.micro_batch, 1)
    with accumulator.autocast:
        shares = accumulator.losses(number, micro_batch, plan, accumulator.counts.tolist())
    return [rounded(share) for share in shares.tolist()]


def check(folder: Path, step: int, stage: str | None = None, index: int | None = None) -> list[Row]:
    """Compute a step of a bundle again.

    Compared are losses, the gradient's norm, the samples' digest and, where the next checkpoint is there, the weights
    after the step: the length of their difference beside that of the update. With ``index`` only what this micro-batch
    adds to the losses, which one core can compute of any batch. ConfigError where the bundle does not
    hold this step, DataError where it is not what it says.
    """
    record = _record(folder)
    recipe = restore(Recipe, record["recipe"], str(folder / PROOF))
    name = _phase_with(folder, record["steps"], recipe, step, stage)
    own, phase, device = folder / name, recipe.phases[name], chosen_device()
    for path in (own / "metrics.jsonl", _samples_file(own, step)):
        if file_sha256(path) != record["files"].get(str(path.relative_to(folder))):
            raise DataError(f"{path} is not the file that {PROOF} lists: the bundle was changed")
    saved = checkpoint.read(step_folder(own, step - 1))
    data = _samples(own, step, record["data"][name], recipe, phase, saved.sample_position)
    task = Replay(recipe, phase, data, device)
    logged = _logged(own, step, task.losses_named)
    accumulator = restored(task, saved, device)
    rounding = ROUNDING.get(recipe.train.precision, 1e-3)
    if index is not None:
        logged_ones = _logged_shares(own, logged, index, task.losses_named)
        both = zip(task.losses_named, logged_ones, shares_of(task, accumulator, index), strict=True)
        return [row(f"{key} of {index}", logged_one, value, rounding) for key, logged_one, value in both]
    sums, norm = computed(task, accumulator)
    values = {"loss": sums.loss, **sums.losses, "grad_norm": norm}
    rows = [row(key, logged[key], value, rounding) for key, value in values.items()]
    rows.append(Row("samples", str(logged["samples"]), sums.samples, float(logged["samples"] != sums.samples)))
    if is_whole(step_folder(own, step)):
        after = checkpoint.read(step_folder(own, step), tensors=("weights",)).weights
        rows.append(_weights_row(accumulator.state.model, saved.weights, after))
    return rows


def _phase_with(folder: Path, steps: Mapping[str, list[Any]], recipe: Recipe, step: int, stage: str | None) -> str:
    """The one phase of which the bundle can prove ``step``."""
    able = {name: [int(s) for s in steps.get(name, [])] for name in recipe.phases}
    names = [name for name, numbers in able.items() if step in numbers and stage in (None, name)]
    if len(names) != 1:
        available = "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in able.items() if numbers)
        raise ConfigError(
            f"{folder}: name one of its steps ({available}), by --step and, where several have it, --stage"
        )
    return names[0]


def _samples(
    own: Path, step: int, facts: Mapping[str, Any], recipe: Recipe, phase: PhaseConfig, position: int
) -> Excerpt:
    """The samples of a step, whose batch begins at ``position``; DataError where they are not all there."""
    file = _samples_file(own, step)
    try:
        data = Excerpt(facts, load(file.read_bytes()), phase, recipe.train)
        vocab_size, continuing = data.manifest.vocab_size, data.continuing
        there = data.lengths(np.arange(phase.global_batch) + position).all()
        if not there or max(shard.tokens.max(initial=0) for shard in data.shards) >= vocab_size:
            raise ValueError("it lacks samples of the step, or holds tokens outside the vocabulary")
        if continuing is not None and (continuing.dtype != bool or continuing.shape != (vocab_size,)):
            raise ValueError("it does not say of every token whether it goes on with a word")
    except (KeyError, ValueError, IndexError, TypeError, SafetensorError) as error:
        raise DataError(f"{file}: not the samples of step {step}: {error}") from None
    return data


def _logged(own: Path, step: int, losses: Sequence[str]) -> Mapping[str, Any]:
    """The line of metrics that a step left; DataError where it lacks what is compared."""
    line = next((line for line in read_jsonl(own / "metrics.jsonl") if line.get("step") == step), {})
    if not all(is_number(line.get(key)) for key in ("loss", *losses, "grad_norm")) or "samples" not in line:
        raise DataError(f"{own / 'metrics.jsonl'}: step {step} has no whole record")
    return line


def _logged_shares(own: Path, line: Mapping[str, Any], index: int, losses: Sequence[str]) -> list[float]:
    """What a micro-batch added to each loss, as logged."""
    shares, step = line.get("shares") or [], line["step"]
    if not 0 <= index < len(shares):
        raise ConfigError(f"{own.parent}: step {step} has the shares of {len(shares)} micro-batches on record")
    share = shares[index]
    if not isinstance(share, list) or len(share) != len(losses) or not all(map(is_number, share)):
        raise DataError(f"{own / 'metrics.jsonl'}: step {step} has no whole record of micro-batch {index}")
    return cast(list[float], share)


def _weights_row(model: torch.nn.Module, before: Arrays, after: Arrays) -> Row:
    """How far the weights are from those of the checkpoint ``after`` the step, by the length of the update."""
    ours = {key: value.cpu().numpy() for key, value in model.state_dict().items()}
    apart, update = (
        sum(float(np.square(there[key] - after[key]).sum()) for key in after) ** 0.5 for there in (ours, before)
    )
    words = ("update's length " + repr(update), "difference " + repr(apart))
    return Row("weights", *words, apart / max(update, 1e-30), ROUNDED_UPDATE)


def _samples_file(own: Path, step: int) -> Path:
    """Where a phase's folder of a bundle keeps the samples of a step."""
    return own / f"samples-{step}.safetensors"


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / PROOF).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / PROOF} cannot be read: {error}; name a folder that pipeline.prove wrote") from None
    if not is_sealed(record) or record.get("format") != FORMAT:
        raise DataError(f"{folder / PROOF} was changed, or another version wrote it")
    return cast(dict[str, Any], record)
