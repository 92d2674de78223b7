"""The shape of a BERT model, checked once, and its translation from and to Hugging Face's config.json.

Imports no torch, so that recipes can be validated on a login node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.errors import refuse_pointer
from data_prep.manifest import MOST_BYTES
from data_prep.publish import open_plain
from pipeline.errors import ConfigError

VOCAB_MULTIPLE = 8
PADDINGS = (8, 64, 128)  # multiples to which others pad the rows of a vocabulary
# The tensors with one row per token of the padded vocabulary.
VOCAB_ROWS = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ACTIVATIONS = ("erf", "tanh")
INITS = ("bert", "nvidia")
# Names that transformers has for the two GELUs; the first of each kind is the one we write.
HUGGING_FACE_ACTIVATIONS = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}
# Options of Hugging Face's BertConfig that change the mathematics, with the only value that this model has.
REQUIRED_VALUES = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def shape_of(model: object) -> dict[str, int]:
    """What makes a model small, base or large: four fields that a BertConfig and a recipe's model have."""
    return {name: getattr(model, name) for name in SHAPE}


def padded_vocab(size: int) -> int:
    """Vocabulary rows in the model for ``size`` real tokens: the next multiple of 8 (30522 → 30528)."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def is_padding(rows: int, size: int) -> bool:
    """Whether a model with ``rows`` vocabulary rows may be one of ``size`` tokens, by anyone's padding."""
    return rows in (-(-size // multiple) * multiple for multiple in PADDINGS)


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Architecture and initialisation of one model; the defaults are BERT-base.

    ``vocab_size`` counts rows of the embedding, padding rows included (see `padded_vocab`). ``hidden_act``
    names the GELU: ``erf`` is exact, ``tanh`` the approximation. ``init`` is ``bert`` (every weight normal)
    or ``nvidia`` (see `pipeline.bert.encoder.initialise`). Raises ConfigError with one line per wrong value.
    """

    vocab_size: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "erf"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    init: str = "bert"
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Check every value, so that no half-valid model is ever built."""
        wrong: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if field.type == "int" and not (number and isinstance(value, int) and value > 0):
                wrong.append(f"model.{field.name} = {value!r}: must be a whole number above 0")
            elif field.type == "float" and not (number and 0 <= value < 1):
                wrong.append(f"model.{field.name} = {value!r}: must be a number from 0 to below 1")
        for name, allowed in (("hidden_act", ACTIVATIONS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                wrong.append(f"model.{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not wrong and self.hidden_size % self.num_attention_heads:
            wrong.append(
                f"model.hidden_size = {self.hidden_size} is not divisible by "
                f"model.num_attention_heads = {self.num_attention_heads}"
            )
        if not wrong and self.vocab_size % VOCAB_MULTIPLE:
            wrong.append(
                f"model.vocab_size = {self.vocab_size}: must be a multiple of {VOCAB_MULTIPLE}; "
                f"the next is {padded_vocab(self.vocab_size)}"
            )
        if wrong:
            raise ConfigError("\n".join(wrong))

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint's manifest stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """The inverse of `to_dict`; unknown or missing names are a ConfigError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"model: unknown name {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if "vocab_size" not in values:
            raise ConfigError("model.vocab_size is missing")
        return cls(**values)

    def to_hugging_face(self, *, vocab_size: int, pad_token_id: int = 0) -> dict[str, Any]:
        """The mathematics of this model as the content of config.json.

        ``vocab_size`` is the number of real tokens: the padding rows are not exported.
        """
        activation = next(name for name, ours in HUGGING_FACE_ACTIVATIONS.items() if ours == self.hidden_act)
        values = self.to_dict() | {"vocab_size": vocab_size, "hidden_act": activation}
        del values["init"]
        return values | {"model_type": "bert", "pad_token_id": pad_token_id}

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> BertConfig:
        """Read a config.json; the vocabulary is padded. ConfigError when the model is not this BERT."""
        wrong = [
            f"config.json: {name} is {values[name]!r}, needed is {needed!r}"
            for name, needed in REQUIRED_VALUES.items()
            if values.get(name, needed) != needed
        ]
        activation = values.get("hidden_act", "gelu")
        if activation not in HUGGING_FACE_ACTIVATIONS:
            known_names = ", ".join(HUGGING_FACE_ACTIVATIONS)
            wrong.append(f"config.json: hidden_act is {activation!r}, known are {known_names}")
        if not isinstance(values.get("vocab_size"), int):
            wrong.append(f"config.json: vocab_size is {values.get('vocab_size')!r}, needed is a whole number")
        if values.get("type_vocab_size", 2) == 1:
            wrong.append("config.json: type_vocab_size is 1, needed are 2: the texts of a pair are told by them")
        if wrong:
            raise ConfigError("\n".join(wrong))
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known |= {"vocab_size": padded_vocab(values["vocab_size"]), "hidden_act": HUGGING_FACE_ACTIVATIONS[activation]}
        known.pop("init", None)
        return cls(**known)


def read_object(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The JSON object in a file of a model folder; ``error`` when there is none."""
    try:
        refuse_pointer(path, error)
        with open_plain(path, MOST_BYTES) as file:
            values = json.loads(file.read().decode())
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object is needed, found {type(values).__name__}")
        return values
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}") from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is no JSON object: {fault}") from fault
