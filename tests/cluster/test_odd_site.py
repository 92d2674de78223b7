"""A site as others have it (see the fixture): what is asked fits it, and the whole chain goes there as one job."""

from __future__ import annotations

import os
import re
import sys

import pytest

from pipeline.run.rundir import RunDir
from slurm.profile import PROFILES
from support.running import SMALL, digests, states
from support.sent_runs import LAST, LONG, SENDER, call, metrics, resumed_at, said, send, sent, wait_done

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def site(odd, monkeypatch: pytest.MonkeyPatch):
    """Every command of a test talks to it through the site's own sbatch, as root."""
    monkeypatch.setenv("SLURM_CONF", str(odd.layout.conf))
    monkeypatch.setenv("PATH", f"{odd.layout.state / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setitem(SENDER, "cluster", "devcluster")
    yield odd
    odd.clear()


def test_its_shape(site) -> None:
    assert site.call("sinfo", "-h", "-p", "low", "-N", "-o", "%c %m").split("\n") == ["64 1", "16 1"]
    said_there = site.call("srun", "-N2", "--immediate=10", "sh", "-c", "echo $SLURMD_NODENAME $(hostname)")
    assert sorted(said_there.splitlines()) == [f"odd-n0{k} odd-n0{k}.example.org" for k in (1, 2)]
    sbatch = [str(site.layout.state / "bin" / "sbatch"), "--parsable", "--hold", "--wrap", "true"]
    assert [len(site.call(*sbatch).splitlines()) for _ in range(2)] == [3, 3]
    with pytest.raises(AssertionError, match="QOSMaxSubmitJobPerUserLimit"):
        site.call(*sbatch)
    assert site.call("sinfo", "-h", "-p", "short", "-o", "%l") == "10:00"


def test_the_chain_as_one_job(site, folder, data, reference, tmp_path) -> None:
    """Raw text to report in one allocation; preempted in phase 1 it goes on there, to the same bits."""
    run = folder / "one job"
    words = ["--recipe", SMALL, "--nodes", 2, "--data", data, *LONG]
    refused = send(run, *words)
    assert refused.returncode == 9
    assert "--one-job sends the chain as one job" in refused.stderr
    assert not site.call("squeue", "-h")
    wide = send(run, *words, "--one-job", "-p", "data=short")
    assert (wide.returncode, wide.stderr.count("\n")) == (2, 1)
    assert "--partition=data=short: with --one-job the one job is pretrain's" in wide.stderr
    long = send(run, *words, "--one-job", "-p", "short")
    assert long.returncode == 9
    assert "chain: partition short allows 00:10:00 of time and not 02:00:00; -t 00:10:00 has" in long.stderr
    other = send(run, *words, "--one-job", "-A", "nobodys")
    assert "(--account=nobodys from flag); your accounts: root" in other.stderr
    jobs = sent(run, *words, "--one-job")
    assert list(jobs) == ["chain"]
    site.wait(lambda: len(metrics(run, 1)) >= 20, "phase 1 trains", 120)
    assert "same job" in call("status", run).stdout
    site.sbatch("sleep 2", tmp_path, "--partition=high", "--nodes=2", "--exclusive")
    site.wait_state(jobs["chain"], "PENDING", limit_s=40)
    wait_done(site, run, jobs["chain"], 200)
    assert set(states(run).values()) == {"done"}, said(run)
    assert resumed_at(run, 2) == metrics(run, 1)[-1]["step"]
    assert digests(run)[LAST] == digests(reference)[LAST]
    started = {event["stage"]: event["world_size"] for event in RunDir(run).events if event["event"] == "started"}
    assert (started["extract"], started["phase1"], started["squad"], started["report"]) == (1, 2, 1, 1)


def test_a_piped_chain_that_fails_still_reports(site, prepared, tmp_path) -> None:
    """``submit --one-job --dry-run=sbatch | sbatch``: status and cancel know the job; phase 1 of it diverges."""
    words = ["--set", "phase1.learning_rate=1e30", "--set", "phase1.warmup=0", "--nodes", 2, "--one-job"]
    printed = send(prepared, *words, "--dry-run=sbatch")
    assert printed.stdout.startswith("#!/bin/bash\n#SBATCH "), printed.stderr
    (tmp_path / "piped").write_text(printed.stdout)
    site.call("sh", "-c", f"sbatch --hold <{tmp_path / 'piped'}")
    assert "cancelled chain (job" in call("cancel", prepared).stdout
    assert not site.call("squeue", "-h")
    (job,) = re.findall(r"^\d+$", site.call("sh", "-c", f"sbatch --parsable <{tmp_path / 'piped'}"), re.MULTILINE)
    site.wait(lambda: site.state(job) in ("COMPLETED", "FAILED"), "the job has ended", 90)
    assert site.words("job", job)["ExitCode"] == "5:0", said(prepared)
    assert (states(prepared)["phase1"], states(prepared)["report"]) == ("failed", "done")
    assert len(list((prepared / "stages/phase1/attempts").glob("[0-9]*"))) == 1
    assert ">failed<" in RunDir(prepared).report.read_text()


def test_a_drafted_profile_needs_no_edit(site, prepared, tmp_path) -> None:
    """Neither for what this site lacks nor for a recipe that names no micro-batch."""
    drafted = tmp_path / "site.toml"
    drafted.write_text(site.call(sys.executable, "-m", "slurm.probe") + "\n")
    assert list(sent(prepared, "--one-job", "--nodes", 2, "--hold", cluster=drafted)) == ["chain"]
    words = ["--recipe", "bert_base", "--cluster", drafted, "--run", tmp_path / "base", "--nodes", 2, "--dry-run"]
    assert call("submit", *words).returncode == 0


def test_the_doctor_proves_a_profile(site, tmp_path) -> None:
    """Ranks, software, files, network, a signal, a requeue by the job itself; then an interpreter that is not there."""
    done = call("doctor", "devcluster", "--run", tmp_path / "good")
    rows = {
        line[5:18].strip(): line.split()[0] for line in done.stdout.splitlines() if line.startswith(("yes", "no", "?"))
    }
    assert done.returncode == 0, done.stdout + done.stderr
    held = ("ranks", "packages", "Slurm there", "network", "shared files", "files", "signal", "requeue", "grace")
    assert [name for name in held if rows.get(name) != "yes"] == [], done.stdout
    assert not site.call("squeue", "-h")
    profile = (PROFILES / "devcluster.toml").read_text().replace("[data]", 'python = "/nowhere/python"\n[data]', 1)
    (tmp_path / "bad.toml").write_text(profile)
    ill = call("doctor", tmp_path / "bad.toml", "--run", tmp_path / "ill")
    assert ill.returncode == 7, ill.stdout + ill.stderr
    assert re.search("0 of 2 answered: .*/nowhere/python: No such file or directory", ill.stdout), ill.stdout
    assert not site.call("squeue", "-h")
