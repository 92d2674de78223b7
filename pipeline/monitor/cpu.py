"""What Linux says of this machine's CPU, and whether there is a GPU, without the driver and without torch."""

from __future__ import annotations

import os
from pathlib import Path

BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm


def processor() -> str:
    """What people call it."""
    model = next((value for key, value in _lines() if key == "model name"), "")
    return f"CPU {model or os.uname().machine}"


def has_gpu() -> bool:
    """Whether an NVIDIA driver shows a GPU."""
    return Path("/dev/nvidia0").exists()


def computes_bf16() -> bool:
    """Whether it multiplies bf16; one that does not imitates it, many times slower than fp32."""
    return any(key in ("flags", "Features") and BF16 & {*value.split()} for key, value in _lines())


def _lines() -> list[tuple[str, str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
