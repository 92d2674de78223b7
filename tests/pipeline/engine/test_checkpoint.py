"""Checkpoints: bytes come back, nothing corrupt is ever used, a kill or a full disk never costs the older one."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from data_prep.publish import json_sha256, publish_sealed
from pipeline.bert.tensor_file import write_safetensors
from pipeline.engine import checkpoint, checkpoint_folder, storage
from pipeline.engine.checkpoint import Saver, check_identity, lineage, listing, newest_verified, read, rotate, save
from pipeline.errors import CheckpointError, InUseError, NumericalError, StorageError

ROOT = Path(__file__).parents[3]
IDENTITY = {"data": "ab12", "micro_batch": 4}
MODEL = {"hidden_size": 8}


def state(seed=0, rows=50):
    numbers = np.random.default_rng(seed)
    weights = {"a.weight": numbers.normal(size=(rows, 8)).astype("f4"), "a.bias": np.zeros(8, "f4")}
    optimizer = {"exp_avg.a.weight": numbers.normal(size=(rows, 8)).astype("f4"), "step": np.array(seed)}
    return {"weights": weights, "optimizer": optimizer}


def new_attempt(stage_dir, number, resumed_from=None):
    folder = stage_dir / "attempts" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"resumed_from": resumed_from}))
    return folder


def fields(attempt_dir, step, **more):
    common = {"stage": "phase1", "attempt": int(attempt_dir.name), "step": step, "sample_position": step * 32}
    return common | {"identity": IDENTITY, "model": MODEL} | more


def save_step(attempt_dir, step, seed=None, **more):
    return save(attempt_dir, **fields(attempt_dir, step, **more), **state(step if seed is None else seed))


def same(found, seed):
    wanted = state(seed)
    return all(
        set(got) == set(want) and all(np.array_equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)
        for got, want in ((found.weights, wanted["weights"]), (found.optimizer, wanted["optimizer"]))
    )


@pytest.fixture
def stage_dir(tmp_path):
    return tmp_path / "run" / "stages" / "phase1"


@pytest.fixture
def attempt(stage_dir):
    return new_attempt(stage_dir, 1)


# ---------------------------------------------------------------- one checkpoint


def test_what_was_saved_comes_back(attempt):
    folder = save_step(attempt, 100)
    assert folder == attempt / "step-00000100"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "optimizer.safetensors", "weights.safetensors"]
    found = read(folder)
    assert same(found, 100)
    assert (found.stage, found.attempt, found.step, found.sample_position) == ("phase1", 1, 100, 3200)
    assert (found.identity, found.model, found.permanent) == (IDENTITY, MODEL, False)
    assert found.weights["a.weight"].flags.writeable  # torch.from_numpy warns otherwise
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["weights.safetensors"]["bytes"] == (folder / "weights.safetensors").stat().st_size
    assert abs(manifest["saved_unix_s"] - time.time()) < 60
    only = read(folder, tensors=("weights",))
    assert only.optimizer == {}
    assert set(only.weights) == {"a.weight", "a.bias"}


@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from(["f8", "f4", "f2", "i8", "i4", "u1", "?", ">f4"]), hnp.array_shapes(min_dims=0, min_side=0)
        ),
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_safetensors_library_reads_our_files(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    facts = write_safetensors(path, arrays)
    assert facts["bytes"] == path.stat().st_size
    found = load_file(path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert write_safetensors(path, dict(reversed(arrays.items()))) == facts  # order does not matter
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, array in arrays.items():  # so that a reader may map the file
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_a_strided_array_is_written_as_it_reads(tmp_path):
    array = np.arange(24, dtype="f4").reshape(4, 6).T[::2]
    write_safetensors(tmp_path / "x.safetensors", {"a": array})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], array)


def test_digest_tells_states_apart_and_nothing_else(stage_dir):
    first, second = new_attempt(stage_dir, 1), new_attempt(stage_dir.with_name("phase2"), 2)
    one = read(save_step(first, 5, seed=1))
    assert read(save_step(second, 7, seed=1, permanent=True, identity={"x": 1})).digest == one.digest
    assert read(save_step(first, 6, seed=2)).digest != one.digest
    changed = state(1)
    changed["optimizer"]["step"] = np.array(2)
    assert read(save(first, **fields(first, 8), **changed)).digest != one.digest
    renamed = state(1)
    renamed["weights"]["b.bias"] = renamed["weights"].pop("a.bias")
    assert read(save(first, **fields(first, 9), **renamed)).digest != one.digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_never_saved(attempt, value):
    poisoned = state()
    poisoned["optimizer"]["exp_avg.a.weight"][49, 7] = value
    with pytest.raises(NumericalError, match=r"step 3 of phase1: exp_avg\.a\.weight is not finite"):
        save(attempt, **fields(attempt, 3), **poisoned)
    assert not list(attempt.glob("step-*"))


def test_a_step_saved_twice_stays_and_can_become_permanent(attempt):
    folder = save_step(attempt, 3)
    before = (folder / "manifest.json").read_bytes()
    assert save_step(attempt, 3) == folder
    assert (folder / "manifest.json").read_bytes() == before
    save_step(attempt, 3, permanent=True)
    assert read(folder).permanent
    (folder / "weights.safetensors").write_bytes(b"broken")
    save_step(attempt, 3)  # a broken one is written again
    assert same(read(folder), 3)


def test_a_succeeded_attempt_commits_nothing(stage_dir, attempt):
    owner = {"process": 1, "host": "there", "pid": 7, "time": 1_750_000_000.0}
    (new_attempt(stage_dir, 2) / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(InUseError, match=r"^attempt 2 .process 7 on there, since 2.* has taken over from attempt 1"):
        save_step(attempt, 3)
    assert not list(attempt.glob("step-*"))


# ---------------------------------------------------------------- corruption


def test_messages_name_file_and_both_hashes_or_sizes(attempt):
    folder = save_step(attempt, 2)
    path = folder / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has SHA-256 \w{8}\.\., manifest says \w{8}\.\.$"):
        read(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"has {len(content) - 1} bytes, manifest says {len(content)}"):
        checkpoint_folder.verify(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(folder)


def signed(manifest):
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return body | {"manifest_sha256": json_sha256(body)}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"step": 3},
        {"step": "2"},
        {"files": {"../../../secret": {"bytes": 1, "sha256": "0"}}},
        {"files": {"weights.safetensors": {}, "optimizer.safetensors": 3}},
        {"identity": None},
    ],
    ids=str,
)
def test_a_crafted_manifest_is_refused_in_one_line(attempt, change):
    folder = save_step(attempt, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(signed(manifest | change)))
    with pytest.raises(CheckpointError, match=r"^checkpoint step 2 .attempt 1.: manifest\.json "):
        read(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{}", "", "[" * 100_000, '{"a": NaN}', "\xff"])
def test_a_manifest_that_is_no_manifest_is_refused_in_one_line(attempt, text):
    folder = save_step(attempt, 2)
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"^checkpoint step 2 .attempt 1.: manifest.json [^\n]*$"):
        read(folder)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"^checkpoint {tmp_path}: manifest.json cannot be read"):
        read(tmp_path)


# ---------------------------------------------------------------- the history of a stage


def test_no_checkpoint_is_none_but_no_good_checkpoint_is_an_error(stage_dir):
    assert newest_verified(stage_dir, print) is None
    attempt = new_attempt(stage_dir, 1)
    assert newest_verified(stage_dir, print) is None
    for step in (1, 2):
        (save_step(attempt, step) / "weights.safetensors").write_bytes(b"")
    new_attempt(stage_dir, 2)
    (stage_dir / "attempts" / "0002" / "attempt.json").write_text('{"resumed_from": {"attempt": 1, "step": 2}}')
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used: checkpoint step 2 .*\(and 1 older\)"):
        newest_verified(stage_dir, print)


def test_the_history_follows_what_each_attempt_resumed_from(stage_dir):
    first = new_attempt(stage_dir, 1)
    for step in (100, 200, 300, 400):
        save_step(first, step, seed=step)
    second = new_attempt(stage_dir, 2, {"attempt": 1, "step": 300})
    save_step(second, 350)
    new_attempt(stage_dir, 3, {"attempt": 2, "step": 350})
    (stage_dir / "attempts" / "0004").mkdir()  # has just been created: no attempt.json yet
    order = [(int(f.parent.name), int(f.name[5:])) for f in lineage(stage_dir)]
    assert order == [(2, 350), (1, 300), (1, 200), (1, 100)]  # 400 was overtaken
    (second / "step-00000350" / "optimizer.safetensors").write_bytes(b"")
    said = []
    assert newest_verified(stage_dir, said.append).step == 300
    assert len(said) == 1
    assert said[0].endswith("; using step 300 of attempt 1 instead (50 steps redone)")


def test_a_save_that_was_cut_short_is_passed_over_aloud(attempt):
    save_step(attempt, 1)
    (save_step(attempt, 2) / "manifest.json").unlink()
    said = []
    assert newest_verified(attempt.parent.parent, said.append).step == 1
    assert said == ["checkpoint step 2 (attempt 1) has no manifest (its save was cut short) and is passed over"]


def test_checkpoints_without_a_history_do_not_mean_a_start_from_nothing(stage_dir, attempt):
    save_step(attempt, 1)
    (attempt / "attempt.json").write_text("{")
    with pytest.raises(CheckpointError, match="attempt 1 has checkpoints but no readable attempt"):
        newest_verified(stage_dir, print)


def test_identity_lists_every_difference_old_to_new():
    check_identity({"a": 1, "m": {"h": 2}}, {"m": {"h": 2}, "a": 1})
    lines = r"a was 1, is 2; m\.h was 2, is 3; old was x, is \(absent\); z was \(absent\), is None;"
    with pytest.raises(CheckpointError, match=lines):
        check_identity({"a": 1, "m": {"h": 2}, "old": "x"}, {"a": 2, "m": {"h": 3}, "z": None})


def test_rotation_keeps_the_newest_of_the_history_and_the_permanent_ones(stage_dir):
    first = new_attempt(stage_dir, 1)
    save_step(first, 100, permanent=True)
    for step in (200, 300, 400):
        save_step(first, step)
    rotate(first, 3)
    assert {f.name[5:].lstrip("0") for f in first.glob("step-*")} == {"100", "200", "300", "400"}
    second = new_attempt(stage_dir, 2, {"attempt": 1, "step": 300})
    rotate(first, 1)  # has been succeeded: touches nothing
    rotate(second, 1)  # has saved nothing yet: touches nothing
    assert len(list(first.glob("step-*"))) == 4
    (second / "step-00000310").mkdir()
    (second / "step-00000310" / ".weights.safetensors.1-ab.tmp").write_bytes(b"left by a kill")
    save_step(second, 350)
    rotate(second, 2)
    left = sorted(str(f.relative_to(stage_dir / "attempts")) for f in stage_dir.glob("attempts/*/step-*"))
    assert left == ["0001/step-00000100", "0001/step-00000300", "0002/step-00000350"]


def test_rotation_deletes_nothing_behind_a_link(stage_dir, tmp_path):
    """Who else may write into the run could have it delete checkpoints of another."""
    theirs = new_attempt(tmp_path / "other", 1)
    for step in (1, 2):
        save_step(theirs, step)
    attempt = new_attempt(stage_dir, 2)
    (stage_dir / "attempts" / "0001").symlink_to(theirs)
    (attempt / "step-00000003").symlink_to(theirs / "step-00000001")
    for step in (10, 20, 30):
        save_step(attempt, step)
    rotate(attempt, 1)
    assert [folder.name for folder in lineage(stage_dir)] == ["step-00000030"]
    assert len([folder for folder in theirs.glob("step-*") if checkpoint.is_whole(folder)]) == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "attempt.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(stage_dir, attempt, name):
    for step in (1, 2):
        save_step(attempt, step)
    path = attempt / "step-00000002" / name
    if name == "attempt.json":
        path = attempt / name
    else:  # whoever can write knows the seal, too
        manifest = checkpoint.read_manifest(path.parent)
        manifest["files"][checkpoint_folder.WEIGHTS]["bytes"] = 0
        publish_sealed(path.with_name("manifest.json"), manifest)
    path.unlink()
    os.mkfifo(path)
    if name == "attempt.json":
        with pytest.raises(CheckpointError, match=r"no readable attempt.json"):
            newest_verified(stage_dir, print)
    else:
        assert newest_verified(stage_dir, print).step == 1
    with suppress(StorageError):
        listing(stage_dir.parent.parent, check=True)


# ---------------------------------------------------------------- the saver


def test_the_saver_writes_what_was_there_at_the_call(attempt):
    saver = Saver(attempt, keep=2)
    live = state(0)
    for step in range(1, 5):
        for group in live.values():
            for array in group.values():
                array += 1
        folder = saver.save(**fields(attempt, step), **live)
        assert folder == attempt / f"step-{step:08d}"
    for group in live.values():
        for array in group.values():
            array *= 0  # the loop goes on at once
    saver.wait()
    assert [f.name for f in sorted(attempt.glob("step-*"))] == ["step-00000003", "step-00000004"]
    found = read(attempt / "step-00000004")
    assert found.optimizer["step"] == 4
    np.testing.assert_array_equal(found.weights["a.bias"], np.full(8, 4, "f4"))
    assert saver.stall_s >= 0
    assert saver.write_s > 0


def test_the_loop_stands_still_for_the_copy_only(attempt, monkeypatch):
    release, entered = threading.Event(), threading.Event()
    written = write_safetensors

    def slow(path, tensors):
        entered.set()
        assert release.wait(30)
        return written(path, tensors)

    monkeypatch.setattr(checkpoint_folder, "write_safetensors", slow)
    saver = Saver(attempt)
    saver.save(**fields(attempt, 1), **state())
    assert entered.wait(30)
    assert not (attempt / "step-00000001" / "manifest.json").exists()  # and yet save() has returned
    release.set()
    saver.wait()
    assert read(attempt / "step-00000001").step == 1


def test_tensors_and_arrays_are_saved_alike(attempt):
    """Training gives tensors; equal values make equal files."""
    saver = Saver(attempt)
    arrays = state(1)
    tensors = {kind: {name: torch.tensor(array) for name, array in part.items()} for kind, part in arrays.items()}
    saver.prepare(**tensors)
    saver.save(**fields(attempt, 1), **tensors)
    saver.before_update()  # nothing is on its way where there is no GPU
    for part in tensors.values():
        for tensor in part.values():
            tensor.zero_()  # what the next step does: the copy is whole by now
    saver.save(**fields(attempt, 2), **arrays)
    saver.wait()
    first, second = (read(attempt / f"step-0000000{step}") for step in (1, 2))
    assert same(first, 1)
    assert first.digest == second.digest


def test_the_staging_buffer_is_reused(attempt):
    saver = Saver(attempt)
    buffers = []
    for step in (1, 2):
        saver.save(**fields(attempt, step), **state(step))
        saver.wait()
        buffers.append(saver._staging.wait()["weights"]["a.weight"].ctypes.data)
    assert buffers[0] == buffers[1]


def limited(size_bytes):
    """Let no file of this process grow over a size; returns what undoes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refusing_file_system_costs_one_warning_and_the_next_save_tries_again(attempt):
    said = []
    saver = Saver(attempt, warn=said.append)
    saver.save(**fields(attempt, 1), **state(1))
    saver.wait()
    undo = limited(1000)
    try:
        saver.save(**fields(attempt, 2), **state(2))
        with pytest.raises(StorageError):
            saver.wait()
    finally:
        undo()
    assert len(said) == 1
    assert "step 2 of phase1 was not saved: File too large (" in said[0]
    assert "it needs 0.0 MB, " in said[0]
    assert said[0].endswith("the older checkpoints stay; training goes on and the next save tries again")
    assert [f.name for f in attempt.glob("step-*")] == ["step-00000001"]  # remains are removed
    with pytest.raises(StorageError):
        saver.wait()
    saver.save(**fields(attempt, 3), **state(3))
    saver.wait()
    assert same(newest_verified(attempt.parent.parent, print), 3)


@pytest.mark.slow
def test_a_disk_that_stays_full_is_told_once_and_its_end_too(attempt):
    said = []
    saver = Saver(attempt, warn=said.append)
    undo = limited(1000)
    try:
        for step in (1, 2, 3):
            saver.save(**fields(attempt, step), **state(step))
            with pytest.raises(StorageError, match=f"step {step} of phase1 was not saved"):
                saver.wait()
    finally:
        undo()
    assert len(said) == 1
    saver.save(**fields(attempt, 4), **state(4))
    saver.wait()
    assert said[1:] == ["checkpoint step 4 is saved, after 3 that were not"]


def test_a_save_that_fails_once_is_tried_again_at_once(attempt, monkeypatch):
    faults = [OSError(5, "Input/output error")]
    written = write_safetensors

    def failing(path, tensors):
        if faults:
            raise faults.pop()
        return written(path, tensors)

    monkeypatch.setattr(checkpoint_folder, "write_safetensors", failing)
    said = []
    saver = Saver(attempt, warn=said.append)
    saver.save(**fields(attempt, 1), **state(1))
    saver.wait()
    assert said == []
    assert same(newest_verified(attempt.parent.parent, print), 1)


def test_memory_prepared_for_a_state_is_what_its_saves_use(attempt):
    saver = Saver(attempt, keep=2)
    saver.prepare(**state(1))
    saver.wait()
    prepared = saver._staging.wait()["weights"]["a.weight"].ctypes.data
    saver.save(**fields(attempt, 1), **state(1))
    assert saver._staging.wait()["weights"]["a.weight"].ctypes.data == prepared
    saver.prepare(weights={"other": np.zeros(3)}, optimizer={})  # of another shape: taken anew
    saver.save(**fields(attempt, 2), **state(2))
    saver.wait()
    assert same(read(attempt / "step-00000002"), 2)


def test_an_attempt_whose_folder_was_moved_aside_touches_nothing_of_the_next(stage_dir, attempt):
    (attempt / "owner.json").write_text('{"host": "here", "pid": 1, "time": 1.0}')
    saver = Saver(attempt, keep=2)
    saver.save(**fields(attempt, 1), **state(1))
    saver.wait()
    stage_dir.rename(stage_dir.with_name("old"))
    saver.save(**fields(attempt, 2), **state(2))
    with pytest.raises(InUseError, match="moved aside"):  # before anyone begins it again
        saver.wait()
    again = new_attempt(stage_dir, 1)
    (again / "owner.json").write_text('{"host": "there", "pid": 2, "time": 2.0}')
    before = sorted(stage_dir.rglob("*"))
    late = Saver(attempt, keep=2)
    late._owner = {"host": "here", "pid": 1, "time": 1.0}
    late.save(**fields(attempt, 3), **state(3))
    with pytest.raises(InUseError, match=r"belongs to another start \(process 2 on there, since 19"):
        late.wait()
    assert sorted(stage_dir.rglob("*")) == before


def test_rotation_does_not_see_an_attempt_that_begins_meanwhile(stage_dir, attempt, monkeypatch):
    for step in (1, 2, 3):
        save_step(attempt, step)
    whole = checkpoint.is_whole

    def is_whole(folder):
        if not (stage_dir / "attempts" / "0002").exists():
            save_step(new_attempt(stage_dir, 2, {"attempt": 1, "step": 3}), 4)
        return whole(folder)

    monkeypatch.setattr(checkpoint, "is_whole", is_whole)
    rotate(attempt, 2)
    assert (stage_dir / "attempts" / "0002" / "step-00000004" / "manifest.json").exists()


def test_room_for_checkpoints_is_asked_for_before_training(stage_dir, attempt, tmp_path, monkeypatch):
    save_step(attempt, 1)
    line = storage.preflight(stage_dir, 10**6, keep=2)
    assert line.startswith("3 checkpoints of 1.0 MB need 3.0 MB more, ")
    free = shutil.disk_usage(stage_dir).free
    with pytest.raises(StorageError, match=r"need .* GB more, .* GB are free, quota .*; free some space"):
        storage.preflight(stage_dir, free, keep=2)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert storage.preflight(stage_dir, 10**6, keep=2).endswith("quota not known")
    answer = "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
    for use, limit, told in (("13", "8000", "8.2 MB left"), ("9000*", "8000", None), ("13", "0", "none")):
        (programs / "quota").write_text(
            f"#!/bin/sh\necho '{answer}  /dev/loop0  {use}  1000  {limit}  0  2  0  0  0'\n"
        )
        (programs / "quota").chmod(0o755)
        if told is not None:
            assert storage.preflight(stage_dir, 10**6, keep=2).endswith(f"quota {told}")
        else:
            with pytest.raises(StorageError, match=r"quota 0\.0 MB left"):
                storage.preflight(stage_dir, 10**6, keep=2)
    (programs / "quota").write_text("#!/bin/sh\necho 'not found or has no quota enabled' >&2; exit 1\n")
    assert storage.preflight(stage_dir, 10**6, keep=2).endswith("quota not known")


def test_other_errors_stop_the_loop_at_the_next_call(attempt):
    saver = Saver(attempt, warn=print)
    poisoned = state()
    poisoned["weights"]["a.bias"][0] = np.nan
    saver.save(**fields(attempt, 1), **poisoned)
    with pytest.raises(NumericalError):
        saver.save(**fields(attempt, 2), **state())
    with pytest.raises(NumericalError):
        saver.wait()


def test_an_attempt_without_a_history_cannot_save(stage_dir):
    folder = stage_dir / "attempts" / "0001"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be found"):
        Saver(folder).save(**fields(folder, 1), **state())


def test_a_full_disk_names_what_it_needs_and_leaves_no_remains(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system: a full disk is not tested here")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here: a full disk is not tested")
    try:
        attempt = new_attempt(disk / "stages" / "phase1", 1)
        save_step(attempt, 1)
        large = state(2, rows=20_000)
        with pytest.raises(StorageError, match=r"No space left on device \(.*it needs 1\.3 MB, 0\.\d MB are free"):
            save(attempt, **fields(attempt, 2), **large)
        assert [f.name for f in attempt.glob("step-*")] == ["step-00000001"]
        assert same(newest_verified(disk / "stages" / "phase1", print), 1)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- the command


def command(run, *options):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.checkpoints", str(run), *options], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_lists_and_verifies(stage_dir, attempt):
    run = stage_dir.parent.parent
    refused = command(run, "--json")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    (run / "run.json").write_text("{}")
    assert command(run).stdout == "no checkpoints yet\n"
    save_step(attempt, 1)
    bad = save_step(attempt, 2)
    (save_step(attempt, 3) / "manifest.json").unlink()
    (bad / "optimizer.safetensors").write_bytes(b"")
    rows = json.loads(command(run, "--json").stdout)["checkpoints"]
    digest = read(attempt / "step-00000001").digest
    assert rows[0] == {"stage": "phase1", "step": 1, "attempt": 1, "verified": None, "digest": digest}
    assert [row["step"] for row in rows] == [1, 2]
    verified = command(run, "--json", "--verify")
    assert [row["verified"] for row in json.loads(verified.stdout)["checkpoints"]] == [True, False]
    assert "optimizer.safetensors has 0 bytes" in verified.stderr
    (bad / "manifest.json").write_text("{}")
    unreadable = json.loads(command(run, "--json").stdout)["checkpoints"][1]
    assert (unreadable["verified"], unreadable["digest"]) == (None, None)
    lines = command(run, "--verify").stdout.splitlines()
    assert lines[0].split() == ["stage", "attempt", "step", "verified", "digest"]
    assert lines[1].split() == ["phase1", "1", "1", "yes", digest[:12]]
    assert lines[2].split()[:4] == ["phase1", "1", "2", "NO"]


def test_listing_and_command_need_no_torch(stage_dir, attempt):
    save_step(attempt, 1)
    run = stage_dir.parent.parent
    code = (
        "import sys, pathlib, pipeline.checkpoints, pipeline.engine.checkpoint as c\n"
        f"assert c.listing(pathlib.Path({str(run)!r}), check=True)[0]['verified']\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert listing(stage_dir) == []
    assert checkpoint.listing(stage_dir.parent.parent)[0]["verified"] is None
