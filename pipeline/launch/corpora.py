"""The files that a recipe reads: where they are, which they are, and whether the disk holds what is made of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.dumpfile import STREAM_BYTES_PER_H
from pipeline.config import TASKS, Recipe
from pipeline.errors import ConfigError, StorageError
from pipeline.launch.request import Request
from pipeline.run.chain import Chain
from pipeline.stage import Stage, function_of
from pipeline.stages import Command
from pipeline.words import absent_model, size

MARKUP = {".bz2": 4.2, ".gz": 3.3}  # bytes on the disk to bytes of markup
EXTRACT, SHARD, SAMPLES = 14e6, 16e6, 22e6  # bytes a second of a core (docs/data.md); SAMPLES with a dupe_factor of 5
VOCAB_S, WORKER_MB = 120, 300
FEW_FILES = 1000  # of a folder: so many are opened to see whether one changed


def missing(request: Request, wanted: Sequence[Stage] = ()) -> list[Path]:
    """Corpora that are not there, and that the run does not know either or a ``wanted`` stage is to read."""
    known = request.stored.get("corpora", {}).keys() - {name for stage in wanted for name in stage.corpora}
    names = [name for name in corpora_of(request.recipe) if name not in known]
    return [path for name in names if not (path := request.data_dir / name).exists()]


def check(request: Request, chain: Chain) -> None:
    """Raise everything that is wrong with files, before anything is written: one fault as itself, several as lines of a
    ConfigError.

    First those that are missing, then what stages that are still to be made say of what is inside; at last StorageError
    for too little space.
    """
    todo = chain.todo(chain.with_followers(request.remake))
    wanted = [chain.stages[name] for name in todo if not request.stages or name in request.stages]
    hint = "run make fetch, or " if request.local else ""
    faults: list[Exception] = [
        ConfigError(f"{path}: no such file; {hint}name the folder that has it with --data DIR")
        for path in missing(request, wanted)
    ]
    faults += unfit(request, wanted)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(map(str, faults))))
    needed, place = estimated_bytes(request.recipe, request.data_dir), request.run.path
    parent = next(path for path in [place, *place.resolve().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(f"{parent}: about {size(needed)} are needed for this run, {size(free)} are free")


def unfit(request: Request, wanted: Sequence[Stage]) -> Iterator[Exception]:
    """What the stages' own checks say of the files that are here; each set of files is asked about once."""
    asked = set()

    def here(text: str) -> Path:
        return request.data_dir / text.removeprefix("data:")

    for stage in wanted:
        inputs: dict[str, Any] = {
            key: here(text) if isinstance(text, str) else tuple(map(here, text))
            for key, text in stage.inputs.items()
            if not isinstance(text, str) or text.startswith("data:")
        }
        paths = [path for given in inputs.values() for path in (given if isinstance(given, tuple) else [given])]
        if not stage.check or (stage.check, *inputs.values()) in asked:
            continue
        asked.add((stage.check, *inputs.values()))
        if not all(path.exists() for path in paths):  # only weights to start from are no corpus of the run
            if "start" in inputs and not inputs["start"].exists():
                name = Path(str(stage.inputs["start"]).removeprefix("data:"))
                yield ConfigError(f"{absent_model(name, f'{stage.name}.start')}; looked for in {request.data_dir}")
            continue
        try:
            function_of(stage.check)(**stage.config, **inputs)
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            yield error


def corpora_of(recipe: Recipe | Command) -> list[str]:
    """Names of all files under --data that the recipe reads."""
    if isinstance(recipe, Command):
        return []
    data, tasks = recipe.data, [getattr(recipe, name) for name in TASKS]
    names = [*data.corpora, *([data.vocabulary] if data.vocabulary else [])]
    names += [phase.samples for phase in recipe.phases.values() if phase.samples]
    return list(dict.fromkeys([*names, *(name for task in tasks if task for name in (task.train, task.eval))]))


def estimated_bytes(recipe: Recipe | Command, data_dir: Path) -> int:
    """Rough need: clean text twice (documents, shards), samples of each length, three checkpoints a phase."""
    if isinstance(recipe, Command):
        return 0  # nobody knows
    text = text_bytes(recipe, data_dir)
    lengths = {phase.seq_len for phase in recipe.phases.values()}
    given = sum(size_of(data_dir / phase.samples) for phase in recipe.phases.values() if phase.samples)
    samples = given + len(lengths) * recipe.data.dupe_factor * text / 4.4 * 2.2  # characters per token, bytes per token
    model = recipe.model
    parameters = recipe.data.vocab_size * model.hidden_size + model.num_hidden_layers * (
        4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    )
    return int(2 * text + samples + (recipe.train.keep_checkpoints + 1) * len(recipe.phases) * 12 * parameters)


def text_bytes(recipe: Recipe, data_dir: Path) -> float:
    """Of clean text in all corpora, at most."""
    grows = {".bz2": 2.5, ".gz": 2.0, ".xml": 0.6}  # compressed or marked-up bytes to bytes of clean text
    return sum(size_of(data_dir / name) * grows.get(Path(name).suffix, 1.0) for name in recipe.data.corpora)


def core_hours(recipe: Recipe, data_dir: Path) -> float:
    """Of the data stages, from the files under ``data_dir`` to the samples of every length."""
    sizes = {Path(name): size_of(data_dir / name) for name in recipe.data.corpora}
    packed = sum(size for path, size in sizes.items() if path.suffix == ".bz2")
    markup = sum(size * MARKUP.get(path.suffix, 1.0) for path, size in sizes.items())
    lengths = len({phase.seq_len for phase in recipe.phases.values()})
    a_byte = 1 / SHARD + lengths * (2 + recipe.data.dupe_factor) / 7 / SAMPLES
    seconds = markup / EXTRACT + text_bytes(recipe, data_dir) * a_byte + (0 if recipe.data.vocabulary else VOCAB_S)
    return packed / STREAM_BYTES_PER_H + seconds / 3600


def size_of(path: Path) -> int:
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size if path.exists() else 0


def identity_of(path: Path) -> dict[str, Any]:
    """What tells one corpus from another without reading 20 GB: size, and a digest of first and last MiB.

    For a folder: number of files, bytes, a digest of names and sizes, and one of the ends of up to `FEW_FILES` files.
    """
    if path.is_dir():
        files = sorted(
            (str(inner.relative_to(path)), inner.stat().st_size) for inner in path.rglob("*") if inner.is_file()
        )
        digest = hashlib.sha256(repr(files).encode()).hexdigest()
        identity = {"files": len(files), "bytes": sum(size for _, size in files), "digest": digest[:16]}
        if len(files) <= FEW_FILES:
            ends = b"".join(hashlib.sha256(_ends(path / name, 1 << 16)).digest() for name, _ in files)
            identity["contents"] = hashlib.sha256(ends).hexdigest()[:16]
        return identity
    if not path.is_file():
        raise ConfigError(f"{path}: neither a file nor a folder")  # opening a pipe would wait for ever
    return {"bytes": path.stat().st_size, "digest": hashlib.sha256(_ends(path, 1 << 20)).hexdigest()[:16]}


def _ends(path: Path, size: int) -> bytes:
    """The first and the last ``size`` bytes of a file."""
    with open(path, "rb") as file:
        first = file.read(size)
        file.seek(max(size, path.stat().st_size - size))
        return first + file.read(size)


def identities(request: Request) -> dict[str, Any]:
    """Identity of each corpus; what the run knows of it, or nothing, where the file is not here."""
    known, folder = request.stored.get("corpora", {}), request.data_dir
    return {
        name: identity_of(folder / name) if (folder / name).exists() else known.get(name)
        for name in corpora_of(request.recipe)
    }
