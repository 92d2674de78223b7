"""``python -m pipeline.bench finetune squad|mrpc|sst2``: throughput of fine-tuning and of evaluation on 1 or more GPUs.

It needs neither a model nor data: weights are random, of a recipe's shape, and texts are invented. With ``--lengths
full`` every sequence has as many tokens as it may have, as where all are padded; ``invented`` ones are about as long as
the task's, and the pipeline computes no padding. A training step is the engine's own: feed, micro-batches, sum over the
processes, clipping, loss scale, the task's optimizer. A step of evaluation is the forward of some micro-batches and the
answers made of it. ``--beside transformers`` does both with Hugging Face's model on the same samples, in the same
precision and by turns: rows padded to the longest of a micro-batch and prepared beforehand, SDPA,
DistributedDataParallel, torch's fused AdamW and loss scale, the answers of its examples, each process for itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import BatchPlan
from pipeline.bench import turns
from pipeline.bench.engines import autocast, best_text, of_transformers, padded, transformers_step
from pipeline.bench.inputs import full_texts, invented_texts, texts_of, write_task, write_untrained
from pipeline.bench.turns import DIFFERENT, Row, Step, Work
from pipeline.bert.costs import BACKWARD, training_flops
from pipeline.bert.folder import ModelFolder
from pipeline.bert.heads import Model
from pipeline.bert.regions import compile_regions
from pipeline.config import FinetuneConfig, Recipe, load_recipe
from pipeline.engine.accumulate import Accumulator
from pipeline.engine.backend import of_config
from pipeline.engine.feed import Feed
from pipeline.engine.metrics import Clock
from pipeline.engine.precision import LossScale, autocast_for
from pipeline.engine.ranks import Ranks
from pipeline.engine.reduce import GradientBuffer, Reducer
from pipeline.engine.state import TrainingState
from pipeline.errors import NumericalError
from pipeline.finetune.options import SQUAD, defaults
from pipeline.finetune.predict import predict
from pipeline.finetune.problems import SquadProblem
from pipeline.finetune.samples import Samples
from pipeline.finetune.squad import BLANKS
from pipeline.finetune.task import Finetuning, Spec
from pipeline.node.job import Job

MODES, LENGTHS = ("train", "eval"), ("full", "invented")
SHORTEST = 16  # tokens of a sequence


def main(arguments: list[str]) -> int:
    """Measure every combination that was asked for and print a table, or its figures as JSON."""
    options = parser().parse_args(arguments)
    recipe = load_recipe(options.recipe, options.settings)
    config: FinetuneConfig = getattr(recipe, options.task) or defaults(options.task, dataset="benchmark")
    seq_len = options.seq_len or config.max_seq_len
    precisions = options.precision.split(",") if options.precision else [config.precision]
    modes, lengths = options.mode.split(","), ["real"] if options.text else (options.lengths or "full").split(",")
    wrong = [f"--mode {name}: choose from {', '.join(MODES)}" for name in modes if name not in MODES]
    wrong += [f"--lengths {name}: choose from {', '.join(LENGTHS)}" for name in lengths
              if name not in (*LENGTHS, "real" if options.text else "")]  # fmt: skip
    if options.text and options.lengths:
        wrong.append(f"--lengths {options.lengths}: --text {options.text} has lengths of its own; give one of them")
    if options.text and not options.model:
        wrong.append(f"--text {options.text}: needs the vocabulary of a --model FOLDER")
    model = ModelFolder(options.model).config if options.model else recipe.model
    longest = model.max_position_embeddings
    if not SHORTEST <= seq_len <= longest:
        wrong.append(f"--seq-len {seq_len}: {SHORTEST} to {longest}, the positions of the model")
    measurements = [
        {"mode": mode, "lengths": length, "precision": precision, "gpus": gpus,
         **turns.amounts(options, precision, config.micro_batch, wrong)}
        for mode in modes for length in lengths for precision in precisions for gpus in options.gpus
    ]  # fmt: skip
    turns.refuse(options, precisions, wrong)
    if options.text:
        texts_of(options.text, options.task, 1)
    config = dataclasses.replace(config, max_seq_len=seq_len, seeds=(1,),
                                 max_query_length=min(config.max_query_length, seq_len // 4))  # fmt: skip
    return turns.run(
        options, functools.partial(prepare, recipe, config), measurements, ("task", "mode", "lengths"), model
    )


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m pipeline.bench finetune", description=__doc__)
    add = options.add_argument
    add("task", choices=(SQUAD, "mrpc", "sst2"))
    add("--mode", default="train,eval", metavar="NAMES", help="train, eval, or both (default)")
    add("--lengths", metavar="NAMES", help="full, invented or both, of the sequences (default: full)")
    add("--seq-len", type=int, metavar="N", help="tokens of a sequence at most (default: the recipe's, or 384 and 128)")
    add("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder instead of random weights")
    add("--text", type=Path, metavar="FILE", help="a file of the task whose texts are taken, with the --model's words")
    turns.common_options(options)
    return options


class Timed(Finetuning):
    """The task on as many samples as whole batches hold: those of its file, again and again where it has fewer."""

    def _read_train(self) -> Samples:
        samples, batch = super()._read_train(), self.config.batch
        return samples.take(np.resize(np.arange(len(samples)), -(-len(samples) // batch) * batch))

    def numbers(self, batch: int, rank: int = 0, world_size: int = 1) -> list[NDArray[np.int64]]:
        """The samples of a rank's micro-batches."""
        plan = BatchPlan(self.size(batch), self.settings.micro_batch, world_size)
        return [self._chosen(batch, range(index, index + 1)) for index in plan.range_of(rank)]


@contextmanager
def prepare(
    recipe: Recipe, config: FinetuneConfig, options: argparse.Namespace, asked: Row, ranks: Ranks
) -> Iterator[Work]:
    """The steps of one mode, kind of lengths and precision."""
    mode, lengths, precision, gpus, micro_batch, accumulation = asked.values()
    config = dataclasses.replace(
        config, precision=precision, micro_batch=micro_batch, batch=micro_batch * accumulation * gpus
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-finetune-")))
        if not options.model:
            write_untrained(folder, dataclasses.asdict(recipe.model), recipe.data.vocab_size)
        source = ModelFolder(options.model or folder)
        count = config.batch * math.ceil(DIFFERENT / accumulation)
        texts = (
            texts_of(options.text, options.task, count) if options.text
            else full_texts(options.task, count, source.tokenizer, config.max_seq_len) if lengths == "full"
            else invented_texts(options.task, count, source.tokenizer)
        )  # fmt: skip
        file = folder / ("texts.json" if options.task == SQUAD else "texts.jsonl")
        write_task(file, options.task, texts)
        task = subject(options.task, config, source, file, folder, mode, ranks)
        begun = range(options.warmup + options.steps)
        if mode == "train":
            assert task.samples is not None
            taken = [task.samples.lengths[np.concatenate(task.numbers(number))] for number in begun]
            model = task.model().to(ranks.device)
            rows = their_rows(task, ranks, begun) if options.beside else {}
            steps = {"ours": stack.enter_context(our_training(task, model, ranks))}
            if options.beside:
                theirs = of_transformers(model, source.config).to(ranks.device)
                steps["transformers"] = transformers_step(theirs, precision, rows.__getitem__, scaled=True)
        else:
            taken = [task.evaluations[""][1].lengths] * len(begun)
            model = task.model().to(ranks.device)
            steps = {"ours": our_evaluation(task, model, ranks)}
            if options.beside:
                steps["transformers"] = their_evaluation(task, model, ranks)
        parts = 1 + BACKWARD if mode == "eval" else 1  # of the arithmetic of training, the forward alone
        holds = [(int(each.sum()), training_flops(source.config, each.tolist(), 0) / parts) for each in taken]
        row = {
            "task": options.task, **asked, "seq_len": config.max_seq_len,
            "accumulation": accumulation if mode == "train" else None,
            "recipe": None if options.model else recipe.name, "model": str(options.model) if options.model else None,
        }  # fmt: skip
        yield Work(row, steps, len(taken[0]), holds.__getitem__)


def subject(
    name: str, config: FinetuneConfig, source: ModelFolder, file: Path, out: Path, mode: str, ranks: Ranks
) -> Timed:
    """The engine's task, to train on ``file`` or to answer it; weights that the source does not have are random."""
    job = cast(Job, SimpleNamespace(rank=ranks.rank, out=out, say=lambda line: None))
    spec = Spec(
        task=name,
        config=config,
        model=source.path,
        train=file if mode == "train" else None,
        eval=None if mode == "train" else file,
        modes=["train" if mode == "train" else "prediction"],
        scratch=not source.has_weights,
    )
    return Timed(job, ranks.device, spec)


# -------------------------------------------------------------------- training


@contextmanager
def our_training(task: Timed, model: Model, ranks: Ranks) -> Iterator[Step]:
    """A step as the loop computes it; returns the loss."""
    compile_regions(ranks.device)
    settings = task.settings
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = GradientBuffer([parameter for _, parameter in trained])
    optimizer = of_config(settings.optimizer, trained, gradients)
    state = TrainingState(model.train(), optimizer, LossScale() if settings.precision == "fp16" else None, {})
    reducer = Reducer(gradients, ranks.rank, ranks.group, settings.reduction, scalars=len(task.losses_named))
    computed_in = autocast_for(settings.precision, ranks.device)
    accumulator = Accumulator("bench", task, ranks, state, reducer, computed_in, Clock())
    accumulator.begin(0)
    with Feed(task, ranks.rank, ranks.world_size, ranks.device, 0) as feed:

        def step(number: int, learning_rate: float) -> float:
            while True:  # once, but where fp16's scale is still too high
                sums = accumulator.accumulate(feed, lambda what: False)
                norm = optimizer.step(learning_rate, max_grad_norm=settings.max_grad_norm)
                if math.isfinite(norm + sums.loss):
                    return sums.loss
                if state.scale is None or not state.scale.lowered():
                    raise NumericalError(f"step {number}: loss {sums.loss}, norm of the gradients {norm}: not finite")

        yield step


def their_rows(task: Timed, ranks: Ranks, steps: range) -> Mapping[int, list[dict[str, torch.Tensor]]]:
    """A rank's micro-batches of each step as transformers' model takes them, with their labels."""
    assert task.samples is not None
    samples, names = task.samples, ("start_positions", "end_positions") if task.spec.task == SQUAD else ("labels",)
    made: dict[int, list[dict[str, torch.Tensor]]] = {}
    for number in steps:
        made[number] = []
        for members in task.numbers(number, ranks.rank, ranks.world_size):
            part = samples.take(members)
            assert part.targets is not None
            targets = torch.from_numpy(part.targets.reshape(len(part), -1)).to(ranks.device)
            made[number].append(padded(part, ranks.device) | dict(zip(names, targets.unbind(1), strict=True)))
    return made


# -------------------------------------------------------------------- evaluation


def our_evaluation(task: Timed, model: Model, ranks: Ranks) -> Step:
    """Logits of all samples and the answers made of them, the processes together; returns the answers."""
    problem, samples = task.evaluations[""]

    def step(number: int, learning_rate: float) -> list[str]:
        files, _ = problem.judge(predict(model, problem, samples, task.config, ranks), ranks)
        return list(files["predictions.json"].values())

    return step


def their_evaluation(task: Timed, model: Model, ranks: Ranks) -> Step:
    """The same by Hugging Face's model and the n-best answers of its examples; returns those of this process."""
    device, precision = ranks.device, task.config.precision
    theirs = of_transformers(model, task.source.config).to(device).eval()
    problem, samples = task.evaluations[""]
    size = task.config.micro_batch
    starts = range(ranks.rank * size, len(samples), ranks.world_size * size)
    parts = [np.arange(start, min(start + size, len(samples))) for start in starts]
    inputs = [padded(samples.take(members), device) for members in parts]
    windows = windows_of(problem) if isinstance(problem, SquadProblem) else []

    def step(number: int, learning_rate: float) -> list[str]:
        asked: dict[tuple[str, str], list[Any]] = {}
        answers: list[str] = []
        for members, batch in zip(parts, inputs, strict=True):
            with torch.inference_mode(), autocast(precision, device):
                logits = [values.float().cpu().numpy() for values in theirs(**batch).to_tuple()]
            if not windows:
                answers += [problem.labels[label] for label in logits[0].argmax(1).tolist()]
                continue
            for place, (start, end) in zip(members.tolist(), zip(*logits, strict=True), strict=True):
                question, offsets, inside = windows[place]
                asked.setdefault(question, []).append((start[: len(inside)], end[: len(inside)], offsets, inside))
        return answers or [best_text(found, context) for (_, context), found in asked.items()]

    return step


def windows_of(problem: SquadProblem) -> list[tuple[tuple[str, str], NDArray[np.int64], NDArray[np.bool_]]]:
    """Question (id and context), characters of each token in the context and whether it lies there, of each sample."""
    found = []
    for feature in problem.features:
        context = problem.data.contexts[feature.question.context]
        words = np.array([match.span() for match in re.finditer(f"[^{BLANKS}]+", context)])
        inside = np.zeros(len(feature.tokens), bool)
        inside[feature.b_start : feature.b_start + len(feature.word)] = True
        offsets = np.zeros((len(feature.tokens), 2), np.int64)
        offsets[inside] = words[feature.word]
        found.append(((feature.question.id, context), offsets, inside))
    return found
