"""``python -m pipeline``: the list of commands."""

from __future__ import annotations

import importlib
import subprocess
import sys

from pipeline.__main__ import COMMANDS
from support.running import ROOT

TOOLS = {
    "pipeline",
    "pipeline.bench.gpu_reference",
    "pipeline.node.checkup",
    "slurm.devcluster",
    "data_prep.sample_text",
}  # itself, what serves developers, and what doctor sends


def test_every_command_is_listed_and_no_other() -> None:
    found = set()
    for package in ("pipeline", "data_prep", "slurm"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__main__":
                found.add(".".join(parts[:-1]))
            elif '__name__ == "__main__"' in path.read_text():
                found.add(".".join(parts))
    assert found - TOOLS == set(COMMANDS)


def test_the_list_is_printed_without_anything_heavy() -> None:
    program = "import sys; from pipeline.__main__ import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert not {"torch", "numpy", "h5py", "submitit"} & set(modules.split())
    assert [line.split()[0] for line in lines[1:]] == list(COMMANDS)
    assert max(map(len, lines)) <= 100


def test_what_a_command_says_of_itself_can_be_asked() -> None:
    for name in ("pipeline.cancel", "slurm.probe"):  # the others' --help is tried elsewhere
        assert importlib.util.find_spec(name) is not None
        done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0


def test_a_command_runs_by_its_last_name() -> None:
    def said(*words: str) -> tuple[int, str]:
        call = [sys.executable, "-m", *words]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    words = ("--recipe", "tiny", "--cluster", "local", "--nodes", "1")
    assert said("pipeline", "plan", *words) == said("pipeline.plan", *words)
    assert said("pipeline", "plam")[0] == 2
    assert "status, cancel" in said("pipeline", "plam")[1]
