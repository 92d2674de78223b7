"""Users' Slurm flags: taken apart, resolved with their sources, spelled for sbatch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm import flags, header
from slurm.errors import FlagError
from slurm.flags import Setting
from slurm.resources import Resources

SECTIONS = ("data", "pretrain", "finetune")


def resolve(argv: list[str], section: str = "pretrain", **more: object) -> dict[str, tuple[str, str]]:
    line = flags.split(argv, sections=SECTIONS)
    more.setdefault("environ", {})
    found = flags.resolve(section, line.flags, default_section="pretrain", **more)  # type: ignore[arg-type]
    return {name: (setting.value, setting.source) for name, setting in found.items()}


def test_names_and_letters_mean_the_same() -> None:
    long = [
        "--partition=p",
        "--account",
        "a",
        "--nodes=4",
        "--time",
        "1-0",
        "--qos=q",
        "--constraint=c",
        "--nodelist=w",
    ]
    long += ["--exclude=x", "--job-name=j", "--cpus-per-task=6", "--hold"]
    short = ["-p", "p", "-A", "a", "-N4", "-t", "1-0", "-qq", "-Cc", "-ww", "-x", "x", "-J", "j", "-c6", "-H"]
    assert flags.split(long).flags == flags.split(short).flags


def test_what_is_not_slurms_stays_in_order() -> None:
    line = flags.split(
        ["tiny", "--run", "runs/x", "-p", "gpu", "--set", "a.b=c", "-v", "--", "--bbf=f", "-N1"], own=("-v",)
    )
    assert line.rest == ("tiny", "--run", "runs/x", "--set", "a.b=c", "-v")
    assert line.passthrough == ("--bbf=f", "-N1")
    assert [flag.name for flag in line.flags] == ["partition"]


def test_own_options_win_over_slurms() -> None:
    assert flags.split(["--profile=x", "-d", "data"], own=("--profile", "-d")).rest == ("--profile=x", "-d", "data")


def test_joined_letters() -> None:
    assert [flag.name for flag in flags.split(["-HO"]).flags] == ["hold", "overcommit"]
    assert flags.split(["-Hpgpu"]).flags[1] == flags.Flag("partition", "gpu")


@pytest.mark.parametrize(
    "word", ["--array=1-3", "-n", "--ntasks=8", "-d", "--gpus-per-task=1", "-G8", "--output=x", "--wrap=x"]
)
def test_refused_flags_say_what_to_use(word: str) -> None:
    with pytest.raises(FlagError, match=word[:2] if word[1] != "-" else word.partition("=")[0]):
        flags.split([word])


@pytest.mark.parametrize("argv", [["-p"], ["--time"], ["--hold=yes"], ["--partition="], ["--no-time=5"], ["-Hz"]])
def test_malformed_flags(argv: list[str]) -> None:
    with pytest.raises(FlagError):
        flags.split(argv, sections=SECTIONS)


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\x00b", "a\x1bb", "a\u2028b", "\udcff", "a\tb", "\u202e"])
def test_control_characters_are_refused(bad: str) -> None:
    with pytest.raises(FlagError, match="control"):
        flags.split([f"--comment={bad}"])


def test_sections() -> None:
    argv = ["-p", "data=cpu", "-p", "h100", "--exclusive=finetune", "-A", "proj", "--time", "pretrain=2-0"]
    assert resolve(argv, "data") == {"partition": ("cpu", "flag"), "account": ("proj", "flag")}
    assert resolve(argv, "pretrain") == {
        "partition": ("h100", "flag"),
        "account": ("proj", "flag"),
        "time": ("2-0", "flag"),
    }
    assert resolve(argv, "finetune") == {"exclusive": ("", "flag"), "account": ("proj", "flag")}


def test_an_addressed_flag_beats_a_bare_one_in_any_order() -> None:
    assert resolve(["-p", "pretrain=a", "-p", "b"])["partition"] == ("a", "flag")
    assert resolve(["-p", "b", "-p", "pretrain=a"])["partition"] == ("a", "flag")
    assert resolve(["-p", "b", "-p", "c"])["partition"] == ("c", "flag")


def test_precedence_and_sources() -> None:
    layers = {
        "profile": {"mem": "2G", "constraint": "p", "partition": "p"},
        "profile_name": "profile site",
        "environ": {"SBATCH_CONSTRAINT": "e", "SBATCH_PARTITION": "e", "SBATCH_TIMELIMIT": ""},
    }
    assert resolve(["-p", "f"], **layers) == {
        "mem": ("2G", "profile site"),
        "constraint": ("e", "SBATCH_CONSTRAINT"),
        "partition": ("f", "flag"),
    }


def test_removal_and_return() -> None:
    profile = {"partition": "p", "exclusive": ""}
    assert resolve(["--no-partition"], profile=profile) == {"exclusive": ("", "profile")}
    assert resolve(["--no-partition", "-p", "x"], profile=profile)["partition"] == ("x", "flag")
    assert "partition" not in resolve(["--no-partition=data"], "data", profile=profile)
    assert "partition" in resolve(["--no-partition=data"], profile=profile)
    assert resolve(["--no-requeue"], profile={"requeue": ""})["requeue"] == ("no", "flag")


def test_one_of_alternatives_removes_the_weaker_others() -> None:
    assert resolve(["--mem-per-cpu=4G"], profile={"mem": "64G"}) == {"mem-per-cpu": ("4G", "flag")}
    assert resolve(["--gres=gpu:2"], profile={"gpus-per-node": "8"}) == {"gres": ("gpu:2", "flag")}
    both = resolve(["--gres=lustre:1"], profile={"gpus-per-node": "8"})
    assert both == {"gres": ("lustre:1", "flag"), "gpus-per-node": ("8", "profile")}


def test_unknown_profile_option_names_the_nearest() -> None:
    with pytest.raises(FlagError, match="did you mean partition"):
        resolve([], profile={"partion": "x"})


def test_ignored_variables_are_named() -> None:
    environ = {"SBATCH_ARRAY_INX": "1", "SBATCH_PARTITION": "x", "SBATCH_OUTPUT": "y", "SLURM_CONF": "z"}
    assert flags.ignored(environ) == ["SBATCH_ARRAY_INX", "SBATCH_OUTPUT"]


def settings(**values: str) -> dict[str, Setting]:
    return {name.replace("_", "-"): Setting(value, "flag") for name, value in values.items()}


def test_numbers_move_into_resources() -> None:
    asked = settings(nodes="4-8", time="1-0", mem="64G", cpus_per_task="6", gres="gpu:a100:4,lustre:1", exclusive="")
    resources, left = header.apply(Resources(tasks_per_node=8, gpus_per_node=8), asked)
    assert resources == Resources(
        nodes=(4, 8),
        time_min=1440,
        mem_gb=64,
        cpus_per_task=6,
        gpus_per_node=4,
        gpu_type="a100",
        gpu_request="gres",
        tasks_per_node=4,
        exclusive="",
    )
    assert left == settings(gres="lustre:1")


def test_header_has_no_task_count_and_all_cpus_of_a_node() -> None:
    resources = Resources(nodes=(2, 4), tasks_per_node=8, gpus_per_node=8, cpus_per_task=6, time_min=90, mem_gb=0)
    pairs = header.header(resources, settings(partition="p", requeue="no"))
    assert pairs == [
        ("cpus-per-task", "48"),
        ("gpus-per-node", "8"),
        ("mem", "0G"),
        ("no-requeue", ""),
        ("nodes", "2-4"),
        ("partition", "p"),
        ("time", "01:30:00"),
    ]


def test_a_shared_node_gives_every_task_a_core() -> None:
    assert ("cpus-per-task", "8") in header.header(Resources(tasks_per_node=8), {})
    assert "cpus-per-task" not in dict(header.header(Resources(tasks_per_node=8, exclusive=""), {}))
    assert "cpus-per-task" not in dict(header.header(Resources(), {}))


def test_gpus_as_gres_join_other_gres() -> None:
    resources = Resources(gpus_per_node=4, gpu_type="a100", gpu_request="gres")
    assert ("gres", "gpu:a100:4,lustre:1") in header.header(resources, settings(gres="lustre:1"))


@given(st.text(alphabet=st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1))
def test_header_lines_stay_one_comment_line(value: str) -> None:
    line = header.header_line("comment", value)
    assert line.startswith("#SBATCH --comment=")
    assert len(line.splitlines()) == 1


def test_percent_and_backslash_in_log_paths() -> None:
    assert header.path_pattern("/a b/100%", "%j.out") == "/a b/100%%/%j.out"
    with pytest.raises(FlagError, match="backslash"):
        header.path_pattern("/a\\b", "%j.out")


@pytest.mark.parametrize("words", [["-M", "alder"], ["--clusters=alder"], ["--", "-Malder"], ["--", "--clusters", "a"]])
def test_another_cluster_numbers_its_jobs_itself(words: list[str]) -> None:
    """There the ids of our jobs are those of strangers' jobs here."""
    with pytest.raises(FlagError, match="one cluster"):
        resolve(words)
    with pytest.raises(FlagError, match=r"SLURM_CLUSTERS=alder: .* or unset it"):
        resolve([], environ={"SLURM_CLUSTERS": "alder"})
