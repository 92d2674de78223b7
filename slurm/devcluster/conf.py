"""The configuration files of a developer cluster as text (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from slurm.devcluster.layout import Layout


def slurm_conf(layout: Layout) -> str:
    """slurm.conf: short timeouts, so that tests of failures take seconds; hardware that is not there."""
    settings = _settings(layout)
    settings.update(layout.settings)
    lines = [f"{key}={value}" for key, value in settings.items() if value != ""]
    return "\n".join([*lines, *_node_lines(layout), *_partition_lines(layout)]) + "\n"


def _settings(layout: Layout) -> dict[str, str]:
    state = layout.state
    settings = {
        "ClusterName": layout.name,
        "SlurmctldHost": f"{layout.host}({layout.controller_address})",
        "SlurmctldPort": str(layout.controller_port),
        "SlurmUser": layout.user,
        "SlurmdUser": layout.user,
        "AuthType": "auth/munge",
        # a requeued job may not start before its old credential has expired: 120 s by default
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "CredType": "cred/munge",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "SwitchType": "switch/none",
        "ReturnToService": "2",
        "StateSaveLocation": f"{state}/controller",
        "SlurmdSpoolDir": f"{state}/spool/%n",
        "SlurmctldPidFile": f"{state}/pid/slurmctld",
        "SlurmdPidFile": f"{state}/pid/slurmd-%n",
        "SlurmctldLogFile": f"{state}/log/slurmctld.log",
        "SlurmdLogFile": f"{state}/log/slurmd-%n.log",
        "TmpFS": f"{state}/tmp/%n",  # PMIx makes folders of fixed names here: never one for all nodes
        "SlurmdTimeout": "20",
        "KillWait": "5",
        "Waittime": "0",
        "MessageTimeout": "10",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=2,sched_interval=2,sched_min_interval=100000",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": "100",
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": "1",
        "SlurmctldParameters": "preempt_send_user_signal",
        "SlurmdParameters": "config_overrides",  # believe the node lines, not the machine
        # a fresh controller would start at job 1 again and meet the log folders of an older cluster
        "FirstJobId": str(layout.first_job_id),
        "MailProg": "/bin/true",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": f"{state}/log/jobcomp.txt",
        "AccountingStorageType": "accounting_storage/none",
    }
    if layout.accounting:
        settings["AccountingStorageType"] = "accounting_storage/slurmdbd"
        settings["AccountingStorageHost"] = layout.controller_address
        settings["AccountingStoragePort"] = str(layout.database_port)
        settings["AccountingStoragePass"] = str(layout.munge_socket)
    if layout.max_submit:
        settings["AccountingStorageEnforce"] = "limits"
    if layout.memory_mb == 1:
        settings |= {"SelectTypeParameters": "CR_Core", "DefMemPerCPU": ""}
    if layout.gpus_per_node:
        settings["GresTypes"] = "gpu"
    return settings


def _node_lines(layout: Layout) -> list[str]:
    gres = f" Gres=gpu:{layout.gpus_per_node}" if layout.gpus_per_node else ""
    lines = []
    for k, name in enumerate(layout.node_names, start=1):
        host = layout.host_name(name) if layout.isolation == "netns" else layout.host
        cpus = layout.cpus[(k - 1) % len(layout.cpus)]
        lines.append(
            f"NodeName={name} NodeAddr={layout.address(k)} NodeHostname={host} Port={layout.port(k)} CPUs={cpus} "
            f"Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={layout.memory_mb}{gres} "
            "State=UNKNOWN"
        )
    return lines


def _partition_lines(layout: Layout) -> list[str]:
    nodes = f"Nodes={layout.node_list}"
    every = f"{nodes} MaxTime=INFINITE DefaultTime=60"
    return [
        f"PartitionName=low {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10",
        f"PartitionName=spot {every} PriorityTier=1 PreemptMode=CANCEL GraceTime=10",
        f"PartitionName=high {every} PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=short {nodes} MaxTime=10 DefaultTime=1 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10",
    ]


def gres_conf(layout: Layout, devices: Sequence[str]) -> str:
    """gres.conf; other files than devices would leave CUDA_VISIBLE_DEVICES empty."""
    return "".join(f"NodeName={layout.node_list} Name=gpu File={device}\n" for device in devices)


def slurmdbd_conf(layout: Layout) -> str:
    """slurmdbd.conf; the database's socket reaches slurmdbd as MYSQL_UNIX_PORT."""
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={layout.munge_socket}",
            f"DbdHost={layout.host}",
            f"DbdAddr={layout.controller_address}",
            f"DbdPort={layout.database_port}",
            f"SlurmUser={layout.user}",
            f"LogFile={layout.state}/log/slurmdbd.log",
            f"PidFile={layout.state}/pid/slurmdbd",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=slurm",
            "StorageLoc=slurm_acct_db",
            "",
        ]
    )


def hosts(layout: Layout) -> str:
    """/etc/hosts of the nodes: all nodes and the controller, no 127.0.0.1 line for any of them."""
    lines = ["127.0.0.1 localhost", f"{layout.controller_address} {layout.host}"]
    for k, name in enumerate(layout.node_names, start=1):
        lines.append(f"{layout.address(k)} {layout.host_name(name)}{f' {name}' if layout.domain else ''}")
    return "\n".join(lines) + "\n"


def nsswitch(host_text: str) -> str:
    """The machine's nsswitch.conf with names from files only: nodes reach no DNS, a miss costs 10 s."""
    kept = [line for line in host_text.splitlines() if not line.lstrip().startswith("hosts:")]
    return "\n".join([*kept, "hosts: files"]) + "\n"


def greeting_sbatch(real: str) -> str:
    """A site's wrapper around sbatch: it greets before the id, reports the account's budget after it."""
    return f'#!/bin/sh\necho "Welcome to $(hostname)"\n{real} "$@" || exit\necho "4711 of 9000 hours are left"\n'
