"""The tables: every return code of NVML, NVIDIA's advice for each Xid, and what a reading shows."""

import re
from pathlib import Path

import pynvml
import pytest

import pipeline.monitor
from pipeline.monitor import health

# NVIDIA, "Analyzing Xid Errors with the Xid Catalog": the column of the immediate action.
CATALOG = {
    13: "restart the application", 31: "restart the application", 32: "restart the application", 43: "ignore",
    44: "ignore", 45: "ignore", 46: "reset the GPU", 48: "reset the GPU", 54: "check the mechanics",
    62: "reset the GPU", 63: "ignore", 64: "reset the GPU", 74: "look at the registers", 79: "reboot", 92: "ignore",
    93: "ignore", 94: "restart the application", 95: "reset the GPU", 109: "reset the GPU", 110: "reset the GPU",
    119: "reset the GPU", 120: "reset the GPU", 136: "reset the GPU", 140: "reset the GPU", 143: "reset the GPU",
    155: "reset the GPU", 156: "reset the GPU", 158: "reset the GPU",
}  # fmt: skip


def test_every_return_code_of_pynvml_has_a_verdict_and_a_meaning() -> None:
    known = {value for name, value in vars(pynvml).items() if re.fullmatch(r"NVML_ERROR_[A-Z_]+", name)}
    assert set(health.RETURN_CODES) == known
    assert {verdict for verdict, _ in health.RETURN_CODES.values()} == {"fatal", "warn", "ignore"}
    fatal = {code for code, (verdict, _) in health.RETURN_CODES.items() if verdict == "fatal"}
    assert fatal == {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED}


def test_an_xid_is_fatal_exactly_when_nvidia_says_reset_or_reboot() -> None:
    assert set(health.XIDS) == set(CATALOG)
    for number, (verdict, _) in health.XIDS.items():
        assert (verdict == "fatal") == (CATALOG[number] in ("reset the GPU", "reboot")), number


def test_every_recovery_action_of_pynvml_has_a_verdict() -> None:
    actions = {value for name, value in vars(pynvml).items() if name.startswith("NVML_GPU_RECOVERY_ACTION_")}
    assert set(health.RECOVERY_ACTIONS) == actions - {pynvml.NVML_GPU_RECOVERY_ACTION_NONE}


def test_unknown_numbers_only_warn() -> None:
    assert [found.verdict for found in health.of_xids([777]) + health.of_code(777)] == ["warn", "warn"]
    assert "777" in health.of_xids([777])[0].meaning


@pytest.mark.parametrize(
    ("before", "now", "verdicts"),
    [
        ({}, {}, []),
        ({}, {"throttle": ["power cap", "application clocks", "sync boost"]}, []),
        ({}, {"throttle": ["power cap", "hardware thermal slowdown"]}, ["warn"]),
        ({}, {"ecc_uncorrected": 2}, ["warn"]),
        ({"ecc_uncorrected": 2}, {"ecc_uncorrected": 2}, []),
        ({"ecc_uncorrected": 2}, {"ecc_uncorrected": 3}, ["warn"]),
        ({}, {"ecc_corrected": 10**9}, []),
        ({}, {"remap_pending": True, "remap_failed": False}, ["warn"]),
        ({}, {"remap_failed": True}, ["warn"]),  # so it was given to us
        ({"remap_failed": False}, {"remap_failed": True}, ["fatal"]),
        ({}, {"recovery_action": 2}, ["warn"]),
        ({"recovery_action": 2}, {"recovery_action": 2}, []),
        ({"recovery_action": 0}, {"recovery_action": 2}, ["fatal"]),
        ({"recovery_action": 0}, {"recovery_action": 4}, ["warn"]),
        ({"recovery_action": 0}, {"recovery_action": 99}, ["warn"]),
        ({"recovery_action": 2}, {"recovery_action": 0}, []),
    ],
)
def test_a_state_from_before_training_only_warns(before: dict, now: dict, verdicts: list[str]) -> None:
    assert [found.verdict for found in health.of_reading(now, before)] == verdicts


def test_a_line_names_node_gpu_and_uuid() -> None:
    assert health.line("n03", 2, "GPU-1a", "is hot") == "n03: GPU 2 (GPU-1a): is hot"
    assert health.line("n03", 2, "", "is hot") == "n03: GPU 2 (UUID unknown): is hot"


def test_only_one_module_imports_pynvml() -> None:
    package = Path(pipeline.monitor.__file__).parents[1]
    importers = [
        path.name for path in package.rglob("*.py") if re.search(r"^\s*(import|from) pynvml", path.read_text(), re.M)
    ]
    assert importers == ["nvml.py"]
