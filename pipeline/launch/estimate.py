"""How long a step takes, and what fits: arithmetic on declared, measured or fitted rates. Imports no torch.

A step of the busiest rank is its micro-batches, one after the other, and what comes once: LAMB (its traffic at the
GPU's memory bandwidth), the all-reduce of the gradients (its bytes at the network's), and what the host does.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.batch import BatchPlan
from pipeline.bert import costs
from pipeline.bert.config import LARGE, BertConfig, padded_vocab, shape_of
from pipeline.config import PhaseConfig, Recipe
from pipeline.errors import ConfigError
from pipeline.run.rundir import RunDir
from pipeline.stages import training_of
from pipeline.words import is_number
from slurm.profile import Profile

MEMORY_GB_S, REDUCE_GB_S, HOST_S = 1700.0, 150.0, 0.005  # where the profile declares none
LAMB_BYTES = 84  # a parameter: what PyTorch's list operations read and write in one step
STATE_BYTES = 16  # a parameter: weight, gradient and two moments, float32
STEP_BYTES = 8  # a parameter: what LAMB holds for a moment
SLOT_BYTES = 36  # a token, layer and hidden unit: what the backward needs of a compiled 16-bit forward (measured, H100)
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's, NCCL's and lost between tensors


@dataclass(frozen=True)
class Rates:
    """``sequences_per_s`` of one GPU by phase in forward and backward alone, and where that is from; by phase also
    ``extra_s``, what a step is known to take beside all that is counted here."""

    sequences_per_s: Mapping[str, float]
    source: str
    memory_gb_s: float
    reduce_gb_s: float
    host_s: float
    extra_s: Mapping[str, float]
    lamb_s: float | None = None  # measured


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by part."""

    compute_s: float
    lamb_s: float
    reduce_s: float
    host_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.lamb_s + self.reduce_s + self.host_s


def declared(recipe: Recipe, profile: Profile) -> Rates:
    """What the profile's [rates] say of this recipe and precision."""
    keys = {name: f"{recipe.name}.{name}.{recipe.train.precision}" for name in recipe.phases}
    rates = profile.rates
    return Rates(
        sequences_per_s={name: rates[key] for name, key in keys.items() if key in rates},
        source=f"declared in profile {profile.name}",
        memory_gb_s=rates.get("memory_gb_s", MEMORY_GB_S),
        reduce_gb_s=rates.get("reduce_gb_s", REDUCE_GB_S),
        host_s=rates.get("host_s", HOST_S),
        extra_s={name: rates.get(f"{key}.extra_s", 0.0) for name, key in keys.items()},
    )


def measured(path: Path, recipe: Recipe, base: Rates) -> Rates:
    """Those that `bench gpu` wrote into a JSON file; for a model of another shape by its arithmetic."""
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        rows = {name: blocks[name]["all_on"] for name in recipe.phases if "all_on" in blocks.get(name, {})}
        lamb_ms, gpu = blocks.get("lamb", {}).get("torch", {}).get("ms"), blocks["env"].get("gpu", "a CPU")
        large, config, rates = shape_of(recipe.model) == LARGE, config_of(recipe), {}
        published = BertConfig(vocab_size=padded_vocab(30522), **(asdict(recipe.model) | LARGE))
        for name, row in rows.items():
            length = round(row["mean_tokens"])
            own = costs.training_flops(config, [length], round(0.15 * length))
            rates[name] = row["sequences_per_s"] if large else 1e12 * row["tflops"] / own
        lamb_s = lamb_ms / 1e3 * costs.parameters(config) / costs.parameters(published) if lamb_ms else None
        if not all(is_number(rate) and rate > 0 for rate in (*rates.values(), *([] if lamb_s is None else [lamb_s]))):
            raise ValueError("its rates must be numbers above 0")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"--rates {path}: not a JSON file of `python -m pipeline.bench gpu`: {error!r}") from error
    return replace(base, sequences_per_s=rates, source=f"measured on {gpu} ({path.name})", extra_s={}, lamb_s=lamb_s)


def fitted(folder: Path, recipe: Recipe, base: Rates) -> Rates:
    """From the median step of a run's phases, less what a step takes once. ConfigError for one of another training."""
    run, rates = RunDir(folder), {}
    theirs = training_of(run.settings, str(folder))
    starts = {e["stage"]: int(e["world_size"]) for e in run.events if e.get("event") == "started" and "world_size" in e}
    for name, phase in recipe.phases.items():
        steps = [line["step_s"] for line in run.stage(name).metrics() if "step_s" in line]
        own = theirs.phases.get(name)
        if steps and own and own.micro_batch and name in starts:
            kinds = [(shape_of(r.model), r.train.precision, p.seq_len) for r, p in ((theirs, own), (recipe, phase))]
            if kinds[0] != kinds[1]:
                named = "shape, precision and seq_len"
                raise ConfigError(f"--fit {folder}: {named} of its {name} are {kinds[0]}, not {kinds[1]}; fit another")
            plan = BatchPlan(own.global_batch, own.micro_batch, starts[name])
            rates[name] = fit({plan: statistics.median(steps)}, base, recipe)
    if not rates:
        raise ConfigError(f"--fit {folder}: no step of {' or '.join(recipe.phases)} is on record there")
    return replace(base, sequences_per_s=rates, source=f"fitted to {folder.name}", extra_s={})


def fit(seconds: Mapping[BatchPlan, float], base: Rates, recipe: Recipe, extra_s: float = 0.0) -> float:
    """Sequences per second of one GPU that explain the ``seconds`` of steps best: by the mean time of a sample."""
    once = replace(base, sequences_per_s={"": 1.0}, extra_s={"": extra_s})
    shares = []
    for plan, total_s in seconds.items():
        step = step_of(once, "", plan, recipe)
        shares.append((total_s - step.total_s + step.compute_s) / plan.largest_rank_batch)
    return 1 / statistics.mean(shares)


def step_of(rates: Rates, phase: str, plan: BatchPlan, recipe: Recipe) -> Step:
    """The parts of a step of ``phase`` shared as in ``plan``."""
    parameters = costs.parameters(config_of(recipe))
    lamb_s = LAMB_BYTES * parameters / (1e9 * rates.memory_gb_s) if rates.lamb_s is None else rates.lamb_s
    ring = 2 * (plan.world_size - 1) / plan.world_size
    return Step(
        compute_s=plan.largest_rank_batch / rates.sequences_per_s[phase],
        lamb_s=lamb_s,
        reduce_s=ring * 4 * parameters / (1e9 * rates.reduce_gb_s),
        host_s=rates.host_s + rates.extra_s.get(phase, 0.0),
    )


def hours_of(recipe: Recipe, rates: Rates, ranks: int, phases: Set[str]) -> float | None:
    """Hours that all steps of ``phases`` take on ``ranks``; None where the rates do not know one of them."""
    if not phases <= rates.sequences_per_s.keys():
        return None
    taken_s = 0.0
    for name in phases:
        phase = recipe.phases[name]
        plan = BatchPlan(phase.global_batch, phase.micro_batch or 1, ranks)
        taken_s += phase.steps * step_of(rates, name, plan, recipe).total_s
    return taken_s / 3600


def memory_gb(recipe: Recipe, phase: PhaseConfig, micro_batch: int) -> float:
    """Of one GPU at its fullest: weights, gradients, moments, activations and logits of full-length samples."""
    return _fixed_gb(recipe) + micro_batch * _sample_gb(recipe, phase)


def largest_micro_batch(recipe: Recipe, phase: PhaseConfig, gpu_gb: float) -> int:
    """The largest power of two that fits a GPU; 0 where the model itself does not."""
    fits = int((USABLE * gpu_gb - _fixed_gb(recipe)) / _sample_gb(recipe, phase))
    return 1 << fits.bit_length() - 1 if fits > 0 else 0


def _fixed_gb(recipe: Recipe) -> float:
    return (STATE_BYTES + STEP_BYTES) * costs.parameters(config_of(recipe)) / 1e9


def _sample_gb(recipe: Recipe, phase: PhaseConfig) -> float:
    config, wide = config_of(recipe), 1 if recipe.train.precision in ("bf16", "fp16") else 2
    activations = SLOT_BYTES * wide * phase.seq_len * config.num_hidden_layers * config.hidden_size
    logits = phase.max_predictions * config.vocab_size * (4 + 4 * wide)
    return (activations + logits) / 1e9


def disk_gb(recipe: Recipe) -> float:
    """Of a run at its fullest: kept checkpoints, the one being written and the last of each phase, and a model."""
    checkpoints = recipe.train.keep_checkpoints + 1 + len(recipe.phases)
    return (12 * checkpoints + 4) * costs.parameters(config_of(recipe)) / 1e9


def config_of(recipe: Recipe) -> BertConfig:
    """The model's shape, with the vocabulary that the recipe names."""
    return BertConfig(vocab_size=padded_vocab(recipe.data.vocab_size), **asdict(recipe.model))
