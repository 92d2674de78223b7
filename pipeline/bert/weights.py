"""Weights of others in, strictly: Hugging Face folders and NVIDIA's ``ckpt_*.pt``, under our names (Hugging Face's).

A key that is missing, surplus or of another shape is an error that names it: weights are never taken in part.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.bert.config import VOCAB_ROWS, BertConfig, padded_vocab
from pipeline.errors import CheckpointError, ConfigError

State = dict[str, Tensor]

WORD_EMBEDDINGS, VOCAB_BIAS = VOCAB_ROWS
# Spellings of other times and makers; each is applied to every key.
SPELLINGS = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"^(embeddings|encoder|pooler)\."), r"bert.\1."),
    (re.compile(r"\.dense_act\."), ".dense."),
    (re.compile(r"\.LayerNorm\.gamma$"), ".LayerNorm.weight"),
    (re.compile(r"\.LayerNorm\.beta$"), ".LayerNorm.bias"),
)
# Second names of tensors that the model holds once; dropped when equal, refused when not.
ALIASES = {"cls.predictions.decoder.weight": WORD_EMBEDDINGS, "cls.predictions.decoder.bias": VOCAB_BIAS}
POSITION_IDS = "bert.embeddings.position_ids"


def load_hugging_face(folder: Path) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a folder with config.json and model.safetensors or pytorch_model.bin.

    The vocabulary is padded to a multiple of 8 (see `canonical`). CheckpointError for anything that is not a
    readable BERT.
    """
    config = _read_config(folder / "config.json")
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        return config, canonical(_read_safetensors(safe), config, origin=str(safe))
    if pickled.is_file():
        return config, canonical(_read_pickled(pickled), config, origin=str(pickled))
    hint = " (weights in several files: save them as one)" if list(folder.glob("*.index.json")) else ""
    raise CheckpointError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there{hint}")


def load_nvidia(file: Path, config_file: Path, *, hidden_act: str | None = None) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a checkpoint of NVIDIA's BERT for PyTorch and its base.json or large.json.

    Both call their activation ``gelu``, but the code since 2022 computes the tanh approximation and the earlier
    one the exact function. A pretraining checkpoint shows which code wrote it (``grad_scaler`` or ``master
    params``); for other files ``hidden_act`` ("tanh" or "erf") must say it.
    """
    content = _read_pickled(file)
    written_by = {"grad_scaler": "tanh", "master params": "erf"}
    shown = next((act for key, act in written_by.items() if key in content), None)
    if shown is None and hidden_act is None:
        raise CheckpointError(f"{file} does not show which GELU it was trained with: say tanh (since 2022) or erf")
    if shown and hidden_act and shown != hidden_act:
        raise CheckpointError(f"{file} was trained with the {shown} GELU, not {hidden_act}")
    config = replace(_read_config(config_file), hidden_act=hidden_act or shown or "")
    model = content.get("model", content)
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: its entry 'model' is {type(model).__name__}, not named tensors")
    return config, canonical(model, config, origin=str(file))


def canonical(state: Mapping[str, Any], config: BertConfig, *, origin: str) -> State:
    """``state`` under our names, in fp32, without second names of tied tensors, its vocabulary padded.

    The rows that padding appends are the mean of the real ones, so that they neither win nor distort a softmax.
    """
    named: State = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in SPELLINGS:
            name = pattern.sub(replacement, name)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{origin}: {key} is no tensor but {type(tensor).__name__}: not a model's weights")
        if name in named:
            raise CheckpointError(f"{origin}: {name} is there twice, under an old and a new spelling")
        named[name] = tensor.float() if tensor.is_floating_point() else tensor
    named.pop(POSITION_IDS, None)
    for alias, name in ALIASES.items():
        if alias in named and not torch.equal(named[alias], named.setdefault(name, named[alias])):
            raise CheckpointError(f"{origin}: {alias} differs from {name}: this model ties them")
        named.pop(alias, None)
    if broken := [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{origin}: not finite: {', '.join(broken)}")
    for name in VOCAB_ROWS:
        if name in named and padded_vocab(len(named[name])) == config.vocab_size:
            missing = config.vocab_size - len(named[name])
            mean = named[name].mean(0, keepdim=True)
            named[name] = torch.cat([named[name], mean.expand(missing, *mean.shape[1:])])
    return named


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
    """CheckpointError listing all names of ``shapes`` that are missing, surplus or unlike those of ``own``."""
    faults = []
    if missing := sorted(own.keys() - shapes.keys()):
        faults.append(f"missing {', '.join(missing)}")
    if surplus := sorted(shapes.keys() - own.keys()):
        faults.append(f"surplus {', '.join(surplus)}")
    for name in sorted(own.keys() & shapes.keys()):
        if tuple(own[name].shape) != tuple(shapes[name]):
            faults.append(f"{name} is {list(shapes[name])} instead of {list(own[name].shape)}")
    if faults:
        raise CheckpointError(f"{what}: {'; '.join(faults)}")


def _read_config(path: Path) -> BertConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object is needed, found {type(values).__name__}")
        return BertConfig.from_hugging_face(values)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no model configuration: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path.parent}: {'; '.join(str(error).splitlines())}") from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error


def _read_pickled(path: Path) -> Mapping[str, Any]:
    """A file of torch.save with tensors and plain containers only; anything that could run code is refused."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of foreign pickles; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # nearly any kind on foreign bytes; torch's own text advises to read unsafely
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, or holds more than tensors, which could "
            "run code when read; copy it again, or save its tensors alone"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds no named tensors but {type(content).__name__}")
    return content
