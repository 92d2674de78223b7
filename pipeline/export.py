"""The command and the stage that turn trained weights into what others load: Hugging Face's folder, NVIDIA's file."""

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
from pipeline.bert.config import ACTIVATIONS, VOCAB_ROWS, BertConfig, padded_vocab
from pipeline.errors import CheckpointError, ConfigError, run_command

if TYPE_CHECKING:
    from pipeline.engine.checkpoint import Checkpoint

# Which class of Hugging Face a set of weights belongs to, by the key that only this class has.
ARCHITECTURES = {
    "cls.seq_relationship.weight": "BertForPreTraining",
    "qa_outputs.weight": "BertForQuestionAnswering",
    "classifier.weight": "BertForSequenceClassification",
}
ENCODER, QUESTION_ANSWERING = "BertModel", "BertForQuestionAnswering"
POOLER = "bert.pooler."
NVIDIA_EPS = 1e-12  # of every LayerNorm; NVIDIA's code knows no other
NVIDIA_CONFIG = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)


@dataclass(frozen=True)
class Source:
    """Trained weights under our names, fp32, padding rows of the vocabulary included; ``origin`` is for people.

    ``labels`` are the names of a classifier's classes, where they are known.
    """

    config: BertConfig
    arrays: Mapping[str, NDArray[Any]]
    origin: str
    labels: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Hugging Face's class for these weights."""
        return next((kind for key, kind in ARCHITECTURES.items() if key in self.arrays), ENCODER)


@dataclass(frozen=True)
class Tokenizer:
    """The vocabulary that the weights were trained with, and how text is prepared for it."""

    vocab: Path
    lowercase: bool
    strip_accents: bool


def read_source(path: Path, config_file: Path | None = None, hidden_act: str | None = None) -> Source:
    """Weights of a checkpoint or stage folder (its newest good one), a Hugging Face folder or an NVIDIA file.

    ``config_file`` and ``hidden_act`` say what an NVIDIA file does not (`pipeline.bert.weights.load_nvidia`).
    CheckpointError when it is none of these or not whole.
    """
    if path.is_file() or (path / "config.json").is_file():
        return _of_others(path, config_file, hidden_act)
    from pipeline.engine import checkpoint

    if (path / "manifest.json").is_file():
        return _of_checkpoint(checkpoint.read(path, tensors=("weights",)))
    if (path / "attempts").is_dir():
        found = checkpoint.newest_verified(path, print, tensors=("weights",))
        if found:
            return _of_checkpoint(found)
    raise CheckpointError(
        f"{path} holds no weights: give a checkpoint (…/step-00000100), a stage (RUN/stages/phase2), a folder with "
        "config.json or a file of NVIDIA's BERT"
    )


def _of_others(path: Path, config_file: Path | None, hidden_act: str | None) -> Source:
    from pipeline.bert.weights import config_beside, load_hugging_face, load_nvidia

    labels: tuple[str, ...] = ()
    if path.is_dir():
        config, state = load_hugging_face(path)
        named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("id2label")
        if isinstance(named, dict):
            labels = tuple(str(label) for label in named.values())
    else:
        config_file = config_file or config_beside(path)
        if config_file is None:
            raise ConfigError(f"{path} does not tell its model: name its base.json or large.json by --config FILE")
        config, state = load_nvidia(path, config_file, hidden_act=hidden_act)
    kind = "folder" if path.is_dir() else "file"
    source = Source(config, {name: tensor.numpy() for name, tensor in state.items()}, f"the {kind} {path.name}", labels)
    _check_whole(source)
    return source


def _check_whole(source: Source) -> None:
    """CheckpointError unless the weights are those of their class, all and no others; only a pooler may be missing."""
    import torch

    from pipeline.bert import heads
    from pipeline.bert.encoder import Bert
    from pipeline.bert.weights import check_fit

    kind, arrays = source.architecture, source.arrays
    with torch.device("meta"):
        if kind == ENCODER:
            own = {f"bert.{name}": tensor for name, tensor in Bert(source.config).state_dict().items()}
        elif "classifier.weight" in arrays:
            own = heads.BertForSequenceClassification(source.config, len(arrays["classifier.weight"])).state_dict()
        else:
            own = getattr(heads, kind)(source.config).state_dict()
    if kind in (ENCODER, QUESTION_ANSWERING) and not any(name.startswith(POOLER) for name in arrays):
        own = {name: tensor for name, tensor in own.items() if not name.startswith(POOLER)}
    check_fit({name: array.shape for name, array in arrays.items()}, own, f"{source.origin} is no whole {kind}")


def _of_checkpoint(found: Checkpoint) -> Source:
    source = Source(BertConfig.from_dict(found.model), found.weights, f"step {found.step} of {found.stage}")
    _check_whole(source)
    return source


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

    The padding rows of the vocabulary are left out, and a pooler that question answering does not read.
    ConfigError when ``to`` exists and ``replace`` is not set, CheckpointError when the vocabulary is not the model's.
    """
    from pipeline.bert.tensor_file import write_safetensors

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
        if not (source.architecture == QUESTION_ANSWERING and name.startswith(POOLER))
    }
    described = {
        "architectures": [source.architecture],
        **config.to_hugging_face(vocab_size=size, pad_token_id=vocabulary.special["pad"]),
        "dtype": "float32",
    }
    if "classifier.weight" in arrays:
        labels = source.labels or [f"LABEL_{i}" for i in range(len(arrays["classifier.weight"]))]
        described["id2label"] = {str(i): label for i, label in enumerate(labels)}
        described["label2id"] = {label: i for i, label in enumerate(labels)}
    with _publishing_folder(to, replace=replace) as folder:
        write_safetensors(folder / "model.safetensors", arrays)
        publish_json(folder / "config.json", described)
        publish_bytes(folder / "vocab.txt", "".join(f"{token}\n" for token in vocabulary.tokens).encode())
        publish_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
        publish_text(folder / "README.md", card)
    parameters = sum(array.size for array in arrays.values())
    return {"step_of": source.origin, "vocab_size": size, "parameters": parameters}


def write_nvidia_file(to: Path, source: Source) -> None:
    """Write ``to`` for NVIDIA's BERT for PyTorch and, beside it, ``<stem>_config.json`` in the form of its base.json.

    The vocabulary stays padded. ConfigError when ``to`` exists, CheckpointError when NVIDIA's code cannot compute
    this model.
    """
    import torch

    from pipeline.bert.weight_files import write_nvidia

    if to.exists():
        raise ConfigError(f"{to} exists already: name a file that does not")
    if source.config.layer_norm_eps != NVIDIA_EPS:
        raise CheckpointError(
            f"{source.origin} has layer_norm_eps {source.config.layer_norm_eps:g}, NVIDIA's code only {NVIDIA_EPS:g}"
        )
    described = source.config.to_dict() | {"hidden_act": "gelu"}
    to.parent.mkdir(parents=True, exist_ok=True)
    publish_json(to.with_name(f"{to.stem}_config.json"), {key: described[key] for key in NVIDIA_CONFIG})
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in source.arrays.items()}
    write_nvidia(to, state, source.config.hidden_act)


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


def _tokenizer_of(options: argparse.Namespace, folder: Path) -> Tokenizer:
    """The tokenizer that lies in ``folder``, or what the command line says of that of a checkpoint."""
    beside = folder / "tokenizer_config.json"
    try:
        said = json.loads(beside.read_bytes()) if beside.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{beside} is not JSON: {error}") from error
    vocab = options.vocab or folder / "vocab.txt"
    if not vocab.is_file():
        raise ConfigError(f"{folder} holds no vocab.txt: name the one it was trained with by --vocab FILE")
    lowercase = bool(said.get("do_lower_case", True)) and not options.cased
    strip_accents = bool(lowercase if said.get("strip_accents") is None else said["strip_accents"])
    return Tokenizer(vocab, lowercase, strip_accents and not options.keep_accents)


def main() -> int:
    """Export one model and print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument(
        "source", type=Path, help="a checkpoint, a stage or its run, a Hugging Face folder, or a file of NVIDIA's BERT"
    )
    parser.add_argument("destination", type=Path, help="the folder (hf) or file (nvidia) to make")
    parser.add_argument("--to", choices=["hf", "nvidia"], default="hf", help="whose form to write (default: hf)")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt, when it does not lie in the source")
    parser.add_argument("--cased", action="store_true", help="the text was not lower-cased")
    parser.add_argument("--keep-accents", action="store_true", help="accents were not stripped")
    parser.add_argument("--config", type=Path, metavar="FILE", help="of an NVIDIA file: its base.json or large.json")
    parser.add_argument("--gelu", choices=ACTIVATIONS, help="of an NVIDIA file: tanh (its code since 2022) or erf")
    options = parser.parse_args()
    path: Path = options.source
    if (path / "model" / "config.json").is_file():  # a run, or a stage that made a model
        path = path / "model"
    if options.to == "nvidia":
        source = read_source(path, options.config, options.gelu)
        write_nvidia_file(options.destination, source)
        if source.config.hidden_act == "erf":
            print("note: this model has the exact GELU; NVIDIA's code since 2022 computes the tanh one in its place")
        parameters = sum(array.size for array in source.arrays.values())
    else:
        tokenizer = _tokenizer_of(options, path if path.is_dir() else path.parent)
        source = read_source(path, options.config, options.gelu)
        parameters = write_model(options.destination, source, tokenizer, card=model_card(source))["parameters"]
    print(f"{options.destination}: {parameters / 1e6:.1f} million parameters of {source.origin}")
    return 0


if __name__ == "__main__":
    run_command(main)
