"""One checkpoint on disk: safetensors files under one JSON manifest, committed by one rename and verified before use.

A folder ``STAGE/attempts/NNNN/step-SSSSSSSS`` is a checkpoint when its ``manifest.json`` is there; the manifest
names every file with size and SHA-256 and carries a SHA-256 of itself. No pickle, and no torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.publish import SEAL, file_sha256, is_sealed, open_plain, publish_sealed, sync_folder
from pipeline.bert.tensor_file import write_safetensors
from pipeline.errors import CheckpointError, InUseError, NumericalError, StorageError
from pipeline.run.files import MOST_JSON_BYTES, read_json
from pipeline.run.rundir import describe_owner

Arrays = Mapping[str, NDArray[Any]]
FORMAT = 1
MANIFEST, WEIGHTS, OPTIMIZER = "manifest.json", "weights.safetensors", "optimizer.safetensors"
FIELDS: dict[str, type] = {
    "format": int,
    "stage": str,
    "attempt": int,
    "step": int,
    "sample_position": int,
    "permanent": bool,
    "identity": dict,
    "model": dict,
    "files": dict,
    "digest": str,
    "saved_unix_s": float,
}
PIECE = 1 << 20  # elements looked at once: temporaries stay small beside a model


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``weights`` and ``optimizer`` hold what ``read`` was asked to load."""

    folder: Path
    stage: str
    attempt: int
    step: int
    sample_position: int
    identity: dict[str, Any]
    model: dict[str, Any]
    digest: str
    permanent: bool
    best: dict[str, Any] | None
    weights: dict[str, NDArray[Any]]
    optimizer: dict[str, NDArray[Any]]


def step_folder(attempt_dir: Path, step: int) -> Path:
    return attempt_dir / f"step-{step:08d}"


def label(folder: Path) -> str:
    """How messages name a checkpoint: by step and attempt where its folders have our names."""
    step, attempt = folder.name.removeprefix("step-"), folder.parent.name
    if step.isdecimal() and attempt.isdecimal():
        return f"checkpoint step {int(step)} (attempt {int(attempt)})"
    return f"checkpoint {folder}"


def save(
    attempt_dir: Path,
    *,
    stage: str,
    attempt: int,
    step: int,
    sample_position: int,
    weights: Arrays,
    optimizer: Arrays,
    identity: Mapping[str, Any],
    model: Mapping[str, Any],
    permanent: bool = False,
    best: Mapping[str, Any] | None = None,
    owner: Mapping[str, Any] | None = None,
) -> Path:
    """Write one checkpoint and return its folder; a kill at any moment leaves the older ones as they were.

    ``permanent`` exempts it from rotation, and ``best`` (``attempt``, ``step``, ``value``) that one. A checkpoint of
    this step that is there already is kept. Raises
    NumericalError for a tensor that is not finite, StorageError when the file system refuses (what was written
    is removed), InUseError when a newer attempt has begun or the attempt's ``owner_of`` is not ``owner`` any more.
    """
    folder = step_folder(attempt_dir, step)
    fields = {"stage": stage, "attempt": attempt, "step": step, "sample_position": sample_position}
    tensors = {WEIGHTS: weights, OPTIMIZER: optimizer}
    for group in tensors.values():
        _refuse_non_finite(group, f"step {step} of {stage}")
    whole = True  # nothing to remove yet
    try:
        _fence(attempt_dir, owner)
        if whole := is_whole(folder):
            if permanent:
                publish_sealed(folder / MANIFEST, {**read_manifest(folder), "permanent": True})
            return folder
        folder.mkdir(exist_ok=True)
        sync_folder(attempt_dir)
        files = {name: write_safetensors(folder / name, group) for name, group in tensors.items()}
        _fence(attempt_dir, owner)
        manifest = {
            **fields,
            "permanent": permanent,
            "identity": dict(identity),
            "model": dict(model),
            "files": files,
            "digest": _digest(files),
            "saved_unix_s": round(time.time(), 3),
            **({"best": dict(best)} if best else {}),
        }
        publish_sealed(folder / MANIFEST, {"format": FORMAT, **manifest})
    except (OSError, StorageError, CheckpointError) as error:
        if not whole:
            remove(folder)
        with suppress(StorageError):
            _fence(attempt_dir, owner)  # a newer attempt may have taken the files away
        needed = sum(array.nbytes for group in tensors.values() for array in group.values())
        why = f"{error.strerror} ({error.filename or folder})" if isinstance(error, OSError) else str(error)
        raise StorageError(
            f"checkpoint step {step} of {stage} was not saved: {why}; "
            f"it needs {needed / 1e6:.1f} MB, {_free_mb(attempt_dir)} are free; the older checkpoints stay"
        ) from error
    except InUseError:
        if not whole:
            remove(folder)
        raise
    # A newer attempt that began before this line may have looked before the commit: it does not know this step,
    # and this attempt must not go on. One that begins after this line finds it.
    _fence(attempt_dir, owner)
    return folder


def read(folder: Path, *, tensors: Iterable[str] = ("weights", "optimizer")) -> Checkpoint:
    """Read a checkpoint, loading only the named ``tensors``; their files are verified before they are parsed.

    Raises CheckpointError naming the file and both hashes (or sizes) where disk and manifest disagree or a file
    is missing, StorageError where the file system does not give it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    manifest = read_manifest(folder)
    loaded: dict[str, dict[str, NDArray[Any]]] = {"weights": {}, "optimizer": {}}
    for kind in tensors:
        name = f"{kind}.safetensors"
        _verify_file(folder, name, manifest)
        try:
            with _reading(folder, name):
                loaded[kind] = load_file(folder / name)
        except SafetensorError as error:
            raise CheckpointError(f"{label(folder)}: {name} cannot be read: {error}") from error
    kept = {key: manifest[key] for key in FIELDS if key not in ("format", "files", "saved_unix_s")}
    kept["best"] = manifest.get("best")
    return Checkpoint(folder=folder, weights=loaded["weights"], optimizer=loaded["optimizer"], **kept)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless the manifest and every file of the checkpoint are what was written."""
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        _verify_file(folder, name, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked against its own hash, our format and the folder's name."""
    with _reading(folder, MANIFEST), open_plain(folder / MANIFEST, MOST_JSON_BYTES) as file:
        content = file.read()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label(folder)}: {MANIFEST} cannot be read: {error}") from error
    if not is_sealed(manifest):
        fault = f"{MANIFEST} does not match its own digest"
    elif manifest.get("format") != FORMAT:
        fault = f"{MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}"
    elif {key: type(manifest.get(key)) for key in FIELDS} != FIELDS or not _names_files(manifest["files"]):
        fault = f"{MANIFEST} lacks fields that this version reads"
    elif folder.name != step_folder(folder.parent, manifest["step"]).name:
        fault = f"{MANIFEST} is that of step {manifest['step']}"
    else:
        return {key: value for key, value in manifest.items() if key != SEAL}
    raise CheckpointError(f"{label(folder)}: {fault}")


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """A file that is not there makes a bad checkpoint; one that cannot be read now may be good (StorageError)."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{label(folder)}: {name} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"{label(folder)}: {name} cannot be read: {error.strerror or error}") from error


def is_whole(folder: Path) -> bool:
    """Manifest sound and files of the right size: enough for the process that wrote and hashed them.

    Raises StorageError where the file system does not say.
    """
    try:
        with _reading(folder, "a file"):
            files = read_manifest(folder)["files"]
            return all((folder / name).stat().st_size == files[name]["bytes"] for name in files)
    except CheckpointError:
        return False


def is_permanent(folder: Path) -> bool:
    """Whether this is a whole checkpoint that rotation leaves alone."""
    try:
        return is_whole(folder) and bool(read_manifest(folder)["permanent"])
    except CheckpointError:  # a newer attempt has just deleted it
        return False


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: whatever a kill leaves is no checkpoint any more."""
    with suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of all names, dtypes, shapes and values; equal states have equal files (write_safetensors)."""
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _names_files(files: dict[str, Any]) -> bool:
    shapes = [{key: type(value) for key, value in entry.items()} for entry in files.values() if type(entry) is dict]
    return files.keys() == {WEIGHTS, OPTIMIZER} and shapes == [{"bytes": int, "sha256": str}] * 2


def _verify_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    wanted = manifest["files"][name]
    with _reading(folder, name):
        size = (folder / name).stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(f"{label(folder)}: {name} has {size} bytes, manifest says {wanted['bytes']}")
        actual = file_sha256(folder / name)
    if actual != wanted["sha256"]:
        raise CheckpointError(
            f"{label(folder)}: {name} has SHA-256 {actual[:8]}.., manifest says {wanted['sha256'][:8]}.."
        )


def owner_of(attempt_dir: Path) -> dict[str, Any] | None:
    """What the attempt's folder says about who began it; None where it says nothing."""
    return read_json(attempt_dir / "owner.json")


def _fence(attempt_dir: Path, owner: Mapping[str, Any] | None) -> None:
    """Raise InUseError when an attempt with a higher number exists, or this folder is another start's by now.

    The second happens when the stage's folder was moved aside and begun anew.
    """
    number = int(attempt_dir.name) if attempt_dir.name.isdecimal() else None
    try:
        numbers = [int(path.name) for path in attempt_dir.parent.glob("[0-9]*") if path.name.isdecimal()]
        newest = max(numbers, default=0)
        holder = owner_of(attempt_dir) if owner is not None else None
        successor = owner_of(attempt_dir.with_name(f"{newest:04d}"))
    except OSError as error:
        raise StorageError(f"{attempt_dir} cannot be read: {error.strerror or error}") from error
    if number is not None and newest > number:
        raise InUseError(f"attempt {newest} ({describe_owner(successor)}) has taken over from attempt {number}")
    if holder != owner:
        raise InUseError(
            f"{attempt_dir} was moved aside or belongs to another start ({describe_owner(holder)}); this one stops"
        )


def _refuse_non_finite(tensors: Arrays, what: str) -> None:
    for name, array in tensors.items():
        if array.dtype.kind != "f":
            continue
        flat = array.reshape(-1)
        if not all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, len(flat), PIECE)):
            raise NumericalError(f"{what}: {name} is not finite; nothing was saved")


def _free_mb(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        return "unknown MB"
