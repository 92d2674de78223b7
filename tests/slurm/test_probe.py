"""Drafting a profile from what Slurm 22.05 was seen to print, and from the same texts as other sites have them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from slurm.errors import FlagError, SlurmError
from slurm.probe import Facts, draft, interfaces

GOLDEN = Path(__file__).parent / "golden" / "probe"
RECORDED = Facts(**{f.stem: f.read_text() for f in GOLDEN.glob("*.txt")})


def site(partition: str = "", **changes: list[tuple[str, str]]) -> Facts:
    """The recorded texts with words replaced."""
    made = dataclasses.replace(RECORDED, partition=partition)
    for name, pairs in changes.items():
        text = getattr(made, name)
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        made = dataclasses.replace(made, **{name: text})
    return made


def test_the_recorded_site():
    found = tomllib.loads(draft(RECORDED))
    assert len(found.pop("micro_batch")) == 16
    assert found == {
        "name": "probe",
        "runner": "slurm",
        "gpus_per_node": 8,
        "requeue": True,
        "signal_s": 120,
        "data": {"partition": "low", "time": "1-00:00:00", "cpus_per_task": 16, "mem_gb": 64},
        "pretrain": {"partition": "low", "time": "1-00:00:00", "exclusive": True, "mem_gb": 0},
        "finetune": {"partition": "low", "time": "08:00:00", "exclusive": True, "mem_gb": 0},
    }


def test_every_value_says_where_it_came_from():
    text = draft(RECORDED)
    for words in (
        "gpus_per_node = 8  # Gres of 4 of 4 nodes of partition low",
        "requeue = true  # JobRequeue=1, PreemptMode=REQUEUE",
        "signal_s = 120  # preempt_send_user_signal, GraceTime=10",
        "then leaves 10 s, in which a checkpoint must be written",
        "# Partition low: 4 nodes idle (sinfo), State=UP,",
        'partition = "low"  # Default=YES',
        'time = "08:00:00"  # MaxTime=UNLIMITED',
    ):
        assert words in text


def test_most_common_gpus_of_a_mixed_partition():
    first, second, third, fourth = RECORDED.nodes.splitlines()
    nodes = [
        first.replace("Gres=gpu:8", "Gres=gpu:a100:4(S:0,1),nvme:1"),
        second.replace("Gres=gpu:8", "Gres=nvme:1,gpu:a100:4(S:0-1)"),
        third.replace("Gres=gpu:8", "Gres=gpu:v100:2"),
        fourth.replace("Gres=gpu:8", "Gres=(null)").replace("Partitions=low", "Partitions=low,cpu"),
    ]
    text = draft(dataclasses.replace(RECORDED, nodes="\n".join(nodes)))
    found = tomllib.loads(text)
    assert (found["gpus_per_node"], found["gpu_type"]) == (4, "a100")
    assert "Gres of 2 of 4 nodes" in text
    assert "CPU-only partitions, enough for these jobs: cpu\n" in text


@pytest.mark.parametrize(
    ("gres", "count", "named"), [("gpu", 1, ""), ("gpu:a100:8(S:0-1)", 8, "a100"), ("gpu:1g.5gb:7", 7, "1g.5gb")]
)
def test_spellings_of_gres(gres, count, named):
    text = draft(site(nodes=[("gpu:8", gres)]))
    assert tomllib.loads(text)["gpus_per_node"] == count
    assert (f'# gpu_type = "{named}"' in text) == bool(named)


@pytest.mark.parametrize(
    ("kind", "memory", "micro"),
    [
        ("a100", 40, 32),
        ("nvidia_a100_80gb_pcie", 80, 256),
        ("h200", 141, 256),
        ("v100", 16, 16),
        ("1g.10gb", 10, 16),
        ("unheard", None, 16),
    ],
)
def test_memory_and_micro_batches_by_the_type_of_gpu(kind, memory, micro):
    """Those of the profile for the largest GPU that is no larger, in every precision; doubled for one of twice that."""
    found = tomllib.loads(draft(site(nodes=[("gpu:8", f"gpu:{kind}:8")])))
    assert found.get("gpu_memory_gb") == memory
    batches = {key: value for key, value in found["micro_batch"].items() if key.startswith("bert_large.phase1.")}
    assert (batches["bert_large.phase1.bf16"], len(batches)) == (micro, 4)


def test_interfaces(tmp_path):
    """Those with hardware that are up; InfiniBand first, whatever its speed."""
    for name, kind, state, speed in (
        ("eth0", 1, "up", 100000),
        ("ib0", 32, "up", 50000),
        ("eth1", 1, "down", 10),
        ("lo", 772, "up", 9),
    ):
        (tmp_path / name).mkdir()
        for key, value in {
            "type": kind,
            "operstate": state,
            "speed": speed,
            **({} if name == "lo" else {"device": ""}),
        }.items():
            (tmp_path / name / key).write_text(f"{value}\n")
    found = interfaces(tmp_path)
    assert found == ("ib0", "eth0")
    text = draft(dataclasses.replace(RECORDED, interfaces=found))
    assert '# NCCL_SOCKET_IFNAME = "ib0"' in text
    assert tomllib.loads(text)["env"] == {}


def test_a_comment_that_reads_like_a_fact_is_none():
    text = draft(site(nodes=[("ExtSensorsTemp=n/s", "ExtSensorsTemp=n/s Comment=was Gres=gpu:2 before")]))
    assert tomllib.loads(text)["gpus_per_node"] == 8


def test_a_site_without_gpus_in_the_partition():
    nodes = RECORDED.nodes.replace("Gres=gpu:8", "Gres=(null)", 3).replace("low,spot,high", "low,spot", 3)
    text = draft(dataclasses.replace(RECORDED, nodes=nodes.replace("Partitions=low,spot,high", "Partitions=high")))
    found = tomllib.loads(text)
    assert (found["gpus_per_node"], found["pretrain"]["cpus_per_task"]) == (0, 1)
    assert len(found["micro_batch"]) == 16
    assert "there are GPUs in high; draft again with --partition" in text


@pytest.mark.parametrize(
    ("most", "pretrain", "finetune"),
    [("12:00:00", "12:00:00", "08:00:00"), ("00:30:00", "00:30:00", "00:30:00"), ("7-00:00:00", "1-00:00:00", None)],
)
def test_time_limits_are_the_partitions_where_shorter(most, pretrain, finetune):
    found = tomllib.loads(draft(site(partitions=[("MaxTime=UNLIMITED", f"MaxTime={most}")])))
    assert found["pretrain"]["time"] == pretrain
    assert found["finetune"]["time"] == (finetune or "08:00:00")


@pytest.mark.parametrize(
    ("partition", "changes", "requeue", "words"),
    [
        ("spot", [], True, "a job preempted in this partition is cancelled"),
        ("high", [], True, "PreemptMode=OFF"),
        ("high", [("JobRequeue              = 1", "JobRequeue = 0")], False, "JobRequeue=0 often allow --requeue"),
        ("low", [("JobRequeue              = 1", "JobRequeue = 0")], True, "JobRequeue=0, PreemptMode=REQUEUE"),
        ("low", [("preempt/partition_prio", "preempt/none")], True, "PreemptMode=OFF"),
    ],
)
def test_requeue(partition, changes, requeue, words):
    text = draft(site(partition, config=changes))
    assert tomllib.loads(text)["requeue"] is requeue
    assert words in text
    assert f'partition = "{partition}"  # --partition' in text


def test_signal_and_grace():
    text = draft(site(partitions=[("GraceTime=10", "GraceTime=300")]))
    assert tomllib.loads(text)["signal_s"] == 300
    text = draft(site(config=[("preempt_send_user_signal", "enable_configless")]))
    assert "preempt_send_user_signal is not set, so a preempted job may end without a last checkpoint" in text


def test_older_selection_knows_only_gres():
    found = tomllib.loads(draft(site(config=[("select/cons_tres", "select/linear")])))
    assert found["gpu_request"] == "gres"


def test_small_nodes_are_not_asked_for_more_than_they_have():
    found = tomllib.loads(draft(site(nodes=[("CPUTot=64", "CPUTot=12"), ("RealMemory=500000", "RealMemory=40000")])))
    assert (found["data"]["cpus_per_task"], found["data"]["mem_gb"]) == (12, 39)
    assert (found["finetune"]["exclusive"], found["finetune"]["mem_gb"]) == (True, 0)  # a whole node, whatever it has


def test_accounts_are_named_when_the_database_answers():
    assert "your accounts are bio, physics (sacctmgr)" in draft(
        dataclasses.replace(RECORDED, accounts=("bio", "physics"))
    )
    assert "accounts" not in draft(RECORDED)


def test_a_partition_that_is_not_there():
    with pytest.raises(FlagError, match=r"--partition gpu: Slurm shows no such partition; it shows low, spot, high"):
        draft(site("gpu"))
    with pytest.raises(SlurmError, match="no default partition; name one with --partition; it shows low, spot, high"):
        draft(site(partitions=[("Default=YES", "Default=NO")]))


@pytest.mark.parametrize("text", ['x"\n[data]', "\x1b[31m", "", "ü #"])
def test_a_sites_own_words_cannot_break_the_file(text):
    made = draft(site(config=[("= probe", f"= {text}"), ("= 22.05.8", f"= {text}")]))
    assert tomllib.loads(made)["runner"] == "slurm"
    assert made.isascii()
    assert "\x1b" not in made


def test_without_slurm_one_line_and_exit_9(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "SLURM_CONF": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-m", "slurm.probe"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (9, "", 1)
    assert "scontrol: not found" in done.stderr
