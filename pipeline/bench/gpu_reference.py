"""What a CPU in float32 makes of BERT-large's first micro-batch: the values that a GPU is held against.

``python -m pipeline.bench.gpu_reference > pipeline/bench/gpu_reference.json`` makes them anew (a minute).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.gpu_subject import LARGE, TINY, Levers, Samples, Subject, invent
from pipeline.bert.config import BertConfig

Values = dict[str, Any]
FILE = Path(__file__).with_suffix(".json")
SIZES = {"phase1": (4, 128), "phase2": (2, 512)}  # samples and seq_len
SMALL = 1e-2  # of the whole gradient's norm: what is smaller is held against this share of the whole
KEPT_LAYERS = ("layer.0.", "layer.12.", "layer.23.")


def case(name: str, tiny: bool) -> tuple[BertConfig, Samples]:
    """Model without dropout and micro-batch of a case."""
    config = replace(TINY if tiny else LARGE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    count, seq_len = SIZES[name]
    return config, invent(count, seq_len // 4 if tiny else seq_len, config.vocab_size, seed=7)


def values_of(subject: Subject) -> Values:
    """Losses and gradients of the subject's only micro-batch: of each gradient its norm and one projection."""
    subject.gradients.zero_()
    with subject.autocast():
        mlm_loss, nsp_loss = subject.losses(0)
        with torch.autocast(subject.device.type, enabled=False):
            torch.autograd.backward(mlm_loss + nsp_loss)
    kept = [
        (name, p.grad)
        for name, p in subject.model.named_parameters()
        if p.grad is not None and (".layer." not in name or any(layer in name for layer in KEPT_LAYERS))
    ]
    return {
        "mlm_loss": float(mlm_loss.detach()),
        "nsp_loss": float(nsp_loss.detach()),
        "norm": float(torch.linalg.vector_norm(subject.gradients.flat.double())),
        "gradients": {name: [float(f"{value:.7g}") for value in _seen(grad)] for name, grad in kept},
    }


def _seen(gradient: Tensor) -> tuple[float, float]:
    """Norm of a gradient, and its cosine with a fixed pattern of -3 to 3: signs and places count too."""
    flat = gradient.flatten().double()
    pattern = (torch.arange(flat.numel(), device=flat.device) % 7 - 3).double()
    norm = torch.linalg.vector_norm(flat)
    return float(norm), float(flat @ pattern / (norm.clamp_min(1e-30) * torch.linalg.vector_norm(pattern)))


def difference(found: Values, wanted: Values) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradients (tiny ones are held against the whole)."""
    loss = max(abs(found[name] - wanted[name]) / wanted[name] for name in ("mlm_loss", "nsp_loss"))
    return loss, max(_gradient_differences(found, wanted))


def _gradient_differences(found: Values, wanted: Values) -> Iterable[float]:
    yield abs(found["norm"] - wanted["norm"]) / wanted["norm"]
    for name, (norm, cosine) in wanted["gradients"].items():
        own_norm, own_cosine = found["gradients"][name]
        yield abs(own_norm - norm) / max(norm, SMALL * wanted["norm"])
        if norm >= SMALL * wanted["norm"]:
            yield abs(own_cosine - cosine)


def on_cpu(name: str, tiny: bool) -> Values:
    """The values of a case, computed here in float32."""
    config, samples = case(name, tiny)
    levers = Levers("rows", compiled=False, precision="fp32")
    return values_of(Subject(torch.device("cpu"), config, levers, [samples]))


def kept(name: str, tiny: bool) -> Values:
    """The values of a case: those in the repository, for the tiny model computed on the spot."""
    if tiny:
        return on_cpu(name, tiny)
    values: dict[str, Values] = json.loads(FILE.read_text(encoding="utf-8"))
    return values[name]


if __name__ == "__main__":
    print(json.dumps({name: on_cpu(name, tiny=False) for name in SIZES}, indent=0))
