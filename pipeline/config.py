"""Recipe and profile files to frozen dataclasses: strict, all errors at once, each with file, line and key.

The dataclasses below are the reference of the recipe's keys. A field marked ``science=False`` may change without
making finished stages stale. Imported by the login-node commands, so nothing heavy may be imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError
from pipeline.finetune.options import FinetuneConfig
from slurm.profile import PROFILES, Profile

RECIPES = Path(__file__).parent / "recipes"
T = TypeVar("T")


def limited(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    science: bool = True,
) -> Any:
    """A dataclass field with bounds: ``low <= value <= high`` and ``value > above``."""
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

    wikipedia: tuple[str, ...] = ()  # MediaWiki pages-articles exports: .xml, .xml.gz, .xml.bz2
    books: tuple[str, ...] = ()  # folders of text files, or files of documents separated by blank lines
    jsonl: tuple[str, ...] = ()  # one JSON object with a "text" field per line
    licences: tuple[str, ...] = ()  # of these texts, for the model card
    vocab: str | None = None  # a vocab.txt; none: the chain trains one
    vocab_size: int = limited(30522, low=64, high=1_000_000)
    language: str = "en"
    lowercase: bool = True
    strip_accents: bool = True
    splitter: Literal["sentencex", "punkt"] = "sentencex"
    max_document_mb: float = limited(16.0, above=0)
    train_shards: int = limited(256, low=1, high=65536)
    test_shards: int = limited(8, low=1, high=65536)
    test_fraction: float = limited(0.01, above=0, high=0.5)
    dupe_factor: int = limited(5, low=1, high=1000)
    short_seq_prob: float = limited(0.1, low=0, high=1)
    seed: int = limited(12345, low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """[train]: what both pretraining phases share."""

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    reduction: Literal["fast", "tree"] = "fast"
    loss_mean: Literal["global", "micro"] = "global"
    masking: Literal["dynamic", "static"] = "dynamic"
    masked_lm_prob: float = limited(0.15, above=0, high=0.9)
    max_grad_norm: float = limited(1.0, above=0)
    seed: int = limited(42, low=0)
    log_every: int = limited(1, low=1, science=False)  # steps
    eval_every: int = limited(200, low=1, science=False)  # steps
    eval_samples: int = limited(4096, low=1, science=False)
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
    """[phase1], [phase2]: one pretraining phase; both run the same code."""

    seq_len: int = limited(low=16, high=65536)
    max_predictions: int = limited(low=1)
    global_batch: int = limited(low=1)
    micro_batch: int | None = limited(None, low=1, science=False)  # none: what the profile allows
    learning_rate: float = limited(above=0)
    warmup: float = limited(low=0, high=1)  # proportion of steps
    schedule: Literal["poly", "linear", "constant", "cosine"] = "poly"
    steps: int = limited(low=1)


@dataclass(frozen=True, kw_only=True)
class TaskConfig(FinetuneConfig):
    """[squad], [mrpc], [sst2]: a fine-tuning task and its files under --data, in the task's official format."""

    train: str
    eval: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train. Knows no node count and no path of a site."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    phase1: PhaseConfig
    phase2: PhaseConfig
    squad: TaskConfig | None = None
    mrpc: TaskConfig | None = None
    sst2: TaskConfig | None = None


def load_recipe(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Recipe from a TOML file (a path, or a name in pipeline/recipes) with ``--set key=value`` settings applied.

    Raises ConfigError with one line for each error.
    """
    recipe = _load(Recipe, name, RECIPES, "recipe", settings)
    _raise(f"{name}: {line}" for line in _contradictions(recipe))
    return recipe


def load_profile(name: str) -> Profile:
    """Cluster profile from a TOML file (a path, or a name in slurm/profiles)."""
    return _load(Profile, name, PROFILES, "cluster profile", ())


def restore(cls: type[T], values: dict[str, Any], origin: str, settings: Iterable[str] = ()) -> T:
    """Rebuild a dataclass from the JSON kept in a run, with new ``--set`` settings applied."""
    errors: list[str] = []
    table, where = _apply(values, settings, errors)
    made = _build(cls, table, Source(origin, "", where), "", errors)
    _raise(errors)
    if isinstance(made, Recipe):
        _raise(f"{origin}: {line}" for line in _contradictions(made))
    assert made is not None
    return made


def science(value: Any) -> Any:
    """The JSON form of a configuration without the fields that do not change results."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if f.metadata.get("science", True)]
        return {f.name: science(getattr(value, f.name)) for f in kept}
    if isinstance(value, dict):
        return {key: science(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [science(item) for item in value]
    return value


@dataclass(frozen=True)
class Source:
    """Where values come from, to say it in errors: the file, its text, and the keys that --set gave."""

    file: str
    text: str
    set_keys: frozenset[str] = frozenset()

    def at(self, section: str, key: str) -> str:
        dotted = f"{section}.{key}" if section else key
        if dotted in self.set_keys:
            return f"--set {dotted}"
        line = self._line(section, key)
        return f"{self.file}{f':{line}' if line else ''}: {dotted}"

    def _line(self, section: str, key: str) -> int | None:
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            bare = line.split("#")[0].strip()
            if bare.startswith("["):
                current = bare.strip("[] ")
                if current == (f"{section}.{key}" if section else key):
                    return number
            elif current == section and bare.split("=")[0].strip().strip('"') == key:
                return number
        return None


def _load(cls: type[T], name: str, folder: Path, kind: str, settings: Iterable[str]) -> T:
    path = Path(name) if name.endswith(".toml") or "/" in name else folder / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        raise ConfigError(f"no {kind} {name!r}: {_hint(name, known)}; a path to a .toml file works too")
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error or type(error).__name__}") from None
    errors: list[str] = []
    table, keys = _apply(table, settings, errors)
    made = _build(cls, table, Source(str(path), text, keys), "", errors)
    _raise(errors)
    assert made is not None
    return made


def _apply(table: dict[str, Any], settings: Iterable[str], errors: list[str]) -> tuple[dict[str, Any], frozenset[str]]:
    keys = set()
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted.strip():
            errors.append(f"--set {setting}: write it as key=value, for example --set phase1.steps=100")
            continue
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text  # a bare word is a string
        *parents, last = dotted.strip().split(".")
        inner = table = dict(table)
        for parent in parents:
            inner[parent] = dict(inner[parent]) if isinstance(inner.get(parent), dict) else {}
            inner = inner[parent]
        inner[last] = value
        keys.add(dotted.strip())
    return table, frozenset(keys)


def _build(cls: type[T], table: dict[str, Any], source: Source, section: str, errors: list[str]) -> T | None:
    """An instance of ``cls``, or None with lines appended to ``errors``."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    before = len(errors)
    for key in table:
        if key not in fields:
            errors.append(f"{source.at(section, key)}: unknown key; {_hint(key, fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in table:
            inner = f"{section}.{name}" if section else name
            values[name] = _value(hints[name], table[name], source, section, spec, inner, errors)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            where = f"{source.file}: {f'[{section}] ' if section else ''}"
            errors.append(f"{where}{name} is missing")
    return cls(**values) if len(errors) == before else None


def _value(
    kind: Any,
    value: Any,
    source: Source,
    section: str,
    spec: dataclasses.Field[Any],
    inner: str,
    errors: list[str],
) -> Any:
    where = source.at(section, spec.name)
    options = [kind]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if value is None:  # TOML has no null: this comes from a stored run
            return None
        options = [option for option in typing.get_args(kind) if option is not type(None)]
    (kind,) = options  # the only unions in a configuration are "X or nothing"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            errors.append(f"{where}: expected a table [{inner}], found {_show(value)}")
            return None
        return _build(typing.cast(type, kind), value, source, inner, errors)
    if origin is Literal:
        if value not in args:
            errors.append(f"{where} = {_show(value)}: {_hint(str(value), args)}")
        return value
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, list | tuple):
            errors.append(f"{where} = {_show(value)}: expected a list, such as {_example(args[0])}")
            return None
        if origin is tuple and Ellipsis not in args and len(value) != len(args):
            errors.append(f"{where} = {_show(value)}: expected {len(args)} values, found {len(value)}")
            return None
        items = [_value(args[0], item, source, section, spec, inner, errors) for item in value]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict) or any(type(item) is not args[1] for item in value.values()):
            errors.append(f"{where}: expected a table of {args[1].__name__} values")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        errors.append(f"{where} = {_show(value)}: expected {_NAMES[kind]}, found {_NAMES.get(type(value), 'a table')}")
        return value
    _check_bounds(value, spec, where, errors)
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}


def _check_bounds(value: Any, spec: dataclasses.Field[Any], where: str, errors: list[str]) -> None:
    low, high, above = (spec.metadata.get(key) for key in ("low", "high", "above"))
    choices = spec.metadata.get("choices")
    if isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{where} = {value}: expected a finite number")
    elif choices is not None and value not in choices:
        errors.append(f"{where} = {_show(value)}: {_hint(str(value), choices)}")
    elif low is not None and value < low:
        errors.append(f"{where} = {value}: must be at least {low}")
    elif high is not None and value > high:
        errors.append(f"{where} = {value}: must be at most {high}")
    elif above is not None and value <= above:
        errors.append(f"{where} = {value}: must be greater than {above}")
    elif isinstance(value, str) and any(ord(char) < 32 for char in value):
        errors.append(f"{where}: control characters are not allowed")


def _contradictions(recipe: Recipe) -> list[str]:
    """Values that are fine alone and impossible together."""
    lines = []
    model, data = recipe.model, recipe.data
    if model.hidden_size % model.num_attention_heads:
        lines.append(
            f"model.hidden_size = {model.hidden_size} is not divisible by "
            f"model.num_attention_heads = {model.num_attention_heads}"
        )
    for name, phase in (("phase1", recipe.phase1), ("phase2", recipe.phase2)):
        if phase.seq_len > model.max_position_embeddings:
            lines.append(
                f"{name}.seq_len = {phase.seq_len} exceeds "
                f"model.max_position_embeddings = {model.max_position_embeddings}"
            )
        if phase.max_predictions >= phase.seq_len:
            lines.append(
                f"{name}.max_predictions = {phase.max_predictions} must be below {name}.seq_len = {phase.seq_len}"
            )
    for name in ("squad", "mrpc", "sst2"):
        task: TaskConfig | None = getattr(recipe, name)
        if task is not None and task.max_seq_len > model.max_position_embeddings:
            lines.append(
                f"{name}.max_seq_len = {task.max_seq_len} exceeds "
                f"model.max_position_embeddings = {model.max_position_embeddings}"
            )
    if not (data.wikipedia or data.books or data.jsonl):
        lines.append("[data] names no corpus: give at least one of wikipedia, books, jsonl")
    if not recipe.name.replace("_", "").replace("-", "").isalnum():
        lines.append(f"name = {recipe.name!r}: use letters, digits, '-' and '_' only")
    return lines


def _hint(word: str, known: Iterable[Any]) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _example(kind: Any) -> str:
    return '["enwiki.xml.bz2"]' if kind is str else "[0.9, 0.999]" if kind is float else "[1, 2]"


def _raise(lines: Iterable[str]) -> None:
    if text := "\n".join(lines):
        raise ConfigError(text)
