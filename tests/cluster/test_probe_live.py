"""A profile is drafted from a real Slurm, and a chain planned with it is one that this Slurm takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.config import load_profile

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def test_the_draft_of_a_real_site(devcluster, tmp_path: Path) -> None:
    drafted = tmp_path / "site.toml"
    drafted.write_text(devcluster.call(sys.executable, "-m", "slurm.probe", "--partition", "spot") + "\n")
    profile = load_profile(str(drafted))
    assert (profile.name, profile.gpus_per_node, profile.requeue) == ("test", 8, True)
    assert profile.pretrain.partition == "spot"
    assert "# Partition spot: " in drafted.read_text()
    assert "a job preempted in this partition is cancelled" in drafted.read_text()
    for section in ("data", "pretrain", "finetune"):
        options = [f"--{name}={value}" if value else f"--{name}" for name, value in profile.options(section).items()]
        options = [option.replace("--requeue=no", "--no-requeue") for option in options]
        asked = f"--gpus-per-node={profile.resources(section).gpus_per_node}"
        devcluster.call("sbatch", "--test-only", *options, asked, "--wrap", "true")
