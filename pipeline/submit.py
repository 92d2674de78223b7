"""``python -m pipeline.submit``: make or continue a run and send its chain to this machine or to Slurm."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from data_prep.publish import publish_json, publish_text
from pipeline import batch
from pipeline.chain import Chain
from pipeline.config import Recipe, load_profile, load_recipe, restore
from pipeline.errors import ConfigError, SlurmFault, StorageError, run_command
from pipeline.local import run_chain
from pipeline.rundir import RunDir, read_json
from pipeline.stages import TASKS
from pipeline.worker import made_with
from slurm.profile import Profile


def main() -> int:
    arguments = parse()
    run = RunDir(arguments.run)
    recipe, profile = configure(run, arguments)
    check_disk(run, recipe, profile, arguments)
    run.path.mkdir(parents=True, exist_ok=True)
    with run.held():
        begin(run, recipe, profile, arguments)
        chain = Chain.of(run)
        todo = chain.select(arguments.stages.split(",")) if arguments.stages else chain.todo()
        if not todo:
            print(f"{run.path}: everything is done, nothing to do")
            show_results(run)
            return 0
        for name, why in todo.items():
            print(f"  will run {name:12s} {why}")
        if profile.runner != "local":
            raise SlurmFault(
                f"cluster profile {profile.name!r} sends jobs to Slurm, which this version does not do "
                f"yet; use --cluster local"
            )
        code = run_chain(run, todo, profile.processes, profile.threads)
    if code == 0:
        show_results(run)
    return code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.submit", description=__doc__)
    parser.add_argument(
        "--recipe", help="what to train: a name in pipeline/recipes or a .toml file (default: the run's)"
    )
    parser.add_argument(
        "--cluster",
        help="how the site runs jobs: a name in slurm/profiles or a .toml file (default: the run's)",
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory: everything of this training")
    parser.add_argument(
        "--data", type=Path, help="folder of the corpora that the recipe names (default: the profile's)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes for pretraining; the global batch stays the same")
    parser.add_argument("--processes", type=int, help="local runner: ranks in training and data workers")
    parser.add_argument("--stages", help="run only these, separated by commas")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a recipe value, such as phase1.steps=100",
    )
    return parser.parse_args()


def configure(run: RunDir, arguments: argparse.Namespace) -> tuple[Recipe, Profile]:
    """Recipe and profile from the command line, else from the run."""
    stored = read_json(run.path / "run.json")
    if stored is None and (arguments.recipe is None or arguments.cluster is None):
        raise ConfigError(f"{run.path} is not a run yet: name a --recipe and a --cluster")
    origin = str(run.path / "run.json")
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe, arguments.settings)
    else:
        recipe = restore(Recipe, (stored or {})["recipe"], origin, arguments.settings)
    if arguments.cluster is not None:
        profile = load_profile(arguments.cluster)
    else:
        profile = restore(Profile, (stored or {})["profile"], origin)
    for flag in ("nodes", "processes"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} {value}: must be at least 1")
    if arguments.processes is not None:
        profile = dataclasses.replace(profile, processes=arguments.processes)
    return choose_micro_batches(recipe, profile, arguments.nodes, stored, arguments.settings), profile


def choose_micro_batches(
    recipe: Recipe, profile: Profile, nodes: int, stored: dict[str, Any] | None, settings: list[str]
) -> Recipe:
    """The recipe with each phase's micro_batch fixed: chosen when the run is created, kept afterwards."""
    for name in ("phase1", "phase2"):
        phase = getattr(recipe, name)
        kept = ((stored or {}).get("recipe", {}).get(name) or {}).get("micro_batch")
        if kept and not any(s.startswith(f"{name}.micro_batch=") for s in settings):
            chosen = min(kept, phase.global_batch)
        else:
            limit = micro_batch_limit(recipe, profile, name)
            chosen = batch.plan(phase.global_batch, limit, profile.ranks(nodes)).micro_batch
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(phase, micro_batch=chosen)})
    return recipe


def micro_batch_limit(recipe: Recipe, profile: Profile, phase_name: str) -> int:
    """The recipe's micro_batch limited by the profile's; ConfigError when neither names one."""
    key = f"{recipe.name}.{phase_name}.{recipe.train.precision}"
    given = [value for value in (getattr(recipe, phase_name).micro_batch, profile.micro_batch.get(key)) if value]
    if not given:
        raise ConfigError(
            f"no micro_batch for {key}: cluster profile {profile.name!r} has no such key in "
            f"[micro_batch]; add it, or give --set {phase_name}.micro_batch=N"
        )
    return min(given)


def check_disk(run: RunDir, recipe: Recipe, profile: Profile, arguments: argparse.Namespace) -> None:
    """Checks that need the disk, before anything is written."""
    data_dir = find_data_dir(run, profile, arguments)
    missing = [name for name in corpora_of(recipe) if not (data_dir / name).exists()]
    known = (read_json(run.path / "run.json") or {}).get("corpora", {})
    if missing := [name for name in missing if name not in known]:
        hint = "run make fetch, or " if profile.runner == "local" else ""
        raise ConfigError(
            "\n".join(
                f"{data_dir / name}: no such file; {hint}name the folder that has it with --data DIR"
                for name in missing
            )
        )
    needed = estimated_bytes(recipe, data_dir)
    parent = next(p for p in [run.path, *run.path.resolve().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            f"{parent}: about {needed / 1e9:.1f} GB are needed for this run, {free / 1e9:.1f} GB are free"
        )


def find_data_dir(run: RunDir, profile: Profile, arguments: argparse.Namespace) -> Path:
    if arguments.data is not None:
        return Path(arguments.data)
    return run.data_dir if run.exists and arguments.cluster is None else Path(profile.data_dir)


def corpora_of(recipe: Recipe) -> list[str]:
    """Names of all files under --data that the recipe reads."""
    data, tasks = recipe.data, [getattr(recipe, name) for name in TASKS]
    names = [*data.wikipedia, *data.books, *data.jsonl, *([data.vocab] if data.vocab else [])]
    return [*names, *(name for task in tasks if task for name in (task.train, task.eval))]


def estimated_bytes(recipe: Recipe, data_dir: Path) -> int:
    """Rough need: clean text twice (documents, shards), samples of both lengths, three checkpoints a phase."""
    grows = {".bz2": 2.5, ".gz": 2.0, ".xml": 0.6}  # compressed or marked-up bytes to bytes of clean text
    text = sum(
        size_of(data_dir / name) * grows.get(Path(name).suffix, 1.0)
        for name in (*recipe.data.wikipedia, *recipe.data.books, *recipe.data.jsonl)
    )
    samples = 2 * recipe.data.dupe_factor * text / 4.4 * 2.2  # characters per token, bytes per token
    model = recipe.model
    parameters = recipe.data.vocab_size * model.hidden_size + model.num_hidden_layers * (
        4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    )
    return int(2 * text + samples + (recipe.train.keep_checkpoints + 1) * 2 * 12 * parameters)


def size_of(path: Path) -> int:
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size if path.exists() else 0


def identity_of(path: Path) -> dict[str, Any]:
    """What tells one corpus from another without reading 20 GB: size, and a digest of first and last MiB.

    For a folder: number of files, bytes, and a digest of the names and sizes.
    """
    if path.is_dir():
        files = sorted(
            (str(inner.relative_to(path)), inner.stat().st_size) for inner in path.rglob("*") if inner.is_file()
        )
        digest = hashlib.sha256(repr(files).encode()).hexdigest()
        return {"files": len(files), "bytes": sum(size for _, size in files), "digest": digest[:16]}
    size, mib = path.stat().st_size, 1 << 20
    with open(path, "rb") as file:
        ends = file.read(mib)
        file.seek(max(mib, size - mib))
        ends += file.read(mib)
    return {"bytes": size, "digest": hashlib.sha256(ends).hexdigest()[:16]}


def begin(run: RunDir, recipe: Recipe, profile: Profile, arguments: argparse.Namespace) -> None:
    """Write run.json and what is needed to repeat the run."""
    data_dir = find_data_dir(run, profile, arguments)
    known = (read_json(run.path / "run.json") or {}).get("corpora", {})
    corpora = {
        name: identity_of(data_dir / name) if (data_dir / name).exists() else known[name] for name in corpora_of(recipe)
    }
    if not run.model.is_symlink():
        run.model.symlink_to("stages/export/model")
    commit, diff = code_version()
    publish_text(run.path / "code.diff", diff)
    publish_json(
        run.path / "run.json",
        {
            "format": 1,
            "recipe": dataclasses.asdict(recipe),
            "profile": dataclasses.asdict(profile),
            "nodes": arguments.nodes,
            "corpora": corpora,
            "data_dir": os.path.relpath(data_dir.resolve(), run.path.resolve()),
            "versions": made_with(),
            "commit": commit,
        },
    )
    run.event(
        "submitted",
        recipe=recipe.name,
        cluster=profile.name,
        nodes=arguments.nodes,
        commit=commit,
        settings=arguments.settings,
    )


def code_version() -> tuple[str, str]:
    """Commit of this checkout and the diff against it; empty strings outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""

    return git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")


def show_results(run: RunDir) -> None:
    """Scores of the fine-tuning stages and where the report lies."""
    for name in TASKS:
        found = read_json(run.stage(name).path / "scores.json")
        if found:
            scores = ", ".join(f"{key} {value:.4g}" for key, value in found["scores"].items())
            print(f"{found['dataset']}: {scores} ({found['examples']} examples)")
    if run.report.exists():
        print(f"report: {run.report}")


if __name__ == "__main__":
    run_command(main)
