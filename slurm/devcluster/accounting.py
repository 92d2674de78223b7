"""slurmdbd with a private MariaDB (no service, no TCP port), so that sacct answers."""

from __future__ import annotations

import os
import pwd
import time

from slurm.command import run
from slurm.devcluster import conf, network, processes
from slurm.devcluster.layout import Layout
from slurm.devcluster.processes import must
from slurm.errors import SlurmError

MARIADB_OPTIONS = (
    "--skip-networking",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-flush-log-at-trx-commit=0",  # a test database: losing the last second is fine
)
INSTALL_OPTIONS = ("--auth-root-authentication-method=normal", "--skip-test-db")
GRANTS = "create database slurm_acct_db; create user slurm@localhost; grant all on slurm_acct_db.* to slurm@localhost"


def bring_up(layout: Layout) -> None:
    """Database, slurmdbd and the cluster's entry; slurmctld stops when it starts before them."""
    socket = _start_database(layout)
    must(["mariadb", "--no-defaults", "-u", "root", f"--socket={socket}", "-e", GRANTS])
    file = layout.state / "slurmdbd.conf"
    file.write_text(conf.slurmdbd_conf(layout))
    file.chmod(0o600)
    slurmdbd = network.named(layout, ["slurmdbd", "-D"])
    daemon = processes.start(layout, "slurmdbd", slurmdbd, env={"MYSQL_UNIX_PORT": socket})
    end = time.monotonic() + 60
    while True:
        answer = run(
            ["sacctmgr", "-i", "add", "cluster", layout.name],
            timeout_s=20,
            env=processes.daemon_environment(layout),
        )
        if answer.ok or "already exists" in answer.out:
            break
        if not processes.alive(daemon) or time.monotonic() > end:
            raise SlurmError(f"slurmdbd did not start: {processes.last_words(layout, 'slurmdbd')}")
        time.sleep(0.2)
    if layout.max_submit:
        limit = [*("sacctmgr", "-i", "modify", "qos", "normal", "set"), f"MaxSubmitJobsPerUser={layout.max_submit}"]
        must(limit, env=processes.daemon_environment(layout))


def _start_database(layout: Layout) -> str:
    folder = layout.state / "mysql"
    folder.mkdir(mode=0o755)
    user: list[str] = []
    if os.geteuid() == 0:  # mariadbd will not run as root; it changes its user itself
        user = ["--user=mysql"]
        owner = pwd.getpwnam("mysql")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    datadir = f"--datadir={folder}/data"
    must(
        [*("mariadb-install-db", "--no-defaults", datadir), *user, *INSTALL_OPTIONS],
        timeout_s=120,
    )
    socket = str(folder / "socket")
    options = [datadir, f"--socket={socket}", f"--pid-file={folder}/pid", *MARIADB_OPTIONS]
    daemon = processes.start(layout, "mariadbd", ["mariadbd", "--no-defaults", *user, *options])
    end = time.monotonic() + 60
    while not run(["mariadb", "--no-defaults", "-u", "root", f"--socket={socket}", "-e", "select 1"]).ok:
        if not processes.alive(daemon) or time.monotonic() > end:
            raise SlurmError(f"mariadbd did not start: {processes.last_words(layout, 'mariadbd')}")
        time.sleep(0.1)
    return socket
