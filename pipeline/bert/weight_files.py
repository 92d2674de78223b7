"""Weight files of others, read and written: Hugging Face's safetensors and pickles, NVIDIA's ``ckpt_*.pt``.

Every reader gives named tensors under our names, which are Hugging Face's; nothing that could run code is loaded.
Into a model they go strictly: a key that is missing, surplus or of another shape is an error that names it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import refuse_pointer
from data_prep.publish import publishing
from pipeline.bert.config import VOCAB_ROWS, BertConfig, is_padding, padded_vocab, read_object
from pipeline.errors import CheckpointError, ConfigError

State = dict[str, Tensor]

WORD_EMBEDDINGS, VOCAB_BIAS = VOCAB_ROWS
DECODER = "cls.predictions.decoder.weight"
# Spellings of other times and makers; each is applied to every key.
SPELLINGS = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"^(embeddings|encoder|pooler)\."), r"bert.\1."),
    (re.compile(r"\.dense_act\."), ".dense."),
    (re.compile(r"\.LayerNorm\.gamma$"), ".LayerNorm.weight"),
    (re.compile(r"\.LayerNorm\.beta$"), ".LayerNorm.bias"),
)
# NVIDIA's name of a linear that is fused with its activation.
FUSED = re.compile(r"(\.intermediate|\.pooler|\.transform)\.dense\.")
# Second names of tensors that the model holds once; dropped when equal, refused when not.
ALIASES = {DECODER: WORD_EMBEDDINGS, "cls.predictions.decoder.bias": VOCAB_BIAS}
POSITION_IDS = "bert.embeddings.position_ids"
# What only one generation of NVIDIA's code writes into its checkpoints, and the GELU that this code computes.
GELU_SHOWN_BY = {"grad_scaler": "tanh", "master params": "erf"}
GELU_KEY = "hidden_act"  # what `write_nvidia` adds, since NVIDIA's files and configurations do not tell


def renamed(state: Mapping[str, Any], *, origin: str) -> State:
    """``state`` under our names, in fp32, without second names of tied tensors; all values finite."""
    named: State = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in SPELLINGS:
            name = pattern.sub(replacement, name)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{origin}: {key} is no tensor but {type(tensor).__name__}: not a model's weights")
        if name in named:
            raise CheckpointError(f"{origin}: {name} is there twice, under an old and a new spelling")
        if not tensor.is_floating_point() and name != POSITION_IDS:
            raise CheckpointError(f"{origin}: {key} is {tensor.dtype}: quantised; give the weights as floating numbers")
        named[name] = tensor.float()
    named.pop(POSITION_IDS, None)
    for alias, name in ALIASES.items():
        if alias in named and not torch.equal(named[alias], named.setdefault(name, named[alias])):
            raise CheckpointError(f"{origin}: {alias} differs from {name}: this model ties them")
        named.pop(alias, None)
    if broken := [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{origin}: not finite: {', '.join(broken)}")
    return named


def padded(state: State, rows: int) -> State:
    """``state`` with ``rows`` vocabulary rows where these are the padding of its own number; else as it is.

    The rows that padding appends are the mean of the real ones, so that they neither win nor distort a softmax.
    """
    for name in VOCAB_ROWS:
        if name in state and len(state[name]) < rows == padded_vocab(len(state[name])):
            mean = state[name].mean(0, keepdim=True)
            state[name] = torch.cat([state[name], mean.expand(rows - len(state[name]), *mean.shape[1:])])
    return state


def cut(config: BertConfig, state: State, size: int) -> tuple[BertConfig, State]:
    """Both with the rows of ``size`` tokens padded our way, where they have those of a wider padding; else as given."""
    if not is_padding(config.vocab_size, size):
        return config, state
    rows = padded_vocab(size)
    cut_state = {name: tensor[:rows] if name in VOCAB_ROWS else tensor for name, tensor in state.items()}
    return replace(config, vocab_size=rows), cut_state


def read_config(path: Path) -> BertConfig:
    """The model that a configuration in JSON describes, Hugging Face's or NVIDIA's; CheckpointError if none."""
    try:
        return BertConfig.from_hugging_face(read_object(path, CheckpointError))
    except ConfigError as error:
        raise CheckpointError(f"{path.parent}: {'; '.join(str(error).splitlines())}") from error


def read_safetensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        refuse_pointer(path, CheckpointError)
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error


def read_pickled(path: Path) -> Mapping[str, Any]:
    """A file of torch.save with tensors and plain containers only; anything that could run code is refused.

    Mapped into memory where the format allows, so that an optimizer in it costs nothing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of foreign pickles; what matters is raised
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # nearly any kind on foreign bytes; torch's own text advises to read unsafely
        refuse_pointer(path, CheckpointError)
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, or holds more than tensors, which could "
            "run code when read; copy it again, or save its tensors alone"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds no named tensors but {type(content).__name__}")
    return content


def read_nvidia(path: Path) -> tuple[State, str | None]:
    """Weights of a file of NVIDIA's BERT, wrapped or bare, under our names, and the GELU it shows, if any."""
    content = read_pickled(path)
    gelu = next((act for key, act in GELU_SHOWN_BY.items() if key in content), content.get(GELU_KEY))
    model = content.get("model", content)
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: its entry 'model' is {type(model).__name__}, not named tensors")
    return renamed(model, origin=str(path)), gelu if isinstance(gelu, str) else None


def write_nvidia(path: Path, state: Mapping[str, Tensor], hidden_act: str) -> None:
    """Write ``state`` (our names, vocabulary padded) under the names that NVIDIA's BERT for PyTorch loads.

    The file holds ``model`` and, for `read_nvidia`, which GELU it was trained with. Whole or not at all.
    """
    model = {FUSED.sub(r"\1.dense_act.", name): tensor for name, tensor in state.items()}
    if VOCAB_BIAS in model:
        model[DECODER] = model[WORD_EMBEDDINGS]  # the same storage: it is written once
    with publishing(path) as file:
        torch.save({"model": model, GELU_KEY: hidden_act}, file)


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
