"""The middle of a phase of NVIDIA's BERT for PyTorch: weights in full precision and LAMB's moments, from ``ckpt_N.pt``.

Its ``run_pretraining.py`` gives apex's FusedLAMB two groups of parameters in the order of the model: those that decay,
then biases and LayerNorms. The optimizer's state, and with apex's O2 the fp32 ``master params``, are numbered so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bert.config import VOCAB_ROWS
from pipeline.bert.weight_files import State, read_pickled, renamed
from pipeline.engine.optim import decays
from pipeline.errors import CheckpointError

MASTERS = "master params"


def read_middle(path: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[State, dict[str, Tensor]]:
    """The fp32 weights of ``path`` where it has them beside half-precision ones, and the optimizer's state.

    Both by our names, the latter as `Optimizer.state` has it, of the parameters in ``shapes``, to whose rows those of
    the vocabulary are cut or filled with zeros. CheckpointError where the file has no such state, or another model's.
    """
    content = read_pickled(path) if path.is_file() else {}
    model, optimizer = content.get("model"), content.get("optimizer")
    if not isinstance(model, dict) or not isinstance(optimizer, dict):
        raise CheckpointError(
            f"{path} holds no optimizer: to begin the phase with its weights alone, leave start_step out"
        )
    names = list(renamed(model, origin=str(path)))
    names = [name for name in names if decays(name)] + [name for name in names if not decays(name)]
    try:
        groups, moments = optimizer["param_groups"], optimizer["state"]
        numbers = [number for group in groups for number in group["params"]]
        state = {
            f"{key}.{name}": _fitted(name, moments[number][key], shapes)
            for name, number in zip(names, numbers, strict=True)
            for key in ("exp_avg", "exp_avg_sq")
            if name in shapes
        }
        steps = {int(group["step"]) for group in groups}
        masters = dict(zip(names, content[MASTERS], strict=True)) if MASTERS in content else {}
        weights = {name: _fitted(name, tensor, shapes) for name, tensor in masters.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its optimizer is not that of NVIDIA's BERT: {error!r}") from None
    if len(steps) != 1 or min(steps) < 1:
        raise CheckpointError(f"{path}: the groups of its optimizer have made {sorted(steps)} steps, not one number")
    return weights, {**state, "step": torch.tensor(steps.pop(), dtype=torch.int64)}


def _fitted(name: str, tensor: Any, shapes: Mapping[str, Sequence[int]]) -> Tensor:
    """``tensor`` as fp32 in the shape of the parameter, all values finite."""
    wanted = torch.Size(shapes[name])
    fitted: Tensor = tensor.float()
    if name in VOCAB_ROWS and fitted.shape[1:] == wanted[1:]:
        missing = max(0, wanted[0] - len(fitted))
        fitted = torch.cat([fitted[: wanted[0]], fitted.new_zeros(missing, *wanted[1:])])
    if fitted.shape != wanted or not torch.isfinite(fitted).all():
        raise ValueError(f"{name} is {list(fitted.shape)} where {list(wanted)} belongs, or not finite")
    return fitted
