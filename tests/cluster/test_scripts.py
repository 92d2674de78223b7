"""Our batch files on a real Slurm: quoting, task layout, and what happens after a rank has ended."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import flags, queue, script
from slurm.command import which
from slurm.devcluster import cluster, network
from slurm.errors import FlagError, SlurmError
from slurm.flags import Setting
from slurm.resources import Resources, parse_time
from slurm.script import Script
from slurm.submission import JobPlan, Need, submit_sh

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

BACKSLASH = "\\"
SHOW = 'printf "%s\\n" "$1" "$TEXT" "$PWD" >"$2/got"'
HOSTILE = [
    *("plain", "two words", "tab-free", "trailing ", " leading", "a  b", "don't", 'say "hi"', "'", '"', "''", '""'),
    *(
        "$HOME",
        "${PATH}",
        "$(touch MARK)",
        "`touch MARK`",
        "; touch MARK",
        "& touch MARK",
        "| touch MARK",
        "&& touch MARK",
    ),
    *(
        "|| touch MARK",
        "> MARK",
        ">> MARK",
        "< /etc/passwd",
        "'; touch MARK; '",
        '"; touch MARK; "',
        "#",
        "a #b",
        "#SBATCH -x",
    ),
    *(
        "\\",
        "a\\",
        "\\n",
        "\\\\",
        "\\'",
        '\\"',
        "a\\ b",
        "%",
        "%j",
        "100%",
        "%%",
        "%N%t",
        "!",
        "!!",
        "*",
        "?",
        "[a-z]",
        "{a,b}",
    ),
    *(
        "~",
        "~root",
        "=",
        "a=b",
        "--time=1",
        "-x",
        ",",
        "a,b",
        ":",
        "@",
        "é",
        "日本",
        "😀",
        "ß ü",
        "..",
        "../..",
        "(a)",
        "^",
        "a\nb",
    ),
    *("a\rb", "a\x00b", "\x1b[31m", "a\u2028b", "a\tb", "\u200b"),
]


@pytest.fixture
def slurm(idle, monkeypatch: pytest.MonkeyPatch):
    """The cluster, and our own queue functions talking to it."""
    monkeypatch.setenv("SLURM_CONF", str(idle.layout.conf))
    return idle


def settings(**values: str) -> dict[str, Setting]:
    return {name.replace("_", "-"): Setting(value, "flag") for name, value in values.items()}


def send(folder: Path, command: list[str], *extra: str, **changes: object) -> str:
    values: dict[str, object] = {"resources": Resources(time_min=5), "settings": settings(requeue="")}
    values |= {"log_dir": str(folder), "state_dir": str(folder / "jobs"), "program": command[:1]}
    values |= {"arguments": command[1:]} | changes
    file = folder / f"{len(list(folder.iterdir()))}.sbatch"
    file.write_text(script.render(Script(**values)))  # type: ignore[arg-type]
    return queue.submit(file, extra, tag="-")


def log(folder: Path, job_id: str) -> str:
    file = folder / f"{job_id}.out"
    return file.read_text() if file.exists() else ""


def of_ranks(folder: Path, job_id: str) -> list[str]:
    """The lines of a log but for those of the batch script."""
    return [line for line in log(folder, job_id).splitlines() if not line.startswith("attempt ")]


@pytest.mark.parametrize(
    "strings", [HOSTILE[::10], pytest.param(HOSTILE, marks=pytest.mark.chaos)], ids=["a tenth", "all"]
)
def test_hostile_strings_arrive_unharmed_or_are_refused(slurm, tmp_path: Path, strings: list[str]) -> None:
    """As job name, comment, mail user (sbatch's fields), variable, container word, argument, folder and its state."""
    refused: list[str] = []
    jobs: dict[str, tuple[str, Path]] = {}
    for number, text in enumerate(strings):
        # a backslash is refused in log folders, and would hide how the other fields fare
        folder = tmp_path / f"{number} {'' if BACKSLASH in text else text.replace('/', '_')}".replace("\x00", "0")
        wanted = settings(job_name=text, comment=text, mail_user=text, mail_type="FAIL")
        try:
            folder.mkdir()
            job = send(
                folder,
                ["env", f"A={text}", "bash", "-c", SHOW, "x", text, str(folder)],
                *("--hold", f"--chdir={tmp_path}"),
                settings=wanted,
                env={"TEXT": text},
            )
        except FlagError as refusal:
            refused.append(str(refusal))
            continue
        jobs[job] = text, folder
    known = queue.jobs(jobs)
    assert len(jobs) + len(refused) == len(strings)
    assert all(len(words.splitlines()) == 1 for words in refused)
    for job, (text, _) in jobs.items():
        assert known[job].comment == text
        assert slurm.call("squeue", "-h", "-j", job, "-o", "<%j>") == f"<{text}>"
        assert f"MailUser={text}" in slurm.call("scontrol", "show", "job", job) or text != text.strip()
    slurm.call("scontrol", "release", *jobs)
    slurm.wait(lambda: all(job.ended for job in queue.jobs(jobs).values()), "all have run", 60)
    for job, (text, folder) in jobs.items():
        assert (folder / "got").read_text() == f"{text}\n{text}\n{tmp_path}\n", log(folder, job)
        assert (folder / f"{job}.out").exists()
    assert not list(tmp_path.rglob("MARK"))


def test_time_means_what_sbatch_takes_it_for(slurm, tmp_path: Path) -> None:
    for text in ("90", "90:00", "0:30", "1:30:00", "01:30:01", "1-12", "1-12:30", "2-00:00:59", "0", "INFINITE"):
        job = slurm.sbatch("true", tmp_path, "--hold", f"--time={text}")
        assert parse_time(slurm.call("squeue", "-h", "-j", job, "-o", "%l")) == parse_time(text), text
    for text in ("1h", "1:2:3:4", "1-1:1:1:1"):
        with pytest.raises(AssertionError, match="Invalid"):
            slurm.sbatch("true", tmp_path, f"--time={text}")


def test_tasks_gpus_and_environment_of_a_node_range(slurm, tmp_path: Path) -> None:
    """8 tasks of 4 cores on each of 2-4 nodes, all 8 GPUs visible to each, also under --export=NONE."""
    resources = Resources(nodes=(2, 4), tasks_per_node=8, gpus_per_node=8, cpus_per_task=4, time_min=5)
    probe = (
        'echo "$SLURM_NTASKS $SLURM_NNODES $CUDA_VISIBLE_DEVICES $((JOB_DEADLINE - $(date +%s))) ${PATH:+path} $MARK"'
    )
    command = ["bash", "-c", probe]
    job = send(tmp_path, command, resources=resources, settings=settings(export="NONE"), env={"MARK": "here"})
    slurm.wait_state(job, "COMPLETED")
    rows = [row.split() for row in of_ranks(tmp_path, job)]
    assert len(rows) == 32, log(tmp_path, job)
    assert {(row[0], row[1], row[2], *row[4:]) for row in rows} == {("32", "4", "0,1,2,3,4,5,6,7", "path", "here")}
    assert all(280 <= int(row[3]) <= 300 for row in rows)


def test_ranks_share_the_cores_that_the_job_got(slurm, tmp_path: Path) -> None:
    say = ["bash", "-c", "echo $SLURM_NTASKS tasks of $SLURM_CPUS_PER_TASK"]
    for exclusive, words in ((None, "4 tasks of 1"), ("", "4 tasks of 16")):
        job = send(tmp_path, say, resources=Resources(tasks_per_node=4, time_min=5, exclusive=exclusive))
        slurm.wait_state(job, "COMPLETED")
        assert of_ranks(tmp_path, job) == [words] * 4


def test_the_hand_written_stage_script(slurm, tmp_path: Path) -> None:
    """``sbatch slurm/stage.sbatch RUN STAGE`` starts the worker once per task, and says how it is used."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exec {sys.executable} "$@"\necho "$SLURM_PROCID $*"\n')
    python.chmod(0o755)
    (tmp_path / "run s").mkdir()
    (tmp_path / "run s/run.json").touch()
    stage = Path(script.__file__).parent / "stage.sbatch"
    where = {"PYTHONPATH": str(stage.parents[1])}
    call = ["sbatch", "--parsable", "-N2", f"--chdir={tmp_path}", f"--output={tmp_path}/%j.out"]
    good = slurm.call(*call, str(stage), "run s", "phase1", PYTHON=str(python), TASKS_PER_NODE="2", **where)
    bad = slurm.call(*call, str(stage), "run s")
    slurm.wait_state(bad, "FAILED")
    assert "usage:" in log(tmp_path, bad)
    slurm.wait_state(good, "COMPLETED")
    rows = [row for row in log(tmp_path, good).splitlines() if "pipeline.worker" in row]
    assert sorted(rows) == [f"{rank} -m pipeline.worker run s phase1" for rank in range(4)]


def test_after_the_end_of_a_rank(slurm, tmp_path: Path) -> None:
    """A clean stop comes back and its child waits; a configuration error does not; a cancelled job stays dead.

    A node that a rank found to be bad takes no part in the next attempt. A TERM that no kill follows ends no chain.
    """
    waits = "sleep 300 & wait; exit 137"  # where the sleep is killed first, that is no good end
    stops = f'if [ "$SLURM_RESTART_COUNT" = 1 ]; then exit; fi; trap "exit 75" TERM; echo ready; {waits}'
    hurt = send(tmp_path, ["bash", "-c", stops])

    first_75 = 'if [ "$SLURM_RESTART_COUNT" = 1 ]; then echo again; else echo 75 >"$JOB_VERDICT"; exit 143; fi'
    blame = 'if [ -n "$SLURM_RESTART_COUNT" ]; then hostname; elif [ "$SLURM_PROCID" = 0 ]; then '
    blame += 'echo 77 test-n02 >"$JOB_VERDICT"; exit 77; fi'
    spared = send(tmp_path, ["bash", "-c", blame], resources=Resources(nodes=(4, 4), time_min=5))
    back = send(tmp_path, ["bash", "-c", first_75])
    child = send(tmp_path, ["true"], f"--dependency=afterok:{back}")
    killed = send(tmp_path, ["bash", "-c", "kill -9 $$"])
    wrong = send(tmp_path, ["bash", "-c", 'echo 2 >"$JOB_VERDICT"; exit 76'])
    orphan = send(tmp_path, ["true"], f"--dependency=afterok:{wrong}")
    dying = send(tmp_path, ["bash", "-c", f'trap "exit 75" TERM; echo up; {waits}'])
    slurm.wait(lambda: "up" in log(tmp_path, dying), "the job to cancel runs")
    queue.cancel([dying])
    slurm.wait(lambda: "ready" in log(tmp_path, hurt), "the job to hurt runs")
    slurm.call("scancel", "--full", "--signal=TERM", hurt)
    slurm.wait_state(wrong, "FAILED")
    slurm.wait(lambda: queue.jobs([orphan])[orphan].stuck, "the orphan can never start")
    slurm.call("scontrol", "update", f"JobId={orphan}", "Dependency=")
    slurm.wait_state(child, "COMPLETED")
    slurm.wait_state(orphan, "COMPLETED")
    slurm.wait_state(killed, "FAILED")
    slurm.wait_state(spared, "COMPLETED")
    hosts = re.findall(r"^test-n\d+$", log(tmp_path, spared), re.MULTILINE)
    assert sorted(hosts) == ["test-n01", "test-n03", "test-n04"]
    slurm.wait_state(hurt, "COMPLETED", limit_s=60)
    assert slurm.words("job", hurt)["Restarts"] == "1"
    assert "again" in log(tmp_path, back)
    assert "2 attempts without progress; not started again" in log(tmp_path, killed)
    details = slurm.words("job", dying)
    assert (details["JobState"], details["Restarts"]) == ("CANCELLED", "0"), log(tmp_path, dying)
    assert (slurm.words("job", back)["Restarts"], slurm.words("job", wrong)["Restarts"]) == ("1", "0")


def test_submit_sh_sends_a_chain_or_nothing(slurm, tmp_path: Path) -> None:
    good = script.render(
        Script(
            resources=Resources(time_min=5),
            settings=settings(partition="low"),
            program=["true"],
            arguments=[],
            log_dir=str(tmp_path),
            state_dir=str(tmp_path / "jobs"),
        )
    )
    (tmp_path / "a.sbatch").write_text(good)
    (tmp_path / "b.sbatch").write_text(good)
    common = {"section": "data", "stages": ()}
    chain = [JobPlan(name="a", **common), JobPlan(name="b", needs=(Need(job="a"),), **common)]
    (tmp_path / "submit.sh").write_text(submit_sh(chain, {"a": [], "b": []}))
    ids = slurm.call("bash", str(tmp_path / "submit.sh"), SBATCH_PARTITION="nowhere").split()
    slurm.wait(lambda: [job.state for job in queue.jobs(ids).values()] == ["COMPLETED"] * 2, "the chain has run")
    (tmp_path / "b.sbatch").write_text(good.replace("partition=low", "partition=nowhere"))
    with pytest.raises(AssertionError, match="partition"):
        slurm.call("bash", str(tmp_path / "submit.sh"))
    slurm.wait(lambda: not slurm.call("squeue", "-h"), "nothing is left in the queue")


def test_slurms_own_words_for_rejections(slurm, tmp_path: Path) -> None:
    for name, value, words in (
        ("partition", "x", "partition"),
        ("nodelist", "x", "node"),
        ("mem", "9999999G", "emory|onfig"),
    ):
        with pytest.raises(SlurmError, match=words):
            send(tmp_path, ["true"], f"--{name}={value}")
    (tmp_path / "t.sbatch").write_text("#!/bin/bash\ntrue\n")
    assert "to start at" in queue.estimate_start(tmp_path / "t.sbatch")
    with pytest.raises(SlurmError, match="not available"):
        queue.estimate_start(tmp_path / "t.sbatch", ["--nodes=64"])
    assert slurm.words("config")["ClusterName"] == "test"
    assert queue.accounted([1]) == {}


def test_every_option_is_one_of_sbatch(slurm) -> None:
    """Name, letter and kind of argument of the table, as sbatch's own parser says when they are misused."""

    def complaint(*words: str) -> str:
        command = ["sbatch", *words]
        return subprocess.run(command, env=slurm.env, capture_output=True, text=True, check=False, input="").stderr

    for option in flags.OPTIONS.values():
        names = [f"--{option.name}"] + ([f"-{option.letter}"] if option.letter else [])
        if option.argument == "yes":
            for name in names:
                assert "requires an argument" in complaint(name), name
        elif option.argument == "no":
            assert "doesn't allow an argument" in complaint(f"--{option.name}=1"), option.name
        for name in names:
            assert not re.search("unrecognized|invalid option|ambiguous", complaint(name)), name
        if option.argument == "may":
            assert not re.search("requires an|doesn't allow", complaint(f"--{option.name}", f"--{option.name}=1"))


def test_every_state_and_reason_is_one_of_slurm(slurm) -> None:
    """Each name of the table is a word of Slurm's library or controller."""
    library = re.search(r"/\S+/libslurm\S*", slurm.call("ldd", str(which("squeue"))))[0]  # type: ignore[index]
    own = b"".join(Path(file).read_bytes() for file in (library, str(which("slurmctld"))))
    names = [row["name"] for row in flags.rows_of("states.csv")]
    unknown = [name for name in names if name.encode() not in own and name.replace("_", " ").encode() not in own]
    assert unknown == []


def test_a_step_that_outlived_its_attempt_ends_no_other(slurm, tmp_path: Path) -> None:
    """A node is cut off, the job begins again elsewhere, the cable is plugged in: the old srun ends its step by id."""
    old = "trap '' TERM USR1 USR2; touch old; until [ -e die ]; do sleep 0.2; done; exit 76"
    new = "touch new; until [ -e end ]; do sleep 0.2; done"
    rank = f'cd {tmp_path}; if [ -n "$SLURM_RESTART_COUNT" ]; then {new}; else {old}; fi'
    job = send(tmp_path, ["bash", "-c", rank], resources=Resources(nodes=(1, 1), time_min=5))
    slurm.wait((tmp_path / "old").exists, "the first attempt runs")
    node = slurm.words("job", job)["BatchHost"]
    network.set_link(slurm.layout, node, up=False)
    try:
        slurm.wait((tmp_path / "new").exists, "the second attempt runs", 60)
        network.set_link(slurm.layout, node, up=True)
        (tmp_path / "die").touch()
        slurm.wait(lambda: "goes on alone" in log(tmp_path, job), "the old script has ended")
        (tmp_path / "end").touch()
        slurm.wait_state(job, "COMPLETED", "FAILED", "PENDING")
        assert (slurm.state(job), slurm.words("job", job)["Restarts"]) == ("COMPLETED", "1"), log(tmp_path, job)
    finally:
        cluster.heal(slurm.layout, node)
