"""The lock with hashes names what the constraints name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> set[tuple[str, str]]:
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return {(package.lower().replace("_", "-"), version) for package, version in found}


def test_every_package_but_torch_is_locked_by_hash() -> None:
    assert pinned("requirements.lock") == {
        (name, version) for name, version in pinned("constraints.txt") if name != "torch"
    }
    parts = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in part for part in parts)
