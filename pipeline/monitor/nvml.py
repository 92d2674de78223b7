"""One GPU's readings, taken from NVML. The only module that imports pynvml (the package nvidia-ml-py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pynvml

from pipeline.monitor.health import GPU_IS_LOST

SLOW_S = 5.0  # a query that once took longer is not asked again
NEVER = {2, 3, 4, 13, 22, 25, 26}  # return codes of what this GPU, driver or user will not be told later either

CLOCK_REASONS = {  # NVML API reference, nvmlClocksEventReasons; "idle" (1) is no throttling
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}


class NvmlFault(Exception):
    """NVML answered with a return code other than success."""

    def __init__(self, code: int) -> None:
        super().__init__(f"NVML return code {code}")
        self.code = code


def ask(names: str, *arguments: Any) -> Any:
    """Call the first of the named functions that the driver has; NvmlFault with what it answers."""
    fault = NvmlFault(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    for name in names.split():
        try:
            return getattr(pynvml, name)(*arguments)
        except AttributeError:
            continue
        except pynvml.NVMLError as error:
            fault = NvmlFault(int(error.value))
            if fault.code != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise fault from None
    raise fault


def open_library() -> int:
    """Load libnvidia-ml.so.1 and start it; the number of GPUs that it shows to this process."""
    ask("nvmlInit")
    return int(ask("nvmlDeviceGetCount"))


def visible(environment: Mapping[str, str], count: int) -> list[int]:
    """NVML's indices of the GPUs that this job sees.

    Slurm's numbers count all GPUs of a node. Where a cgroup hides the other jobs' GPUs, NVML counts only ours from 0,
    so that a number it does not know means: all that it shows.
    """
    for variable in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if variable not in environment:
            continue
        words = [word.strip() for word in environment[variable].split(",")]
        if words[0] in ("", "-1", "NoDevFiles"):
            return []
        indices = [_index(word, count) for word in words]
        if None not in indices:
            return [index for index in indices if index is not None]
    return list(range(count))


def _index(word: str, count: int) -> int | None:
    """The index that a number, a UUID or the beginning of a UUID names."""
    if word.isdecimal():
        return int(word) if int(word) < count else None
    if not word.startswith("GPU-"):
        return None
    for index in range(count):
        try:
            uuid = ask("nvmlDeviceGetUUID", ask("nvmlDeviceGetHandleByIndex", index))
        except NvmlFault:
            continue
        if uuid.startswith(word):
            return index
    return None


def _memory(gpu: Any) -> dict[str, Any]:
    memory = ask("nvmlDeviceGetMemoryInfo", gpu)
    return {"memory_used_mb": memory.used >> 20, "memory_total_mb": memory.total >> 20}


def _throttle(gpu: Any) -> dict[str, Any]:
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons", gpu)
    return {"throttle": [word for bit, word in CLOCK_REASONS.items() if bits & bit]}


def _remapped_rows(gpu: Any) -> dict[str, Any]:
    _, _, pending, failed = ask("nvmlDeviceGetRemappedRows", gpu)
    return {"remap_pending": bool(pending), "remap_failed": bool(failed)}


def _recovery_action(gpu: Any) -> dict[str, Any]:
    (field,) = ask("nvmlDeviceGetFieldValues", gpu, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if field.nvmlReturn:
        raise NvmlFault(field.nvmlReturn)
    return {"recovery_action": field.value.uiVal}


# fmt: off
READS: tuple[Callable[[Any], dict[str, Any]], ...] = (
    lambda gpu: {"utilization_pct": ask("nvmlDeviceGetUtilizationRates", gpu).gpu},
    _memory,
    lambda gpu: {"power_w": ask("nvmlDeviceGetPowerUsage", gpu) / 1000},
    lambda gpu: {"energy_j": ask("nvmlDeviceGetTotalEnergyConsumption", gpu) / 1000},
    lambda gpu: {"temperature_c": ask("nvmlDeviceGetTemperature nvmlDeviceGetTemperatureV", gpu, pynvml.NVML_TEMPERATURE_GPU)},  # noqa: E501
    lambda gpu: {"sm_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, pynvml.NVML_CLOCK_SM)},
    lambda gpu: {"memory_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, pynvml.NVML_CLOCK_MEM)},
    _throttle,
    lambda gpu: {"ecc_corrected": ask("nvmlDeviceGetTotalEccErrors", gpu, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC)},  # noqa: E501
    lambda gpu: {"ecc_uncorrected": ask("nvmlDeviceGetTotalEccErrors", gpu, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)},  # noqa: E501
    _remapped_rows,
    _recovery_action,
)
# fmt: on


class Gpu:
    """One GPU by its NVML index. NvmlFault when NVML does not give a handle."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._handle = ask("nvmlDeviceGetHandleByIndex", index)
        self.uuid, self.name = self._text("nvmlDeviceGetUUID"), self._text("nvmlDeviceGetName")
        self._reads = list(READS)
        self._events = self._event_set()

    def _text(self, function: str) -> str:
        try:
            return str(ask(function, self._handle))
        except NvmlFault:
            return ""

    def read(self) -> tuple[dict[str, Any], set[int]]:
        """What the GPU says now, and the return codes of what it does not say.

        The fields are those of a GPU sample and, for ``health``, ``remap_pending``, ``remap_failed`` and
        ``recovery_action``.
        """
        reading: dict[str, Any] = {}
        codes = set()
        for read in list(self._reads):
            started = time.monotonic()
            try:
                reading |= read(self._handle)
            except NvmlFault as fault:
                codes.add(fault.code)
                if fault.code == GPU_IS_LOST:
                    return reading, codes
                if fault.code in NEVER:
                    self._reads.remove(read)
                    continue
            if time.monotonic() - started > SLOW_S:
                self._reads.remove(read)
        if self._events is not None:
            reading["xid"] = self._xids(codes)
        return reading, codes

    def _event_set(self) -> Any:
        """A set that collects this GPU's Xid events; None where that is not allowed or not known."""
        try:
            events = ask("nvmlEventSetCreate")
            ask("nvmlDeviceRegisterEvents", self._handle, pynvml.nvmlEventTypeXidCriticalError, events)
        except NvmlFault:
            return None
        return events

    def _xids(self, codes: set[int]) -> list[int]:
        """The Xid numbers since the last call."""
        numbers: list[int] = []
        while len(numbers) < 100:  # a GPU in trouble may raise them faster than they are read
            try:
                numbers.append(int(ask("nvmlEventSetWait_v2", self._events, 1).eventData))
            except NvmlFault as fault:  # mostly "timeout", which stands for no event
                codes.add(fault.code)
                break
        return numbers
