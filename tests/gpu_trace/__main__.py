"""Every bar on the way to a GPU that can be held without one, as a table: ``python tests/gpu_trace``.

Counts come from fake CUDA tensors and need g++; the overlap of host and device is timed, on an idle machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # instead of this folder, whose names are too common

from gpu_trace.bars import Bar, bars, seen  # noqa: E402

from pipeline.bench.feed import MICRO_BATCH_MS, OVERLAP, STEP_MS  # noqa: E402
from support.layers import kernels_of_a_layer  # noqa: E402


def main() -> int:
    """Print the table; 1 where a bar does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        found = bars(seen(Path(folder)))
    found.append(Bar("layer: kernels that the compiler makes, forward and backward", kernels_of_a_layer(), 50))
    found += timed()
    for bar in found:
        print(f"{'ok' if bar.found <= bar.most else 'MISSED':6s} {bar.found:8.3f} {bar.most:8.3f}  {bar.what}")
    return int(any(bar.found > bar.most for bar in found))


def timed() -> list[Bar]:
    """What `bench feed` finds on this machine."""
    command = [sys.executable, "-m", "pipeline.bench", "feed", "--json"]
    figures = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    found = []
    for row in figures["host"]:
        found.append(Bar(f"host: ms of a step at {row['world']:,} ranks", row["step_ms"], STEP_MS))
        found.append(Bar(f"host: ms of a micro-batch at {row['world']:,} ranks", row["micro_batch_ms"], MICRO_BATCH_MS))
    for row in figures["overlap"]:
        count = row["micro_batches"]
        found.append(Bar(f"loop's time by the device's, {count} micro-batches a step", row["ratio"], OVERLAP[count]))
    return found


if __name__ == "__main__":
    sys.exit(main())
