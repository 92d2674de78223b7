"""Weights of others in, strictly: Hugging Face folders and NVIDIA's ``ckpt_*.pt``, under our names (Hugging Face's).

A key that is missing, surplus or of another shape is an error that names it: weights are never taken in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.wordpiece import Vocabulary
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.heads import BertForPreTraining
from pipeline.bert.weight_files import (
    WORD_EMBEDDINGS,
    State,
    canonical,
    padded,
    read_config,
    read_nvidia,
    read_pickled,
    read_safetensors,
)
from pipeline.errors import CheckpointError

# What two configurations must share for the weights of one to mean the same in the other.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)
NO_CONFIG = ("tokenizer_config.json", "generation_config.json", "adapter_config.json")


def load_start(path: Path, config: BertConfig, vocab: Path | None) -> State:
    """All weights of a `BertForPreTraining` of ``config`` to begin a phase with, fp32, from a file of others.

    ``path`` is a Hugging Face folder (a vocab.txt in it must equal ``vocab``) or a ``.pt`` of NVIDIA's BERT, of
    any year, with or without its configuration beside it. What an NVIDIA file does not tell (its GELU, without a
    configuration its heads) is taken to be as in ``config``. CheckpointError names every field of the
    configuration that differs and every key that is missing or surplus; both pretraining heads must be there.
    """
    if path.is_dir():
        found, state = load_hugging_face(path)
        if vocab is not None and (path / "vocab.txt").is_file():
            _same_vocabulary(path / "vocab.txt", vocab)
    elif path.is_file():
        found, state = _nvidia_start(path, config)
    else:
        raise CheckpointError(f"{path}: no such Hugging Face folder or NVIDIA checkpoint to start from")
    if not any(name.startswith("cls.") for name in state):
        raise CheckpointError(
            f"{path} holds an encoder without pretraining heads (no cls.*): pretraining goes on only from a model "
            "that has both; for a task, fine-tune it with python -m pipeline.finetune"
        )
    faults = [
        f"{name} is {getattr(found, name)}, the recipe's is {getattr(config, name)}"
        for name in SHAPE
        if getattr(found, name) != getattr(config, name)
    ]
    with torch.device("meta"):
        own = BertForPreTraining(found).state_dict()
    faults += misfits({name: tuple(tensor.shape) for name, tensor in state.items()}, own)
    if faults:
        raise CheckpointError(f"{path} does not fit the recipe's model: {'; '.join(faults)}")
    return state


def _nvidia_start(path: Path, config: BertConfig) -> tuple[BertConfig, State]:
    """An NVIDIA file's weights and its configuration: the one beside it, else what its shapes tell."""
    state, shown = read_nvidia(path)
    beside = config_beside(path)
    found = read_config(beside) if beside else config_of_shapes(state, config)
    act = shown or (_told_gelu(found) if beside else None) or config.hidden_act
    return replace(found, hidden_act=act), padded(state, found.vocab_size)


def _told_gelu(config: BertConfig) -> str | None:
    """The GELU that a configuration beside an NVIDIA file names; plain ``gelu`` means either there."""
    return "tanh" if config.hidden_act == "tanh" else None


def _same_vocabulary(theirs: Path, ours: Path) -> None:
    """CheckpointError with the first line in which two vocabularies differ."""
    first, second = Vocabulary.load(theirs).tokens, Vocabulary.load(ours).tokens
    for number in range(max(len(first), len(second))):
        there, here = (repr(tokens[number]) if number < len(tokens) else "nothing" for tokens in (first, second))
        if there != here:
            raise CheckpointError(
                f"{theirs} differs from {ours} in line {number + 1}: {there}, not {here}; name the vocabulary that "
                "belongs to these weights as data.vocab"
            )


def config_beside(file: Path) -> Path | None:
    """config.json, bert_config.json or another ``*_config.json`` in the folder of ``file``, if any.

    CheckpointError when only the last kind is there and more than once.
    """
    folder = file.parent
    for name in (f"{file.stem}_config.json", "config.json", "bert_config.json"):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.glob("*_config.json") if path.name not in NO_CONFIG)
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder} holds {names}: keep beside {file.name} only the one that belongs to it")
    return others[0] if others else None


def config_of_shapes(state: State, like: BertConfig) -> BertConfig:
    """``like`` with the sizes that the tensors of ``state`` show (their heads, GELU and eps they do not)."""

    def size(name: str, dimension: int, default: int) -> int:
        return state[name].shape[dimension] if name in state and state[name].dim() > dimension else default

    layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
    sizes = {
        "vocab_size": padded_vocab(size(WORD_EMBEDDINGS, 0, like.vocab_size)),
        "hidden_size": size(WORD_EMBEDDINGS, 1, like.hidden_size),
        "num_hidden_layers": len(layers) or like.num_hidden_layers,
        "intermediate_size": size("bert.encoder.layer.0.intermediate.dense.weight", 0, like.intermediate_size),
        "max_position_embeddings": size("bert.embeddings.position_embeddings.weight", 0, like.max_position_embeddings),
        "type_vocab_size": size("bert.embeddings.token_type_embeddings.weight", 0, like.type_vocab_size),
    }
    heads = like.num_attention_heads if sizes["hidden_size"] % like.num_attention_heads == 0 else 1
    return BertConfig.from_dict(like.to_dict() | sizes | {"num_attention_heads": heads})


def load_hugging_face(folder: Path) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a folder with config.json and model.safetensors or pytorch_model.bin.

    The vocabulary is padded to a multiple of 8 (see `canonical`). CheckpointError for anything that is not a
    readable BERT.
    """
    config = read_config(folder / "config.json")
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        return config, canonical(read_safetensors(safe), config, origin=str(safe))
    if pickled.is_file():
        return config, canonical(read_pickled(pickled), config, origin=str(pickled))
    hint = " (weights in several files: save them as one)" if list(folder.glob("*.index.json")) else ""
    raise CheckpointError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there{hint}")


def load_nvidia(file: Path, config_file: Path, *, hidden_act: str | None = None) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a checkpoint of NVIDIA's BERT for PyTorch and its base.json or large.json.

    Both call their activation ``gelu``, but the code since 2022 computes the tanh approximation and the earlier
    one the exact function. A pretraining checkpoint shows which code wrote it (``grad_scaler`` or ``master
    params``); for other files ``hidden_act`` ("tanh" or "erf") must say it.
    """
    state, shown = read_nvidia(file)
    config = read_config(config_file)
    shown = shown or _told_gelu(config)
    if shown is None and hidden_act is None:
        raise CheckpointError(f"{file} does not show which GELU it was trained with: say tanh (since 2022) or erf")
    if shown and hidden_act and shown != hidden_act:
        raise CheckpointError(f"{file} was trained with the {shown} GELU, not {hidden_act}")
    return replace(config, hidden_act=shown or hidden_act or ""), padded(state, config.vocab_size)


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    origin: str = "weights",
    new: Iterable[str] = (),
    drop: Iterable[str] = (),
) -> None:
    """Copy ``state`` into ``model``; what does not fit is listed in one CheckpointError and nothing is copied.

    Parameters below the prefixes ``new`` keep their values and must not be in ``state``; what lies below the
    prefixes ``drop`` in ``state`` is left out (the pretraining heads, when a task begins).
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(drop))}
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(new))}
    what = f"{origin} does not fit this {type(model).__name__}"
    check_fit({name: tuple(tensor.shape) for name, tensor in kept.items()}, own, what)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(kept[name])


def check_fit(shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor], what: str) -> None:
    """CheckpointError listing all `misfits`."""
    if faults := misfits(shapes, own):
        raise CheckpointError(f"{what}: {'; '.join(faults)}")


def misfits(shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> list[str]:
    """All names of ``shapes`` that are missing, surplus or unlike those of ``own``, in words."""
    faults = []
    if missing := sorted(own.keys() - shapes.keys()):
        faults.append(f"missing {', '.join(missing)}")
    if surplus := sorted(shapes.keys() - own.keys()):
        faults.append(f"surplus {', '.join(surplus)}")
    for name in sorted(own.keys() & shapes.keys()):
        if tuple(own[name].shape) != tuple(shapes[name]):
            faults.append(f"{name} is {list(shapes[name])} instead of {list(own[name].shape)}")
    return faults
