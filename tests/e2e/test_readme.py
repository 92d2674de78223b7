"""Every command block of the README runs, in order, as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from running import ROOT, call

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
MADE_ALREADY = {"make demo"}  # its run is the one that test_demo.py made
CLUSTER = "devcluster"  # the tour on a real Slurm: tests/cluster does the same and more

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1800)]


def test_the_commands_of_the_readme(sample_dir):
    assert "make demo" in COMMANDS
    assert len(COMMANDS) >= 7
    done = call("submit", "--recipe", "tiny", "--cluster", "local", "--run", "runs/demo")
    assert done.returncode == 0, done.stderr
    for name in ("my-bert", "my-sentiment", "large", "scripts"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    for command in COMMANDS:
        if command in MADE_ALREADY or CLUSTER in command:
            continue
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_files_and_options_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:pipeline|slurm|data_prep|tests)/[\w/.]*\w)`", text):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        done = subprocess.run([ROOT / ".venv/bin/python", "-m", module, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, module
