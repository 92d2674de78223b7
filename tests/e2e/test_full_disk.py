"""A disk that fills up while a stage writes: code 6 in one line, nothing is lost, and with room the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.stages import table
from support.running import SMALL, call

pytestmark = [pytest.mark.slow]

STAGES = tuple(table(load_recipe(str(SMALL))))
REPRESENTATIVE = ("extract", "samples_64", "phase1", "export")
PAGE = 4096  # what tmpfs counts in


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 256 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root to mount a small file system: full disks are not tested here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def without(run: Path, stage: str, to: Path, data: Path) -> Path:
    """A copy of a finished run in which one stage never ran."""
    shutil.copytree(run, to, symlinks=True, ignore=lambda folder, names: [stage] if folder.endswith("/stages") else [])
    settings = json.loads((to / "run.json").read_text())
    (to / "run.json").write_text(json.dumps({**settings, "data_dir": str(data)}))
    return to


def contents(folder: Path, *left_out: str) -> dict[str, str]:
    """Digest of every file by name, without what tells when and where it was made."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(left_out) & {*path.relative_to(folder).parts}
    }


def made_by(run: Path, stage: str) -> dict[str, str]:
    """What the stage made: its files, and of a training the tensors of its last checkpoint."""
    folder = run / "stages" / stage
    # "verified" holds inodes and times of the shards, which differ between copies of a run.
    found = contents(folder, "attempts", "done.json", "stage.json", "tensorboard", "verified")
    found = {name: digest for name, digest in found.items() if "tfevents" not in name}
    if stage == "inference":  # timings
        return dict.fromkeys(found, "")
    steps = sorted(folder.glob("attempts/*/step-*"), key=lambda path: path.name)
    if steps:
        found |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in steps[-1].glob("*.safetensors")}
    return found


def fill(disk: Path, leaving: int) -> Path:
    """Write until only ``leaving`` bytes are free."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leaving) // PAGE * PAGE))
    return disk / "ballast"


def run_out_of_space(
    small_run: Path, data: Path, disk: Path, folder: Path, stage: str, shares: tuple[float, ...]
) -> None:
    """Run a stage with room for a share of its files, then with room, and compare it with an undisturbed one."""
    reference = without(small_run, stage, folder / "reference", data)
    assert call("worker", reference, stage).returncode == 0
    size = sum(path.stat().st_size for path in (reference / "stages" / stage).rglob("*") if path.is_file())
    run = without(small_run, stage, disk / "run", data)
    others = contents(run, stage, "events.jsonl", "run.json", "model")
    failed = 0
    for share in shares:
        ballast = fill(disk, int(share * size))
        done = call("worker", run, stage)
        assert done.returncode in (0, 6), (share, done.stdout + done.stderr)
        if done.returncode == 6:
            failed += 1
            assert "Traceback" not in done.stderr
            said = [line for line in done.stderr.splitlines() if "warning" not in line]
            lines = [line for line in said if "No space left" in line or "are free, quota" in line]
            assert len(lines) == 1, done.stderr
            assert not (run / "stages" / stage / "done.json").exists()
        assert contents(run, stage, "events.jsonl", "run.json", "model", "old") == others
        ballast.unlink()
    assert failed, "the disk was never full"
    assert call("status", run).returncode == 0
    done = call("worker", run, stage)
    assert done.returncode == 0, done.stderr
    assert made_by(run, stage) == made_by(reference, stage)
    assert not [*run.rglob("*.tmp"), *run.rglob(".*.note")]


@pytest.mark.parametrize("stage", REPRESENTATIVE)
def test_a_stage_on_a_full_disk_ends_with_6_and_goes_on_when_there_is_room(
    small_run, small_data, disk, tmp_path, stage
):
    run_out_of_space(small_run, small_data, disk, tmp_path, stage, (0.5,))


@pytest.mark.chaos
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_at_every_fill(small_run, small_data, disk, tmp_path, stage):
    run_out_of_space(small_run, small_data, disk, tmp_path, stage, (0, 0.1, 0.3, 0.6, 0.9, 0.99))
