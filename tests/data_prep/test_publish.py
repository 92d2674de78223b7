"""Published files are whole or absent, whatever fails on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.publish import file_sha256, publish_bytes, publish_json, publishing, remove_leftovers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs root to mount a file system of 1 MB: a full disk is not tested here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_says_what_was_needed_and_what_is_free(small_disk: Path) -> None:
    publish_bytes(small_disk / "old", b"old" * 100_000)
    with pytest.raises(OSError) as caught:
        publish_bytes(small_disk / "old", b"new" * 1_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "old")
    assert "(3.0 MB needed, 0.7 MB free)" in str(caught.value)
    with pytest.raises(OSError, match=r"over 0\.7 MB needed, 0\.7 MB free"), publishing(small_disk / "new") as file:
        file.writelines([b"x" * 65536] * 100)
    assert names(small_disk) == ["old"]
    assert (small_disk / "old").read_bytes() == b"old" * 100_000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    publish_bytes(target, b"old")
    with publishing(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_an_exception_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    publish_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), publishing(target) as file:
        file.write(bytes(1 // 0))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "a.bin"
    publish_bytes(target, b"old")

    def full(*_args: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        publish_bytes(target, b"new")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_device_without_room_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda _path, *_rest: real("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError) as caught, publishing(tmp_path / "a.bin") as file:
        file.write(b"x" * 100)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.bin"))


def test_data_is_synced_before_the_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    publish_bytes(tmp_path / "a.bin", b"x")
    assert calls == ["sync file", "rename", "sync folder"]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "a.bin", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        publish_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_digest_is_sha256_of_the_content(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a.bin", b"abc")
    assert file_sha256(tmp_path / "a.bin") == hashlib.sha256(b"abc").hexdigest()


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a.bin", b"abc")
    (tmp_path / ".b.bin.123-abcd.tmp").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a.bin"]
