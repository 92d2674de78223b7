"""Stages to jobs, jobs to scripts, and a submit killed at every call it makes, with a Slurm that is a list."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cancel, submit
from pipeline.config import load_profile, load_recipe
from pipeline.errors import ConfigError, InUseError
from pipeline.launch import code, jobs, request, scripts, start
from pipeline.launch.family import start_family
from pipeline.launch.request import Request
from pipeline.node.preempt import STOP_SIGNALS, StopRequest
from pipeline.run.chain import Chain
from pipeline.run.family import runs_of
from pipeline.run.journal import Journal, SentJob, refuse_running, run_key
from pipeline.run.rundir import RunDir
from pipeline.stages import table
from slurm import queue, refusal, script
from slurm.errors import ControllerDown, FlagError
from slurm.flags import Flag, Setting
from slurm.profile import PROFILES as PROFILES_DIR
from slurm.profile import SECTIONS
from slurm.resources import parse_nodes
from slurm.submission import JobPlan, Need
from support.running import SMALL, TWO_PHASES, call

GOLDEN = Path(__file__).parent / "golden"


def write_corpora(folder: Path) -> None:
    """Files that are at first sight what `SMALL` names."""
    (folder / "enwiki-table-markup.xml.bz2").write_bytes(bz2.compress(b"<mediawiki></mediawiki>"))
    (folder / "boolq.jsonl").write_text('{"text": "A text."}\n')
    for name in ("qa.json", "pairs.tsv", "sentiment.tsv"):
        (folder / name).write_text("x")


def plans(recipe: str = "bert_large", todo: list[str] | None = None, split: bool = False) -> list[JobPlan]:
    stages = table(load_recipe(recipe))
    return jobs.jobs_of(stages, stages if todo is None else todo, split=split)


def test_three_jobs_and_a_report() -> None:
    found = plans()
    assert [(job.name, job.stages) for job in found] == [
        ("data", ("extract", "shard", "samples_128", "samples_512")),
        ("pretrain", ("phase1", "phase2")),
        ("finetune", ("export", "squad", "mrpc", "sst2", "inference")),
        ("report", ("report",)),
    ]
    assert [job.needs for job in found[:3]] == [(), (Need(job="data"),), (Need(job="pretrain"),)]
    assert found[3].any_need
    assert [(need.job, need.kind) for need in found[3].needs] == [
        ("data", "afternotok"),
        ("pretrain", "afternotok"),
        ("finetune", "afterany"),
    ]


def test_what_is_done_needs_no_job() -> None:
    found = plans(todo=["phase2", "squad", "report"])
    assert [(job.name, job.stages) for job in found] == [
        ("pretrain", ("phase2",)),
        ("finetune", ("squad",)),
        ("report", ("report",)),
    ]
    assert found[0].needs == ()
    only = plans(todo=["report"])
    assert (only[0].needs, only[0].any_need) == ((), False)


def test_one_job_for_each_stage() -> None:
    found = {job.name: job for job in plans(split=True)}
    assert list(found) == list(table(load_recipe("bert_large")))
    assert [need.job for need in found["phase1"].needs] == ["samples_128"]
    assert {need.job for need in found["phase2"].needs} == {"samples_512", "phase1"}
    assert {(need.job, need.kind) for need in found["report"].needs} == {
        (name, "afterany") for name in ("squad", "mrpc", "sst2", "inference")
    }
    assert not found["report"].any_need


def ready(*flags: Flag, cluster: str = "dgx_a100_80g", nodes: str = "32", **environ: str) -> list[JobPlan]:
    profile = load_profile(cluster)
    asked = {name: jobs.asked_by(profile, name, parse_nodes(nodes), flags, environ) for name in SECTIONS}
    return jobs.equipped(jobs.with_spares(plans(), profile.spares) if profile.spares else plans(), asked)


def asked_for(path: Path, cluster: str = "generic", *words: object) -> Request:
    """What a submit of bert_large asks for."""
    return request.of([*map(str, ("--recipe", "bert_large", "--cluster", cluster, "--run", path, *words))])


def text_of(job: JobPlan, cluster: str) -> str:
    """Its script for a run elsewhere, without what differs between machines and from change to change."""
    text = scripts.script_text(asked_for(Path("/scratch/runs/bert"), cluster), job)
    for value, name in ((sys.executable, "PYTHON"), (str(code.ROOT), "CHECKOUT"), (code.digest(), "DIGEST")):
        text = text.replace(value, name)
    return text


def test_what_the_jobs_ask_for() -> None:
    data, pretrain, finetune, report = ready(Flag("time", "2-00", ""), Flag("partition", "cpu", "data"))
    assert (pretrain.resources.most_tasks, pretrain.resources.gpus_per_node, pretrain.resources.nodes) == (
        256,
        8,
        (32, 32),
    )
    assert pretrain.resources.time_min == 2 * 24 * 60
    assert data.resources.time_min == 24 * 60
    assert data.left["partition"].value == report.left["partition"].value == "cpu"
    assert (data.resources.gpus_per_node, finetune.resources.gpus_per_node) == (0, 8)
    assert (finetune.resources.nodes, finetune.resources.most_tasks) == ((1, 1), 8)  # a node with all its GPUs
    assert (report.resources.cpus_per_task, report.resources.time_min) == (1, 30)
    for asked, mem_gb in (("64G", 4), ("1G", 1), ("0", 0)):
        assert ready(Flag("mem", asked, "data"))[3].resources.mem_gb == mem_gb
    assert ready(Flag("mem-per-cpu", "2G", "data"))[3].resources.mem_gb is None
    assert scripts.gpu_hours([pretrain]) == 32 * 8 * 48
    _, range_, _, _ = ready(nodes="16-32", SBATCH_PARTITION="h100")
    assert range_.resources.nodes == (16, 32)
    assert range_.settings["partition"].source == "SBATCH_PARTITION"
    _, none, _, _ = ready(Flag("gpus-per-node", "0", ""))
    assert none.resources.tasks_per_node == 1
    _, _, wider, _ = ready(Flag("nodes", "2", "finetune"))
    assert wider.resources.most_tasks == 16
    many, _, _, small = ready(Flag("nodes", "2", "data"), Flag("ntasks-per-node", "4", "data"))
    assert (many.resources.most_tasks, small.resources.most_tasks) == (8, 1)  # over MPI; the report is one process
    with pytest.raises(FlagError, match="16-32"):
        ready(nodes="many")


def test_one_job_asks_for_what_each_of_its_parts_needs() -> None:
    """All nodes; cores and memory of the greediest; narrower parts on one node, the report whatever happened."""
    chain = jobs.in_one(ready(nodes="4"))
    assert (chain.name, chain.resources.nodes, chain.resources.mem_gb, chain.needs) == ("chain", (4, 4), 0, ())
    lines = text_of(chain, "dgx_a100_80g").splitlines()
    heads = [line.partition(" srun_args")[0] for line in lines if line.startswith("part_")]
    assert heads == [
        "part_data() { width=1; tasks=1; cpus=32;",
        "part_pretrain() { width=; tasks=8; cpus=;",
        "part_finetune() { width=1; tasks=8; cpus=;",
        "part_report() { width=1; tasks=1; cpus=1;",
    ]
    assert {"sruns=(part_data part_pretrain part_finetune)", "always=part_report"} < set(lines)
    small = jobs.in_one(
        ready(Flag("mem", "8G", "pretrain"), Flag("mem", "64G", "data"), cluster="devcluster", nodes="2")
    )
    assert (small.resources.cpus_per_task, small.resources.mem_gb) == (2, 64)
    only = jobs.in_one(ready(nodes="4")[2:])
    assert (only.resources.nodes, only.stages[-1]) == ((1, 1), "report")
    with pytest.raises(ConfigError, match=r"--partition=data=cpu: with --one-job the one job is pretrain's"):
        jobs.in_one(ready(Flag("partition", "cpu", "data"), nodes="4"))


@pytest.mark.slow
def test_a_file_for_a_pipe_is_all_that_is_printed(tmp_path) -> None:
    """Also where a recipe is written and shown before; the run is begun, and the script notes itself in its journal."""
    run = tmp_path / "run"
    said = "The river runs past the old mill number {}, and nobody counts the sacks of flour in winter.\n\n"
    (tmp_path / "text.txt").write_text("".join(said.format(number) for number in range(400)))
    words = ["--text", tmp_path / "text.txt", "--cluster", "devcluster", "--run", run, "--one-job"]
    done = call("submit", *words, "--dry-run=sbatch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert f"mv {run}/jobs.json.new {run}/jobs.json" in done.stdout
    assert (run / "run.json").exists()
    assert not (run / "jobs.json").exists()


def test_no_job_is_longer_than_a_chunk(tmp_path) -> None:
    """And none that asks for less becomes longer; the profile's are 24, 24 and 8 hours."""
    for text, minutes in (("2h", (120, 120, 120)), ("45m", (45, 45, 45)), ("10h", (600, 540, 480))):
        asked = asked_for(tmp_path / "run", "generic", "--chunk", text, "-t", "9:00:00")
        assert tuple(asked.asked[section].resources.time_min for section in SECTIONS) == minutes
    assert asked.asked["data"].settings["time"] == Setting("10:00:00", "--chunk")
    with pytest.raises(FlagError, match="--chunk 0: name a time"):
        asked_for(tmp_path / "run", "generic", "--chunk", "0")
    with pytest.raises(ConfigError, match="--chunk: means nothing"):
        asked_for(tmp_path / "run", "local", "--chunk", "2h")


def test_a_command_to_type_is_one_for_a_shell_wherever_the_run_lies(tmp_path) -> None:
    run = RunDir(tmp_path / "it's a run")
    live = [queue.QueuedJob(id="7", state="RUNNING", comment=f"{run_key(run)}/by-hand/data")]
    with pytest.raises(InUseError) as refused:
        refuse_running(run, live, f"stop it with python -m pipeline.cancel {run.word}")
    assert shlex.split(f"x{str(refused.value).partition('cancel')[2]}")[1:] == [str(run.path)]
    for words in (["--stages", "extract"], []):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            start.nothing_to_do(asked_for(run.path, "generic", *words))
        assert out.getvalue() == f"{run.path}: {'extract' if words else 'everything'} is done, nothing to do\n"


def test_a_node_count_that_cannot_be_is_a_line_beside_the_others(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(submit, "try_out", lambda asked, jobs: {"pretrain": "Job 7 to start at 2026-01-01T00:00:00"})
    run = ["--recipe", "bert_large", "--cluster", "generic", "--run", str(tmp_path / "run"), "--test-only"]
    assert submit.compare_node_counts(submit.by_node_count([*run, "--nodes", "1,99999"])) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["1", "2026-01-01T00:00:00"]
    assert second.split()[:2] == ["99999", "never"]
    assert "cannot share a global_batch" in second
    with pytest.raises(ConfigError, match="cannot share a global_batch"):
        submit.compare_node_counts(submit.by_node_count([*run, "--nodes", "88888,99999"]))


def test_a_dry_run_refuses_what_cannot_stand_in_a_script(tmp_path) -> None:
    profile = tmp_path / "site.toml"
    profile.write_text((PROFILES_DIR / "generic.toml").read_text() + '[env]\n"A B" = "x"\n')
    asked = asked_for(tmp_path / "run", str(profile), "--dry-run")
    with pytest.raises(FlagError, match="'A B': a variable's name"):
        start.show_plan(start.planned(asked), asked)


def test_cancel_asks_again_while_the_controller_is_down(fake, tmp_path, monkeypatch, capsys) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    send_once(run)
    answers = iter([ControllerDown("squeue: no answer"), None])

    def jobs() -> dict[str, queue.QueuedJob]:
        if down := next(answers, None):
            raise down
        return fake.jobs()

    monkeypatch.setattr(queue, "jobs", jobs)
    monkeypatch.setattr(RunDir, "event", lambda self, *words, **values: None)
    cancel.cancel_jobs(run, None)
    assert not fake.live()
    assert "squeue: no answer; asking again for" in capsys.readouterr().out


def test_each_seed_is_a_job_of_its_own_where_that_is_wanted() -> None:
    stages = table(load_recipe(TWO_PHASES, ["squad.seeds=[1, 2]"]))
    assert [name for name in stages if name.startswith("squad")] == ["squad-1", "squad-2", "squad"]
    together = {job.name: job.stages for job in jobs.jobs_of(stages, stages)}
    assert together["finetune"] == ("export", "squad-1", "squad-2", "squad", "mrpc", "sst2", "inference")
    apart = {job.name: job for job in jobs.jobs_of(stages, stages, split_seeds=True)}
    assert apart["finetune"].stages == ("export", "mrpc", "sst2", "inference")
    assert [apart[name].stages for name in ("squad-1", "squad-2", "squad")] == [("squad-1",), ("squad-2",), ("squad",)]
    assert [need.job for need in apart["squad-1"].needs] == ["finetune"]
    assert [need.job for need in apart["squad"].needs] == ["squad-1", "squad-2"]


def test_the_text_of_bert_large_on_32_nodes() -> None:
    _, pretrain, _, _ = ready()
    text = text_of(pretrain, "dgx_a100_80g")
    file = GOLDEN / "bert_large_32_nodes.sbatch"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"{file}: differs; look at it, then REWRITE_GOLDEN=1 pytest writes it anew"


PROFILES = ("generic", "venv_modules", "conda", "pyxis", "apptainer", "preemptible_cancel")


@pytest.mark.parametrize("cluster", PROFILES)
def test_the_text_of_each_kind_of_site(cluster: str) -> None:
    """Header, environment and srun line of the pretraining job; the shell code around them is the same for all."""
    pretrain = next(job for job in ready(cluster=cluster, nodes="4") if job.name == "pretrain")
    text = text_of(pretrain, cluster)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    text = text.replace(script.JOB_SH, "# …\n")
    file = GOLDEN / f"profile_{cluster}.sbatch"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"{file}: differs; look at it, then REWRITE_GOLDEN=1 pytest writes it anew"


def test_spare_jobs_go_on_where_requeue_is_refused() -> None:
    chain = {job.name: job for job in ready(cluster="preemptible_cancel", nodes="4")}
    assert list(chain)[5:8] == ["pretrain", "pretrain-2", "pretrain-3"]
    waits = {
        name: [f"{need.kind}:{need.job}" for need in chain[name].needs]
        for name in ("pretrain", "pretrain-2", "pretrain-3", "finetune", "report")
    }
    family = ["", "-2", "-3", "-4", "-5"]
    assert waits["pretrain"] == [f"afterok:data{n}" for n in family]
    assert waits["pretrain-2"] == ["afternotok:pretrain"]
    assert waits["pretrain-3"] == ["afternotok:pretrain", "afternotok:pretrain-2"]
    assert waits["finetune"] == [f"afterok:pretrain{n}" for n in family]
    assert waits["report"] == [f"afterany:finetune{n}" for n in family]
    assert [chain[name].any_need for name in waits] == [True, False, False, True, False]
    assert {job.settings["kill-on-invalid-dep"].value for job in chain.values()} == {"yes"}
    run = RunDir(Path("/scratch/runs/bert"))
    spare = chain["pretrain-3"]
    assert (spare.file, spare.stands_in_for) == ("pretrain.sbatch", "pretrain")
    assert len({scripts.tag_of(run, job, "s") for job in chain.values()}) == len(chain)  # told apart by them
    assert scripts.gpu_hours(list(chain.values())) == 4 * 8 * 24 + 8 * 8
    with pytest.raises(ConfigError, match="--split"):
        jobs.with_spares(plans(split=True), 1)
    alone = jobs.with_spares(plans(todo=["phase1"]), 1)
    assert [(job.name, len(job.needs)) for job in alone] == [("pretrain", 0), ("pretrain-2", 1)]


def test_the_job_of_a_stage_is_the_spare_that_lives() -> None:
    journal = Journal(
        submission="s", state="released", jobs=(held(101), dataclasses.replace(held(102), name="pretrain-2"))
    )
    dead, live = queue.QueuedJob(id="101", state="PREEMPTED"), queue.QueuedJob(id="102", state="RUNNING")
    assert journal.job_of("phase1", {"101": dead, "102": live}).id == "102"
    assert journal.job_of("phase1", {"101": live, "102": live}).id == "101"
    assert journal.job_of("phase1").id == "101"
    assert journal.job_of("phase2") is None


def test_the_gpu_hours_of_a_run(tmp_path) -> None:
    run, chain = RunDir(tmp_path), ready(nodes="2")
    assert scripts.spent_gpu_hours(run) == 0
    (tmp_path / "jobs").mkdir()
    for name, text in (("7.0", "7200\n"), ("7.1", "1800"), ("8.0", ""), ("8.1", "²"), ("8.2", "-9000")):
        (tmp_path / "jobs" / f"{name}.gpu_s").write_text(text)  # the third is just being written
    os.mkfifo(tmp_path / "jobs" / "8.3.gpu_s")
    assert scripts.spent_gpu_hours(run) == 2.5

    def limited(hours: float) -> Request:
        return asked_for(tmp_path, "generic", "--max-gpu-hours", hours)

    start.check_budget(limited(0), chain)
    start.check_budget(limited(2.8), chain)
    start.check_budget(limited(1), [job for job in chain if job.name == "report"])
    with pytest.raises(ConfigError, match=r"2\.50 GPU-hours are spent, --max-gpu-hours allows 2\.7"):
        start.check_budget(limited(2.7), chain)  # less than a minute on 16 GPUs is left
    assert "\nmax_gpu_s=9360\n" in scripts.script_text(limited(2.6), chain[1])


@pytest.mark.parametrize(
    ("words", "blamed"),
    [
        ("sbatch refused: Invalid partition name specified", " (--partition=x from flag)"),
        ("sbatch refused: Invalid feature specification", " (--constraint=c from profile a)"),
        ("Invalid --begin specification", " (--begin=late after --)"),
        (
            "sbatch refused: Requested node configuration is not available",
            " (--nodes=64 from flag; --mem=9T from flag; --constraint=c from profile a)",
        ),
        ("sbatch refused: Invalid qos specification", ""),
        ("sbatch refused: Unspecified error", ""),
    ],
)
def test_a_refusal_names_the_option_and_where_it_came_from(words: str, blamed: str) -> None:
    given = {name: Setting(value, "flag") for name, value in (("partition", "x"), ("nodes", "64"), ("mem", "9T"))}
    given["constraint"] = Setting("c", "profile a")
    assert refusal.blame(words, given, ["--begin=late"]) == blamed


def test_scripts_are_written_without_slurm_and_as_they_are_sent(tmp_path, monkeypatch) -> None:
    words = ["--recipe", "bert_large", "--cluster", "generic", "--run", tmp_path / "run", "--data", tmp_path]
    out = tmp_path / "scripts"
    done = call("submit", *words, "--nodes", "4", "-A", "proj x", "--write-scripts", out, "--", "--nice=5")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "data.sbatch",
        "finetune.sbatch",
        "pretrain.sbatch",
        "report.sbatch",
        "submit.sh",
    ]
    assert "is not begun" in done.stdout
    assert not (tmp_path / "run").exists()
    for path in out.iterdir():
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    for job in ready(Flag("account", "proj x"), cluster="generic", nodes="4"):
        assert (out / job.file).read_text() == scripts.script_text(asked_for(tmp_path / "run"), job)
    assert "--nice=5" in (out / "submit.sh").read_text()


def test_a_chain_sent_by_submit_sh_is_the_runs(fake, tmp_path, monkeypatch) -> None:
    """With a real shell and stub commands: it is in the journal, and what squeue's comments say is not needed."""
    run, bin_, out = RunDir(tmp_path / "it's run"), tmp_path / "bin", tmp_path / "out"
    run.path.mkdir()
    bin_.mkdir()
    for name, body in (("sbatch", "echo Welcome; echo x >>n; echo 10$(($(wc -l <n) - 1))"), ("scontrol", "cp $J held")):
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    scripts.write_scripts(out, asked_for(run.path), ready(cluster="generic", nodes="2"))
    env = {"PATH": f"{bin_}:/usr/bin:/bin", "J": str(Journal.path(run)).replace("'", "?").replace(" ", "?")}
    subprocess.run([out / "submit.sh"], env=env, check=True)
    assert '"state": "releasing"' in (out / "held").read_text()
    journal = Journal.read(run)
    assert (journal.state, journal.submission) == ("released", "by-hand")
    assert journal.names == {"100": "data", "101": "pretrain", "102": "finetune", "103": "report"}
    fake.all = {
        number: {"tag": "the site's", "held": False, "state": "RUNNING", "waits": ""} for number in ("100", "7")
    }
    with pytest.raises(InUseError, match=r"data \(job 100, running\)"):
        send_once(run)
    monkeypatch.setattr(RunDir, "event", lambda self, *words, **values: None)
    cancel.cancel_jobs(run, "extract")
    assert {number: job["state"] for number, job in fake.all.items()} == {"100": "CANCELLED", "7": "RUNNING"}


def test_a_dry_run_writes_nothing_and_names_sources(tmp_path) -> None:
    words = ["--recipe", "bert_large", "--cluster", "generic", "--run", tmp_path / "run"]
    done = call("submit", *words, "-N", "16-32", "-p", "h100", "-p", "data=cpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "16-32 nodes, 256 tasks, time 1-00:00:00, at most 6144 GPU-hours" in done.stdout
    assert "--partition=h100  (flag)" in done.stdout
    assert "--mem=64G  (profile generic)" in done.stdout
    assert not (tmp_path / "run").exists()
    words[3] = "dgx_a100_80g"
    idle = call("submit", *words, "-N", "24", "--dry-run").stdout.splitlines()[-2:]
    assert [line.split()[0] for line in idle] == ["phase1:", "phase2:"]
    assert "33% of the time of 192 ranks is idle with micro-batches of 256" in idle[0]
    better = [word for line in idle for word in line.split() if word in ("--set",) or ".micro_batch=" in word]
    assert "is idle" not in call("submit", *words, "-N", "24", *better, "--dry-run").stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["-p", "gpu"], "--partition: means nothing"),
        (["--test-only"], "--test-only: means nothing"),
        (["--max-gpu-hours", "5", "--allow-mixed"], "--max-gpu-hours, --allow-mixed: means nothing"),
        (["--nodes", "0"], "--nodes=0"),
        (["--", "--nice"], "--nice: means nothing"),
    ],
)
def test_slurm_options_without_slurm_are_refused(tmp_path, words, hint) -> None:
    done = call("submit", "--recipe", "tiny", "--cluster", "local", "--run", tmp_path / "run", *words)
    assert done.returncode == 2
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_stop_is_asked_for_before_the_time_limit(monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pipeline.node.preempt.time.time", lambda: now)
    stop = StopRequest(deadline=1100.0)
    stop.after_step(step_s=20.0, save_s=10.0)  # needs 20 + 2 x 10 + 30 = 70 s
    assert stop.reason is None
    now = 1031.0
    stop.after_step(step_s=1.0, save_s=10.0)  # the longest step counts
    assert stop.reason == "69 s before its time or GPU-hours are used up"
    without = StopRequest()
    without.after_step(step_s=1e9, save_s=0)
    assert without.reason is None


@pytest.mark.parametrize(("left_s", "said"), [(179, "SIGUSR2, 179 s before its time"), (181, "SIGUSR2")])
def test_slurms_warning_of_the_time_limit_is_no_preemption(monkeypatch, left_s: int, said: str) -> None:
    """The signal asked for 120 s before the end may come 60 s too early."""
    monkeypatch.setattr("pipeline.node.preempt.time.time", lambda: 1000.0)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        stop = StopRequest(deadline=1000.0 + left_s, warning_s=120)
        stop.listen()
        signal.raise_signal(signal.SIGUSR2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.reason is not None
    assert stop.reason.removesuffix(" or GPU-hours are used up") == said


class Killed(BaseException):
    """The process is no more."""


class FakeSlurm:
    """Slurm as a list of jobs; from the call number ``dies_at`` on, whoever calls is dead, after the call or before."""

    def __init__(self) -> None:
        self.all: dict[str, dict[str, str]] = {}
        self.calls, self.dies_at, self.after = 0, 10**9, False

    def act(self, change) -> object:
        self.calls += 1
        dead = self.calls >= self.dies_at
        if dead and not (self.after and self.calls == self.dies_at):
            raise Killed
        result = change()
        if dead:
            raise Killed
        return result

    def submit(self, file, words, arguments=(), *, tag, say) -> str:
        def change() -> str:
            number = str(100 + len(self.all))
            waits = [word for word in words if word.startswith("--dependency=")]
            self.all[number] = {"tag": tag, "held": "--hold" in words, "state": "PENDING", "waits": "".join(waits)}
            return number

        return self.act(change)

    def jobs(self) -> dict[str, queue.QueuedJob]:
        return self.act(
            lambda: {
                number: queue.QueuedJob(id=number, state=job["state"], comment=job["tag"])
                for number, job in self.all.items()
            }
        )

    def cancel(self, ids, *, patience_s=0) -> list[str]:
        wanted = list(ids)
        self.act(lambda: [self.all[number].update(state="CANCELLED") for number in wanted])
        return ["scancel", *wanted]

    def release(self, ids) -> None:
        wanted = list(ids)
        self.act(lambda: [self.all[number].update(held=False) for number in wanted])

    def live(self) -> list[dict[str, str]]:
        return [job for job in self.all.values() if job["state"] != "CANCELLED"]


@pytest.fixture
def fake(monkeypatch, tmp_path) -> FakeSlurm:
    made = FakeSlurm()
    for name in ("submit", "jobs", "cancel", "release"):
        monkeypatch.setattr(queue, name, getattr(made, name))
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 1))
    return made


def send_once(run: RunDir, replace: bool = False) -> None:
    from pipeline.launch.send import finish_interrupted, send

    old = finish_interrupted(run, replace=replace, say=lambda line: None)
    with send(asked_for(run.path), ready(cluster="generic", nodes="2"), old, lambda line: None):
        pass


def test_what_slurm_is_to_read_nobody_else_can_change(fake, tmp_path, monkeypatch) -> None:
    """sbatch reads each file from a folder of this user alone; the one in the run's folder is to be looked at."""
    read: dict[str, tuple[int, str]] = {}
    accept = fake.submit

    def submit(file: Path, *given: object, **more: object) -> str:
        read[file.name] = (stat.S_IMODE(file.parent.stat().st_mode), file.read_text())
        return accept(file, *given, **more)

    monkeypatch.setattr(queue, "submit", submit)
    send_once(RunDir(tmp_path))
    assert {mode for mode, _ in read.values()} == {0o700}
    assert {name: text for name, (_, text) in read.items()} == {
        file.name: file.read_text() for file in tmp_path.glob("jobs/*.sbatch")
    }


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_call_a_second_submit_leaves_one_chain(fake, tmp_path, after, earlier) -> None:
    """With and without an older chain that waits; before and after each call has reached Slurm."""
    deaths = 0
    for dies_at in range(1, 30):
        run = RunDir(tmp_path / f"{dies_at}")
        run.path.mkdir()
        fake.__init__()
        if earlier:
            send_once(run)
        fake.calls, fake.dies_at, fake.after = 0, dies_at, after
        try:
            send_once(run)
        except Killed:
            deaths += 1
        roots = [job for job in fake.live() if not job["held"] and not job["waits"]]
        chains = {job["tag"].split("/")[1] for job in roots}
        assert len(chains) <= 1  # never two chains that could run
        journal = Journal.read(run)
        if journal is not None and journal.state == "sending":  # not complete: its first job must not start
            assert all(job["held"] for job in fake.live() if job["tag"].endswith(f"/{journal.submission}/data"))
        fake.dies_at = 10**9
        send_once(run)
        assert [job["tag"].split("/")[2] for job in fake.live()] == ["data", "pretrain", "finetune", "report"]
        assert len({job["tag"].split("/")[1] for job in fake.live()}) == 1
        assert not any(job["held"] for job in fake.live())
        assert Journal.read(run).state == "released"
    assert deaths == 7 + earlier  # the calls: two listings, four jobs, a release; and cancelling the older chain


def test_what_a_killed_submit_left_is_settled_even_where_the_run_is_at_work(fake, tmp_path) -> None:
    run = RunDir(tmp_path)
    send_once(run)
    first = fake.live()
    fake.all["100"]["state"] = "RUNNING"
    fake.calls, fake.dies_at = 0, 4  # the third job of a chain that was to replace it
    with pytest.raises(Killed):
        send_once(run, replace=True)
    fake.dies_at = 10**9
    assert len(fake.live()) == 6
    with pytest.raises(InUseError):
        send_once(run)
    assert fake.live() == first  # the half chain is gone
    journal = Journal.read(run)
    submission = first[0]["tag"].split("/")[1]
    dataclasses.replace(journal, submission=submission, state="releasing", jobs=(held(101),)).write(run)
    fake.all["101"]["held"] = True
    with pytest.raises(InUseError):
        send_once(run)
    assert not fake.all["101"]["held"]  # the release is finished
    assert Journal.read(run).state == "released"


def held(number: int) -> SentJob:
    return SentJob(name="pretrain", stages=("phase1",), needs=(), held_by_us=True, id=str(number))


def test_a_refusal_of_slurm_leaves_the_older_chain(fake, tmp_path) -> None:
    run = RunDir(tmp_path)
    send_once(run)
    before, sent = Journal.read(run), list(fake.live())

    def refuse(file, words, arguments=(), *, tag, say):
        if tag.endswith("finetune"):
            raise FlagError("sbatch refused: Invalid partition")
        return fake.submit(file, words, tag=tag, say=say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "submit", refuse)
        with pytest.raises(FlagError):
            send_once(run)
    assert fake.live() == sent
    assert Journal.read(run) == before


def test_running_jobs_are_refused_or_replaced(fake, tmp_path) -> None:
    run = RunDir(tmp_path)
    send_once(run)
    fake.all["100"]["state"] = "RUNNING"
    with pytest.raises(InUseError, match=r"data \(job 100, running\).*--replace"):
        send_once(run)
    assert len(fake.all) == 4
    send_once(run, replace=True)
    assert fake.all["104"]["waits"] == "--dependency=afterany:100,afterany:101,afterany:102,afterany:103"
    assert fake.all["100"]["state"] == "CANCELLED"


@pytest.fixture
def family(fake, tmp_path, monkeypatch) -> Callable[[str], None]:
    """Sends data and two seeds to the list; the data are not there yet; texts are seen at first sight alone."""
    for asked_of_slurm in ("estimate_start", "partitions"):
        monkeypatch.setattr(queue, asked_of_slurm, lambda *_: "")
    monkeypatch.setattr("pipeline.launch.code.keep", lambda *_: None)
    write_corpora(tmp_path)

    def send(name: str, *more: str) -> None:
        words = [
            "--recipe",
            str(SMALL),
            "--cluster",
            "devcluster",
            "--data",
            str(tmp_path),
            "--stages",
            "phase1",
            *more,
        ]
        seeds = {f"seed-{seed}": [f"--set=train.seed={seed}"] for seed in (0, 1)}
        assert start_family(tmp_path / name, seeds, words) == 0

    return send


def sent_as(fake) -> list[tuple[str, str, bool]]:
    """The live jobs: name, what it waits for, whether it is held."""
    return [(job["tag"].split("/")[2], job["waits"].rpartition("=")[2], job["held"]) for job in fake.live()]


def test_a_family_is_sent_in_one_call(fake, family, tmp_path) -> None:
    family("family")
    whole = [("data", "", False), ("pretrain", "afterok:100", False), ("pretrain", "afterok:100", False)]
    assert sent_as(fake) == whole
    family("family")  # all is at work
    assert sent_as(fake) == whole
    assert len(fake.all) == 3
    fake.all["101"]["state"] = "COMPLETED"  # a seed whose job is gone, while the data are still made
    fake.all["100"]["state"] = "RUNNING"
    family("family")
    assert fake.all["103"]["waits"] == "--dependency=afterok:100"
    assert [run.path.name for run in runs_of(tmp_path / "family")] == ["data", "seed-0", "seed-1"]
    with pytest.raises(ConfigError, match="no run"):
        start_family(tmp_path / "family" / "data", {}, [])


def test_one_of_the_datas_spare_jobs_is_enough_for_a_seed(fake, family, tmp_path) -> None:
    profile = tmp_path / "site.toml"
    text = (code.ROOT / "slurm/profiles/devcluster.toml").read_text()
    profile.write_text(text.replace("[data]", "requeue = false\nspares = 1\n[data]", 1))
    family("family", "--cluster", str(profile))
    waits = {(name, waits) for name, waits, _ in sent_as(fake)}
    assert {("data", ""), ("data-2", "afternotok:100"), ("pretrain", "afterok:100?afterok:101")} <= waits


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_family_killed_at_any_call_starts_nothing_before_it_is_whole(fake, family, tmp_path, after) -> None:
    deaths = 0
    for dies_at in range(1, 15):
        fake.__init__()
        fake.dies_at, fake.after = dies_at, after
        try:
            family(str(dies_at))
        except Killed:
            deaths += 1
            if any(name == "data" and not held for name, _, held in sent_as(fake)):
                assert [name for name, _, _ in sent_as(fake)] == ["data", "pretrain", "pretrain"]
        fake.dies_at = 10**9
        family(str(dies_at))
        (data,) = (number for number, job in fake.all.items() if job["tag"].endswith("data") and job in fake.live())
        (first, *rest), waits = sorted(sent_as(fake)), ("pretrain", f"afterok:{data}", False)
        assert (first[0], first[2], rest) == ("data", False, [waits, waits])
    assert deaths == 12  # for each run two listings, a job, a release


def test_a_seed_that_slurm_refuses_takes_the_family_back(fake, family, tmp_path, monkeypatch) -> None:
    submit, taken = queue.submit, []

    def refuse(file, words, arguments=(), *, tag, say):
        taken.append(tag)
        if len(taken) == 3:
            raise FlagError("sbatch refused: Invalid partition")
        return submit(file, words, tag=tag, say=say)

    monkeypatch.setattr(queue, "submit", refuse)
    with pytest.raises(FlagError):
        family("family")
    assert fake.live() == []
    assert not list((tmp_path / "family").glob("*/jobs.json"))


def test_status_and_cancel_when_slurm_does_not_answer(tmp_path) -> None:
    """No squeue on PATH: the run's own files are told, and that Slurm is silent; cancel says it in one line."""
    words = ["--recipe", SMALL, "--cluster", "devcluster", "--run", tmp_path / "run", "--data", tmp_path]
    words += ["--stages", "extract"]
    write_corpora(tmp_path)
    assert call("submit", *words, "--write-scripts", tmp_path / "scripts").returncode == 0
    run = RunDir(tmp_path / "run")
    (run.path / "jobs.json").write_text(
        '{"sending": "a", "state": "released", "jobs": [{"name": "data", "stages": ["extract"], "needs": [], '
        '"ours": true, "id": "7"}]}'
    )
    silent = {**os.environ, "PATH": "/nowhere", "SLURM_CONF": "/nowhere"}
    known = call("status", run.path, env=silent)
    assert known.returncode == 0, known.stderr
    assert "extract      unknown" in known.stdout
    assert "Slurm does not answer" in known.stdout or "Slurm installed" in known.stdout
    refused = call("cancel", run.path, env=silent)
    assert refused.returncode == 9
    assert refused.stderr.count("\n") == 1


def test_submit_alone_imports_neither_submitit_nor_torch() -> None:
    program = "import pipeline.submit, sys; assert not {'submitit', 'torch', 'h5py'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=code.ROOT, check=False).returncode == 0


@pytest.mark.parametrize("words", [[], ["--verify"]])
def test_verify_has_all_samples_read_again(tmp_path, words):
    stage = tmp_path / "run/stages/phase1"
    records = [stage / f"verified/{split}-00000.hdf5.json" for split in ("train", "test")]
    records[0].parent.mkdir(parents=True)
    (checkpoint := stage / "attempts/0001/step-5").mkdir(parents=True)
    for record in records:
        record.write_text("{}")
    asked = request.of(["--recipe", "tiny", "--cluster", "local", "--run", str(tmp_path / "run"), *words])
    start.move_aside(Chain.planned(asked.run, asked.recipe, {}), asked)
    assert [record.exists() for record in records] == [not words, not words]
    assert checkpoint.is_dir()
