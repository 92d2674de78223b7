"""The code of a run: its copy, the check in the batch file (by a real bash), and moving a run to other code."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault
from pipeline.launch import code
from pipeline.run.rundir import RunDir
from slurm.resources import Resources
from slurm.script import Script, render
from support.reporting import finished_run, page_of
from support.running import SMALL, call


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    before = os.umask(0o002)  # as in project folders
    try:
        code.keep(run, code.digest())
    finally:
        os.umask(before)
    return code.folder(run, code.digest())


def start(tmp_path: Path, copy: Path) -> subprocess.CompletedProcess[str]:
    """A batch file whose program says which code it runs, by bash, from the checkout; srun just runs it."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, body in (("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'), ("squeue", "")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = Script(
        resources=Resources(),
        settings={},
        program=[sys.executable],
        arguments=["-c", "import pipeline.worker, slurm, data_prep.errors as e; print(slurm.__file__, e.__file__)"],
        log_dir=str(tmp_path),
        state_dir=str(tmp_path / "jobs"),
        code=str(copy),
    )
    (tmp_path / "job.sbatch").write_text(render(script))
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    return subprocess.run(
        ["bash", tmp_path / "job.sbatch"], cwd=code.ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_a_job_runs_the_copy_wherever_it_is_started(tmp_path: Path, copy: Path) -> None:
    done = start(tmp_path, copy)
    assert done.stdout.splitlines()[-1] == f"{copy}/slurm/__init__.py {copy}/data_prep/errors.py", done.stderr
    assert done.returncode == 0
    assert code.is_intact(copy)  # it left no byte code
    assert start(tmp_path, copy).returncode == 0


def test_the_copy_is_the_packages_for_nobody_else_to_write(copy: Path) -> None:
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names == set(code.shipped())
    assert {"slurm/job.sh", "slurm/flags.csv", "pipeline/recipes/tiny.toml", "pipeline/report/style.css"} <= names
    for path in (copy.parent, copy, *copy.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o444), path


def add_module(copy: Path) -> None:
    (copy / "pipeline" / "added.py").write_text("")


def add_byte_code(copy: Path) -> None:
    (copy / "slurm" / "__pycache__").mkdir()
    (copy / "slurm" / "__pycache__" / "script.cpython-311.pyc").write_bytes(b"")


def add_link(copy: Path) -> None:
    (copy / "torch.py").symlink_to("/dev/null")


def add_pipe(copy: Path) -> None:
    os.mkfifo(copy / "torch")


def change(copy: Path) -> None:
    path = copy / "pipeline" / "worker.py"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")


def remove(copy: Path) -> None:
    shutil.rmtree(copy)


@pytest.mark.parametrize("do", [add_module, add_byte_code, add_link, add_pipe, change, remove])
def test_a_changed_copy_starts_nothing(tmp_path: Path, copy: Path, do) -> None:
    do(copy)
    assert not code.is_intact(copy)
    done = start(tmp_path, copy)
    said = [line for line in done.stderr.splitlines() if "missing, or changed since this job was sent" in line]
    assert (done.returncode, done.stdout, len(said)) == (7, "", 1)


def test_the_copy_is_made_again_from_the_same_code_only(tmp_path: Path, copy: Path, monkeypatch) -> None:
    change(copy)
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(code, "digest", lambda *where: "f" * 64)
        with pytest.raises(EnvironmentFault, match=r"--upgrade goes on with this checkout's"):
            code.keep(run, copy.name)
    code.keep(run, copy.name)
    assert code.is_intact(copy)


def test_neither_a_place_elsewhere_nor_a_strangers_copy_is_taken_for_the_runs_code(copy: Path) -> None:
    for hostile in (f"../../{copy.name}", "$(touch x)", copy.name.upper(), f"{copy.name}\n", 7, None):
        assert code.of_run({"code": hostile}) == code.digest()
    assert code.of_run({"code": "b" * 64}) == "b" * 64
    if os.geteuid() == 0:
        os.chown(copy / "pipeline" / "worker.py", 12345, -1)
        assert not code.is_intact(copy)


@pytest.mark.parametrize("name", ["pipeline/worker.py", "pipeline", "."])
def test_files_of_ours_that_others_may_write_or_move_are_no_copy(copy: Path, name: str) -> None:
    (copy / name).chmod(0o775)
    assert not code.is_intact(copy)


def submitted(run: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return call("submit", "--run", run, *words)


def noted(run: Path) -> list[str]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["code"] for event in events if event["event"] == "submitted"]


def test_a_run_keeps_its_code_until_it_is_upgraded(tmp_path: Path) -> None:
    run, now = tmp_path / "run", code.digest()
    (tmp_path / "text.txt").write_text("x")
    words = ["--recipe", "small", "--set", 'data.books=["text.txt"]', "--cluster", "devcluster", "--data", tmp_path]
    words += ["--write-scripts", tmp_path / "scripts"]
    assert submitted(run, *words).returncode == 0
    assert f"\ncode={run}/code/{now}\n" in (tmp_path / "scripts" / "pretrain.sbatch").read_text()
    older = pretend_older(run, now)
    again = ["--write-scripts", tmp_path / "scripts"]
    done = submitted(run, *again)
    assert f"jobs run the code with which this run began ({older[:12]}); --upgrade takes this checkout's" in done.stdout
    assert f"\ncode={run}/code/{older}\n" in (tmp_path / "scripts" / "pretrain.sbatch").read_text()
    shutil.rmtree(run / "code" / older)
    done = submitted(run, *again)
    assert (done.returncode, done.stderr.count("\n"), "--upgrade" in done.stderr) == (7, 1, True)
    assert submitted(run, *again, "--upgrade").returncode == 0
    assert f"\ncode={run}/code/{now}\n" in (tmp_path / "scripts" / "pretrain.sbatch").read_text()
    assert noted(run) == [now, older, now]


def test_the_local_runner_runs_the_checkout_and_says_that_it_has_changed(small_data: Path, tmp_path: Path) -> None:
    run, now = tmp_path / "run", code.digest()
    words = ["--recipe", SMALL, "--cluster", "local", "--data", small_data, "--stages", "extract"]
    assert "the code has changed" not in submitted(run, *words).stdout
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "code": "b" * 64}))
    said = f"the code has changed since this run began (bbbbbbbbbbbb, now {now[:12]})"
    assert said in submitted(run, "--stages", "extract").stdout
    assert said not in submitted(run, "--stages", "extract", "--upgrade").stdout
    assert said not in submitted(run, "--stages", "extract").stdout
    assert noted(run) == [now] * 4  # what really computes
    assert not (run / "code").exists()


def pretend_older(run: Path, now: str) -> str:
    """The run began with other code than this checkout's."""
    copy = run / "code" / now
    change(copy)
    names = [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]
    older = code.digest(copy, names)
    copy.rename(run / "code" / older)
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "code": older}))
    return older


def test_the_report_says_from_which_step(tmp_path: Path) -> None:
    chain = finished_run(tmp_path / "demo")
    for digest in ("a" * 64, "a" * 64):
        chain.run.event("submitted", code=digest)
    assert "other code" not in page_of(chain).text
    second = chain.run.stage("phase1").attempts[1].path / "owner.json"
    owner = json.loads(second.read_text())
    codes = ((2, "a"), (1, "a"), (0, "b"))  # seconds before the second attempt
    events = [{"time": owner["time"] - early, "event": "submitted", "code": c * 64} for early, c in codes]
    (chain.run.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = page_of(chain).text
    assert "phase1 from step 175 on: other code than before, bbbbbbbbbbbb instead of aaaaaaaaaaaa" in text
    assert text.count("other code than before") == 1
