"""``python -m pipeline.status RUN``: every stage's state, reason and progress, from the run's own files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.chain import Chain
from pipeline.errors import run_command
from pipeline.rundir import RunDir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args()
    found = survey(RunDir(arguments.run))
    if arguments.json:
        print(json.dumps({"stages": found}))
        return 0
    for row in found:
        duration = f"{row['duration_s']:.1f} s" if "duration_s" in row else ""
        print(f"{row['name']:12s} {row['state']:10s} {duration:>10s}  {row.get('reason', '')}".rstrip())
    return 0


def survey(run: RunDir) -> list[dict[str, Any]]:
    """One row for each stage: name, state (todo, waiting, running, done, failed, cancelled), reason, progress."""
    chain = Chain.of(run)
    todo, held = chain.todo(), run.is_held()
    return [state_of(chain, name, todo, held) for name in chain.stages]


def state_of(chain: Chain, name: str, todo: dict[str, str], held: bool) -> dict[str, Any]:
    folder, stage = chain.run.stage(name), chain.stages[name]
    row: dict[str, Any] = {"name": name, "state": "todo", "attempts": len(folder.attempts)}
    if name not in todo:
        return {**row, "state": "done", "duration_s": (folder.done or {}).get("duration_s", 0.0)}
    last = folder.attempts[-1] if folder.attempts and chain.is_current(name) else None
    verdict = last.verdict if last else None
    if verdict is None and last is not None and held and not (stage.always and chain.is_done(name)):
        row["state"] = "running"
        metrics = [line for line in folder.metrics() if "loss" in line]
        row.update(
            {
                key: metrics[-1][key]
                for key in ("step", "loss", "sequences_per_s", "tokens_per_s")
                if metrics and key in metrics[-1]
            }
        )
        row["reason"] = ", ".join(f"{key} {row[key]:.4g}" for key in ("step", "loss", "sequences_per_s") if key in row)
    elif held:
        pending = [need for need in stage.needs if need in todo]
        row.update(state="waiting", reason=f"waits for {', '.join(pending)}" if pending else "starts next")
    elif verdict is not None and verdict["code"] in (75, 130):
        row.update(state="cancelled", reason=verdict["line"])
    elif verdict is not None:
        row.update(state="failed", reason=f"exit {verdict['code']}: {verdict['line']}")
    else:
        row["reason"] = todo[name]
    return row


if __name__ == "__main__":
    run_command(main)
