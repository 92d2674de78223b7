"""Host copies of a training's state: one buffer, used again by every save.

Beside a GPU it is pinned, and copies run on a stream of their own while training goes on; the next change of the
weights waits for them on the GPU, never on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = Mapping[str, Tensor | NDArray[Any]]
ALIGN = 64  # bytes: every tensor starts on its own cache line


class Staging:
    """Filled by `copy`, read by another thread after `wait`; reused while names, dtypes and shapes stay the same."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def prepare(self, state: Mapping[str, Values]) -> None:
        """Take the memory for copies of ``state``, and touch it: else the first copy would wait for every page."""
        tensors = {kind: {name: _tensor(value) for name, value in values.items()} for kind, values in state.items()}
        if _shapes(tensors) == _shapes(self._parts):
            return
        device = next((t.device for values in tensors.values() for t in values.values() if t.is_cuda), None)
        size = sum(_up(t.nbytes) for values in tensors.values() for t in values.values())
        self._parts, self._buffer = {}, torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
        if device is None:
            self._buffer = torch.empty(size, dtype=torch.uint8).fill_(0)
        else:
            with torch.cuda.device(device):  # threads begin on GPU 0, where this rank has no business
                self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        start = 0
        for kind, values in tensors.items():
            self._parts[kind] = {}
            for name, tensor in values.items():
                part = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                self._parts[kind][name] = part
                start += _up(tensor.nbytes)

    def copy(self, state: Mapping[str, Values]) -> None:
        """Begin to copy ``state``; on a GPU after all that was asked of it so far. CPU tensors are copied at once."""
        self.prepare(state)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for kind, values in state.items():
                for name, value in values.items():
                    self._parts[kind][name].copy_(_tensor(value), non_blocking=True)
        if self._stream is not None:
            self._copied = self._stream.record_event()

    def hold(self) -> None:
        """Have the GPU finish the copies before anything that is asked of it from now on."""
        if self._copied is not None:
            torch.cuda.current_stream(self._copied.device).wait_event(self._copied)

    def wait(self) -> dict[str, dict[str, NDArray[Any]]]:
        """The copies, once they are whole; valid until the next `copy`."""
        if self._copied is not None:
            self._copied.synchronize()
        return {kind: {name: part.numpy() for name, part in parts.items()} for kind, parts in self._parts.items()}


def _tensor(value: Tensor | NDArray[Any]) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))


def _shapes(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, tuple[torch.dtype, torch.Size]]]:
    return {kind: {name: (t.dtype, t.shape) for name, t in values.items()} for kind, values in state.items()}


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
