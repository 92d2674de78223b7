"""``submit --seeds pretrain=0-1``: data made once, a run for each seed, and nothing written through a link."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.launch.request import seeds_of
from pipeline.run.family import link
from pipeline.run.rundir import RunDir
from support.running import call, digests, one_line, states, submit

SHORT = ["--stages", "phase1,phase2", "--set", "phase1.steps=2", "--set", "phase2.steps=1"]
DATA = ("extract", "shard", "vocab", "samples_64", "samples_128")


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_family_of_two_seeds(small_run: Path, small_data: Path, tmp_path: Path) -> None:
    family = tmp_path / "family"
    made = family / "data" / "stages"
    for name in DATA:  # made before, by the undisturbed run
        shutil.copytree(small_run / "stages" / name, made / name)
    before = content(made)
    done = submit(family, small_data, "--seeds", "pretrain=0-1", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (digests(family / f"seed-{seed}") for seed in (0, 1))
    assert first.keys() == second.keys()
    assert ("phase2", 1) in first
    assert not set(first.values()) & set(second.values())
    again = submit(family, small_data, "--seeds", "pretrain=0-1", *SHORT)
    assert again.stdout.count("nothing to do") == 3
    shown = call("status", family).stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["data", "seed-0", "seed-1"]
    assert call("cancel", family).stdout.count("nothing is running") == 3
    # a seed alone, with other data: refused before anything is changed, and the family's data stay as they are
    settings = (family / "seed-0" / "run.json").read_bytes()
    for words in (["--set", "data.dupe_factor=2"], ["--remake", "shard"]):
        one_line(submit(family / "seed-0", small_data, *words), 2, "seed-0/stages/samples_64", "is a link to")
    assert (family / "seed-0" / "run.json").read_bytes() == settings
    assert content(made) == before
    assert states(family / "seed-1")["phase2"] == "done"


def test_own_data_is_never_replaced_by_a_link(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "seed-0")
    run.stage("shard").path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="made its own"):
        link(run, ["extract", "shard"])
    assert seeds_of("mrpc=0-2,7") == ("mrpc", [0, 1, 2, 7])


@pytest.mark.parametrize("words", ["mrpc=0,5-3", "mrpc=²", "mrpc=0-9999999999", "mrpc=1,1", "mrpc=", "nope=1"])
def test_seeds_that_are_none_are_refused(words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="none twice"):
        seeds_of(words)
