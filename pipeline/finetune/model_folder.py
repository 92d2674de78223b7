"""A Hugging Face folder as the start and as the result of a fine-tuning: configuration, tokenizer, weights."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import DataError
from data_prep.publish import file_sha256
from data_prep.wordpiece import Encoder
from pipeline import export
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.encoder import initialise
from pipeline.bert.weight_files import State, read_config
from pipeline.bert.weights import load_hugging_face, load_into
from pipeline.errors import CheckpointError
from pipeline.finetune.problems import Problem, Tokenizer

HEADS = ("cls.", "qa_outputs.", "classifier.")
POOLER = "bert.pooler."


class ModelFolder:
    """A folder with config.json, weights, vocab.txt and (not needed) tokenizer_config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def loaded(self) -> tuple[BertConfig, State]:
        """Configuration and weights; CheckpointError when they are not those of a BERT."""
        return load_hugging_face(self.path)

    @cached_property
    def config(self) -> BertConfig:
        """The shape of the model."""
        return read_config(self.path / "config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """WordPiece as tokenizer_config.json asks for it: lower-case unless it says otherwise.

        ``strip_accents`` follows ``do_lower_case`` when it is not given, as in transformers. DataError when the
        vocabulary does not belong to the model.
        """
        settings = self._tokenizer_config()
        lowercase = settings.get("do_lower_case")
        lowercase = True if lowercase is None else lowercase
        strip_accents = settings.get("strip_accents")
        strip_accents = lowercase if strip_accents is None else strip_accents
        for name, value in (("do_lower_case", lowercase), ("strip_accents", strip_accents)):
            if not isinstance(value, bool):
                raise DataError(f"{self.path}/tokenizer_config.json: {name} is {value!r}, not true or false")
        encoder = Encoder(self.path / "vocab.txt", lowercase, strip_accents)
        if padded_vocab(encoder.vocabulary.size) != self.config.vocab_size:
            raise DataError(
                f"{self.path}/vocab.txt has {encoder.vocabulary.size} tokens and the model beside it "
                f"{self.config.vocab_size} rows (padded): the vocabulary belongs to another model"
            )
        return Tokenizer(encoder, lowercase, strip_accents)

    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.path / "tokenizer_config.json"
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise DataError(f"{path}: not a JSON object")
        return found

    @cached_property
    def sha256(self) -> str:
        """One hash over the files that shape a training."""
        names = ("config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "tokenizer_config.json")
        parts = [f"{n} {file_sha256(self.path / n)}" for n in names if (self.path / n).is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def load_into(self, model: nn.Module, head: str, seed: int | None) -> None:
        """Copy the weights into ``model``, whose task head lies below the prefix ``head``.

        With a ``seed`` the head is new, drawn from it, and the folder's heads are left out; with None the folder
        must have it. Everything else must fit exactly, but a model whose head does not use the pooler may come
        without one. Raises CheckpointError.
        """
        config, state = self.loaded
        new = [] if seed is None else [head]
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            initialise(model.get_submodule(head.rstrip(".")), config, generator)
        elif not any(name.startswith(head) for name in state):
            raise CheckpointError(f"{self.path}: no {head}* in it: not a model of this task, train it first")
        if _has_no_pooler(head) and not any(name.startswith(POOLER) for name in state):
            new.append(POOLER)
        drop = HEADS if seed is not None else [other for other in HEADS if other != head]
        load_into(model, state, origin=str(self.path), new=new, drop=drop)

    def save(self, model: nn.Module, to: Path, problem: Problem, card: str) -> None:
        """Write the fine-tuned ``model`` as a folder for from_pretrained; ``card`` becomes its README.md."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
        tokenizer = export.Tokenizer(self.path / "vocab.txt", self.tokenizer.lowercase, self.tokenizer.strip_accents)
        source = export.Source(self.config, arrays, "fine-tuning", problem.labels)
        export.write_model(to, source, tokenizer, card=card)


def _has_no_pooler(head: str) -> bool:
    """Question answering reads every token's vector; transformers' model for it has no pooler."""
    return head == "qa_outputs."
