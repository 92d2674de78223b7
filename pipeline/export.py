"""The command and the stage that turn trained weights into what others load: Hugging Face's folder, NVIDIA's file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.fanout import Job
from data_prep.publish import publish_json
from pipeline.bert.config import ACTIVATIONS, BertConfig
from pipeline.errors import CheckpointError, ConfigError, run_command
from pipeline.words import absent_model

if TYPE_CHECKING:
    from pipeline.bert.folder import Source

NVIDIA_EPS = 1e-12  # of every LayerNorm; NVIDIA's code knows no other


def read_source(path: Path, config_file: Path | None = None, hidden_act: str | None = None) -> Source:
    """Weights of a checkpoint or stage folder (its newest good one), a Hugging Face folder or an NVIDIA file.

    ``config_file`` and ``hidden_act`` say what an NVIDIA file does not (`pipeline.bert.weights.load_nvidia`).
    CheckpointError when it is none of these or not whole.
    """
    from pipeline.bert import folder, weights
    from pipeline.engine import checkpoint

    if path.is_file():
        config_file = config_file or weights.config_beside(path)
        if config_file is None:
            raise ConfigError(f"{path} does not tell its model: name its base.json or large.json by --config FILE")
        config, state = weights.load_nvidia(path, config_file, hidden_act=hidden_act)
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        return folder.Source(config, arrays, f"the file {path.name}").checked()
    if (path / folder.MODEL).is_file():
        return folder.read_folder(path)
    saved = None
    if (path / "manifest.json").is_file():
        saved = checkpoint.read(path, tensors=("weights",))
    elif (path / "attempts").is_dir():
        saved = checkpoint.newest_verified(path, print, tensors=("weights",))
    if saved is None:
        raise CheckpointError(
            f"{path} holds no weights: give a checkpoint (…/step-00000100), a stage (RUN/stages/phase2), a folder with "
            "config.json or a file of NVIDIA's BERT"
        )
    return folder.Source(
        BertConfig.from_dict(saved.model), saved.weights, f"step {saved.step} of {saved.stage}"
    ).checked()


def run(
    job: Job,
    *,
    checkpoint: Path,
    vocab: Path,
    lowercase: bool = True,
    strip_accents: bool = True,
    any_kind: bool = False,
    **card: Any,
) -> dict[str, Any]:
    """Stage ``export``: write ``model/``, whole or not at all; further arguments are those of `model_card`.

    With ``any_kind`` the vocabulary is a tokenizer.json that is kept as it is. Returns ``model`` (the folder's name),
    ``step_of`` (where the weights are from), ``vocab_size`` and ``parameters`` as exported.
    """
    from pipeline.bert.folder import write_folder
    from pipeline.bert.tokenizer import AnyTokenizer, Tokenizer

    source = read_source(checkpoint)
    tokenizer = AnyTokenizer(vocab) if any_kind else Tokenizer(vocab, lowercase, strip_accents)
    facts = write_folder(job.out / "model", source, tokenizer, card=model_card(source, **card), replace=True)
    job.say(f"model of {facts['parameters'] / 1e6:.1f} million parameters from {source.origin}")
    return {"model": "model", **facts}


def folder_of_nvidia(file: Path, config_file: Path, vocab: Path, to: Path) -> Path:
    """Write the folder ``to`` with the model of NVIDIA's ``file`` in place of what is there; returns ``to``."""
    from pipeline.bert.folder import write_folder
    from pipeline.bert.tokenizer import read_tokenizer

    source = read_source(file, config_file)
    write_folder(to, source, read_tokenizer(file.parent, vocab), card=model_card(source), replace=True)
    return to


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
    del described["init"], described["layer_norm_eps"]  # NVIDIA's base.json has no word for them
    to.parent.mkdir(parents=True, exist_ok=True)
    publish_json(to.with_name(f"{to.stem}_config.json"), described)
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in source.arrays.items()}
    write_nvidia(to, state, source.config.hidden_act)


def model_card(source: Source, *, data: Sequence[str] = (), licences: Sequence[str] = ()) -> str:
    """README.md of an exported model: what it is, what it was trained on, and under which licences."""
    config = source.config
    corpora = "\n".join(f"* {name}" for name in data) or "Not recorded."
    terms = "\n".join(f"* {name}" for name in licences) or "Not recorded: check them before you pass the model on."
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

# BERT

Weights of {source.origin}: {config.num_hidden_layers} layers of {config.hidden_size}, \
{config.num_attention_heads} heads, at most {config.max_position_embeddings} tokens.
Load with `transformers.BertForPreTraining.from_pretrained` and `transformers.AutoTokenizer`.

## Data

{corpora}

## Licences of the data

{terms}
"""


def main() -> int:
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
    if not path.exists():
        raise ConfigError(absent_model(path, "source"))
    if (path / "model" / "config.json").is_file():  # a run, or a stage that made a model
        path = path / "model"
    if options.to == "nvidia":
        source = read_source(path, options.config, options.gelu)
        write_nvidia_file(options.destination, source)
        if source.config.hidden_act == "erf":
            print("note: this model has the exact GELU; NVIDIA's code since 2022 computes the tanh one in its place")
        parameters = sum(array.size for array in source.arrays.values())
    else:
        from pipeline.bert.folder import write_folder
        from pipeline.bert.tokenizer import read_tokenizer

        given = {"do_lower_case": options.cased, "strip_accents": options.keep_accents}
        settings = {name: False for name, off in given.items() if off}
        tokenizer = read_tokenizer(path if path.is_dir() else path.parent, options.vocab, **settings)
        source = read_source(path, options.config, options.gelu)
        parameters = write_folder(options.destination, source, tokenizer, card=model_card(source))["parameters"]
    print(f"{options.destination}: {parameters / 1e6:.1f} million parameters of {source.origin}")
    return 0


if __name__ == "__main__":
    run_command(main)
