"""Full disks and quotas under a real training.

The run lies on a small file system of its own that is filled before a save and, in some trials, emptied again before
a later one; or fsync and rename of the checkpoint files fail by strace. Training must go on to its last step with one
warning, save again as soon as it can, and end with exit code 6 and the bytes needed and free only where the last
state could not be saved. Started again it must end with the bits of a training that nobody disturbed.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import traced, training, zygote
from faults.table import Injection, Row, spread, tried
from faults.training import PHASE, STAGE, TRAIN
from pipeline.run.files import read_jsonl
from pipeline.run.rundir import RunDir

STEPS, EVERY = PHASE.steps, TRAIN.checkpoint_every
DISK_MB = 8


def full_disk(folder: Path, scale: float) -> list[Row]:
    """A disk that fills up before the save of one step, and is emptied before that of a later one, or never."""
    if os.geteuid() != 0:
        return []
    samples, digest = undisturbed(folder)
    saves = range(EVERY, STEPS + 1, EVERY)
    rows = []
    for what, ends in (("for good", [0]), ("for a while", saves)):
        points = [(full, free, left) for full in saves for free in ends for left in (0, 16) if free == 0 or free > full]
        trials = [
            functools.partial(on_small_disk, folder / f"{full}-{free}-{left}", samples, full, free, left, digest)
            for full, free, left in spread(points, scale)
        ]
        note = (
            "exit 6 at the end, the older checkpoints serve"
            if what == "for good"
            else "saved again at the next interval, exit 0"
        )
        rows.append(tried(f"training: the disk is full {what}", trials, note))
    return rows


def undisturbed(folder: Path) -> tuple[Path, str]:
    """Samples, and the digest at the end of a training on them."""
    samples = training.make_samples(folder / "samples")
    code = zygote.code_of(zygote.start(training.train, folder / "undisturbed", samples, output=folder / "output"))
    assert code == 0, (folder / "output").read_text()
    found = training.newest(folder / "undisturbed")
    assert found is not None
    return samples, found.digest


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def starved(run: str, samples: Path, full_at: int, free_at: int, left_kb: int) -> None:
    """In the trial: train, filling and emptying the disk right before the saves of two steps."""
    from pipeline.engine.loop import Loop

    filler = Path(run).parent / "filler"
    save: Any = Loop.save

    def disturbed(loop: Loop, *, permanent: bool) -> None:
        if loop.state.step == full_at:
            for path in (loop.job.attempt.log, loop.job.attempt.metrics):  # so that no page has room for a line
                with open(path, "a") as file:
                    file.write("\n" * (-file.tell() % mmap.PAGESIZE))
            free = shutil.disk_usage(filler.parent).free - left_kb * 1024
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free)
        if loop.state.step == free_at:
            filler.unlink()
        save(loop, permanent=permanent)

    Loop.save = disturbed  # type: ignore[method-assign]
    training.train(Path(run), samples)


def on_small_disk(folder: Path, samples: Path, full_at: int, free_at: int, left_kb: int, digest: str) -> int | None:
    output = folder.with_suffix(".txt")
    with small_disk(folder) as disk:
        run = disk / "run"
        code = zygote.code_of(zygote.start(starved, str(run), samples, full_at, free_at, left_kb, output=output))
        text = output.read_text()
        check_output(text, code, 6 if free_at == 0 else 0)
        (disk / "filler").unlink(missing_ok=True)
        if code == 0:
            assert f"is saved, after {(free_at - full_at) // EVERY} that w" in text, text[-500:]
            lines = [line for a in RunDir(run).stage(STAGE).attempts for line in read_jsonl(a.metrics)]
            steps = [line["step"] for line in lines if "loss" in line]
            assert steps == list(range(1, STEPS + 1)), f"metrics.jsonl has the steps {steps}"
        lost = goes_on(run, samples, output, digest, max(0, full_at - 2 * EVERY))
        return lost if code == 0 else None


def check_output(text: str, code: int, wanted: int) -> None:
    """Exit code, one warning, and at the end a line with the numbers."""
    assert code == wanted, f"exit code {code}: {text[-500:]}"
    assert f"step {STEPS}/{STEPS}" in text, f"training did not go on: {text[-500:]}"
    assert text.count("training goes on and the next save tries again") == 1, text[-800:]
    if wanted == 6:
        last = text.strip().splitlines()[-1]
        assert f"step {STEPS} of {STAGE} was not saved" in last, last
        assert " MB, " in last, last
        assert " MB are free" in last, last


def goes_on(run: Path, samples: Path, output: Path, digest: str, at_least: int) -> int:
    """Start again undisturbed; the steps that had to be computed again."""
    found = training.newest(run)
    step = found.step if found else 0
    assert step >= at_least, f"step {step} is found, step {at_least} was saved"
    code = zygote.code_of(zygote.start(training.train, run, samples, output=output))
    assert code == 0, f"started again: exit code {code}: {output.read_text()[-500:]}"
    found = training.newest(run)
    assert found is not None
    assert found.digest == digest, "other bits at the end"
    return STEPS - step


def failing_calls(folder: Path, scale: float) -> list[Row]:
    """fsync and rename of the writer fail: the last three and the last one of each save.

    strace counts by thread, and so far the main thread does not come before its last step.
    """
    samples, digest = undisturbed(folder)
    points = {True: [("fsync", 5), ("fsync", 6), ("fsync", 7), ("rename", 3)], False: [("fsync", 7)]}
    count = itertools.count()
    rows = []
    for index, (error, lasting) in enumerate(itertools.product(("ENOSPC", "EDQUOT", "EIO"), (False, True))):
        calls = points[lasting]
        chosen = spread(calls[index % len(calls) :] + calls[: index % len(calls)], scale)
        trials = [
            functools.partial(with_failing, folder / str(next(count)), samples, error, lasting, call, digest)
            for call in chosen
        ]
        when = "in every save" if lasting else "once in every save"
        note = "exit 6 at the end" if lasting else "the second try succeeds, exit 0"
        rows.append(tried(f"training: {error} {when}", trials, note))
    return rows


def traced_training(numbers: traced.Shared, run: str, samples: Path) -> None:
    training.train(Path(run), samples)


def with_failing(
    folder: Path, samples: Path, error: str, lasting: bool, call: tuple[str, int], digest: str
) -> int | None:
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    inject = f"{call[0]}:error={error}:when={call[1]}{'+' if lasting else ''}"
    code, _ = traced.run(folder, traced_training, str(run), samples, inject=inject)
    text = (folder / "output").read_text()
    if lasting:
        check_output(text, code, 6)
    else:
        assert code == 0, f"{inject}: exit code {code}: {text[-500:]}"
        assert "not saved" not in text, f"{inject}: {text[-500:]}"
    goes_on(run, samples, folder / "output", digest, 0)
    return None


INJECTIONS: dict[str, Injection] = {"full_disk": full_disk, "failing_calls": failing_calls}
