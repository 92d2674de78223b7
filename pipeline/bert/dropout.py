"""Dropout that is cheap on a CPU: one draw of 16-bit random numbers instead of torch's Bernoulli draw.

Measured at 12.6 million elements, one thread, bf16: 19 ms against 99 ms for
`torch.nn.functional.dropout`, which is used on every other device.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 1 << 16


def keyed(*key: object) -> None:
    """Let all dropout from here on follow from ``key`` alone (seed, stage, batch, micro-batch), never from the rank."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    # not torch.manual_seed, which keeps the stack of each call for GPUs that are not there
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


def keep_factors(count: int, p: float, dtype: torch.dtype) -> Tensor:
    """``[count]`` factors on the CPU: 0 with probability ``p`` (to 1/65536), else 1/(1-p); mean exactly 1.

    The numbers come from an SFC64 stream seeded by one draw from torch's default generator, so that
    ``torch.manual_seed`` alone decides them, whatever the number of threads.
    """
    seed = int(torch.randint(1 << 62, ()).item())
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    bits = torch.from_numpy(words.view(np.int16))[:count]
    dropped = round(p * LEVELS)
    factors = torch.empty(count, dtype=dtype)
    torch.ge(bits, dropped - LEVELS // 2, out=factors)
    return factors.mul_(LEVELS / (LEVELS - dropped))


def dropout(values: Tensor, p: float) -> Tensor:
    """Zero each element with probability ``p`` and scale up the others."""
    if p == 0:
        return values
    if values.device.type != "cpu":
        return functional.dropout(values, p)
    return values * keep_factors(values.numel(), p, values.dtype).view(values.shape)
