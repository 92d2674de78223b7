"""The fault table: runs every injection and prints one Markdown table. ``python tests/faults --to docs/faults.md``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # instead of this folder, whose names are too common

from faults.table import Row, scratch  # noqa: E402

MODULES = ("checkpoints", "checkpoints_damage", "checkpoints_full", "fencing", "identity", "histories", "ranks",
           "finetuning")  # fmt: skip
PACKAGES = ("torch", "numpy", "safetensors", "h5py")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="share of the full counts (default 1.0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these injections or modules")
    parser.add_argument("--to", type=Path, metavar="FILE", help="also write the table there as Markdown")
    options = parser.parse_args()
    chosen = [
        (module, name)
        for module in (importlib.import_module(f"faults.{name}") for name in MODULES)
        for name in module.INJECTIONS
        if options.only is None or {name, module.__name__.removeprefix("faults.")} & set(options.only)
    ]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: there is no such injection or module")
    text, failures, begun = [heading()], 0, time.monotonic()
    last: ModuleType | None = None
    for module, name in chosen:
        began = time.monotonic()
        with scratch() as folder:
            rows = module.INJECTIONS[name](Path(folder), options.scale)
        failures += sum(row.failures for row in rows)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        for row in rows:
            for line in row.failed:
                print(f"  {row.fault}: {line}", file=sys.stderr, flush=True)
        if module is not last:
            text.append(section(module))
            last = module
        text.extend(map(line_of, rows))
    text.append(f"\nAll of it took {(time.monotonic() - begun) / 60:.1f} minutes.\n")
    page = "\n".join(text)
    print(page)
    if options.to is not None:
        options.to.write_text(page, encoding="utf-8")
    return 1 if failures else 0


def heading() -> str:
    """Command, date, versions and machine."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            "# What was broken on purpose, and what came of it\n",
            f"Written by `python tests/faults {' '.join(sys.argv[1:])}`".rstrip() + f" on {time.strftime('%Y-%m-%d')}.",
            f"Python {platform.python_version()}, {versions}; {platform.system()} {platform.release()}, "
            f"{os.cpu_count()} cores ({cpu or platform.machine()}), {memory_gb:.0f} GiB.",
            "`make test` runs a tenth of each count. *Lost* is the most optimizer steps of any trial that had to be "
            "computed again.",
        ]
    )


def lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def section(module: ModuleType) -> str:
    """The heading of a module's rows: its docstring, first line as title, and what else it has to say."""
    title, _, prose = (module.__doc__ or "").strip().partition("\n")
    more = module.prose() if hasattr(module, "prose") else ""
    body = "\n\n".join(part.strip() for part in (prose, more) if part.strip())
    return f"\n## {title.rstrip('.')}\n\n{body}\n\n| fault | trials | failures | lost | note |\n|---|---|---|---|---|"


def line_of(row: Row) -> str:
    lost = "–" if row.lost_steps is None else str(row.lost_steps)
    return f"| {row.fault} | {row.trials} | {row.failures} | {lost} | {row.note} |"


if __name__ == "__main__":
    sys.exit(main())
