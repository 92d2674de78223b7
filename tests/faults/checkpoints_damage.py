"""Damaged checkpoint files: single-bit flips and truncations.

Every trial damages one file (weights, optimizer or manifest in turn) of the newest checkpoint, or one file of every
checkpoint. A failure is: damaged values that are used, an older checkpoint taken without naming the damaged one and
its file, or no exit code 4 where none is left. A flip that JSON reads as the same text is no damage.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from data_prep.publish import publish_json
from faults import training, zygote
from faults.checkpoints import STAGE, fields, same, state
from faults.table import Injection, Row, share, tried
from pipeline.engine.checkpoint import newest_verified, save
from pipeline.errors import CheckpointError
from pipeline.run.rundir import RunDir

Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, dice: random.Random) -> bytes:
    """One bit is another."""
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def truncated(content: bytes, dice: random.Random) -> bytes:
    """Cut at any byte, at the beginning, or one byte short."""
    return content[: dice.choice((0, len(content) - 1, *(dice.randrange(len(content)) for _ in range(6))))]


KINDS: dict[str, tuple[Damage, int]] = {"1 bit flipped": (flipped, 1000), "truncated": (truncated, 200)}


def damage_files(folder: Path, scale: float) -> list[Row]:
    """The newest of two checkpoints damaged: the older is taken and the file named."""
    stage = folder / "stages" / STAGE
    older, newest = saved(stage)
    rows = []
    for name, (damage, count) in KINDS.items():
        trials = [functools.partial(newest_is_bad, stage, damage, number) for number in range(share(count, scale))]
        rows.append(tried(f"newest checkpoint: {name}", trials, "the older one taken, the damaged file named"))
        trials = [
            functools.partial(all_are_bad, stage, (older, newest), damage, number)
            for number in range(share(count // 10, scale))
        ]
        rows.append(tried(f"every checkpoint: {name}", trials, "exit 4, never a start from nothing"))
    return rows


def saved(stage: Path) -> tuple[Path, Path]:
    """A stage with one attempt and two checkpoints."""
    attempt = stage / "attempts" / "0001"
    attempt.mkdir(parents=True)
    publish_json(attempt / "attempt.json", {"resumed_from": None})
    older, newest = (save(attempt, **fields(1, step), **state(step)) for step in (1, 2))
    return older, newest


def newest_is_bad(stage: Path, damage: Damage, number: int) -> int:
    newest = stage / "attempts" / "0001" / "step-00000002"
    path = sorted(newest.iterdir())[number % 3]
    good, dice = path.read_bytes(), random.Random(number)
    path.write_bytes(damage(good, dice))
    said: list[str] = []
    try:
        found = newest_verified(stage, said.append)
    finally:
        path.write_bytes(good)
    assert found is not None, "a start from nothing"
    assert same(found), f"{path.name}: damaged values are used"
    assert found.identity == {"data": "ab12"}
    assert found.sample_position == 32 * found.step
    if found.step == 2:  # the same JSON in other bytes
        assert path.name == "manifest.json", f"{path.name}: damage was not noticed"
        return 0
    assert len(said) == 1, said
    assert said[0].startswith("checkpoint step 2 (attempt 1): "), said
    assert path.name in said[0], said
    assert said[0].endswith("; using step 1 of attempt 1 instead (1 steps redone)"), said
    return 1


def all_are_bad(stage: Path, folders: tuple[Path, ...], damage: Damage, number: int) -> None:
    dice = random.Random(number)
    paths = [sorted(folder.iterdir())[dice.randrange(2) + 1] for folder in folders]  # not a manifest: see above
    good = [path.read_bytes() for path in paths]
    for path, content in zip(paths, good, strict=True):
        path.write_bytes(damage(content, dice))
    fault = ""
    try:
        newest_verified(stage, lambda line: None)
    except CheckpointError as error:
        fault = str(error)
    finally:
        for path, content in zip(paths, good, strict=True):
            path.write_bytes(content)
    assert fault, "damaged values are used, or it is a start from nothing"
    assert paths[-1].name in fault, fault


def damage_training(folder: Path, scale: float) -> list[Row]:
    """Whole trainings that begin over damaged checkpoints."""
    samples = training.make_samples(folder / "samples")
    base = folder / "base"
    code = zygote.code_of(zygote.start(training.train, base, samples, output=folder / "output"))
    assert code == 0, (folder / "output").read_text()
    (RunDir(base).stage(STAGE).path / "done.json").unlink()
    undisturbed = training.newest(base)
    assert undisturbed is not None
    rows = []
    for bad, wanted in ((1, 0), (2, CheckpointError.exit_code)):
        trials = [
            functools.partial(trained_over, folder / f"{bad}-{number}", base, samples, bad, wanted, undisturbed.digest)
            for number in range(share(20, scale))
        ]
        what = "the newest checkpoint" if bad == 1 else "every checkpoint"
        note = "the same bits at the end" if bad == 1 else "exit 4, the files untouched"
        rows.append(tried(f"training begins over damage to {what}", trials, note))
    return rows


def trained_over(run: Path, base: Path, samples: Path, bad: int, wanted: int, digest: str) -> int | None:
    shutil.copytree(base, run)
    dice = random.Random(str(run.name))
    newest_first = sorted(run.glob("stages/*/attempts/*/step-*"), reverse=True)
    for folder in newest_first[:bad]:
        path = sorted(folder.iterdir())[dice.randrange(2) + 1]
        path.write_bytes(flipped(path.read_bytes(), dice))
    output = run.with_suffix(".txt")
    code = zygote.code_of(zygote.start(training.train, run, samples, output=output))
    assert code == wanted, f"exit code {code}: {output.read_text()[-300:]}"
    if bad > 1:
        assert "no checkpoint can be used" in output.read_text()
        assert sorted(run.glob("stages/*/attempts/*/step-*"), reverse=True) == newest_first
        return None
    assert "instead (2 steps redone)" in output.read_text()
    found = training.newest(run)
    assert found is not None
    assert found.digest == digest, "other bits at the end"
    return 2


INJECTIONS: dict[str, Injection] = {"damage_files": damage_files, "damage_training": damage_training}
