"""Weights of others to start a pretraining from: Hugging Face folders, and NVIDIA's ``ckpt_*.pt`` of any year."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from data_prep.wordpiece import Vocabulary
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.folder import load_hugging_face
from pipeline.bert.heads import BertForPreTraining
from pipeline.bert.tokenizer import PLAIN, WHOLE, difference, read_tokenizer
from pipeline.bert.weight_files import WORD_EMBEDDINGS, State, cut, misfits, padded, read_config, read_nvidia
from pipeline.errors import CheckpointError

# All but these must be equal in two configurations, for the weights of one to mean the same in the other.
FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "init")
# Where a tensor shows a size: its name and dimension.
SHOWN_BY = {
    "vocab_size": (WORD_EMBEDDINGS, 0),
    "hidden_size": (WORD_EMBEDDINGS, 1),
    "intermediate_size": ("bert.encoder.layer.0.intermediate.dense.weight", 0),
    "max_position_embeddings": ("bert.embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("bert.embeddings.token_type_embeddings.weight", 0),
}
OF_PAIRS = ("bert.pooler.", "cls.seq_relationship.")  # not trained where train.objective is mlm
NO_CONFIG = ("tokenizer_config.json", "generation_config.json", "adapter_config.json")


def load_start(path: Path, config: BertConfig, vocab: Path | None, *, pairs: bool = True) -> State:
    """All weights of a `BertForPreTraining` of ``config`` to begin a phase with, fp32, from a file of others.

    ``path`` is a Hugging Face folder (a vocabulary in it must equal ``vocab``) or a ``.pt`` of NVIDIA's BERT, of
    any year, with or without its configuration beside it. What an NVIDIA file does not tell (its GELU, without a
    configuration its heads) is taken to be as in ``config``. CheckpointError names every field of the
    configuration that differs and every key that is missing or surplus; both pretraining heads must be there, but
    without ``pairs`` of samples pooler and NSP head may be absent, and are random.
    """
    if path.is_dir():
        saved, state = load_hugging_face(path)
        beside = any((path / name).is_file() for name in (WHOLE, PLAIN))
        if vocab and vocab.name == WHOLE and (path / WHOLE).is_file():  # of any kind, if it is the same
            beside = (path / WHOLE).read_bytes() != vocab.read_bytes()
        if vocab and beside and (line := difference(read_tokenizer(path).vocab, vocab)):
            raise CheckpointError(f"{line}; name the vocabulary that belongs to these weights as data.vocab")
    elif path.is_file():
        saved, state = _nvidia_start(path, config)
    else:
        raise CheckpointError(f"{path}: no such Hugging Face folder or NVIDIA checkpoint to start from")
    if vocab:
        saved, state = cut(saved, state, Vocabulary.load(vocab, any_kind=True).size)
    if not any(name.startswith("cls.") for name in state):
        raise CheckpointError(
            f"{path} holds an encoder without pretraining heads (no cls.*): pretraining goes on only from a model "
            "that has both; for a task, fine-tune it with python -m pipeline.finetune"
        )
    faults = [
        f"{name} is {getattr(saved, name)}, the recipe's is {getattr(config, name)}"
        for name in saved.to_dict()
        if name not in FREE and getattr(saved, name) != getattr(config, name)
    ]
    with torch.device("meta"):
        own = BertForPreTraining(saved).state_dict()
    lacking = tuple(part for part in OF_PAIRS if not any(name.startswith(part) for name in state))
    absent = [name for name in own if name.startswith(lacking)]
    generator = torch.Generator().manual_seed(0)
    for name in () if pairs else absent:
        std = 0.0 if name.endswith(".bias") else config.initializer_range
        state[name] = torch.empty(own[name].shape).normal_(0.0, std, generator=generator)
    faults += misfits({name: tuple(tensor.shape) for name, tensor in state.items()}, own)
    if faults:
        hint = '; train.objective = "mlm" needs neither pooler nor NSP head' if pairs and absent else ""
        raise CheckpointError(f"{path} does not fit the recipe's model: {'; '.join(faults)}{hint}")
    return state


def _nvidia_start(path: Path, config: BertConfig) -> tuple[BertConfig, State]:
    """An NVIDIA file's weights and its configuration: the one beside it, else what its shapes tell."""
    state, gelu = read_nvidia(path)
    beside = config_beside(path)
    saved = read_config(beside) if beside else config_of_shapes(state, config)
    act = gelu or (_told_gelu(saved) if beside else None) or config.hidden_act
    return replace(saved, hidden_act=act), padded(state, saved.vocab_size)


def _told_gelu(config: BertConfig) -> str | None:
    """The GELU that a configuration beside an NVIDIA file names; plain ``gelu`` means either there."""
    return "tanh" if config.hidden_act == "tanh" else None


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
    sizes = {
        name: state[tensor].shape[dimension]
        for name, (tensor, dimension) in SHOWN_BY.items()
        if tensor in state and state[tensor].dim() > dimension
    }
    sizes["vocab_size"] = padded_vocab(sizes.get("vocab_size", like.vocab_size))
    layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
    sizes["num_hidden_layers"] = len(layers) or like.num_hidden_layers
    if sizes.get("hidden_size", like.hidden_size) % like.num_attention_heads:
        sizes["num_attention_heads"] = 1
    return BertConfig.from_dict(like.to_dict() | sizes)


def load_nvidia(file: Path, config_file: Path, *, hidden_act: str | None = None) -> tuple[BertConfig, State]:
    """Configuration and fp32 state of a checkpoint of NVIDIA's BERT for PyTorch and its base.json or large.json.

    Both call their activation ``gelu``, but the code since 2022 computes the tanh approximation and the earlier
    one the exact function. A pretraining checkpoint shows which code wrote it (``grad_scaler`` or ``master
    params``); for other files ``hidden_act`` ("tanh" or "erf") must say it.
    """
    state, gelu = read_nvidia(file)
    config = read_config(config_file)
    gelu = gelu or _told_gelu(config)
    if gelu is None and hidden_act is None:
        raise CheckpointError(f"{file} does not show which GELU it was trained with: say tanh (since 2022) or erf")
    if gelu and hidden_act and gelu != hidden_act:
        raise CheckpointError(f"{file} was trained with the {gelu} GELU, not {hidden_act}")
    return replace(config, hidden_act=gelu or hidden_act or ""), padded(state, config.vocab_size)
