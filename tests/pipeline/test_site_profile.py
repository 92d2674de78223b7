"""A profile that slurm.probe drafts is one that the pipeline reads and plans with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.config import load_profile
from support.running import ROOT, call

RECORDED = ROOT / "tests" / "slurm" / "golden" / "probe"
SCONTROL = f"""#!/bin/sh
case "$*" in
*config) cat {RECORDED}/config.txt ;;
*partition) cat {RECORDED}/partitions.txt ;;
*node) cat {RECORDED}/nodes.txt ;;
esac
"""


def test_a_drafted_profile_loads(tmp_path: Path) -> None:
    programs = {
        "scontrol": SCONTROL,
        "sinfo": f"#!/bin/sh\ncat {RECORDED}/states.txt\n",
        "sacctmgr": "#!/bin/sh\necho 'Connection refused' >&2\nexit 1\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    drafted = subprocess.run([sys.executable, "-m", "slurm.probe"], env=environment, cwd=ROOT, capture_output=True)
    assert drafted.returncode == 0, drafted.stderr
    (tmp_path / "site.toml").write_bytes(drafted.stdout)
    profile = load_profile(str(tmp_path / "site.toml"))
    assert (profile.name, profile.ranks(4), profile.data.partition) == ("probe", 32, "low")
    planned = call("plan", "--recipe", "bert_large", "--cluster", tmp_path / "site.toml", "--nodes", "4")
    assert planned.returncode == 0, planned.stderr
