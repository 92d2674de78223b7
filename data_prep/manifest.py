"""manifest.json of a data folder: every file with size and SHA-256, sealed by a digest of the manifest."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.publish import (
    SEAL,
    WRITE,
    file_sha256,
    is_sealed,
    json_sha256,
    open_plain,
    plain,
    publish_json,
    publish_sealed,
    remove_leftovers,
)

NAME = "manifest.json"
FORMAT = 1
MOST_BYTES = 1 << 26
OF_SET = {"seq_len": int, "vocab_size": int, "vocab_sha256": str, "seed": int, "special": dict}
OF_SHARD = {"file": str, "rows": int, "tokens": int, "bytes": int, "sha256": str}
TRUSTED_S = 7 * 86400.0
MADE_BY = "made_by"
RECIPE = "RECIPE_SHA256"  # names the digest of [data] of the recipe that a stage runs for, the same on every cluster
PACKAGES = (
    "bert-slurm-pipeline",
    "numpy",
    "h5py",
    "sentencex",
    "nltk",
    "tokenizers",
    "nanotoken",
    "pyarrow",
    "zstandard",
    "indexed_bzip2",
)


@dataclass(frozen=True)
class ShardFile:
    """One shard as its manifest lists it: ``rows`` samples, ``tokens`` in all of them, size and digest."""

    path: Path
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SampleSet:
    """The shards of one split of a samples folder, in the order of the manifest."""

    seq_len: int
    vocab_size: int
    vocab_sha256: str
    seed: int
    special: dict[str, int]
    shards: tuple[ShardFile, ...]
    sha256: str  # ``data_sha256`` of the manifest

    @property
    def rows(self) -> int:
        """Samples in all shards."""
        return sum(shard.rows for shard in self.shards)


def publish_manifest(folder: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as the sealed ``manifest.json`` of ``folder``, and beside it the versions and recipe it is of."""
    recipe = {"data_recipe_sha256": os.environ[RECIPE]} if RECIPE in os.environ else {}
    publish_sealed(folder / NAME, {**value, MADE_BY: {**recipe, **versions()}})


def finish(folder: Path, value: Mapping[str, Any]) -> None:
    """`publish_manifest`, and delete what is not in it: notes of finished files and leftovers of killed writers."""
    publish_manifest(folder, value)
    for path in folder.glob(".*.note"):
        path.unlink(missing_ok=True)
    remove_leftovers(folder)


def data_sha256(value: Mapping[str, Any]) -> str:
    """Identity of the data that a manifest lists: with other versions the same files are the same data."""
    return json_sha256({key: item for key, item in value.items() if key not in (SEAL, MADE_BY)})


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of what is installed of ``packages``."""
    from importlib import metadata  # not for everybody who reads a manifest: it brings e-mail and zip files with it

    installed = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``; DataError when it is missing, unreadable or does not match its seal."""
    path = folder / NAME
    try:
        with open_plain(path, MOST_BYTES) as file:
            value = json.loads(file.read())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the stage that makes this folder has not finished") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): run the stage that makes this folder again") from None
    if not is_sealed(value):
        raise DataError(f"{path} does not match its own digest: it was damaged or edited; run its stage again")
    return dict(value)


def file_entry(path: Path) -> dict[str, Any]:
    """``{"file", "bytes", "sha256"}`` of a file, for a manifest in the same folder."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def verify(folder: Path, entries: Iterable[Mapping[str, Any]], *, digests: bool = True) -> list[Path]:
    """Check that each entry's file is there with its size and, if asked, its SHA-256; return their paths.

    Raises DataError naming the first file that is missing, short, changed, or whose name leaves the folder.
    """
    paths = []
    for entry in entries:
        name = str(entry["file"])
        if Path(name).name != name or name == "..":
            raise DataError(f"{folder / NAME} names {name!r}: only plain file names of its own folder are allowed")
        path = folder / name
        verify_file(path, int(entry["bytes"]), str(entry["sha256"]) if digests else None)
        paths.append(path)
    return paths


def verify_file(path: Path, size: int, sha256: str | None) -> None:
    """Raise DataError unless ``path`` has ``size`` bytes and (unless None) this digest."""
    advice = "copy it again or run the stage that makes it again"
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing though its manifest lists it: {advice}") from None
    if actual != size:
        raise DataError(f"{path} has {actual} bytes, its manifest says {size}: {advice}")
    if sha256 is not None and (digest := file_sha256(path)) != sha256:
        raise DataError(f"{path} has SHA-256 {digest[:12]}.., its manifest says {sha256[:12]}..: {advice}")


def load(folder: Path, split: str) -> SampleSet:
    """The ``"train"`` or ``"test"`` shards of a samples folder; names and sizes are checked, contents not.

    Raises DataError for another format, a missing key or file, a wrong size.
    """
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder / NAME} has format {manifest.get('format')}, this version reads {FORMAT}")
    try:
        entries = [_typed(entry, OF_SHARD) for entry in manifest["shards"] if entry["split"] == split]
        facts = _typed(manifest, OF_SET)
        special = _typed(facts["special"], dict.fromkeys(("mask", *facts["special"]), int))
        if not (0 < facts["vocab_size"] <= 1 << 31 and all(0 <= n < facts["vocab_size"] for n in special.values())):
            raise ValueError(f"its special tokens, {special}, lie outside of its {facts['vocab_size']} tokens")
        shards = tuple(
            ShardFile(path, entry["rows"], entry["tokens"], entry["bytes"], entry["sha256"])
            for path, entry in zip(verify(folder, entries, digests=False), entries, strict=True)
        )
        return SampleSet(**facts, shards=shards, sha256=data_sha256(manifest))
    except KeyError as error:
        raise DataError(f"{folder / NAME} lacks {error}: it is not the manifest of a samples folder") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / NAME} is not the manifest of a samples folder: {error}") from None


def _typed(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The members that ``kinds`` names; KeyError for one that is missing, TypeError for one of another type."""
    for key, kind in kinds.items():
        if type(values[key]) is not kind:
            raise TypeError(f"{key} is {str(values[key])[:40]!r}, no {kind.__name__}")
    return {key: values[key] for key in kinds}


def load_verified(folder: Path, split: str) -> SampleSet:
    """As ``load``, and the SHA-256 of every shard is compared, before anything parses its content."""
    samples = load(folder, split)
    for shard in samples.shards:
        verify_file(shard.path, shard.bytes, shard.sha256)
    return samples


def verify_share(samples: SampleSet, record: Path, *, rank: int = 0, ranks: int = 1) -> int:
    """Compare the SHA-256 of this rank's share of the shards; all ranks together verify each file once.

    What was verified is written to ``record/SHARD.json``. A later start reads the records of its own share, with any
    number of ranks, and trusts them for `TRUSTED_S` seconds where inode, size and time of change are the same. Every
    rank must have returned before any uses the samples. Returns how many files were read. Raises DataError as
    ``verify_file``.
    """
    from data_prep.fanout import shares  # here for those who only read a manifest: it brings multiprocessing with it

    read = 0
    with suppress(OSError):
        record.mkdir(exist_ok=True)
    for index in shares([shard.bytes for shard in samples.shards], ranks)[rank]:
        shard = samples.shards[index]
        status, on_record = shard.path.stat(), record / f"{shard.path.name}.json"
        now = {
            "sha256": shard.sha256,
            "inode": status.st_ino,
            "bytes": status.st_size,
            "changed_ns": status.st_mtime_ns,
        }
        if not _is_trusted(on_record, now):
            verify_file(shard.path, shard.bytes, shard.sha256)
            read += 1
            # lost or cut short, the next start verifies again: no reason to end or to wait
            with suppress(OSError), os.fdopen(plain(on_record, WRITE), "w") as file:
                json.dump({**now, "when": time.time()}, file)
    return read


def _is_trusted(on_record: Path, now: Mapping[str, Any]) -> bool:
    """Whether the record says ``now``, not too long ago. What is no small file is no record, and not waited for."""
    try:
        with open_plain(on_record, 4096) as file:
            row = json.loads(file.read())
        age_s = time.time() - float(row.pop("when"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return bool(0 <= age_s < TRUSTED_S and row == now)


def note(path: Path, identity: str, facts: Mapping[str, Any]) -> None:
    """Beside a finished file of an unfinished stage: from which ``identity`` of inputs and settings it came."""
    publish_json(_note_path(path), {"identity": identity, "bytes": path.stat().st_size, "facts": facts})


def noted(path: Path, identity: str) -> dict[str, Any] | None:
    """Facts of ``path`` if an earlier, killed try finished it from the same ``identity``; else None."""
    try:
        with open_plain(_note_path(path), MOST_BYTES) as file:
            note = json.loads(file.read())
        whole = note["identity"] == identity and note["bytes"] == path.stat().st_size
        return dict(note["facts"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def identity_of(**settings: Any) -> str:
    """Digest of the settings and input digests that decide a file's bytes."""
    return json_sha256(settings)


def _note_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.note")
