"""What NVML's return codes, Xid numbers and readings mean for training: tables, and the functions that look into them.

``fatal``: the GPU is of no use before somebody resets it or reboots the node, so training saves what it can and leaves
the node. ``warn``: training goes on, or ends by itself and may start again on the same node. ``ignore``: no finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GPU_IS_LOST = 15


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a GPU; ``key`` names it, so that it is told once and not every second."""

    key: str
    verdict: str
    meaning: str


# NVML API reference, nvmlReturn_t. Verdict while a GPU of ours is read; when NVML itself does not start, nothing is
# known of any GPU and the meaning is only said.
RETURN_CODES = {
    1: ("warn", "NVML is not initialized"),
    2: ("ignore", "NVML calls an argument invalid"),
    3: ("ignore", "the GPU does not support this query"),
    4: ("ignore", "this user may not ask NVML"),
    5: ("ignore", "NVML is initialized already"),
    6: ("ignore", "NVML does not find what was asked for"),
    7: ("ignore", "NVML wants a larger buffer"),
    8: ("warn", "a power cable of the GPU is not attached properly"),
    9: ("warn", "the NVIDIA driver is not loaded"),
    10: ("ignore", "NVML timed out"),
    11: ("warn", "the kernel has an interrupt problem with the GPU"),
    12: ("warn", "there is no NVIDIA driver (libnvidia-ml.so.1 is not found)"),
    13: ("ignore", "the driver is too old for this query"),
    14: ("warn", "the GPU's infoROM is corrupted"),
    GPU_IS_LOST: ("fatal", "the GPU is lost: fallen off the bus or otherwise out of reach; the node needs a reboot"),
    16: ("fatal", "the GPU cannot be used before it is reset"),
    17: ("warn", "the operating system or a cgroup blocks the GPU's control device"),
    18: ("warn", "the driver's library and kernel module have different versions; the node needs a reboot"),
    19: ("ignore", "the GPU is in use"),
    20: ("ignore", "NVML is out of memory"),
    21: ("ignore", "NVML has no data"),
    22: ("ignore", "no ECC counts on this virtual GPU"),
    23: ("ignore", "NVML is out of a resource other than memory"),
    24: ("ignore", "the frequency is not supported"),
    25: ("ignore", "the driver speaks another version of this query"),
    26: ("ignore", "the query is deprecated"),
    27: ("ignore", "the GPU is not ready"),
    28: ("warn", "NVML finds no GPU"),
    29: ("ignore", "the GPU is in a state that does not allow the query"),
    30: ("ignore", "this type of reset is not supported"),
    999: ("warn", "the driver reports an internal error"),
}

# NVIDIA, "Analyzing Xid Errors with the Xid Catalog". Immediate action "reset the GPU" or "reboot" is fatal here;
# "restart the application" a warning: the driver ends the process concerned, and the GPU stays good. Xid 74 says no
# more than "look at the registers", which NVML does not give; a link that is really broken stops NCCL by itself.
XIDS = {
    13: ("warn", "graphics engine exception, mostly a fault of the program"),
    31: ("warn", "memory page fault, mostly a fault of the program"),
    32: ("warn", "corrupted push buffer, mostly bad PCIe transfers"),
    43: ("ignore", "the program's work was stopped after its own fault"),
    44: ("ignore", "fault during a context switch"),
    45: ("ignore", "cleanup after a process that ended"),
    46: ("fatal", "the GPU stopped processing"),
    48: ("fatal", "uncorrectable (double-bit) memory error"),
    54: ("warn", "auxiliary power is not connected, clocks are reduced"),
    62: ("fatal", "the power management unit halted"),
    63: ("warn", "a bad memory row or page is recorded and will be replaced at the next reset"),
    64: ("fatal", "a bad memory row or page could not be recorded for replacement"),
    74: ("warn", "NVLink error"),
    79: ("fatal", "the GPU has fallen off the bus"),
    92: ("warn", "high rate of corrected memory errors"),
    93: ("warn", "the infoROM has reached its limit of erasures"),
    94: ("warn", "contained memory error: only the process that met it ends"),
    95: ("fatal", "uncontained memory error: any process on the GPU may be hit"),
    109: ("fatal", "context switch timed out"),
    110: ("fatal", "security fault"),
    119: ("fatal", "the GPU's system processor (GSP) does not answer"),
    120: ("fatal", "error in the GPU's system processor (GSP)"),
    136: ("fatal", "NVLink training failed"),
    140: ("fatal", "unrecovered memory error"),
    143: ("fatal", "the GPU could not be initialized"),
    155: ("fatal", "NVLink error defined by software"),
    156: ("fatal", "a defective unit of the GPU is retired at the next reset"),
    158: ("fatal", "the GPU timed out fatally"),
}

# NVML API reference, nvmlDeviceGpuRecoveryAction_t: what the driver (570 and later) says must be done.
RECOVERY_ACTIONS = {
    1: ("fatal", "the GPU must be reset"),
    2: ("fatal", "the node must be rebooted"),
    3: ("fatal", "all traffic between GPUs must end"),
    4: ("warn", "the GPU must be reset when its work is done"),
    5: ("warn", "the IMEX domain must be recovered"),
    6: ("fatal", "the GPU's PCIe bus must be reset"),
    7: ("fatal", "the system must be rebooted"),
}

# Clock reasons that mean a fault of cooling or power supply, not merely a full load.
SLOWDOWNS = {"hardware slowdown", "hardware thermal slowdown", "software thermal slowdown", "power brake"}


def of_code(code: int) -> list[Finding]:
    """What an NVML return code says about the GPU that was asked."""
    verdict, meaning = RETURN_CODES.get(code, ("warn", f"NVML answers with the unknown code {code}"))
    return [] if verdict == "ignore" else [Finding(f"code {code}", verdict, meaning)]


def of_xids(numbers: Iterable[int]) -> list[Finding]:
    """What Xid events say about the GPU that raised them."""
    meanings = {number: XIDS.get(number, ("warn", "see NVIDIA's Xid catalog")) for number in numbers}
    return [
        Finding(f"xid {number}", verdict, f"Xid {number}: {meaning}")
        for number, (verdict, meaning) in meanings.items()
        if verdict != "ignore"
    ]


def of_reading(reading: Mapping[str, Any], before: Mapping[str, Any]) -> list[Finding]:
    """What a reading shows; ``before`` is the one before it, empty at the first.

    A state that was there before training began only warns: the node was given as it is, and it works.
    """
    findings = [Finding(reason, "warn", reason) for reason in reading.get("throttle", ()) if reason in SLOWDOWNS]
    new = reading.get("ecc_uncorrected", 0) - before.get("ecc_uncorrected", 0)
    if new > 0:
        when = "while training" if "ecc_uncorrected" in before else "since the driver was loaded"
        findings.append(Finding(f"ecc {when}", "warn", f"{new} uncorrectable memory errors {when}"))
    if reading.get("remap_pending"):
        findings.append(Finding("remap pending", "warn", "bad memory rows will be replaced at the next reset"))
    if reading.get("remap_failed"):
        verdict = "fatal" if before.get("remap_failed") is False else "warn"
        findings.append(Finding("remap failed", verdict, "bad memory rows could not be replaced; have the GPU tested"))
    if (action := reading.get("recovery_action", 0)) and action != before.get("recovery_action"):
        verdict, meaning = RECOVERY_ACTIONS.get(action, ("warn", f"the driver asks for recovery action {action}"))
        findings.append(Finding(f"recovery {action}", verdict if "recovery_action" in before else "warn", meaning))
    return findings


def line(node: str, gpu: int, uuid: str, meaning: str) -> str:
    """One line that says which GPU it is and what is the matter."""
    return f"{node}: GPU {gpu} ({uuid or 'UUID unknown'}): {meaning}"
