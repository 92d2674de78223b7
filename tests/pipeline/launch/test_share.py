"""A run that a project's group shares: the modes of all that is made, and colleagues who may write, or only read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch import code
from pipeline.run.rundir import RunDir
from support.running import ROOT, call

GROUP, COLLEAGUE, STRANGER = 54321, 65533, 65534
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other users are not tried")]


def as_user(user: int, group: int, module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A command by another user; root's own Python, which others cannot reach, in a view of its own of the files."""
    who = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", sys.executable, "-B", "-m"]
    base = sys.base_prefix
    closed = [str(path) for path in Path(base).parents if not path.stat().st_mode & stat.S_IXOTH]
    opened = ""
    if closed:
        opened = f"mount --bind {base} /mnt && mount -t tmpfs -o mode=755 none {closed[-1]} && "
        opened += f"mkdir -p {base} && mount --bind /mnt {base} && "
    command = ["unshare", "--mount", "sh", "-c", f'{opened}exec "$@"', "sh", *who, f"pipeline.{module}"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A run with one finished stage in a folder of a group, made with the umask that hides the most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2775)
        (folder / "text").mkdir()
        (folder / "text/a.txt").write_text("The first sentence. The second one.\n\n" * 40)
        words = ("--text", folder / "text", "--language", "en", "--stages", "extract")
        previous = os.umask(0o077)
        try:
            done = call("submit", "--run", folder / "run", *words, "--share", "group")
        finally:
            os.umask(previous)
        assert done.returncode == 0, done.stdout + done.stderr
        yield folder / "run"


def test_the_group_may_write_all_but_the_code(shared: Path) -> None:
    found = [path for path in (shared, *shared.rglob("*")) if not path.is_symlink()]
    modes = {oct(path.stat().st_mode & 0o7777) for path in found if path.is_file() and path.name != "run.json"}
    assert modes == {"0o664"}
    assert (shared / "run.json").stat().st_mode & 0o7777 == 0o644
    assert {oct(path.stat().st_mode & 0o7777) for path in found if path.is_dir()} == {"0o2775"}
    assert {path.stat().st_gid for path in found} == {GROUP}
    previous = os.umask(0o002)
    try:
        code.keep(RunDir(shared), code.digest())
    finally:
        os.umask(previous)
    copied = list(code.folder(RunDir(shared), code.digest()).rglob("*"))
    assert copied
    assert not any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in copied)


def test_a_colleague_goes_on_and_a_stranger_does_not(shared: Path) -> None:
    words = ("--run", shared, "--stages", "extract")
    done = as_user(COLLEAGUE, GROUP, "submit", *words, "--remake", "extract")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (shared / "stages/extract/done.json").stat().st_uid == COLLEAGUE
    assert (shared / "stages/extract/done.json").stat().st_mode & 0o777 == 0o664
    done = as_user(STRANGER, STRANGER, "submit", *words, "--remake", "extract")
    assert done.returncode == 6, done.stdout + done.stderr
    assert done.stderr.endswith("you may read this run, not change it; --share group lets others\n")


@pytest.mark.parametrize("read_only", [False, True])
def test_who_may_only_read_can_look(shared: Path, read_only: bool) -> None:
    """Also where the file system takes nothing."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "seen" if read_only else shared
        Path(name).chmod(0o755)
        if read_only:
            run.mkdir()
            subprocess.run(["mount", "--bind", shared, run], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        try:
            for module, *words in (
                ("status", run),
                ("compare", run, run),
                ("plan", "--recipe", shared / "recipe.toml", "--cluster", "local", "--nodes", "1"),
            ):
                done = as_user(STRANGER, STRANGER, module, *words)
                assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
            done = as_user(STRANGER, STRANGER, "report", run)
            assert done.returncode == 6
            assert done.stderr.endswith("; --out FILE elsewhere\n")
            own = Path(name) / "own"
            own.mkdir()
            os.chown(own, STRANGER, STRANGER)
            done = as_user(STRANGER, STRANGER, "report", run, "--out", own / "report.html")
            assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
            assert "extract" in (own / "report.html").read_text()
        finally:
            if read_only:
                subprocess.run(["umount", run], check=True)
