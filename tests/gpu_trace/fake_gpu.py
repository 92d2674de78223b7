"""What the product would ask of a GPU, seen without one: every operation, copy and wait, with fake CUDA tensors.

A child process preloads a device guard that computes nothing (`guard.cpp`) and runs the product's own code in
FakeTensorMode: shapes, dtypes and devices are true, values do not exist. An operation whose result would have to be
looked at raises there; what only copies or waits is recorded. Compiled regions run as they are, and what they do is
marked as theirs, forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 1)  # not the current one, so that what lands there by accident is seen
# Only another view of memory, memory without content, or a question that no device answers.
FREE = frozenset(
    """alias as_strided detach device empty empty_like empty_strided expand lift_fresh new_empty new_empty_strided
    permute reshape select slice split split_with_sizes squeeze t transpose unbind unsqueeze unsafe_split view
    _unsafe_view _reshape_alias view_as""".split()  # noqa: SIM905
)
COPIES = ("copy_", "_to_copy")


def compiler_command(source: Path, library: Path) -> list[str]:
    """How to build the guard against this PyTorch."""
    torch_dir = Path(torch.__file__).parent
    include, lib = torch_dir / "include", torch_dir / "lib"
    return [
        *("g++", "-O0", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)),
        *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"),
        *("-lc10", "-ltorch_cpu"),
    ]


@dataclass(frozen=True)
class Operation:
    """One kernel, copy or wait of the GPU.

    ``nbytes`` are those of all its operands and results there, ``region`` the compiled function that it belongs to.
    """

    name: str
    region: str | None
    waits: bool
    nbytes: int
    results: tuple[tuple[tuple[int, ...], str], ...]  # shape and device
    dtypes: tuple[torch.dtype, ...]  # of the results
    generators: tuple[str, ...]


def leaves(tree: object) -> list[Tensor]:
    """The tensors in ``tree``."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def on_gpu(tensors: list[Tensor]) -> int:
    """Bytes of those that lie on a GPU."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cuda")


class Trace(TorchDispatchMode):
    """Records the `Operation`s of the GPU while it is active, and the ``traffic`` of each call of a region.

    That is the bytes of its arguments, of those again that it writes, and of its result: one pass over each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.traffic: list[tuple[str, int]] = []
        self._region: str | None = None
        self._nodes: list[tuple[range, str]] = []  # the autograd nodes that each region made

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Stands in for torch.compile."""

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            name, given = function.__name__, leaves(args)
            versions = [tensor._version for tensor in given]
            first, self._region = torch.autograd._get_sequence_nr(), name
            out = function(*args)
            self._region = None
            self._nodes.append((range(first, torch.autograd._get_sequence_nr()), name))
            written = [tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version]
            self.traffic.append((name, on_gpu([*given, *written, *leaves(out)])))
            return out

        return run

    def _region_now(self) -> str | None:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._region
        number = node._sequence_nr()
        return next((name for numbers, name in self._nodes if number in numbers), None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        waits = name == "_local_scalar_dense"  # item(), tolist(), float(): the host waits for the value
        out = 1.0 if waits else func(*args, **kwargs)
        given, made = tree_leaves((args, kwargs)), leaves(out)
        tensors = [*leaves(given), *made]
        if name in FREE or not on_gpu(tensors):
            return out
        if name in COPIES and any(tensor.device.type == "cpu" for tensor in tensors):
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        self.operations.append(
            Operation(
                name,
                self._region_now(),
                waits,
                on_gpu(tensors),
                tuple((tuple(tensor.shape), str(tensor.device)) for tensor in made),
                tuple(tensor.dtype for tensor in made),
                tuple(str(leaf.device) for leaf in given if isinstance(leaf, torch.Generator)),
            )
        )
        return out


@contextlib.contextmanager
def fake_gpu() -> Iterator[Trace]:
    """The `Trace` of what runs inside, where ``DEVICE`` is an H100 that computes nothing. Once per process."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    trace = Trace()
    torch.compile = trace.compiled
    with FakeTensorMode(allow_non_fake_inputs=True), trace:
        yield trace
