"""What figures were measured on."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from pipeline.monitor.cpu import processor
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
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else processor()
