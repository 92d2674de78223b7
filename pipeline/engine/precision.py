"""Precisions of forward and backward, and the loss scale that keeps fp16 gradients in range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.errors import NO_TF32, EnvironmentFault

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision; weights and gradients stay float32 in all of them.

    Raises EnvironmentFault where the device cannot do it.
    """
    if precision == "tf32" and device.type != "cuda":
        raise EnvironmentFault(NO_TF32)
    if device.type == "cuda":
        if precision == "tf32" and torch.cuda.get_device_capability(device) < (8, 0):
            raise EnvironmentFault("precision = tf32 needs an Ampere GPU or newer; use fp16 or fp32")
        if precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):  # torch would emulate it
            raise EnvironmentFault("precision = bf16 needs an Ampere GPU or newer; use fp16")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2) with the numbers of NVIDIA's BERT.

    The loss is multiplied by ``scale``, always a power of two, and the summed float32 gradients are divided by it.
    A step whose gradients overflow is skipped and halves the scale; ``GROW_AFTER`` good ones in a row double it.
    """

    scale: float = 2.0**20
    good_steps: int = 0

    GROW_AFTER = 2000
    LOWEST = 1.0

    def good(self) -> None:
        """A step was applied."""
        self.good_steps += 1
        if self.good_steps == self.GROW_AFTER:
            self.scale, self.good_steps = self.scale * 2, 0

    def lowered(self) -> bool:
        """A step overflowed: halve the scale. False at the lowest one, where it is not the scale that overflows."""
        if self.scale <= self.LOWEST:
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True
