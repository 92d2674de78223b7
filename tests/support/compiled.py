"""What tests preload into the commands that they run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def shared_library(source: Path, folder: Path, without: str) -> Path:
    """A C file of this folder, to be preloaded; the test is skipped, saying what is not tried, where no cc is."""
    if shutil.which("cc") is None:
        pytest.skip(f"cc is not installed: {without} is not tried")
    built = folder / source.with_suffix(".so").name
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return built
