"""``python -m pipeline.plan``: what any number of nodes means in micro-batches and accumulation. Sends nothing."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pipeline import batch
from pipeline.config import Recipe, load_profile, load_recipe
from pipeline.errors import ConfigError, run_command
from pipeline.submit import micro_batch_limit
from slurm.profile import Profile

COLUMNS = (
    "phase",
    "nodes",
    "world_size",
    "global_batch",
    "rank_batch",
    "micro_batch",
    "accumulation",
    "balance",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a name in pipeline/recipes or a .toml file")
    parser.add_argument("--cluster", required=True, help="a name in slurm/profiles or a .toml file")
    parser.add_argument("--nodes", default="1", help="node counts: 1,2,4 or 1-64 (default 1)")
    parser.add_argument("--precision", help="short for --set train.precision=…")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--ranks", action="store_true", help="with --json: the batch of every rank")
    arguments = parser.parse_args()
    settings = arguments.settings + ([f'train.precision="{arguments.precision}"'] if arguments.precision else [])
    recipe, profile = load_recipe(arguments.recipe, settings), load_profile(arguments.cluster)
    found = rows(recipe, profile, node_counts(arguments.nodes), arguments.ranks)
    if arguments.json:
        print(json.dumps({"rows": found}))
    else:
        show(found)
    return 0


def node_counts(text: str) -> list[int]:
    """``1,2,4-6`` as a list of node counts."""
    counts: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ConfigError(f"--nodes {text}: write it as 4, 1,2,4 or 1-64")
        counts += range(int(first), int(last if dash else first) + 1)
    if not counts or min(counts) < 1 or max(counts) > 100_000:
        raise ConfigError(f"--nodes {text}: needs counts from 1 to 100000")
    return counts


def rows(recipe: Recipe, profile: Profile, nodes: list[int], with_ranks: bool = False) -> list[dict[str, Any]]:
    """One row for each phase and node count; ``rank_batch`` and ``accumulation`` are those of the busiest rank."""
    found = []
    for name in ("phase1", "phase2"):
        limit = micro_batch_limit(recipe, profile, name)
        for count in nodes:
            plan = batch.plan(getattr(recipe, name).global_batch, limit, profile.ranks(count))
            row: dict[str, Any] = {
                "phase": name,
                "nodes": count,
                "world_size": plan.world_size,
                "global_batch": plan.global_batch,
                "rank_batch": max(plan.rank_batches),
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                "balance": round(plan.balance, 4),
            }
            if (better := batch.better_micro_batch(plan)) is not None:
                row["better_micro_batch"] = better
            if with_ranks:
                row["rank_batches"] = plan.rank_batches
            found.append(row)
    return found


def show(found: list[dict[str, Any]]) -> None:
    print("  ".join(f"{name:>12s}" for name in COLUMNS))
    for row in found:
        better = row.get("better_micro_batch")
        hint = f"  --set {row['phase']}.micro_batch={better} would balance the ranks" if better else ""
        print("  ".join(f"{row[name]:>12}" for name in COLUMNS) + hint)
    print(
        "world_size x rank_batch x steps is the same training for every row: "
        "rank_batch = micro_batch x accumulation, global_batch never changes"
    )


if __name__ == "__main__":
    run_command(main)
