"""Batch files: their whole text against golden files, and what their shell code does with a Slurm made of stubs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import script, submission, verdict
from slurm.environment import clean
from slurm.errors import FlagError
from slurm.flags import Setting
from slurm.resources import Resources
from slurm.script import Script
from slurm.submission import JobPlan, Need

GOLDEN = Path(__file__).parent / "golden"
STAGE = Path(script.__file__).parent / "stage.sbatch"


def golden(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"{file}: differs; look at it, then REWRITE_GOLDEN=1 pytest writes it anew"


def settings(**values: str) -> dict[str, Setting]:
    return {name.replace("_", "-"): Setting(value, "flag") for name, value in values.items()}


def plain(**changes: object) -> Script:
    values: dict[str, object] = {
        "resources": Resources(nodes=(4, 4), time_min=60),
        "settings": settings(partition="cpu"),
        "program": ["/usr/bin/python3"],
        "arguments": ["-m", "pipeline.worker", "runs/a", "extract"],
        "log_dir": "/data/runs/a/logs",
        "state_dir": "/data/runs/a/jobs",
    }
    return Script(**(values | changes))  # type: ignore[arg-type]


def test_plain_script() -> None:
    golden("plain.sbatch", script.render(plain()))


def test_script_with_everything() -> None:
    full = plain(
        resources=Resources(
            nodes=(16, 32), tasks_per_node=8, gpus_per_node=8, cpus_per_task=16, time_min=2880, mem_gb=0
        ),
        settings=settings(partition="h100", account="proj", requeue="", signal="USR2@300", comment='a "b" #1 \\ %j'),
        log_dir="/data/100% mine/logs",
        modules=["cuda/12.4", "it's"],
        setup=["ulimit -l unlimited"],
        env={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "$(touch x); `y` \"z\" 'w'"},
        srun_args=["--cpu-bind=cores", "--container-image=/img/a b.sqsh"],
        program=["apptainer", "exec", "--nv", "/img/a b.sif", "python3"],
    )
    golden("full.sbatch", script.render(full))


def test_submit_sh() -> None:
    common = {"section": "data", "stages": ()}
    chain = [
        JobPlan(name="1 data", **common),
        JobPlan(name="pretrain", needs=(Need(job="1 data"),), **common),
        JobPlan(name="spare", needs=(Need(job="pretrain", kind="afternotok"),), stands_in_for="pretrain", **common),
        JobPlan(name="r", needs=(Need(job="pretrain"), Need(job="spare")), any_need=True, **common),
        JobPlan(name="alone", settings=settings(hold=""), **common),
    ]
    extra = {job.name: ["--bbf=my file"] if job.name == "1 data" else [] for job in chain}
    golden("submit.sh", submission.submit_sh(chain, extra))


def test_submit_sh_where_sbatch_greets_or_says_nothing(tmp_path: Path) -> None:
    """It finds the id among other lines; without one it cancels what it has sent."""
    chain = [JobPlan(name=name, section="data", stages=()) for name in ("a", "b")]
    (tmp_path / "submit.sh").write_text(submission.submit_sh(chain, {"a": [], "b": []}))
    for name in ("sbatch", "scontrol", "scancel"):
        body = f'echo "{name} $*" >>log; if [ {name} = sbatch ]; then echo "--> OK"; case $* in $NO*) ;; *'
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}) echo "41$(wc -l <log);lab" ;; esac; fi\n')
        (tmp_path / name).chmod(0o755)
    call = {"args": ["bash", "submit.sh"], "cwd": tmp_path, "capture_output": True, "text": True}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(**call, env=env | {"NO": "none"}, check=True).stdout == "411\n412\n"
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["scontrol release 411", "scontrol release 412"]
    (tmp_path / "log").unlink()
    refused = subprocess.run(**call, env=env | {"NO": "*b.sbatch"}, check=False)
    assert (refused.returncode, "gave no job id" in refused.stderr) == (1, True)
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["scancel 411"]


@pytest.mark.parametrize("ends_with", ["0", "3"])
@pytest.mark.parametrize("prints", ['"Submitted as $id"', '"12345\n$id"', '"$id\n12345"'])
def test_submit_sh_asks_by_comment_where_sbatch_prints_no_id_or_several(
    tmp_path: Path, prints: str, ends_with: str
) -> None:
    """Nothing is left of a job that a wrapper took to Slurm and then failed, and no stranger's job is touched."""
    chain = [JobPlan(name=name, section="data", stages=()) for name in ("a", "b")]
    tags = {job.name: [f"--comment=key/by-hand/{job.name} my  words"] for job in chain}
    (tmp_path / "submit.sh").write_text(submission.submit_sh(chain, tags))
    take = f'id=41$(($(wc -l <log) + 1)); echo "$id ${{2#*=}}" >>jobs; printf {prints}; code={ends_with}'
    for name, body in (("sbatch", take), ("squeue", "cat jobs; exit"), ("scontrol", ""), ("scancel", "")):
        (tmp_path / name).write_text(f'#!/bin/bash\ncode=0\n{body}\necho "{name} $*" >>log\nexit $code\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "log").touch()
    (tmp_path / "jobs").write_text("399 key/by-hand/a my  words\n400 key/by-hand/c\n")
    call = {"args": ["bash", "submit.sh"], "cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(**call, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    later = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("sbatch")]
    if ends_with == "0":
        assert done.stdout == "411\n412\n", done.stderr
        assert later == ["scontrol release 411", "scontrol release 412"]
    else:
        assert (done.returncode, "gave no job id" in done.stderr) == (1, True)
        assert later == ["scancel 411"]
        (tmp_path / "sbatch").write_text("#!/bin/bash\necho 12345\nexit 1\n")  # greets, and is refused
        (tmp_path / "log").unlink()
        assert subprocess.run(**call, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}).returncode == 1
        assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"program": ["a\nb"]},
        {"arguments": ["a", ":", "b"]},
        {"code": "/a\nb"},
        {"env": {"A B": "x"}},
        {"env": {"A": "x\ny"}},
        {"modules": ["a\nb"]},
        {"state_dir": "/a\nb"},
        {"log_dir": "/a\\b"},
        {"setup": ["a\nrm -rf x"]},
        {"settings": {"comment": Setting("a\nb", "flag")}},
    ],
)
def test_what_cannot_stand_on_one_line_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FlagError):
        script.render(plain(**changes))


def test_every_batch_file_ends_with_the_same_shell_text() -> None:
    assert script.render(plain()).endswith(f"\n}}\n\n{script.JOB_SH}")
    assert f"least_s={verdict.LEAST_S} " in script.JOB_SH
    assert f"most_tries={verdict.TRIES_WITHOUT_PROGRESS} " in script.JOB_SH


def test_the_hand_written_stage_script_ends_with_it_too(job, tmp_path: Path) -> None:
    """Slurm runs a copy that lies elsewhere; Python says where the rest is."""
    (tmp_path / "job.sh").write_text(STAGE.read_text())
    words = {"PYTHON": sys.executable, "PYTHONPATH": str(STAGE.parents[1]), "TASKS_PER_NODE": "2"}
    assert job(None, "a run", "phase1", "phase2", **words)[::2] == (
        2, "a run: no run (no run.json); begin one with python -m pipeline.submit\n"
    )  # fmt: skip
    assert not (tmp_path / "a run").exists()
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/run.json").touch()
    code, calls, said = job(None, "a run", "phase1", "phase2", CODE="6", **words)
    assert code == 6, said
    assert calls[0] == (
        "srun --nodes=3 --ntasks=6 --ntasks-per-node=2 --cpus-per-task=1 --export=ALL --kill-on-bad-exit=1 "
        "--overcommit "
        f"{sys.executable} -m pipeline.worker a run phase1 phase2"
    )
    assert (tmp_path / "a run" / "jobs" / "7.over").read_text() == "6 ended with code 6\n"
    assert job(None, "run")[0] == 2
    code, _, said = job(None, "a run", "phase1", **words | {"PYTHON": "/bin/false"})
    assert (code, "finds no package slurm" in said) == (7, True)


SQUEUE = 'case $* in *%T*) echo "${STATE:-RUNNING}" ;; *) echo "${LEFT:-UNLIMITED}" ;; esac'
SRUN = """\
case $* in *--nodelist=*--version)
  if [[ $* != *--nodelist=n[$DUMB]* ]]; then exit; fi
  if [ -n "$LACKS" ]; then echo "slurmstepd: error: execve(): python: No such file or directory" >&2; fi
  exit 2 ;;
esac
env | LC_ALL=C sort >environment
echo "srun $*" >>log; printenv JOB_DEADLINE >>log; printenv JOB_LIMIT >>log
if [ -n "$SPEND" ]; then echo 1000 >"$SPEND"; fi
if [ -n "$WORK" ]; then /bin/sleep "$WORK"; fi
if [ -n "$SAY" ]; then echo "$SAY" >"$JOB_VERDICT"; fi
if [ -n "$TERM_PARENT" ]; then kill -TERM $PPID; fi
if [ -n "$STOP_PARENT" ]; then kill -STOP $PPID; fi
if [ -n "$STOP_SELF" ]; then kill -STOP $$; fi
exit "${CODE:-0}"
"""
SCONTROL = """\
if [ "$1 $2" = "show job" ]; then echo "  Requeue=1 Restarts=${NOW:-${SLURM_RESTART_COUNT:-0}} BatchFlag=1"; exit; fi
echo "scontrol $*" >>log
case $1 in show) tr , '\\n' <<<"$3"; exit ;; esac
if [ -n "$REFUSE" ]; then echo "$REFUSE" >&2; exit 1; fi
if [ ! -e asked ] && [ -n "$DOWN" ]; then touch asked; echo "Unable to contact slurm controller" >&2; exit 1; fi
"""


SLEEP = """\
if [ "$1" = 30 ]; then exec /bin/sleep "${NOTE_S:-30}"; fi  # between two notes of the GPU time
"""


@pytest.fixture
def job(tmp_path: Path):
    """Run a batch file with stub commands; returns (exit code, what was called, output)."""
    stubs = {"squeue": SQUEUE, "srun": SRUN, "scontrol": SCONTROL, "sleep": SLEEP, "scancel": 'echo "scancel $*" >>log'}
    for name, body in stubs.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + body)
        (tmp_path / name).chmod(0o755)
    base = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    base |= {"SLURM_JOB_NODELIST": "n1,n2,n3", "HOME": str(tmp_path)}

    def run(requeue: bool | None = True, *words: str, gpus: int = 0, max_gpu_s: int = 0, code: str = "", **env: str):
        """``requeue`` None: the batch file that is there already."""
        made = plain(
            state_dir=str(tmp_path / "it's jobs"),
            settings=settings(requeue="") if requeue else {},
            resources=Resources(gpus_per_node=gpus),
            max_gpu_s=max_gpu_s,
            code=code,
        )
        if requeue is not None:
            (tmp_path / "job.sh").write_text(script.render(made))
        (tmp_path / "log").write_text("")
        done = subprocess.run(
            ["/bin/bash", "job.sh", *words],
            cwd=tmp_path,
            env=base | env,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return done.returncode, (tmp_path / "log").read_text().splitlines(), done.stdout + done.stderr

    return run


def asked(calls: list[str], job_id: int = 7) -> int:
    return calls.count(f"scontrol requeue {job_id}")


def test_a_good_stage_ends_with_0(job) -> None:
    code, calls, _ = job()
    assert (code, asked(calls)) == (0, 0)
    assert calls[0].endswith("/usr/bin/python3 -m pipeline.worker runs/a extract")


@pytest.mark.parametrize("verdict_code", [75, 76, 77])
def test_restart_codes_ask_for_a_requeue(job, verdict_code: int) -> None:
    assert asked(job(CODE="143", SAY=str(verdict_code))[1]) == 1


@pytest.mark.parametrize("verdict_code", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_other_codes_never_do(job, verdict_code: int) -> None:
    code, calls, _ = job(CODE="76", SAY=str(verdict_code))
    assert (code, asked(calls)) == (verdict_code, 0)


def test_sruns_code_counts_without_a_verdict(job) -> None:
    assert (job(CODE="6")[0], asked(job(CODE="75", SLURM_JOB_ID="8")[1], 8)) == (6, 1)


@pytest.mark.parametrize("code", ["1", "2", "127", "135", "213"])
def test_nodes_on_which_nothing_starts_are_left_out(job, code: str) -> None:
    """No rank said a word: the next attempt is for the nodes that can start the program; on none: no node's fault."""
    _, calls, said = job(CODE=code, DUMB="2")
    assert asked(calls) == 1
    assert [line for line in said.splitlines() if "does not start" in line] == [
        "attempt 0: the program does not start on n2"
    ]
    _, calls, said = job(SLURM_RESTART_COUNT="1")
    assert "without n2, found bad before" in said
    for other in ({"DUMB": "123"}, {"DUMB": "0"}, {"DUMB": "2", "SAY": "76"}):
        (_, calls, said) = job(CODE=code, **other, SLURM_JOB_ID="8")
        assert "does not start" not in said, other


def test_a_program_that_is_on_no_node_is_not_tried_again(job) -> None:
    code, calls, said = job(CODE="2", DUMB="123", LACKS="yes")
    assert (code, asked(calls)) == (7, 0), said
    assert "the program is on none of the nodes" in said
    code, calls, said = job(CODE="2", DUMB="12", LACKS="yes", SLURM_JOB_ID="8")
    assert (asked(calls, 8), "does not start on n1" in said) == (1, True)


def test_without_requeue_the_code_stays(job) -> None:
    code, calls, _ = job(requeue=False, CODE="75")
    assert (code, asked(calls)) == (75, 0)


def test_two_attempts_without_progress_are_the_last(job, tmp_path: Path) -> None:
    """Whatever ended them; an attempt that made progress, or that Slurm ended itself, does not count."""
    tries = {"JOB_TRIES": str(tmp_path / "it's jobs" / "7.tries")}
    assert asked(job(CODE="139")[1]) == 1
    code, calls, said = job(CODE="137", SLURM_RESTART_COUNT="1")
    assert (code, asked(calls)) == (137, 0)
    assert "attempt 1: code 76, 2 attempts without progress; not started again" in said
    for name in ("7.tries", "7.over"):
        (tmp_path / "it's jobs" / name).unlink()
    assert asked(job(CODE="75", SLURM_RESTART_COUNT="2")[1]) == 1
    verdict.made_progress(tries)
    assert asked(job(CODE="76", SLURM_RESTART_COUNT="3")[1]) == 1
    _, calls, said = job(CODE="75", TERM_PARENT="1", STATE="COMPLETING", SLURM_RESTART_COUNT="4")  # preempted
    assert (asked(calls), "without progress" in said) == (0, False)
    assert asked(job(CODE="76", SLURM_RESTART_COUNT="5")[1]) == 0


def test_the_same_rule_in_python(tmp_path: Path) -> None:
    path = tmp_path / "tries"
    assert verdict.may_try_again(path)
    for expected in (True, False):
        verdict.begin_try("a", path)
        assert verdict.may_try_again(path) is expected
    verdict.made_progress({"JOB_TRIES": str(path)})
    assert verdict.may_try_again(path)


def test_a_spare_job_goes_on_or_ends_at_once(job) -> None:
    """It shares tries and bad nodes with the job in whose place it runs, and does nothing when that is over."""
    assert job(False, CODE="75", SAY="77 n2")[0] == 77
    code, calls, said = job(False, "7", SLURM_JOB_ID="8")
    assert code == 0
    assert "without n2" in said
    assert any("--exclude=n2" in call for call in calls)
    assert job(False, CODE="5", SLURM_RESTART_COUNT="1")[0] == 5
    code, calls, said = job(False, "7", SLURM_JOB_ID="9")
    assert (code, [call for call in calls if call.startswith("srun")]) == (5, [])
    assert said == "nothing to do in the place of job 7: ended with code 5\n"


def test_spares_share_the_tries(job) -> None:
    assert "not started again" not in job(False, CODE="76")[2]
    assert "2 attempts without progress" in job(False, "7", CODE="76", SLURM_JOB_ID="8")[2]
    assert "nothing to do" in job(False, "7", SLURM_JOB_ID="9")[2]


def test_gpu_time_is_noted_and_limited(job, tmp_path: Path) -> None:
    """12 GPUs on 3 nodes; what other jobs of the run noted counts."""
    state = tmp_path / "it's jobs"
    code, calls, _ = job(gpus=4, max_gpu_s=12000, LEFT="2:00:00")
    assert code == 0
    now = int(subprocess.check_output(["date", "+%s"]))
    assert (int(calls[1]), calls[2]) == (pytest.approx(now + 1000, abs=5), "gpu_hours")
    assert int((state / "7.0.gpu_s").read_text()) <= 60
    (state / "3.1.gpu_s").write_text("6000\n")
    assert int(job(gpus=4, max_gpu_s=12000, LEFT="2:00:00")[1][1]) == pytest.approx(now + 500, abs=8)
    _, *told = job(gpus=4, max_gpu_s=12000, LEFT="1:40")[1]
    assert [int(line) for line in told] == [pytest.approx(now + 100, abs=8)]  # the time limit
    (state / "3.2.gpu_s").write_text("5700\n")
    code, calls, said = job(gpus=4, max_gpu_s=12000)
    assert (code, calls) == (2, [])
    assert "the 200 GPU-minutes that --max-gpu-hours allows are used up; not started again" in said
    assert said.count("\n") == 1
    assert job(gpus=0, max_gpu_s=12000, SLURM_JOB_ID="8")[0] == 0  # the report costs no GPU


def test_a_job_stopped_by_the_limit_of_gpu_time_is_not_requeued(job, tmp_path: Path) -> None:
    state = tmp_path / "it's jobs"
    state.mkdir()
    (state / "3.gpu_s").write_text("11000")
    spend = {"SAY": "75", "CODE": "1", "SPEND": f"{state}/4.gpu_s"}
    code, calls, said = job(gpus=4, max_gpu_s=12000, **spend)
    assert (code, asked(calls)) == (2, 0)
    assert "used up" in said


def test_a_stage_that_looks_at_no_deadline_is_told_to_stop(job, tmp_path: Path) -> None:
    state = tmp_path / "it's jobs"
    state.mkdir()
    (state / "3.gpu_s").write_text("11000")
    _, calls, _ = job(gpus=4, max_gpu_s=12000, NOTE_S="0.1", SPEND=f"{state}/4.gpu_s", WORK="2")
    assert "scancel --signal=TERM 7" in calls


NAMES = ("", "08x", "9" * 30)  # what a node could be called
PLANTED = (*NAMES, "a[$(touch run)]", "$(touch run)", "`touch run`", "-99999", "; touch run", "* ..", "\x1b[2J")


@pytest.mark.parametrize("text", PLANTED)
def test_what_is_planted_in_the_run_folder_is_not_run(job, tmp_path: Path, text: str) -> None:
    """Of every file that the script reads. Shell arithmetic would run a subscript's command."""
    state = tmp_path / "it's jobs"
    state.mkdir()
    for name in ("3.0.gpu_s", "7.0.verdict", "7.bad_nodes", "7.tries"):
        (state / name).write_text(f"{text}\n")
    code, calls, said = job(gpus=4, max_gpu_s=12000, CODE="6")
    assert (code, asked(calls), any(call.startswith("srun") for call in calls)) == (6, 0, True), said
    for planted in ("77", "0"):
        (state / "7.over").unlink(missing_ok=True)
        (state / "7.1.verdict").write_text(f"{planted} {text}\n")
        code, _, said = job(CODE="6", SLURM_RESTART_COUNT="1")
        assert code == (int(planted) if text in NAMES else 6), said
    (state / "7.over").write_text(f"{text} why\n")
    code, calls, said = job(SLURM_RESTART_COUNT="2")
    assert (code, calls, "take it away" in said) == (6, [], True)
    assert not [path for path in tmp_path.rglob("*") if path.name == "run"]


@pytest.mark.parametrize("name", ["7.0.verdict", "7.over", "7.tries", "7.bad_nodes", "7.0.gpu_s.new"])
def test_a_planted_pipe_is_not_waited_for(job, tmp_path: Path, name: str) -> None:
    (tmp_path / "it's jobs").mkdir()
    os.mkfifo(tmp_path / "it's jobs" / name)
    code, calls, said = job(gpus=4, max_gpu_s=12000)
    assert (code, calls) == (6, [])
    assert f"{name}: not a plain file" in said
    (tmp_path / "it's jobs" / name).unlink()
    os.mkfifo(tmp_path / "it's jobs" / "3.0.gpu_s")
    assert job(gpus=4, max_gpu_s=12000)[0] == 0


@pytest.mark.parametrize(
    "name", ["7.0.verdict", "7.over", "7.tries", "7.bad_nodes", "7.0.gpu_s.new", "7.0.killed", "."]
)
def test_nothing_is_written_through_a_link(job, tmp_path: Path, name: str) -> None:
    state, elsewhere = tmp_path / "it's jobs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious\n")
    if name == ".":
        state.symlink_to(elsewhere)
    else:
        state.mkdir()
        (state / name).symlink_to(elsewhere / "file")
    code, calls, said = job(gpus=4, max_gpu_s=12000, CODE="6")
    assert (code, calls, "take it away" in said) == (6, [], True)
    assert (elsewhere / "file").read_text() == "precious\n"
    assert len(list(elsewhere.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ESTALE])
def test_a_file_server_that_is_away_is_waited_for(job, tmp_path: Path, number: int) -> None:
    """Ten minutes, in which it may come back; then the job is queued again. A folder that is refused ends it."""
    away = (
        f'if [ "$(wc -l <"${{0%/*}}/naps")" -lt $BACK ]; then echo "mkdir: x: {os.strerror(number)}" >&2; exit 1; fi\n'
    )
    naps = '#!/bin/bash\nif [ "$1" = 10 ]; then echo >>"${0%/*}/naps"; fi\n'
    for name, text in (("mkdir", f'#!/bin/bash\n{away}exec /bin/mkdir "$@"\n'), ("sleep", naps + SLEEP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "naps").write_text("")
    code, calls, said = job(BACK="7")
    assert (code, asked(calls), os.strerror(number) in said) == (0, 0, True)
    (tmp_path / "naps").write_text("")
    code, calls, said = job(BACK="1000")
    assert (code, asked(calls), len((tmp_path / "naps").read_text())) == (76, 1, 60)
    assert [call for call in calls if call.startswith("srun")] == []
    (tmp_path / "mkdir").write_text('#!/bin/bash\necho "mkdir: x: Permission denied" >&2; exit 1\n')
    assert (job()[0], asked(job()[1])) == (6, 0)


def test_a_controller_that_is_down_is_asked_again(job) -> None:
    _, calls, said = job(CODE="75", DOWN="1")
    assert asked(calls) == 2
    assert "not confirmed" in said


def test_a_refused_requeue_ends_with_the_code(job) -> None:
    code, calls, said = job(CODE="75", REFUSE="Requested operation is presently disabled")
    assert (code, asked(calls)) == (75, 1)
    assert "presently disabled" in said


def test_a_job_that_slurm_ends_does_not_come_back(job) -> None:
    """scancel: the ranks stop cleanly with 75, but a requeue would raise the job from the dead."""
    assert asked(job(CODE="75", TERM_PARENT="1", STATE="COMPLETING")[1]) == 0
    assert asked(job(CODE="75", TERM_PARENT="1", STATE="COMPLETING", LEFT="10:00")[1]) == 0
    for number, code in (("4", "75"), ("5", "137")):  # TERM that no kill follows: scancel --full, --signal=B:TERM@60
        assert asked(job(CODE=code, TERM_PARENT="1", LEFT="10:00", SLURM_JOB_ID=number)[1], int(number)) == 1
    assert asked(job(CODE="75", STATE="COMPLETING")[1]) == 0  # TERM may reach the shell late
    assert asked(job(CODE="75", TERM_PARENT="1", LEFT="0:00")[1]) == 1  # the time limit
    assert asked(job(CODE="75", STATE="COMPLETING", LEFT="0:00", SLURM_JOB_ID="8")[1], 8) == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("stopped", ["STOP_PARENT", "STOP_SELF"])
def test_a_stopped_script_or_srun_goes_on(job, stopped: str) -> None:
    assert job(**{stopped: "1"}, NOTE_S="0.2", CODE="6")[0] == 6


@pytest.mark.parametrize(
    ("left", "seconds"), [("1:30", 90), ("08:09:09", 29349), ("2-01:00:00", 176400), ("UNLIMITED", None), ("", None)]
)
def test_deadline(job, left: str, seconds: int | None) -> None:
    now = int(subprocess.check_output(["date", "+%s"]))
    line = (job(LEFT=left or " ")[1] + [""])[1]
    found = verdict.deadline({"JOB_DEADLINE": line})
    assert (found is None) if seconds is None else (found is not None and 0 <= found - now - seconds <= 5)


def test_bad_nodes_are_left_out_next_time(job) -> None:
    job(CODE="1", SAY="77 n2")
    _, calls, said = job(SLURM_RESTART_COUNT="1")
    assert any("srun --nodes=2 --ntasks=2 " in call and "--exclude=n2" in call for call in calls)
    assert "without n2" in said
    job(CODE="1", SAY="77 n1 n3")  # all nodes are bad now: better to try than not to run at all
    assert not any("--exclude" in call for call in job()[1])


@pytest.mark.parametrize("code", ["76", "5", "137"])
def test_a_script_that_outlived_its_attempt_leaves_the_next_one_alone(job, tmp_path: Path, code: str) -> None:
    ended, calls, said = job(SLURM_RESTART_COUNT="1", NOW="2", CODE=code)
    assert ended == int(code)
    assert "Slurm has begun attempt 2, which goes on alone" in said
    assert not [call for call in calls if "requeue" in call]
    assert not list(tmp_path.glob("*/7.over"))


def test_nothing_of_the_shell_around_reaches_the_ranks(job, tmp_path: Path) -> None:
    around = {"SLURM_NTASKS": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "100", "PMI_RANK": "0"}
    around |= {"MASTER_ADDR": "login7", "RANK": "3", "WORLD_SIZE": "9", "SQUEUE_FORMAT": "%i", "JOB_DEADLINE": "7"}
    around |= {"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_ID": "4", "SLURM_PROCID": "0"}
    code, calls, said = job(**around, SLURM_CONF="/etc/x.conf", SLURM_GPUS_ON_NODE="8", MY_OWN="x")
    assert code == 0, said
    assert calls[0].startswith("srun --nodes=3 --ntasks=3 --ntasks-per-node=1 ")
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert not around.keys() & environment.keys()
    assert environment["JOB_RANKS"] == "3"
    kept = {"SLURM_CONF": "/etc/x.conf", "SLURM_GPUS_ON_NODE": "8", "MY_OWN": "x", "SLURM_JOB_ID": "7"}
    assert kept.items() <= environment.items()
    assert clean({**around, **kept}) == {"SLURM_CONF": "/etc/x.conf", "MY_OWN": "x"}


def test_nodes_with_different_cpus_get_the_smallest_share(job) -> None:
    for per_node, cpus in (("16,4(x2)", 4), ("2(x2),128", 2), ("8(x3)", 8)):
        call = job(SLURM_CPUS_ON_NODE="16", SLURM_JOB_CPUS_PER_NODE=per_node)[1][0]
        assert f"--cpus-per-task={cpus} " in call


def test_verdict_is_given_once(tmp_path: Path) -> None:
    environ = {"JOB_VERDICT": str(tmp_path / "v")}
    assert verdict.give(77, ["n1", "; rm -rf", "n2.site"], environ)
    assert not verdict.give(2, [], environ)
    assert (tmp_path / "v").read_text() == "77 n1 n2.site\n"
    assert not verdict.give(2, [], {})
