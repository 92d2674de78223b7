"""Recipe and profile files to frozen dataclasses: strict, all errors at once, each with file, line and key.

The dataclasses below are the reference of the recipe's keys. A field marked ``science=False`` may change without
making finished stages stale. A field at its default leaves no trace in what a run records, so new fields may come with
a default that means what was done before; a default that is there never changes.
Imported by the login-node commands, so nothing heavy may be imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_prep.sentences import language_fault
from pipeline.monitor.cpu import computes_bf16, has_gpu
from pipeline.strict_toml import Source, apply_settings, build, raise_all, read_toml
from slurm.profile import PROFILES, Profile

RECIPES = Path(__file__).parent / "recipes"
T = TypeVar("T")
TASKS = ("squad", "mrpc", "sst2")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# auto: bf16 with GPUs, there or here, or a CPU here that multiplies it, else fp32; a loaded recipe says which.
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


def limited(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    science: bool | str = True,
) -> Any:
    """A dataclass field with bounds: ``low <= value <= high`` and ``value > above``.

    ``science``: whether it changes results; the name of another field: only while that one is on.
    """
    return field(default=default, metadata={"low": low, "high": high, "above": above, "science": science})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the encoder's shape. The vocabulary size comes from vocab.txt, padded to a multiple of 8."""

    hidden_size: int = limited(low=1)
    num_hidden_layers: int = limited(low=1)
    num_attention_heads: int = limited(low=1)
    intermediate_size: int = limited(low=1)
    hidden_act: Literal["erf", "tanh"] = "erf"  # GELU exact, or the tanh approximation (NVIDIA since 2022)
    hidden_dropout_prob: float = limited(0.1, low=0, high=0.99)
    attention_probs_dropout_prob: float = limited(0.1, low=0, high=0.99)
    max_position_embeddings: int = limited(512, low=8)
    type_vocab_size: int = limited(2, low=2)
    initializer_range: float = limited(0.02, above=0)
    init: Literal["bert", "nvidia"] = "bert"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: corpora by file name (looked up under --data DIR), language, sharding, samples."""

    wikipedia: tuple[str, ...] = ()  # MediaWiki pages-articles exports: .xml, also .bz2, .gz, .xz, .zst
    books: tuple[str, ...] = ()  # folders of text files; files of documents between blank lines, or WikiExtractor's
    jsonl: tuple[str, ...] = ()  # records with a text: JSON lines, CSV, TSV, Parquet
    text_column: str = "text"  # its name in them
    replay: tuple[str, ...] = ()  # those of them that are general text, against forgetting: a part is taken
    replay_share: float = limited(0.1, above=0, high=0.9)  # of the training text, by bytes
    licences: tuple[str, ...] = ()  # of these texts, for the model card
    tokens: str | None = None  # a folder of sequences of any alphabet with their tokenizer.json, instead of texts
    vocab: str | None = None  # a vocab.txt; none: the chain trains one
    vocab_size: int = limited(30522, low=64, high=1_000_000)
    language: str = "en"
    lowercase: bool = True
    strip_accents: bool = True
    splitter: Literal["sentencex", "punkt"] = "sentencex"
    max_document_mb: float = limited(16.0, above=0)
    deduplicate: bool = False  # leave documents and long lines out that repeat an earlier one; they are always counted
    train_shards: int = limited(256, low=1, high=65536)
    test_shards: int = limited(8, low=1, high=65536)
    test_fraction: float = limited(0.01, above=0, high=0.5)
    dupe_factor: int = limited(5, low=1, high=1000)
    short_seq_prob: float = limited(0.1, low=0, high=1)
    seed: int = limited(12345, low=0)

    @property
    def corpora(self) -> tuple[str, ...]:
        """All that is learnt from, by name."""
        return (*self.wikipedia, *self.books, *self.jsonl, *([self.tokens] if self.tokens else []))

    @property
    def vocabulary(self) -> str | None:
        """The file that names the tokens; None where the chain trains it."""
        return f"{self.tokens}/tokenizer.json" if self.tokens else self.vocab


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """[train]: what all pretraining phases share."""

    precision: Precision = "bf16"
    reduction: Literal["fast", "tree"] = "fast"
    loss_mean: Literal["global", "micro"] = "global"
    objective: Literal["mlm+nsp", "mlm"] = "mlm+nsp"  # mlm: samples are no pairs, pooler and NSP head are not trained
    masking: Literal["dynamic", "static"] = "dynamic"
    masked_lm_prob: float = limited(0.15, above=0, high=0.9)
    masking_unit: Literal["token", "word"] = "token"  # word: all pieces of a word together
    max_grad_norm: float = limited(1.0, above=0)
    seed: int = limited(42, low=0)
    log_every: int = limited(1, low=1, science=False)  # steps
    eval_every: int = limited(200, low=1, science="keep_best")  # steps
    eval_samples: int = limited(4096, low=1, science="keep_best")
    keep_best: bool = False  # a phase ends with its checkpoint of the lowest held-out loss at [MASK], not with the last
    checkpoint_every: int = limited(200, low=1, science=False)  # steps
    keep_checkpoints: int = limited(2, low=2, science=False)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """[optimizer]: LAMB as NVIDIA's apex computes it, or AdamW."""

    name: Literal["lamb", "adamw"] = "lamb"
    variant: Literal["apex", "nvlamb"] = "apex"
    backend: Literal["auto", "torch", "apex"] = field(default="auto", metadata={"science": False})
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = limited(1e-6, above=0)
    weight_decay: float = limited(0.01, low=0)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """[phase1], [phase2], …: one pretraining phase; all run the same code.

    It begins with the weights that ``start`` names, else with those of the phase before, else with random ones.
    """

    seq_len: int = limited(low=16, high=65535)
    max_predictions: int = limited(low=1)
    global_batch: int = limited(low=1)
    micro_batch: int | None = limited(None, low=1, science=False)  # none: what the profile allows
    learning_rate: float = limited(above=0)
    warmup: float = limited(low=0, high=1)  # proportion of steps
    schedule: Literal["poly", "linear", "constant", "cosine", "wsd"] = "poly"
    steps: int = limited(low=1)
    samples: str | None = None  # a folder under --data: samples that were made before, ours or NVIDIA's HDF5
    start: str | None = None  # a Hugging Face folder or NVIDIA's .pt under --data; the phases before are left out
    start_step: int = limited(0, low=0)  # steps of this phase that NVIDIA's .pt has made: LAMB, rate and data go on


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One task: what it is called, how it is trained, how long its inputs and answers may be.

    ``batch`` sequences make one optimizer step, computed ``micro_batch`` at a time. ``learning_rate`` rises
    over the share ``warmup`` of all steps and falls linearly to 0. ``doc_stride`` to ``null_threshold`` are
    used by squad only. Every one of ``seeds`` is trained from the same weights.
    """

    dataset: str  # the name shown to people
    epochs: int = limited(low=1, high=1000)
    batch: int = limited(low=1)
    micro_batch: int = limited(32, low=1, science=False)
    learning_rate: float = limited(above=0)
    warmup: float = limited(low=0, high=0.99)  # share of all steps
    weight_decay: float = limited(0.01, low=0)
    max_seq_len: int = limited(low=8)  # tokens
    doc_stride: int = limited(128, low=1)  # tokens from one window of a context to the next
    max_query_length: int = limited(64, low=1)  # tokens
    n_best: int = limited(20, low=1)
    max_answer_length: int = limited(30, low=1)  # tokens
    version_2: bool = False  # SQuAD 2.0: questions without an answer
    null_threshold: float = 0.0  # answer "" when its score leads the best answer's by more than this
    seeds: tuple[int, ...] = limited((1,), low=0, high=2**63 - 1)
    precision: Precision = "fp32"
    reduction: Literal["fast", "tree"] = "fast"
    checkpoint_every: int | None = limited(None, low=1, science=False)  # steps; none: every five minutes


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FinetuneConfig):
    """A classification of one's own: the columns of ``text`` (one or two; none: found by name) and ``label``."""

    text: tuple[str, ...] = ()
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The inference benchmark: answers and labels per second, and how long one batch takes.

    Every measurement lasts about ``seconds`` at each of ``batches`` (sequences). ``compare`` also measures
    transformers, in turn with ours, where it is installed.
    """

    batches: tuple[int, ...] = limited((1, 8, 32), low=1, high=4096)
    seconds: float = limited(1.0, above=0, high=600)
    precision: Precision = "fp32"
    squad_seq_len: int = limited(384, low=16)  # tokens
    glue_seq_len: int = limited(128, low=16)  # tokens
    compare: bool = True


@dataclass(frozen=True, kw_only=True)
class TaskConfig(FinetuneConfig):
    """[squad], [mrpc], [sst2]: a fine-tuning task and its files under --data, in the task's official format."""

    train: str
    eval: str
    baseline: bool = field(default=False, metadata={"science": False})  # train it without pretraining, too


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train. Knows no node count and no path of a site.

    ``phases`` in a file is a list of names that selects some of its tables [phase1], [phase2], … in that order;
    without it all are taken, by number.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    phases: dict[str, PhaseConfig] = field(metadata={"tables": r"phase[1-9][0-9]?"})
    squad: TaskConfig | None = None
    mrpc: TaskConfig | None = None
    sst2: TaskConfig | None = None
    inference: InferenceConfig | None = None


def load_recipe(name: str, settings: Iterable[str] = (), *, gpus: bool = False) -> Recipe:
    """Recipe from a TOML file (a path, or a name in pipeline/recipes) with ``--set key=value`` settings applied.

    ``gpus``: it is for machines that have some. Raises ConfigError with one line for each error.
    """
    return _sound(read_toml(Recipe, name, RECIPES, "recipe", settings), name, gpus=gpus)


def load_profile(name: str) -> Profile:
    """Cluster profile from a TOML file (a path, or a name in slurm/profiles)."""
    return read_toml(Profile, name, PROFILES, "cluster profile", ())


def restore(cls: type[T], values: dict[str, Any], origin: str, settings: Iterable[str] = ()) -> T:
    """Rebuild a dataclass from the JSON kept in a run (see `table_of`), with new ``--set`` settings applied.

    Keys that only a newer version knows are left out, which is said once.
    """
    errors: list[str] = []
    unknown: list[str] = []
    table, where = apply_settings(values, settings, errors)
    restored = build(cls, table, Source(origin, "", where, unknown), "", errors)
    raise_all(errors)
    if unknown:
        _warn_once(f"{origin}: {', '.join(unknown)} means nothing to this version and is left out")
    assert restored is not None
    return _sound(restored, origin)


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)


def _sound(loaded: T, origin: str, *, gpus: bool = False) -> T:
    """A recipe without contradictions, without the phases that a later one's ``start`` makes useless, without auto."""
    if not isinstance(loaded, Recipe):
        return loaded
    raise_all(f"{origin}: {line}" for line in _contradictions(loaded))
    names = list(loaded.phases)
    first = max((names.index(name) for name, phase in loaded.phases.items() if phase.start), default=0)
    tables = {name: getattr(loaded, name) for name in ("train", *TASKS, "inference")}
    precision = "bf16" if gpus or has_gpu() or computes_bf16() else "fp32"
    chosen = {name: dataclasses.replace(table, precision=precision) for name, table in tables.items()
              if table is not None and table.precision == "auto"}  # fmt: skip
    return dataclasses.replace(loaded, phases={name: loaded.phases[name] for name in names[first:]}, **chosen)


def defaults_of(cls: type) -> dict[str, Any]:
    """Field name to default value, of the fields that have one."""
    values = {f.name: f.default for f in dataclasses.fields(cls)}
    values |= {f.name: f.default_factory() for f in dataclasses.fields(cls) if callable(f.default_factory)}
    return {name: value for name, value in values.items() if value is not dataclasses.MISSING}


NOTHING: Mapping[str, Any] = {}


def science(value: Any, defaults: Mapping[str, Any] = NOTHING) -> Any:
    """The JSON form of what changes results: dataclasses, also inside mappings and lists, by their scientific fields.

    A field at its default is left out, and so is a key of a mapping that holds what ``defaults`` says.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return science(_scientific(value), defaults_of(type(value)))
    if isinstance(value, Mapping):
        return {k: science(v) for k, v in value.items() if k not in defaults or v != defaults[k]}
    return [science(item) for item in value] if isinstance(value, list | tuple) else value


def differences(before: Any, now: Any, defaults: Mapping[str, Any] = NOTHING, where: str = "") -> list[str]:
    """Lines ``KEY was X, is Y`` between a ``science`` that was written down and the configuration as it is now.

    ``now`` is what ``science`` takes, not what it gives. Absent means default on both sides, so that neither a field
    that is newer than the record nor a record that spells defaults out (as version 0.1.0 did) makes a difference.
    """
    known: Mapping[str, Any] = NOTHING
    if dataclasses.is_dataclass(now) and not isinstance(now, type):
        known, defaults, now = vars(now), defaults_of(type(now)), _scientific(now, before)
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == science(now) else [f"{where} was {before}, is {science(now)}"]
    lines = []
    for key in dict.fromkeys([*before, *now]):
        if key not in now and key in known:
            continue  # no science, or none any more
        was, value = (side.get(key, defaults.get(key, ABSENT)) for side in (before, now))
        lines += differences(was if key in before else science(was), value, where=f"{where}.{key}" if where else key)
    return lines


ABSENT = "(absent)"


def _scientific(value: Any, before: Any = None) -> dict[str, Any]:
    """Its scientific fields; of one that is so while another is on, if that was on in the record ``before``, too."""

    def counts(on: bool | str) -> Any:
        return getattr(value, on) and (not isinstance(before, Mapping) or before.get(on)) if isinstance(on, str) else on

    fields = dataclasses.fields(value)
    return {spec.name: getattr(value, spec.name) for spec in fields if counts(spec.metadata.get("science", True))}


def _contradictions(recipe: Recipe) -> list[str]:
    """Values that are fine alone and impossible together."""
    lines = []
    model, data = recipe.model, recipe.data
    heads = model.num_attention_heads
    if model.hidden_size % heads:
        lines.append(f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}")
    tasks: dict[str, TaskConfig] = {name: task for name in TASKS if (task := getattr(recipe, name)) is not None}
    lengths = {f"{name}.seq_len": phase.seq_len for name, phase in recipe.phases.items()}
    lengths |= {f"{name}.max_seq_len": task.max_seq_len for name, task in tasks.items()}
    for key in ("squad_seq_len", "glue_seq_len") if recipe.inference else ():
        lengths[f"inference.{key}"] = getattr(recipe.inference, key)
    most = model.max_position_embeddings
    lines += [f"{key} = {size} exceeds model.max_position_embeddings = {most}" for key, size in lengths.items()
              if size > most]  # fmt: skip
    for name, phase in recipe.phases.items():
        most = phase.max_predictions
        if most >= phase.seq_len:
            lines.append(f"{name}.max_predictions = {most} must be below {name}.seq_len = {phase.seq_len}")
        ready = (phase.start or "").endswith(".pt") and recipe.optimizer.name == "lamb"
        if phase.start_step and not (ready and phase.start_step < phase.steps):
            lines.append(f"{name}.start_step wants NVIDIA's .pt as {name}.start, more {name}.steps, and LAMB")
    for name, task in tasks.items():
        if len(set(task.seeds)) < max(1, len(task.seeds)):
            lines.append(f"{name}.seeds = {list(task.seeds)}: give at least one, none twice")
    given = {name: phase.samples for name, phase in recipe.phases.items() if phase.samples is not None}
    if not data.corpora and given.keys() != recipe.phases.keys():
        lines.append("[data] names no corpus: give at least one of wikipedia, books, jsonl; or tokens")
    own = {Path(name).name for name in data.corpora if name not in data.replay}  # documents know this of their origin
    if data.replay and (not own or set(data.replay) - set(data.corpora) or own & {Path(n).name for n in data.replay}):
        lines.append(
            "data.replay must name some of the corpora, not all, whose files are named otherwise than the rest"
        )
    if data.tokens is not None:
        for name in ("wikipedia", "books", "jsonl", "vocab", *TASKS, "inference"):
            if getattr(data, name, None) or getattr(recipe, name, None):
                lines.append(f"{name} goes with texts, not with data.tokens: leave it out")
        if (recipe.train.objective, recipe.train.masking_unit) != ("mlm", "token"):
            lines.append(
                'data.tokens has no sentences and no words: set train.objective = "mlm", masking_unit = "token"'
            )
    if data.vocabulary is None and given:
        lines.append("data.vocab is missing: samples that were made before are worth nothing without their vocab.txt")
    sources = {(phase.seq_len, phase.samples) for phase in recipe.phases.values()}
    if len(sources) > len(dict(sources)):
        lines.append("phases of one seq_len read the same samples: give all of them the same, or none")
    starts = [phase.start for phase in recipe.phases.values() if phase.start is not None]
    if data.vocabulary is None and starts:
        lines.append("data.vocab is missing: weights to start from are worth nothing without their own vocab.txt")
    if fault := language_fault(data.language):
        lines.append(fault)
    named = [*data.corpora, *([data.vocab] if data.vocab is not None else []), *starts, *given.values()]
    for name in [*named, *(file for task in tasks.values() for file in (task.train, task.eval))]:
        if not name.strip(". /") or name.startswith("/") or ".." in name.split("/"):
            lines.append(f"{name[:40]!r} is no name of a file below --data DIR")
    if not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        lines.append(f"optimizer.betas = {list(recipe.optimizer.betas)}: each must be at least 0 and below 1")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", recipe.name):
        lines.append(f"name = {recipe.name[:40]!r}: use at most 64 letters, digits, '-' and '_'")
    return lines
