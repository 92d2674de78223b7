"""A real Slurm of four nodes, brought up once for all tests of this folder."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm.command import which
from slurm.devcluster import cluster, network, registry
from slurm.devcluster.layout import Layout
from slurm.profile import PROFILES
from support import running
from support.running import ROOT, SMALL
from support.sent_runs import DATA_STAGES, LONG, SENDER

SETTINGS = (("KillWait", "2"), ("SlurmdTimeout", "5"), ("MessageTimeout", "4"))


def why_not() -> str:
    """Why these tests cannot run here; "" when they can."""
    if os.geteuid() != 0:
        return "not root, and a multi-node Slurm on one machine needs namespaces of its own"
    if reason := network.why_not():
        return reason
    if which("slurmctld") is None and which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get to install it"
    return ""


@dataclass(frozen=True)
class DevCluster:
    """A running developer cluster, and the few things tests do with it."""

    layout: Layout

    @property
    def env(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_"))}
        return inherited | {"SLURM_CONF": str(self.layout.conf)}

    def call(self, *argv: str, timeout_s: float = 30, user: int | None = None, **env: str) -> str:
        """Run a command against this cluster; its stdout. Fails with its words when it fails."""
        done = subprocess.run(
            argv,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        assert done.returncode == 0, f"{argv}: {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: str, folder: Path, *extra: str) -> str:
        """Send a script of the given body; its job id. Output goes to ``folder``/ID.out."""
        file = folder / f"job-{time.monotonic_ns()}.sh"
        file.write_text("#!/bin/bash\n" + script)
        output = [f"--output={folder}/%j.out", "--open-mode=append", "--time=5"]
        return self.call("sbatch", "--parsable", *output, *extra, str(file))

    def state(self, job_id: str) -> str:
        return self.call("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T")

    def words(self, *show: str) -> dict[str, str]:
        """``scontrol show`` as a dict of words without spaces: of a job, Restarts, ExitCode and so on."""
        text = self.call("scontrol", "--oneliner", "show", *show)
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*) *= *(\S*)", text))

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = 30) -> None:
        """Poll until the condition holds; fails after ``limit_s`` with the queue as it is."""
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end:
                queue = self.call("squeue", "-t", "all", "-o", "%i %T %r %N")
                pytest.fail(f"not within {limit_s:g} s: {what}\n{queue}\n{self.call('sinfo')}")
            time.sleep(0.1)

    def wait_state(self, job_id: str, *wanted: str, limit_s: float = 30) -> None:
        self.wait(lambda: self.state(job_id) in wanted, f"job {job_id} is {wanted}", limit_s)

    def clear(self) -> None:
        """Cancel everything and wait until all nodes are free again."""
        if ids := self.call("squeue", "-h", "-o", "%A").split():
            self.call("scancel", *ids)
        self.wait(lambda: not self.call("squeue", "-h"), "an empty queue")


def snapshot(base: Path) -> dict[str, set[str]]:
    """What clusters could leave behind on this machine; what belongs to clusters of other sessions is not counted."""
    others = {folder for folder in Path("/tmp").glob("slurm-devcluster-*") if folder != base}
    slots = {layout.slot for folder in others for layout in registry.others(folder)}
    names = {*os.listdir("/sys/class/net"), *(os.listdir("/run/netns") if Path("/run/netns").exists() else ())}
    ours = {name for name in names if not any(re.fullmatch(rf"devcl{slot}(-?n\d+)?", name) for slot in slots)}
    return {
        "processes": {
            text for text in map(describe, Path("/proc").glob("[0-9]*")) if text and not mentions(text, others)
        },
        "networks": ours,
        "cgroups": {folder for folder, _, _ in os.walk("/sys/fs/cgroup") if "slurm" in folder},
        "files": {str(file) for file in base.glob("*")},
    }


def describe(process: Path) -> str:
    """Pid and words of a process that has to do with Slurm; "" for any other, or a dead one."""
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        words = (process / "cmdline").read_bytes() + b" " + (process / "environ").read_bytes()
    except OSError:
        return ""
    text = words.replace(b"\0", b" ").decode(errors="replace")
    mine = re.findall(r"\S*(?:(?<!bert_)slurm|munge|SLURM_CONF)\S*", text)
    return f"{process.name} {' '.join(mine)}" if mine and state not in "ZX" and "pytest" not in text else ""


def mentions(text: str, folders: set[Path]) -> bool:
    return any(f"{folder}/" in text for folder in folders)


def make(base: Path, name: str, nodes: int, **more: object) -> DevCluster:
    return DevCluster(cluster.up(base, name, nodes, **more))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def base() -> Path:
    """Where the clusters of the tests live: not where a developer's own do."""
    return Path(f"/tmp/slurm-devcluster-test-{os.getpid()}")


@pytest.fixture(scope="session")
def devcluster(base: Path) -> Iterator[DevCluster]:
    """Four nodes that claim eight GPUs each; lost nodes and processes that ignore TERM are noticed soon."""
    if reason := why_not():
        pytest.skip(f"NO REAL SLURM: {reason}")
    remove_orphans()
    try:
        yield make(base, "test", 4, gpus_per_node=8, settings=SETTINGS)
    finally:
        for other in [*registry.others(base)]:
            cluster.down(base, other.name)


def remove_orphans() -> None:
    """Take down what test sessions left that were killed themselves."""
    for folder in Path("/tmp").glob("slurm-devcluster-test-*"):
        if not Path("/proc", folder.name.rpartition("-")[2]).exists():
            for other in [*registry.others(folder)]:
                cluster.down(folder, other.name)


@pytest.fixture
def idle(devcluster: DevCluster) -> Iterator[DevCluster]:
    """The cluster with nothing in its queue, before and after."""
    yield devcluster
    devcluster.clear()


@pytest.fixture
def make_cluster(base: Path, devcluster: DevCluster) -> Callable[..., DevCluster]:
    """Another cluster beside the shared one; the test takes it down, the session does it otherwise."""
    return lambda name, nodes, **more: make(base, name, nodes, **more)


@pytest.fixture(scope="module")
def odd(base: Path, devcluster: DevCluster) -> Iterator[DevCluster]:
    """A site as others have it: unequal nodes of unknown memory, hosts with a domain, two jobs a user, a greeting."""
    shape = {"cpus": (64, 16), "memory_mb": 1, "domain": "example.org", "banner": True}
    yield make(base, "odd", 2, settings=SETTINGS, with_accounting=True, max_submit=2, **shape)
    cluster.down(base, "odd")


@dataclass(frozen=True)
class User:
    """Who sends jobs, and the Python that this user may run; uid 0 where ordinary users can run none."""

    uid: int
    home: Path
    python: str = sys.executable
    packages: str = ""  # PYTHONPATH

    @property
    def options(self) -> dict[str, Any]:
        """For subprocess.run."""
        return {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid else {}

    @property
    def profile(self) -> Path:
        """The developer cluster as this user describes it."""
        file = self.home / "site.toml"
        text = (PROFILES / "devcluster.toml").read_text()
        file.write_text(text + (f'[env]\nPYTHONPATH = "{self.packages}"\n' if self.packages else ""))
        file.chmod(0o644)
        return file

    def give(self, path: Path) -> None:
        """Make a file or folder theirs."""
        for each in (path, *path.rglob("*")):
            os.chown(each, self.uid, self.uid, follow_symlinks=False)

    def can_run(self) -> bool:
        command = [self.python, "-c", "import pipeline.submit, h5py"]
        try:
            return not subprocess.run(
                command, cwd=ROOT, env={"PYTHONPATH": self.packages}, capture_output=True, check=False, **self.options
            ).returncode
        except OSError:
            return False


@pytest.fixture(scope="session")
def user() -> Iterator[User]:
    """An ordinary user, made for this session; where this checkout's Python is not for everybody, the system's."""
    name, home = f"bert{os.getpid()}", Path(f"/tmp/bert-user-{os.getpid()}")
    home.mkdir(mode=0o755)
    subprocess.run(["useradd", "--no-create-home", "--user-group", "--home-dir", home, name], check=True)
    uid = pwd.getpwnam(name).pw_uid
    system = f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    tried = [User(uid, home), User(uid, home, system, sysconfig.get_path("purelib"))]
    made = next((one for one in tried if one.can_run()), User(0, home))
    if not made.uid:
        print(f"jobs are sent by root: ordinary users can run no Python that imports from {ROOT}", file=sys.stderr)
    try:
        made.give(home)
        yield made
    finally:
        # What a killed batch script leaves ends by itself within half a minute; more than that must not be left.
        deadline = time.monotonic() + 60
        while subprocess.run(["userdel", name], capture_output=True).returncode == 8 and time.monotonic() < deadline:
            time.sleep(1)
        assert name not in {entry.pw_name for entry in pwd.getpwall()}, f"processes of {name} are left"
        shutil.rmtree(home)


@pytest.fixture
def machine(base: Path) -> Callable[[], dict[str, set[str]]]:
    return lambda: snapshot(base)


@pytest.fixture
def slurm(idle, user, monkeypatch: pytest.MonkeyPatch):
    """The cluster, and every command that a test starts talking to it, sent by an ordinary user."""
    monkeypatch.setenv("SLURM_CONF", str(idle.layout.conf))
    monkeypatch.setenv("HOME", str(user.home))
    monkeypatch.setenv("PYTHONPATH", user.packages)
    monkeypatch.setitem(SENDER, "python", user.python)
    monkeypatch.setitem(SENDER, "options", user.options)
    monkeypatch.setitem(SENDER, "cluster", user.profile)
    return idle


@pytest.fixture(scope="session")
def folder(user) -> Path:
    made = user.home / "sent"
    made.mkdir()
    user.give(made)
    return made


@pytest.fixture(scope="session")
def data(folder: Path, small_data: Path, user) -> Path:
    """The small corpora where an ordinary user may read them."""
    shutil.copytree(small_data, folder / "data")
    user.give(folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def reference(folder: Path, data: Path) -> Path:
    """A longer phase 1, undisturbed, on this machine with two processes."""
    run = folder / "reference"
    words = ["--recipe", SMALL, "--cluster", "local", "--run", run, "--data", data]
    done = running.call("submit", *words, *LONG, "--stages", f"{DATA_STAGES},phase1")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture
def prepared(reference: Path, user, request: pytest.FixtureRequest) -> Path:
    """A run whose data stages are done."""
    run = reference.parent / request.node.name
    shutil.copytree(reference, run, symlinks=True, ignore=lambda _, names: [n for n in names if n == "phase1"])
    user.give(run)
    return run
