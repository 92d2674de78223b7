"""``--text`` and ``--start``: the recipe that a person would write for texts and a model of one's own.

The rules, in the order in which they are applied:

* What a file is, its name says: .xml and .xml-p1p99 (also compressed) is a MediaWiki export, .jsonl .ndjson .csv .tsv
  .parquet records with a column ``text``, all else text; a folder is books, one for each file, unless all that it holds
  are records or exports.
* The base is `further` where there is a model to start from, `standard` where there is a GPU and at least 100 MB of
  text, else `small`.
* A vocabulary has an entry for every 1,000 bytes of text, a power of two from 1,024 on, at most 30,522.
* A shard has about 4 MB of text; of fewer than 100 texts a tenth is held out, or about six, at most half.
* English is lower-cased, other languages keep case and accents; a model to start from decides for its vocabulary.
* Samples have 128 tokens, or as many as a model to start from has positions.
* A model to start from without pooler and NSP head (``BertForMaskedLM``) goes on with masked words alone.
* With a GPU bf16; without one only where the CPU has instructions for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.books import is_hidden
from data_prep.publish import publish_text
from data_prep.sentences import language_fault, language_named
from pipeline.config import load_recipe
from pipeline.errors import CheckpointError, ConfigError
from pipeline.launch.estimate import disk_gb
from pipeline.monitor.cpu import has_gpu
from pipeline.run.rundir import RunDir
from pipeline.words import absent_model
from slurm.profile import Profile

PACKED = (".bz2", ".gz", ".xz", ".zst")
KINDS = {".xml": "wikipedia", **dict.fromkeys((".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"), "jsonl")}
FURTHER_TOKENS = 128  # of a sample of the recipe `further`
STANDARD_BYTES, SHARD_BYTES, VOCAB_BYTES = 100e6, 4e6, 1000
FEW_TEXTS = 100  # of which a tenth is held out, or about six
LOWEST, HIGHEST = 1024, 30522  # entries of a vocabulary


def write_recipe(
    run: RunDir,
    texts: Sequence[Path],
    language: str | None,
    start: Path | None,
    profile: Profile,
    replay: Sequence[Path] = (),
) -> tuple[Path, Path]:
    """Write ``RUN/recipe.toml`` and say so; returns it and the folder below which all that it names lies.

    Raises ConfigError with a line for everything that is wrong, before anything is written.
    """
    named = [("--text", path) for path in texts] + [("--replay", path) for path in replay]
    faults = [f"{option} {path}: there is no such file or folder" for option, path in named if not path.exists()]
    if start is not None and not start.exists():
        faults.append(absent_model(start, "--start"))
    code = language_named(language or "en")
    if fault := language_fault(code):
        faults.append(fault.replace("data.language", "--language"))
    if not texts:
        faults.append("--start and --replay need --text FILE or FOLDER, the text to go on with")
    if faults:
        raise ConfigError("\n".join(faults))
    every = [path.resolve() for path in (*texts, *replay, *((start,) if start else ()))]
    data = Path(os.path.commonpath([path.parent for path in every]))
    model = model_of(start.resolve(), data) if start else {}
    corpora = dict(corpora_of([path.resolve() for path in (*texts, *replay)], data))
    general = [name for _, names in corpora_of([path.resolve() for path in replay], data) for name in names]
    size = sum(path.stat().st_size for text in texts for path in ([text] if text.is_file() else files_in(text)))
    count = sum(len(files_in(text)) if text.is_dir() else FEW_TEXTS for text in texts)
    gpu = bool(profile.gpus_per_node) or has_gpu()
    base = "further" if start else "standard" if gpu and size >= STANDARD_BYTES else "small"
    english = code.partition("-")[0] == "en"
    tables: dict[str, dict[str, Any]] = {
        "model": model.get("model", {}),
        "data": {
            **corpora,
            **({"replay": general} if general else {}),
            "language": code,
            **model.get("data", {"lowercase": english, "strip_accents": english, "vocab_size": vocab_size(size)}),
            "train_shards": min(256, max(2, round(size / SHARD_BYTES))),
            "test_shards": min(8, max(1, round(size / SHARD_BYTES / 16))),
            **({"test_fraction": round(min(0.5, max(0.1, 6 / count)), 2)} if count < FEW_TEXTS else {}),
        },
        "train": model.get("train", {}),
        "phase1": model.get("phase1", {}),
    }
    path = run.path / "recipe.toml"
    text = toml({"name": safe_name(run.path.resolve().name), "base": base}, tables)
    if odd := [str(path) for path in (*every, text) if not is_utf8(str(path))]:
        raise ConfigError(f"--text names what has no UTF-8 name: {odd[0][:200]}: rename it")
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path} is there and says something else: change it and give --recipe {path}, or remove it")
    with tempfile.TemporaryDirectory() as folder:  # what cannot be loaded is not left behind
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        recipe = load_recipe(str(draft))
    run.path.mkdir(parents=True, exist_ok=True)
    publish_text(path, text)
    steps = ", ".join(f"{phase.steps:,} of {phase.global_batch} samples of {phase.seq_len} tokens"
                      for phase in recipe.phases.values())  # fmt: skip
    print(f"{path}, from {size / 1e6:.1f} MB in {data}:\n\n{text}")
    print(f"steps: {steps}; disk: {disk_gb(recipe) + 4 * size / 1e9:.2f} GB; change it and submit again as you like")
    return path, data


def corpora_of(texts: Sequence[Path], data: Path) -> Iterator[tuple[str, list[str]]]:
    """``wikipedia``, ``books`` and ``jsonl`` of a recipe, below ``data``."""
    corpora: dict[str, list[str]] = {"wikipedia": [], "books": [], "jsonl": []}
    for text in texts:
        inner = files_in(text) if text.is_dir() else [text]
        kinds = {kind_of(path) for path in inner}
        if not inner:
            raise ConfigError(f"--text {text}: the folder is empty")
        if text.is_dir() and kinds == {"books"}:
            inner = [text]  # a book for each file
        elif len(kinds) > 1:
            raise ConfigError(f"--text {text} holds {' and '.join(sorted(kinds))}: name its files one by one, by kind")
        for path in inner:
            corpora[kind_of(path)].append(path.relative_to(data).as_posix())
    yield from ((kind, names) for kind, names in corpora.items() if names)


def files_in(folder: Path) -> list[Path]:
    """Files of a folder that are not hidden, nor in a hidden folder of it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path, folder))


def kind_of(path: Path) -> str:
    """The recipe's key for a file."""
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in PACKED]
    return KINDS.get(suffixes[-1].partition("-p")[0] if suffixes else "", "books")  # .xml-p1p41242 is a part of a dump


def vocab_size(size: float) -> int:
    """Entries for so many bytes of text."""
    return int(min(HIGHEST, max(LOWEST, 2 ** round(math.log2(max(1.0, size / VOCAB_BYTES))))))


def model_of(start: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Tables of a recipe for a Hugging Face folder, or NVIDIA's ``.pt`` with configuration and vocabulary beside it.

    Shape, words and case are the model's own; that its weights fit is checked here. Raises ConfigError, DataError and
    CheckpointError.
    """
    from pipeline.bert.config import padded_vocab  # these import torch
    from pipeline.bert.folder import ModelFolder
    from pipeline.bert.tokenizer import read_tokenizer
    from pipeline.bert.weights import config_beside, load_start

    if start.is_dir():
        folder = ModelFolder(start)
        config, tokenizer = folder.config, folder.tokenizer
    else:
        from pipeline.bert.weight_files import read_config

        beside = config_beside(start)
        if beside is None:
            raise ConfigError(f"--start {start}: its bert_config.json must lie beside it, and so must its vocab.txt")
        tokenizer = read_tokenizer(start.parent)
        config = dataclasses.replace(read_config(beside), vocab_size=padded_vocab(tokenizer.vocabulary.size))
    train = {}
    try:
        load_start(start, config, tokenizer.vocab)
    except CheckpointError:
        load_start(start, config, tokenizer.vocab, pairs=False)  # else this says what is wrong
        train = {"objective": "mlm"}
    shape = {name: value for name, value in config.to_dict().items() if name in MODEL_KEYS}
    return {
        "model": shape,
        "data": {
            "vocab": tokenizer.vocab.resolve().relative_to(data).as_posix(),
            "vocab_size": tokenizer.vocabulary.size,
            "lowercase": tokenizer.lowercase,
            "strip_accents": tokenizer.strip_accents,
        },
        "train": train,
        "phase1": {
            "start": start.relative_to(data).as_posix(),
            **({"seq_len": positions} if (positions := config.max_position_embeddings) < FURTHER_TOKENS else {}),
        },
    }


MODEL_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


def safe_name(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:64] or "own"


def is_utf8(text: str) -> bool:
    return text == text.encode(errors="replace").decode()  # bytes of names that are none are lone surrogates


def toml(top: dict[str, str], tables: dict[str, dict[str, Any]]) -> str:
    """A recipe file; JSON's strings, numbers and lists are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for name, values in tables.items():
        if values:
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join([*lines, ""])
