"""The command and the stage that turn trained weights into a folder which Hugging Face's from_pretrained loads."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.fanout import Job
from data_prep.publish import publish_bytes, publish_json, publish_text, sync_folder
from data_prep.wordpiece import SPECIAL, Vocabulary
from pipeline.bert.config import VOCAB_ROWS, BertConfig, padded_vocab
from pipeline.errors import CheckpointError, ConfigError, run_command

if TYPE_CHECKING:
    from pipeline.train.checkpoint import Checkpoint

# Which class of Hugging Face a set of weights belongs to, by the key that only this class has.
ARCHITECTURES = {
    "cls.seq_relationship.weight": "BertForPreTraining",
    "qa_outputs.weight": "BertForQuestionAnswering",
    "classifier.weight": "BertForSequenceClassification",
}


@dataclass(frozen=True)
class Source:
    """Trained weights under our names, fp32, padding rows of the vocabulary included; ``origin`` is for people."""

    config: BertConfig
    arrays: Mapping[str, NDArray[Any]]
    origin: str


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary that the weights were trained with, and how text is prepared for it."""

    vocab: Path
    lowercase: bool
    strip_accents: bool


def read_source(path: Path) -> Source:
    """Weights of a checkpoint folder, of a stage folder (its newest good checkpoint) or of a Hugging Face folder.

    CheckpointError when it is none of these or not whole.
    """
    if (path / "config.json").is_file():
        from pipeline.bert.weights import load_hugging_face

        config, state = load_hugging_face(path)
        return Source(config, {name: tensor.numpy() for name, tensor in state.items()}, f"the folder {path.name}")
    from pipeline.train import checkpoint

    if (path / "manifest.json").is_file():
        return _of_checkpoint(checkpoint.read(path, tensors=("weights",)))
    if (path / "attempts").is_dir():
        found = checkpoint.newest_verified(path, print, tensors=("weights",))
        if found:
            return _of_checkpoint(found)
    raise CheckpointError(
        f"{path} holds no weights: give a checkpoint (…/step-00000100), a stage (RUN/stages/phase2) or a folder "
        "with config.json"
    )


def _of_checkpoint(found: Checkpoint) -> Source:
    import torch

    from pipeline.bert.heads import BertForPreTraining
    from pipeline.bert.weights import check_fit

    config = BertConfig.from_dict(found.model)
    with torch.device("meta"):
        own = BertForPreTraining(config).state_dict()
    origin = f"step {found.step} of {found.stage}"
    shapes = {name: array.shape for name, array in found.weights.items()}
    check_fit(shapes, own, f"{found.folder} does not fit its own model configuration")
    return Source(config, found.weights, origin)


def run(
    job: Job, *, checkpoint: Path, vocab: Path, lowercase: bool, strip_accents: bool, **card: Any
) -> dict[str, Any]:
    """Stage ``export``: write ``model/``, whole or not at all; further arguments are those of `model_card`.

    Returns ``model`` (the folder's name), ``step_of`` (where the weights are from), ``vocab_size`` and
    ``parameters`` as exported.
    """
    source = read_source(checkpoint)
    tokenizer = Tokenizer(vocab, lowercase, strip_accents)
    facts = write_model(job.out / "model", source, tokenizer, card=model_card(source, **card), replace=True)
    job.say(f"model of {facts['parameters'] / 1e6:.1f} million parameters from {source.origin}")
    return {"model": "model", **facts}


def write_model(to: Path, source: Source, tokenizer: Tokenizer, *, card: str, replace: bool = False) -> dict[str, Any]:
    """Write the folder ``to``: model.safetensors, config.json, vocab.txt, tokenizer_config.json, README.md.

    The padding rows of the vocabulary are left out. ConfigError when ``to`` exists and ``replace`` is not set,
    CheckpointError when the vocabulary is not the model's.
    """
    from pipeline.train.tensor_file import write_safetensors

    vocabulary = Vocabulary.load(tokenizer.vocab)
    config, size = source.config, vocabulary.size
    if padded_vocab(size) != config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.vocab} has {size} tokens, but the model of {source.origin} has {config.vocab_size} rows "
            f"({padded_vocab(size)} needed): it was trained with another vocabulary"
        )
    arrays = {
        name: (array[:size] if name in VOCAB_ROWS else array).astype(np.float32, copy=False)
        for name, array in source.arrays.items()
    }
    architecture = next((ARCHITECTURES[key] for key in ARCHITECTURES if key in arrays), "BertModel")
    described = config.to_hugging_face(vocab_size=size, pad_token_id=vocabulary.special["pad"])
    with _publishing_folder(to, replace=replace) as folder:
        write_safetensors(folder / "model.safetensors", arrays)
        publish_json(folder / "config.json", {"architectures": [architecture], **described, "dtype": "float32"})
        publish_bytes(folder / "vocab.txt", "".join(f"{token}\n" for token in vocabulary.tokens).encode())
        publish_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
        publish_text(folder / "README.md", card)
    parameters = sum(array.size for array in arrays.values())
    return {"step_of": source.origin, "vocab_size": size, "parameters": parameters}


def _tokenizer_config(tokenizer: Tokenizer, config: BertConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": tokenizer.lowercase,
        "strip_accents": tokenizer.strip_accents,
        "tokenize_chinese_chars": True,
        "model_max_length": config.max_position_embeddings,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    }


def model_card(
    source: Source,
    *,
    data: Sequence[str] = (),
    licences: Sequence[str] = (),
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """README.md of an exported model: what it is, what it was trained on under which licences, how it scored."""
    config = source.config
    rows = [
        f"| {task} | {', '.join(f'{name} {value:.2f}' for name, value in values.items())} |"
        for task, values in (scores or {}).items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: fill-mask",
            "---",
            "",
            "# BERT",
            "",
            f"Weights of {source.origin}: {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"{config.num_attention_heads} heads, at most {config.max_position_embeddings} tokens.",
            "Load with `transformers.BertForPreTraining.from_pretrained` and `transformers.AutoTokenizer`.",
            "",
            "## Data",
            "",
            *([f"* {name}" for name in data] or ["Not recorded."]),
            "",
            "## Licences of the data",
            "",
            *([f"* {name}" for name in licences] or ["Not recorded: check them before you pass the model on."]),
            "",
            "## Scores",
            "",
            *(["| task | scores |", "|---|---|", *rows] if rows else ["Not measured yet."]),
            "",
        ]
    )


@contextmanager
def _publishing_folder(to: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``to`` when the block ends well; remains of killed writers are removed."""
    if to.exists() and not replace:
        raise ConfigError(f"{to} exists already: name a folder that does not")
    to.parent.mkdir(parents=True, exist_ok=True)
    for leftover in to.parent.glob(f".{to.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary, old = (to.with_name(f".{to.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if to.exists():
            os.replace(to, old)
        os.replace(temporary, to)
        sync_folder(to.parent)
    except BaseException:
        if old.exists() and not to.exists():
            os.replace(old, to)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _tokenizer_of(options: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a Hugging Face source, or what the command line says of that of a checkpoint."""
    beside = options.source / "tokenizer_config.json"
    try:
        said = json.loads(beside.read_bytes()) if beside.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{beside} is not JSON: {error}") from error
    vocab = options.vocab or options.source / "vocab.txt"
    if not vocab.is_file():
        raise ConfigError(f"{options.source} holds no vocab.txt: name the one it was trained with by --vocab FILE")
    lowercase = bool(said.get("do_lower_case", True)) and not options.cased
    strip_accents = bool(lowercase if said.get("strip_accents") is None else said["strip_accents"])
    return Tokenizer(vocab, lowercase, strip_accents and not options.keep_accents)


def main() -> int:
    """Export one model and print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint, a stage of a run, or a Hugging Face folder")
    parser.add_argument("destination", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=["hf"], default="hf", help="hf: Hugging Face (the only form so far)")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt, when it does not lie in the source")
    parser.add_argument("--cased", action="store_true", help="the text was not lower-cased")
    parser.add_argument("--keep-accents", action="store_true", help="accents were not stripped")
    options = parser.parse_args()
    tokenizer, source = _tokenizer_of(options), read_source(options.source)
    facts = write_model(options.destination, source, tokenizer, card=model_card(source))
    print(f"{options.destination}: {facts['parameters'] / 1e6:.1f} million parameters of {source.origin}")
    return 0


if __name__ == "__main__":
    run_command(main)
