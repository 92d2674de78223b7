"""Every field that the GPU sampler reads, held against ``nvidia-smi -q -x``."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from pipeline.bench.gpu import check
from pipeline.monitor.nvml import CLOCK_REASONS, Gpu, open_library

# By field: where nvidia-smi has it (the first that is there; several with + are added), and how far it may be off.
NUMBERS: dict[str, tuple[tuple[str, ...], float]] = {
    "utilization_pct": (("utilization/gpu_util",), 30),
    "memory_used_mb": (("fb_memory_usage/used+fb_memory_usage/reserved", "fb_memory_usage/used"), 64),
    "memory_total_mb": (("fb_memory_usage/total",), 1),
    "power_w": (tuple(f"gpu_power_readings/{name}" for name in ("instant_power_draw", "power_draw")), 60),
    "temperature_c": (("temperature/gpu_temp",), 4),
    "sm_clock_mhz": (("clocks/sm_clock",), 400),
    "memory_clock_mhz": (("clocks/mem_clock",), 400),
    "ecc_corrected": (("ecc_errors/volatile/sram_correctable+ecc_errors/volatile/dram_correctable",), 0),
    "ecc_uncorrected": (
        (
            "ecc_errors/volatile/sram_uncorrectable_parity+ecc_errors/volatile/sram_uncorrectable_secded"
            "+ecc_errors/volatile/dram_uncorrectable",
            "ecc_errors/volatile/sram_uncorrectable+ecc_errors/volatile/dram_uncorrectable",
        ),
        0,
    ),
}  # fmt: skip
WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "remap_pending": ("remapped_rows/remapped_row_pending", {"No": False, "Yes": True}),
    "remap_failed": ("remapped_rows/remapped_row_failure", {"No": False, "Yes": True}),
    "recovery_action": (
        "gpu_recovery_action",
        {"None": 0, "Reset": 1, "Reboot": 2, "Drain P2P": 3, "Drain and Reset": 4},
    ),
}
REASONS = {  # nvidia-smi's names, behind clocks_event_reason_ or clocks_throttle_reason_
    "applications_clocks_setting": "application clocks",
    "sw_power_cap": "power cap",
    "hw_slowdown": "hardware slowdown",
    "sync_boost": "sync boost",
    "sw_thermal_slowdown": "software thermal slowdown",
    "hw_thermal_slowdown": "hardware thermal slowdown",
    "hw_power_brake_slowdown": "power brake",
    "display_clocks_setting": "display clocks",
}


def compared() -> Iterator[tuple[str, Any]]:
    """Each field: NVML's value before and after, nvidia-smi's between, and how far outside it lies."""
    open_library()
    gpu = Gpu(0)
    before, codes = gpu.read()
    log = smi_of(gpu.uuid)
    after, _ = gpu.read()
    yield "codes", sorted(codes)
    yield (
        "name",
        {"nvml": gpu.name, "smi": log.findtext("product_name"), "ok": gpu.name == log.findtext("product_name")},
    )
    for field, (places, tolerance) in NUMBERS.items():
        wanted = number_at(log, places)
        if wanted is None or field not in before:
            yield field, {"nvml": before.get(field), "smi": wanted, "ok": wanted is None or field not in before}
            continue
        low, high = sorted((float(before[field]), float(after.get(field, before[field]))))
        off = max(0.0, low - wanted, wanted - high)
        yield field, check(off, tolerance, nvml=before[field], smi=wanted)
    for field, (place, meaning) in WORDS.items():
        text = log.findtext(place)
        same = text is None or text not in meaning or field not in before or before[field] == meaning[text]
        yield field, {"nvml": before.get(field), "smi": text, "ok": same}
    wanted_reasons = reasons_of(log)
    told = set(before.get("throttle", ())) | set(after.get("throttle", ()))
    known = set(CLOCK_REASONS.values())
    yield "throttle", {"nvml": sorted(told), "smi": sorted(wanted_reasons), "ok": wanted_reasons <= told <= known}
    yield from _energy(gpu)


def _energy(gpu: Gpu) -> Iterator[tuple[str, Any]]:
    """nvidia-smi does not show it: its growth in a second, as power."""
    first, _ = gpu.read()
    began = time.monotonic()
    time.sleep(1.0)
    second, _ = gpu.read()
    if "energy_j" in first:
        watts = (second["energy_j"] - first["energy_j"]) / (time.monotonic() - began)
        yield (
            "energy_j",
            check(abs(watts - second["power_w"]), 80, as_power_w=round(watts, 1), power_w=second["power_w"]),
        )


def smi_of(uuid: str) -> ElementTree.Element:
    """One GPU's part of what ``nvidia-smi -q -x`` prints."""
    text = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, check=True, timeout=15).stdout
    gpus = ElementTree.fromstring(text).findall("gpu")
    return next((gpu for gpu in gpus if gpu.findtext("uuid") == uuid), gpus[0])


def number_at(log: ElementTree.Element, places: tuple[str, ...]) -> float | None:
    """The number at the first place that has one; None where nvidia-smi has none."""
    for place in places:
        texts = [log.findtext(path) for path in place.split("+")]
        try:
            return sum(float((text or "").split()[0]) for text in texts)
        except (ValueError, IndexError):
            continue
    return None


def reasons_of(log: ElementTree.Element) -> set[str]:
    """The clock reasons that nvidia-smi calls active, by our names; "idle" is none."""
    reasons = set()
    for element in log.iter():
        name = element.tag.removeprefix("clocks_event_reason_").removeprefix("clocks_throttle_reason_")
        if name != element.tag and element.text == "Active" and name in REASONS:
            reasons.add(REASONS[name])
    return reasons
