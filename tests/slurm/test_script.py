"""Batch files: their whole text against golden files, and what their shell code does with a Slurm made of stubs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slurm import script, verdict
from slurm.errors import FlagError
from slurm.flags import Setting
from slurm.resources import Resources
from slurm.script import Need, Script, Sending

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
        "command": ["/usr/bin/python3", "-m", "pipeline.worker", "runs/a", "extract"],
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
        wrapper=["apptainer", "exec", "--nv", "/img/a b.sif"],
    )
    golden("full.sbatch", script.render(full))


def test_submit_sh() -> None:
    chain = [
        Sending(name="data", file="1 data.sbatch", extra=["--bbf=my file"]),
        Sending(name="pretrain", file="pretrain.sbatch", needs=[Need(job="data")]),
        Sending(name="spare", file="pretrain.sbatch", needs=[Need(job="pretrain", kind="afternotok")]),
        Sending(name="report", file="r.sbatch", needs=[Need(job="pretrain"), Need(job="spare")], any_need=True),
        Sending(name="alone", file="alone.sbatch", held_by_user=True),
    ]
    golden("submit.sh", script.submit_sh(chain))


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ["a\nb"]},
        {"command": ["a", ":", "b"]},
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


def test_hand_written_stage_script_shares_the_logic() -> None:
    text = STAGE.read_text()
    assert script.BEFORE in text
    assert script.AFTER in text
    subprocess.run(["bash", "-n", str(STAGE)], check=True)


SQUEUE = 'case $* in *%T*) echo "${STATE:-RUNNING}" ;; *) echo "${LEFT:-UNLIMITED}" ;; esac'
SRUN = """\
echo "srun $*" >>log; printenv JOB_DEADLINE >>log
if [ -n "$SAY" ]; then echo "$SAY" >"$JOB_VERDICT"; fi
if [ -n "$TERM_PARENT" ]; then kill -TERM $PPID; fi
exit "${CODE:-0}"
"""
SCONTROL = """\
echo "scontrol $*" >>log
case $1 in show) tr , '\\n' <<<"$3"; exit ;; esac
if [ -n "$REFUSE" ]; then echo "$REFUSE" >&2; exit 1; fi
if [ ! -e asked ] && [ -n "$DOWN" ]; then touch asked; echo "Unable to contact slurm controller" >&2; exit 1; fi
"""


@pytest.fixture
def job(tmp_path: Path):
    """Run a batch file with stub commands; returns (exit code, what was called, output)."""
    for name, body in {"squeue": SQUEUE, "srun": SRUN, "scontrol": SCONTROL, "sleep": ":"}.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + body)
        (tmp_path / name).chmod(0o755)
    base = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    base |= {"SLURM_JOB_NODELIST": "n1,n2,n3", "HOME": str(tmp_path)}

    def run(requeue: bool = True, **env: str) -> tuple[int, list[str], str]:
        made = plain(state_dir=str(tmp_path / "it's jobs"), settings=settings(requeue="") if requeue else {})
        (tmp_path / "job.sh").write_text(script.render(made))
        (tmp_path / "log").unlink(missing_ok=True)
        done = subprocess.run(
            ["/bin/bash", "job.sh"],
            cwd=tmp_path,
            env=base | env,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return done.returncode, (tmp_path / "log").read_text().splitlines(), done.stdout + done.stderr

    return run


def asked(calls: list[str]) -> int:
    return calls.count("scontrol requeue 7")


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
    assert (job(CODE="2")[0], asked(job(CODE="75")[1])) == (2, 1)


def test_without_requeue_the_code_stays(job) -> None:
    code, calls, _ = job(requeue=False, CODE="75")
    assert (code, asked(calls)) == (75, 0)


def test_crashes_without_a_verdict_are_counted(job, tmp_path: Path) -> None:
    assert [asked(job(CODE="139", SLURM_RESTART_COUNT=str(k))[1]) for k in range(3)] == [1, 1, 0]
    code, _, said = job(CODE="137")
    assert code == 137
    assert "without progress" in said
    verdict.made_progress({"JOB_CRASHES": str(tmp_path / "it's jobs" / "7.crashes")})
    assert asked(job(CODE="137")[1]) == 1


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
    assert asked(job(CODE="75", TERM_PARENT="1")[1]) == 0
    assert asked(job(CODE="75", TERM_PARENT="1", LEFT="10:00")[1]) == 0
    assert asked(job(CODE="75", STATE="COMPLETING")[1]) == 0  # TERM may reach the shell late
    assert asked(job(CODE="75", TERM_PARENT="1", LEFT="0:00")[1]) == 1  # the time limit
    assert asked(job(CODE="75", STATE="COMPLETING", LEFT="0:00")[1]) == 1


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
    assert any("--exclude=n2 --nodes=2" in call for call in calls)
    assert "without n2" in said
    job(CODE="1", SAY="77 n1 n3")  # all nodes are bad now: better to try than not to run at all
    assert not any("--exclude" in call for call in job()[1])


def test_verdict_is_given_once(tmp_path: Path) -> None:
    environ = {"JOB_VERDICT": str(tmp_path / "v")}
    assert verdict.give(77, ["n1", "; rm -rf", "n2.site"], environ)
    assert not verdict.give(2, [], environ)
    assert (tmp_path / "v").read_text() == "77 n1 n2.site\n"
    assert not verdict.give(2, [], {})
