"""A model folder as transformers reads and writes it: configuration, tokenizer, weights and card, all in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_prep.errors import DataError
from data_prep.publish import file_sha256, publish_json, publish_text, sync_folder
from pipeline.bert import heads
from pipeline.bert.config import VOCAB_ROWS, BertConfig, is_padding, padded_vocab, read_object
from pipeline.bert.encoder import Bert, initialise
from pipeline.bert.tensor_file import write_safetensors
from pipeline.bert.tokenizer import CONFIG, FILES, PLAIN, AnyTokenizer, Tokenizer, read_tokenizer
from pipeline.bert.weight_files import (
    State,
    check_fit,
    cut,
    load_into,
    padded,
    read_config,
    read_pickled,
    read_safetensors,
    renamed,
)
from pipeline.errors import CheckpointError, ConfigError

MODEL, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
# Which class of Hugging Face a set of weights belongs to, by the key that only this class has.
ARCHITECTURES = {
    "cls.seq_relationship.weight": "BertForPreTraining",
    "qa_outputs.weight": "BertForQuestionAnswering",
    "classifier.weight": "BertForSequenceClassification",
    "cls.predictions.bias": "BertForMaskedLM",  # last: one of pretraining has it, too
}
ENCODER, QUESTION_ANSWERING, MASKED = "BertModel", "BertForQuestionAnswering", "BertForMaskedLM"
HEADS = ("cls.", "qa_outputs.", "classifier.")
POOLER = "bert.pooler."
OPTIONAL = {ENCODER: [POOLER], QUESTION_ANSWERING: [POOLER], MASKED: [POOLER, "cls.seq_relationship."]}


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

    def checked(self) -> Source:
        """This, if the weights are those of their class, all and no others, else CheckpointError.

        Only what the class does not need may be missing: the pooler, of masked words the head of pairs.
        """
        kind, arrays = self.architecture, self.arrays
        model: nn.Module
        with torch.device("meta"):
            if kind == ENCODER:
                model = nn.ModuleDict({"bert": Bert(self.config)})
            elif "classifier.weight" in arrays:
                model = heads.BertForSequenceClassification(self.config, len(arrays["classifier.weight"]))
            else:
                model = getattr(heads, "BertForPreTraining" if kind == MASKED else kind)(self.config)
        absent = tuple(part for part in OPTIONAL.get(kind, ()) if not _has(arrays, part))
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(absent)}
        check_fit({name: array.shape for name, array in arrays.items()}, own, f"{self.origin} is no whole {kind}")
        return self


class ModelFolder:
    """A folder to start a task from, and to measure with; every property is read once, when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> BertConfig:
        """The shape of the model, its vocabulary padded our way.

        CheckpointError when it is no BERT's, DataError when the vocabulary beside it does not belong to it.
        """
        config, tokenizer = read_config(self.path / MODEL), self.tokenizer
        size = tokenizer.vocabulary.size
        if not is_padding(config.vocab_size, size):
            raise DataError(
                f"{tokenizer.vocab} has {size} tokens and the model beside it {config.vocab_size} rows (padded): the "
                "vocabulary belongs to another model"
            )
        return dataclasses.replace(config, vocab_size=padded_vocab(size))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's classes; CheckpointError when it has none to choose one from."""
        if len(labels := _labels(self.path, self.state)) < 2:
            raise CheckpointError(f"{self.path}: no classifier.* of two or more classes in it: train it first")
        return labels

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer (`pipeline.bert.tokenizer.read_tokenizer`)."""
        return read_tokenizer(self.path)

    @cached_property
    def state(self) -> State:
        """The weights, with as many vocabulary rows as `config` has; CheckpointError when they are not a BERT's."""
        return cut(*load_hugging_face(self.path), self.tokenizer.vocabulary.size)[1]

    @property
    def has_weights(self) -> bool:
        """Whether there are any; a shape to measure has none."""
        return any((self.path / name).is_file() for name in (WEIGHTS, PICKLED))

    @cached_property
    def sha256(self) -> str:
        """One hash over the files that shape a training."""
        names = dict.fromkeys((MODEL, WEIGHTS, PICKLED, PLAIN, CONFIG, *FILES))
        parts = [f"{n} {file_sha256(self.path / n)}" for n in names if (self.path / n).is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def load_into(self, model: nn.Module, head: str, seed: int | None) -> None:
        """Copy the weights into ``model``, whose task head lies below the prefix ``head``.

        With a ``seed`` the head is new, drawn from it, and the folder's heads are left out; with None the folder
        must have it. So is the pooler where the folder has none (of masked words); one whose head does not use it
        may come without. Everything else must fit exactly. Raises CheckpointError.
        """
        if seed is None and not _has(self.state, head):
            raise CheckpointError(f"{self.path}: no {head}* in it: not a model of this task, train it first")
        new = [] if seed is None else [head]
        if not _has(self.state, POOLER) and (new or head == "qa_outputs."):  # that head reads every token's vector
            new.append(POOLER)
        generator = torch.Generator().manual_seed(seed or 0)
        for part in new:
            initialise(model.get_submodule(part.rstrip(".")), self.config, generator)
        drop = HEADS if seed is not None else [other for other in HEADS if other != head]
        load_into(model, self.state, origin=str(self.path), new=new, drop=drop)

    def save(self, model: nn.Module, to: Path, labels: tuple[str, ...], card: str) -> None:
        """Write the fine-tuned ``model`` as a folder with this one's tokenizer; ``card`` becomes its README.md."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
        write_folder(to, Source(self.config, arrays, "fine-tuning", labels), self.tokenizer, card=card)


def _has(names: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _labels(folder: Path, state: State) -> tuple[str, ...]:
    """A classifier's classes in the order of their numbers, called as transformers does where nothing names them."""
    described = read_object(folder / MODEL, CheckpointError)
    if (kind := described.get("problem_type")) in ("regression", "multi_label_classification"):
        raise CheckpointError(f"{folder}: config.json: problem_type is {kind!r}, needed is one class of several")
    known = named if isinstance(named := described.get("id2label"), dict) else {}
    return tuple(str(known.get(str(i), f"LABEL_{i}")) for i in range(len(state.get("classifier.weight", ()))))


def load_hugging_face(folder: Path) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a folder with config.json and model.safetensors or pytorch_model.bin.

    The vocabulary is padded to a multiple of 8 (see `padded`). CheckpointError for anything that is not a
    readable BERT.
    """
    config = read_config(folder / MODEL)
    for name, read in ((WEIGHTS, read_safetensors), (PICKLED, read_pickled)):
        if (folder / name).is_file():
            return config, padded(renamed(read(folder / name), origin=str(folder / name)), config.vocab_size)
    hint = " (weights in several files: save them as one)" if list(folder.glob("*.index.json")) else ""
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {PICKLED} is there{hint}")


def read_folder(folder: Path) -> Source:
    """A folder's weights, whole, to be written elsewhere; CheckpointError."""
    config, state = load_hugging_face(folder)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return Source(config, arrays, f"the folder {folder.name}", _labels(folder, state)).checked()


def write_folder(
    to: Path, source: Source, tokenizer: Tokenizer | AnyTokenizer, *, card: str, replace: bool = False
) -> dict[str, Any]:
    """Write the folder ``to``: model.safetensors, config.json, the tokenizer's files, README.md.

    The padding rows of the vocabulary are left out, and a pooler that question answering does not read. Returns
    ``step_of`` (where the weights are from), ``vocab_size`` and ``parameters``. ConfigError when ``to`` exists and
    ``replace`` is not set, CheckpointError when the vocabulary is not the model's.
    """
    config, size = source.config, tokenizer.vocabulary.size
    if not is_padding(config.vocab_size, size):
        raise CheckpointError(
            f"{tokenizer.vocab} has {size} tokens, but the model of {source.origin} has {config.vocab_size} rows "
            f"({padded_vocab(size)} needed): it was trained with another vocabulary"
        )
    arrays = {
        name: (array[:size] if name in VOCAB_ROWS else array).astype(np.float32, copy=False)
        for name, array in source.arrays.items()
        if not (source.architecture == QUESTION_ANSWERING and name.startswith(POOLER))
    }
    described: dict[str, Any] = {"architectures": [source.architecture], "dtype": "float32"}
    if "classifier.weight" in arrays:
        labels = source.labels or [f"LABEL_{i}" for i in range(len(arrays["classifier.weight"]))]
        described["id2label"] = {str(i): label for i, label in enumerate(labels)}
        described["label2id"] = {label: i for i, label in enumerate(labels)}
    with _publishing_folder(to, replace=replace) as folder:
        write_safetensors(folder / WEIGHTS, arrays)
        write_description(folder, config, tokenizer, **described)
        publish_text(folder / "README.md", card)
    parameters = sum(array.size for array in arrays.values())
    return {"step_of": source.origin, "vocab_size": size, "parameters": parameters}


def write_description(folder: Path, config: BertConfig, tokenizer: Tokenizer | AnyTokenizer, **described: Any) -> None:
    """Write all of a folder but weights and card: config.json, with ``described`` in it, and the tokenizer."""
    vocabulary = tokenizer.vocabulary
    shape = config.to_hugging_face(vocab_size=vocabulary.size, pad_token_id=vocabulary.special["pad"])
    publish_json(folder / MODEL, described | shape)
    for name, text in tokenizer.files(config.max_position_embeddings).items():
        publish_text(folder / name, text)


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
