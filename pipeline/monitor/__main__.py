"""``python -m pipeline.monitor``: one reading of every GPU of this node and what it means."""

from __future__ import annotations

import argparse
import json
import socket
from typing import Any

from pipeline.errors import EnvironmentFault, run_command
from pipeline.monitor import health
from pipeline.words import columns

COLUMNS = ("gpu", "name", "utilization_pct", "memory_used_mb", "power_w", "temperature_c", "sm_clock_mhz", "throttle")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.monitor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    gpus = read_all(node := socket.gethostname())
    findings = [finding for gpu in gpus for finding in gpu["findings"]]
    if arguments.json:
        print(json.dumps({"node": node, "gpus": gpus}))
        return
    rows = [COLUMNS, *(tuple(_cell(gpu.get(column, "-")) for column in COLUMNS) for gpu in gpus)]
    print("\n".join(columns(rows)))
    for finding in findings:
        print(f"{finding['verdict']}: {finding['line']}")


def read_all(node: str) -> list[dict[str, Any]]:
    """A reading of each GPU with its ``findings``. EnvironmentFault when NVML does not start."""
    try:
        from pipeline.monitor import nvml
    except ImportError as error:
        raise EnvironmentFault(f"{node}: {error}; pip install nvidia-ml-py") from None
    try:
        count = nvml.open_library()
    except nvml.NvmlFault as fault:
        _, meaning = health.RETURN_CODES.get(fault.code, ("", str(fault)))
        raise EnvironmentFault(f"{node}: cannot read any GPU: {meaning}") from None
    gpus = []
    for index in range(count):
        gpu: dict[str, Any] = {"gpu": index}
        try:
            handle = nvml.Gpu(index)
            reading, codes = handle.read()
            gpu |= {"uuid": handle.uuid, "name": handle.name, **reading}
        except nvml.NvmlFault as fault:
            reading, codes = {}, {fault.code}
        troubles = [finding for code in sorted(codes) for finding in health.of_code(code)]
        gpu["findings"] = [
            {"verdict": each.verdict, "line": health.line(node, index, gpu.get("uuid", ""), each.meaning)}
            for each in troubles + health.of_reading(reading, {})
        ]
        gpus.append(gpu)
    return gpus


def _cell(value: Any) -> str:
    return ", ".join(value) or "no" if isinstance(value, list) else str(value)


if __name__ == "__main__":
    run_command(main)
