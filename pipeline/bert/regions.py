"""What a GPU computes between two matrix products becomes one kernel: `region` functions run compiled there.

One switch for the process, because Inductor's configuration is one. A region is one graph for all batch shapes, and
one for all layers, whose weights are inputs of it. Dropout inside draws its seeds from the device's default generator
each time it runs and its decisions from (seed, element), so that `pipeline.bert.dropout.keyed` alone decides it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

_enabled = False


def compile_regions(device: torch.device) -> bool:
    """Let all regions run compiled from here on where ``device`` is a GPU; whether they will.

    With deterministic algorithms the compiler chooses by rule, never by a timing, what changes bits, so that another
    process computes the same ones. Whether regions are compiled belongs to a training's identity, as the version does.
    """
    global _enabled
    _enabled = device.type == "cuda"
    if _enabled:
        torch.use_deterministic_algorithms(True)  # the compiler's own switch follows it, and is lost if set alone
    return _enabled


def region(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """``function``, compiled where `compile_regions` said so, except in inference mode.

    There it runs as it is: an evaluation in the middle of a training must not wait for a compiler.
    """

    @functools.cache
    def compiled() -> Callable[Inputs, Result]:
        return torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def chosen(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        run = compiled() if _enabled and not torch.is_inference_mode_enabled() else function
        return run(*args, **kwargs)

    return chosen
