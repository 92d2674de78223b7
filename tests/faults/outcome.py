"""What a training left behind: its end, its checkpoints, the journal of the attempts that survive, what it read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import h5py

from faults.starts import SAMPLES
from faults.training import STAGE
from pipeline.engine import checkpoint_folder
from pipeline.run.files import read_json, read_jsonl
from pipeline.run.rundir import Attempt, RunDir, StageDir

STEPS, BATCH, EVERY = 24, 9, 2  # of a training; samples in a step; steps between checkpoints
STEP_FIGURES = ("samples", "loss", "mlm_loss", "nsp_loss", "grad_norm", "learning_rate")
EVALUATION = ("eval_mlm_loss", "eval_mlm_accuracy", "eval_nsp_accuracy")
Facts = dict[str, Any]


def facts_of(run: RunDir) -> Facts:
    """Of a training that is done: ``digest`` of its final state, ``steps`` (figures of each), ``evaluations``, and
    the digests of all checkpoints that are left, as ``saved``.

    AssertionError when the attempts that it comes from do not hold every step once.
    """
    stage = run.stage(STAGE)
    lines = [line for attempt, end in lineage(stage) for line in journal(attempt) if line["step"] <= end]
    steps = [line for line in lines if "loss" in line]
    numbers = [line["step"] for line in steps]
    assert numbers == list(range(1, STEPS + 1)), f"the surviving attempts hold the steps {numbers}"
    evaluations = {line["step"]: line for line in lines if "eval_mlm_loss" in line}
    return {
        "digest": final_digest(run),
        "steps": [figures(line) for line in steps],
        "evaluations": [[line[name] for name in EVALUATION] for _, line in sorted(evaluations.items())],
        "saved": saved(run),
    }


def final_digest(run: RunDir) -> str:
    """Digest of the weights and moments with which a training ended, verified."""
    stage = run.stage(STAGE)
    folder = stage.path / (stage.done or {})["result"]["checkpoint"]
    checkpoint_folder.verify(folder)
    return str(checkpoint_folder.read_manifest(folder)["digest"])


def saved(run: RunDir) -> dict[str, str]:
    """Digests of all checkpoints of a run that are there, verified, by step; AssertionError where two differ."""
    found: dict[str, str] = {}
    for path in run.stage(STAGE).path.glob("attempts/*/*/manifest.json"):
        checkpoint_folder.verify(path.parent)
        manifest = checkpoint_folder.read_manifest(path.parent)
        assert found.setdefault(str(manifest["step"]), manifest["digest"]) == manifest["digest"], path
    return found


def journal(attempt: Attempt) -> list[Facts]:
    return read_jsonl(attempt.metrics)


def figures(line: Mapping[str, Any]) -> Facts:
    return {name: line[name] for name in STEP_FIGURES}


def lineage(stage: StageDir) -> list[tuple[Attempt, int]]:
    """The attempts that the final state comes from, oldest first, each with the step at which the next went on."""
    attempts = {attempt.number: attempt for attempt in stage.attempts}
    found: list[tuple[Attempt, int]] = []
    number, end = int((stage.done or {})["attempt"]), STEPS
    while number:
        found.insert(0, (attempts[number], end))
        number, end = resumed_from(attempts[number])
    return found


def resumed_from(attempt: Attempt) -> tuple[int, int]:
    """Attempt and step from which it went on; zeros for a start from nothing."""
    origin = (read_json(attempt.path / "attempt.json") or {})["resumed_from"]
    return (origin["attempt"], origin["step"]) if origin else (0, 0)


def lost_steps(stage: StageDir) -> int:
    """The most steps that any start had to compute again."""
    lost = reached = 0
    for attempt in stage.attempts:
        if (attempt.path / "attempt.json").exists():
            _, begins = resumed_from(attempt)
            lost = max(lost, reached - begins)
            reached = max([begins, *(line["step"] for line in journal(attempt))])
    return lost


# ---------------------------------------------------------------- what was really read


def noting_reads(run: RunDir) -> Callable[[int], None]:
    """For each rank: have it note the content of every training sample that it reads, by position in the order."""

    def before(rank: int) -> None:
        from pipeline.pretrain.data import PretrainingData

        read = PretrainingData.read

        def noted(self: PretrainingData, positions: Any) -> Any:
            found = read(self, positions)
            if self.train.masking == "dynamic":  # the held-out samples are masked statically
                tokens = found.tokens.copy()
                tokens[found.positions] = found.labels
                ends = found.lengths.cumsum()
                parts = [tokens[end - length : end] for end, length in zip(ends, found.lengths, strict=True)]
                lines = [f"{position} {content(part)}\n" for position, part in zip(positions, parts, strict=True)]
                with open(run.stage(STAGE).attempts[-1].path / f"reads-{rank}", "a", encoding="utf-8") as file:
                    file.write("".join(lines))
            return found

        PretrainingData.read = noted  # type: ignore[method-assign]

    return before


def content(tokens: Any) -> str:
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]


def check_reads(run: RunDir) -> None:
    """AssertionError unless the surviving attempts read each position once, and each epoch all samples once."""
    with h5py.File(run.stage(SAMPLES).path / "train-00000.hdf5") as file:
        tokens, offsets = file["tokens"][:], file["offsets"][:]
    every = sorted(content(tokens[a:b]) for a, b in itertools.pairwise(offsets))
    read: dict[int, str] = {}
    for attempt, end in lineage(run.stage(STAGE)):
        own: dict[int, str] = {}
        for path in attempt.path.glob("reads-*"):
            for line in path.read_text(encoding="utf-8").splitlines():
                position, _, found = line.partition(" ")
                assert int(position) not in own, f"attempt {attempt.number} read position {position} twice"
                own[int(position)] = found
        first = len(read)
        read |= {position: found for position, found in own.items() if first <= position < end * BATCH}
    assert sorted(read) == list(range(STEPS * BATCH)), f"{len(read)} of {STEPS * BATCH} positions were read"
    for epoch in range(STEPS * BATCH // len(every)):
        positions = range(epoch * len(every), (epoch + 1) * len(every))
        assert sorted(read[position] for position in positions) == every, f"epoch {epoch}"
