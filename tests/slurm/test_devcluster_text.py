"""Names, addresses and configuration files of developer clusters, as text; nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.devcluster import conf, layout
from slurm.devcluster.__main__ import main
from slurm.devcluster.layout import Layout
from slurm.errors import SlurmError


def lab(**changes: object) -> Layout:
    values: dict[str, object] = {"name": "lab", "nodes": 3, "slot": 17, "state": Path("/tmp/x/lab"), "user": "root"}
    values |= {"isolation": "netns", "host": "login"} | changes
    return Layout(**values)  # type: ignore[arg-type]


def test_every_name_follows_from_few_values() -> None:
    cluster = lab()
    assert cluster.node_names == ["lab-n01", "lab-n02", "lab-n03"]
    assert (cluster.node_list, cluster.controller_address, cluster.address(2)) == (
        "lab-n[01-03]",
        "10.77.17.254",
        "10.77.17.2",
    )
    assert layout.load(cluster.dump()) == cluster


def test_clusters_in_different_slots_share_nothing() -> None:
    used: set[object] = set()
    for slot in range(layout.SLOTS):
        cluster = lab(slot=slot, nodes=layout.MAX_NODES)
        mine = {cluster.controller_port, cluster.database_port, cluster.bridge, cluster.controller_address}
        for k in range(1, layout.MAX_NODES + 1):
            mine |= {cluster.port(k), cluster.link(k), cluster.address(k)}
            assert len(cluster.link(k)) <= 15
        assert not mine & used
        used |= mine
    assert max(value for value in used if isinstance(value, int)) < 32_768


@pytest.mark.parametrize(("word", "number"), [("lab-n02", 2), ("n02", 2), ("n2", 2), ("2", 2)])
def test_nodes_by_any_of_their_names(word: str, number: int) -> None:
    assert lab().number(word) == number


@pytest.mark.parametrize("word", ["0", "4", "n", "other-n01", "-1", "lab-2"])
def test_unknown_nodes(word: str) -> None:
    with pytest.raises(SlurmError, match="no node"):
        lab().number(word)


@pytest.mark.parametrize("name", ["", "Lab", "1lab", "a b", "a/../b", "x" * 21, "é"])
def test_bad_names(name: str) -> None:
    with pytest.raises(SlurmError, match="cluster name"):
        layout.check_name(name)


def test_slurm_conf_of_isolated_nodes() -> None:
    text = conf.slurm_conf(lab(gpus_per_node=8, accounting=True)).splitlines()
    assert "SlurmctldHost=login(10.77.17.254)" in text
    assert "AuthInfo=socket=/tmp/x/lab/munge/socket,cred_expire=5" in text
    assert "AccountingStoragePort=11701" in text
    nodes = [line for line in text if line.startswith("NodeName=")]
    assert nodes[1].startswith("NodeName=lab-n02 NodeAddr=10.77.17.2 NodeHostname=lab-n02 Port=11703 CPUs=64")
    assert "Gres=gpu:8" in nodes[1]
    assert [line.split()[0] for line in text if line.startswith("Part")] == [
        "PartitionName=low",
        "PartitionName=spot",
        "PartitionName=high",
        "PartitionName=short",
    ]


def test_slurm_conf_of_nodes_on_one_host() -> None:
    text = conf.slurm_conf(lab(isolation="host", user="me"))
    assert "SlurmUser=me\n" in text
    assert "NodeName=lab-n03 NodeAddr=127.0.0.1 NodeHostname=login Port=11704 " in text
    assert "gpu" not in text


def test_settings_of_the_caller_replace_ours_and_remove_them() -> None:
    text = conf.slurm_conf(lab(settings=(("SlurmdTimeout", "300"), ("SlurmctldParameters", ""))))
    assert text.count("SlurmdTimeout=") == 1
    assert "SlurmdTimeout=300\n" in text
    assert "SlurmctldParameters" not in text


def test_names_resolve_without_dns() -> None:
    assert conf.hosts(lab()).splitlines()[1:3] == ["10.77.17.254 login", "10.77.17.1 lab-n01"]
    assert conf.nsswitch("passwd: files\nhosts: files dns\n") == "passwd: files\nhosts: files\n"


def test_commands_on_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    for command in (["env"], ["status"], ["kill", "n01"], ["cut", "1"], ["heal", "1"]):
        with pytest.raises(SlurmError, match="no cluster 'lab'"):
            main([*command, "--state-dir", str(tmp_path)])
    assert main(["down", "--state-dir", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new").exists()


def test_down_removes_what_a_crash_before_the_start_left(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "cluster.json").write_text('{"name": "la')
    assert main(["down", "--state-dir", str(tmp_path)]) == 0
    assert not tmp_path.exists()


def test_missing_programs_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.devcluster.packages.which", lambda program: None)
    with pytest.raises(SlurmError) as refusal:
        main(["up", "--no-install", "--state-dir", str(tmp_path)])
    assert "slurmctld" in str(refusal.value)
    assert "apt-get install" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 9
