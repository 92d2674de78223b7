"""What figures were measured on."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pipeline.node.device import driver_version


def environment(threads: int | None, *, beside: bool) -> dict[str, Any]:
    """Device, versions and processors; ``beside``: transformers was measured, too."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version() or None,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "transformers": importlib.import_module("transformers").__version__ if beside else None,
    }


def device_name(device: torch.device) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.machine()}"
