"""THE chain: every stage from raw text to the report, in order. Read this file first.

extract -> shard (-> vocab) -> samples_128, samples_512 -> phase1 -> phase2 -> export -> squad, mrpc, sst2, inference
-> report. Samples are made once for each length, and there are as many phases as the recipe has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import TASKS, DataConfig, PhaseConfig, Recipe, TaskConfig, defaults_of, restore
from pipeline.errors import ConfigError
from pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Command:
    """In a recipe's place: a command that goes on by itself when it is started again (``pipeline.guard``).

    ``saves`` is the file or folder that holds what it saves: an attempt that changes it made progress.
    """

    command: tuple[str, ...]
    saves: str
    name: str = "command"


def recipe_of(settings: Mapping[str, Any], origin: str, changes: Iterable[str] = ()) -> Recipe | Command:
    """What a run of these ``settings`` (its run.json, named ``origin``) does, with ``--set`` ``changes`` applied."""
    values = settings["recipe"]
    if "command" in values:
        return restore(Command, values, origin, changes)
    return restore(Recipe, values, origin, changes)


def training_of(settings: Mapping[str, Any], origin: str) -> Recipe:
    """As ``recipe_of``; ConfigError for a run of a command."""
    recipe = recipe_of(settings, origin)
    if isinstance(recipe, Command):
        raise ConfigError(f"{origin}: a run of a command (pipeline.guard), not of a recipe; pipeline.status shows it")
    return recipe


def table(recipe: Recipe | Command) -> dict[str, Stage]:
    """The stages of a recipe by name, needs before the stages that need them; of a command the one that runs it."""
    if isinstance(recipe, Command):
        return {recipe.name: command_stage(recipe)}
    data, tasks = recipe.data, [name for name in TASKS if getattr(recipe, name) is not None]
    language = {"lowercase": data.lowercase, "strip_accents": data.strip_accents}
    vocab = f"data:{data.vocabulary}" if data.vocabulary else "vocab:vocab.txt"
    of_data = functools.partial(Stage, job="data", defaults=defaults_of(DataConfig))

    chain = [
        of_data(
            name="extract",
            run="data_prep.extract:run",
            check="data_prep.extract:check",
            width="workers",
            config={"max_document_mb": data.max_document_mb, "text_column": data.text_column},
            inputs={
                kind: tuple(f"data:{name}" for name in getattr(data, kind)) for kind in ("wikipedia", "books", "jsonl")
            },
        ),
        of_data(
            name="shard",
            run="data_prep.shard:run",
            width="workers",
            config={
                "language": data.language,
                "splitter": data.splitter,
                "train_shards": data.train_shards,
                "test_shards": data.test_shards,
                "test_fraction": data.test_fraction,
                "seed": data.seed,
                "replay": data.replay,
                **({"replay_share": data.replay_share} if data.replay else {}),
                "deduplicate": data.deduplicate,
            },
            inputs={"documents": "extract:"},
            looks_at={"evaluation": tuple(getattr(recipe, name).eval for name in tasks)},
        ),
    ]
    if not data.vocabulary:
        chain.append(
            of_data(
                name="vocab",
                run="data_prep.wordpiece:run",
                width="workers",
                config={"vocab_size": data.vocab_size, **language},
                inputs={"shards": "shard:"},
            )
        )
    if data.tokens or all(phase.samples for phase in recipe.phases.values()):
        chain.clear()  # no text is read
    for seq_len, samples in {phase.seq_len: phase.samples for phase in recipe.phases.values()}.items():
        chain.append(samples_stage(recipe, seq_len, samples, vocab))
    before = None
    for name, phase in recipe.phases.items():
        chain.append(phase_stage(recipe, name, phase, before, vocab))
        before = f"{name}#checkpoint"
    chain.append(
        Stage(
            name="export",
            run="pipeline.export:run",
            job="finetune",
            width="one",
            config={
                **({"any_kind": True} if data.tokens else language),
                "data": data.corpora,
                "licences": data.licences,
            },
            defaults=defaults_of(DataConfig),
            inputs={"checkpoint": f"{list(recipe.phases)[-1]}#checkpoint", "vocab": vocab},
        )
    )
    for name in tasks:
        chain += task_stages(name, getattr(recipe, name))
    if recipe.inference is not None:
        text = {"text": f"data:{recipe.squad.eval}"} if recipe.squad else {}
        chain.append(
            Stage(
                name="inference",
                run="pipeline.bench.infer:run",
                job="finetune",
                width="workers",  # the whole machine: what measures time runs alone
                config={"config": recipe.inference},
                inputs={"model": "export:model", **text},
            )
        )
    chain.append(
        Stage(
            name="report",
            run="pipeline.report.render:run",
            job="finetune",
            width="one",
            after=tuple(stage.name for stage in chain),
            always=True,
        )
    )
    return {stage.name: stage for stage in chain}


def command_stage(command: Command) -> Stage:
    """The one stage of a run of somebody's own program."""
    return Stage(
        name=command.name,
        run="pipeline.node.command:run",
        job="pretrain",
        width="ranks",
        config={"command": command.command, "saves": command.saves},
        defaults={"saves": command.saves},
    )


def samples_stage(recipe: Recipe, seq_len: int, made_before: str | None, vocab: str) -> Stage:
    """Samples of a length: made of the text shards, or taken from the folder ``made_before``."""
    data = recipe.data
    form = {} if recipe.train.objective == "mlm+nsp" else {"pairs": False}
    stage = functools.partial(
        Stage, job="data", defaults=defaults_of(DataConfig), name=samples_name(seq_len), width="workers",
        check="data_prep.samples:check" if data.vocabulary else "",
    )  # fmt: skip
    if made_before:
        inputs = {"source": f"data:{made_before}", "vocab": vocab}
        return stage(run="data_prep.nvidia_hdf5:run", config={"seq_len": seq_len, **form}, inputs=inputs)
    if data.tokens:
        config = {"seq_len": seq_len, "test_fraction": data.test_fraction, "seed": data.seed}
        inputs = {"source": f"data:{data.tokens}", "vocab": vocab}
        return stage(run="data_prep.tokens:run", check="data_prep.tokens:check", config=config, inputs=inputs)
    return stage(
        run="data_prep.samples:run",
        config={
            "seq_len": seq_len,
            "lowercase": data.lowercase,
            "strip_accents": data.strip_accents,
            "dupe_factor": data.dupe_factor,
            "short_seq_prob": data.short_seq_prob,
            "seed": data.seed,
            **form,
        },
        inputs={"shards": "shard:", "vocab": vocab},
    )


def phase_stage(recipe: Recipe, name: str, phase: PhaseConfig, before: str | None, vocab: str) -> Stage:
    """A pretraining phase: the same function with another config.

    It starts from the weights that its own config names, else from those of ``before``, else from random ones.
    """
    start = f"data:{phase.start}" if phase.start else before
    return Stage(
        name=name,
        run="pipeline.pretrain.task:run",
        job="pretrain",
        width="ranks",
        config={"model": recipe.model, "train": recipe.train, "optimizer": recipe.optimizer, "phase": phase},
        inputs={"samples": f"{samples_name(phase.seq_len)}:", "vocab": vocab, **({"start": start} if start else {})},
        check="pipeline.pretrain.task:check" if phase.start else "",
    )


def task_stages(name: str, config: TaskConfig) -> list[Stage]:
    """A fine-tuning task: one stage for its seed; or one for each of several, and one that gathers them.

    Before them, where it is asked for, the first seed without pretraining.
    """
    inputs = {"model": "export:model", "train": f"data:{config.train}", "eval": f"data:{config.eval}"}

    def of_seed(stage: str, config: TaskConfig, *, is_seed: bool = False, scratch: bool = False) -> Stage:
        return Stage(
            is_seed=is_seed,
            name=stage,
            run="pipeline.finetune.task:run",
            job="finetune",
            width="ranks",
            config={"task": name, "config": config, **({"scratch": True} if scratch else {})},
            inputs=inputs,
            check="pipeline.finetune.glue:check",
        )

    first = dataclasses.replace(config, seeds=config.seeds[:1])
    baseline = [of_seed(f"{name}-scratch", first, scratch=True)] if config.baseline else []
    if len(config.seeds) == 1:
        return [*baseline, of_seed(name, config)]
    each = {seed: dataclasses.replace(config, seeds=(seed,)) for seed in config.seeds}
    seeds = [of_seed(f"{name}-{seed}", own, is_seed=True) for seed, own in each.items()]
    gather = Stage(
        name=name,
        run="pipeline.finetune.scores:run",
        job="finetune",
        width="one",
        config={"task": name, "config": config},
        inputs={"seeds": tuple(f"{stage.name}:" for stage in seeds)},
    )
    return [*baseline, *seeds, gather]


def samples_name(seq_len: int) -> str:
    return f"samples_{seq_len}"
