"""`bench gpu` as one Python file that needs torch and NumPy alone: for a machine with a GPU and without the product."""

from __future__ import annotations

import base64
import io
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "data_prep", "slurm")
LEFT_OUT = ("sample_text", "devcluster", "report/page.py", "report/chart.py")
SUFFIXES = (".py", ".json", ".toml", ".csv", ".css", ".sh")
SCRIPT = '''\
"""python {name} [--tiny] [--out FILE] [--only BLOCK]: times BERT pretraining on this machine's GPU into one JSON.

Needs torch and NumPy. Everything else is in here: it is unpacked into a temporary folder and run from there.
"""
import base64, io, os, subprocess, sys, tempfile, zipfile

CONTENT = """
{content}
"""

with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(io.BytesIO(base64.b64decode(CONTENT))).extractall(folder)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "pipeline.bench", "gpu", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment).returncode)
'''


def pack(path: Path) -> None:
    """Write the file; equal sources give equal bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for source in sources():
            entry = zipfile.ZipInfo(str(source.relative_to(ROOT)))  # dated 1980, so that the bytes stay the same
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, source.read_bytes())
    lines = textwrap.fill(base64.b64encode(content.getvalue()).decode(), 120)
    path.write_text(SCRIPT.replace("{name}", path.name).replace("{content}", lines), encoding="utf-8")


def sources() -> list[Path]:
    """What goes in, by name."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in files if not any(part in path.as_posix() for part in LEFT_OUT))
