"""A checkpoint of another training: one field differs.

A finished training is begun again with one difference. What changes the science is refused: exit code 4, one line
that names the field with its old and new value, nothing touched. What changes only bits is said in one line, and
training goes on. The rest (how often to log, evaluate and save, the number of ranks) belongs to no identity.
(`pipeline.submit` notices a changed recipe before that: it says what changed and moves the old stage aside.)
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.publish import publish_sealed
from faults import training, zygote
from faults.table import Injection, Row, tried
from pipeline.engine import checkpoint_folder
from pipeline.engine.checkpoint_folder import MANIFEST
from pipeline.errors import CheckpointError

REFUSED, SAID, SILENT = "refused, exit 4", "said, training goes on", "not asked"


@dataclass(frozen=True)
class Difference:
    """``key`` as an identity names it, what is done about it, and how a trial makes it."""

    key: str
    outcome: str
    changes: dict[str, Any] = field(default_factory=dict)  # of the configuration of the second start
    samples: dict[str, Any] = field(default_factory=dict)  # of the data of the second start
    found: Any = None  # another value in the checkpoint instead


def of(section: str, outcome: str = REFUSED, **changes: Any) -> Difference:
    """A configuration field that the second start has otherwise."""
    return Difference(f"{section}.{next(iter(changes))}", outcome, changes=changes)


DIFFERENCES = (
    of("model", hidden_size=8),
    of("model", num_hidden_layers=2),
    of("model", num_attention_heads=1),
    of("model", intermediate_size=16),
    of("model", hidden_act="tanh"),
    of("model", max_position_embeddings=32),
    of("model", hidden_dropout_prob=0.0),
    of("model", attention_probs_dropout_prob=0.0),
    of("train", precision="bf16"),
    of("train", reduction="fast"),
    of("train", loss_mean="micro"),
    of("train", masking="static"),
    of("train", masked_lm_prob=0.2),
    of("train", max_grad_norm=2.0),
    of("train", seed=43),
    of("optimizer", name="adamw"),
    of("optimizer", variant="nvlamb"),
    of("optimizer", betas=(0.9, 0.99)),
    of("optimizer", eps=1e-8),
    of("optimizer", weight_decay=0.0),
    of("phase", max_predictions=3),
    of("phase", global_batch=12),
    of("phase", learning_rate=2e-3),
    of("phase", warmup=0.2),
    of("phase", schedule="linear"),
    of("phase", steps=9),
    Difference("data", REFUSED, samples={"seed": 1}),
    Difference("vocab", REFUSED, samples={"vocab_sha256": "22" * 32}),
    Difference("stage", REFUSED, found="phase2"),
    Difference("threads", SAID, changes={"threads": 2}),
    Difference("micro_batch", SAID, changes={"micro_batch": 3}),
    Difference("code", SAID, found="another"),
    Difference("torch", SAID, found="2.0.0"),
    Difference("cpu", SAID, found="another"),
    of("train", SILENT, log_every=2),
    of("train", SILENT, eval_every=4),
    of("train", SILENT, checkpoint_every=4),
    of("train", SILENT, keep_checkpoints=3),
)


def prose() -> str:
    """Which field is treated how."""
    lines = [
        f"* {outcome}: " + ", ".join(f"`{each.key}`" for each in DIFFERENCES if each.outcome == outcome)
        for outcome in (REFUSED, SAID, SILENT)
    ]
    return "\n".join(lines)


def single_fields(folder: Path, scale: float) -> list[Row]:
    """All differences, at every scale: they take a fifth of a second each."""
    samples = training.make_samples(folder / "samples")
    base = folder / "base"
    code = zygote.code_of(zygote.start(training.train, base, samples, output=folder / "output"))
    assert code == 0, (folder / "output").read_text()
    rows = []
    for outcome in (REFUSED, SAID, SILENT):
        trials = [
            functools.partial(begun_again, folder / f"{outcome[:4]}-{number}", base, samples, each)
            for number, each in enumerate(DIFFERENCES)
            if each.outcome == outcome
        ]
        rows.append(tried(f"one field differs: {outcome}", trials))
    return rows


def begun_again(run: Path, base: Path, samples: Path, difference: Difference) -> None:
    shutil.copytree(base, run)
    key, output = difference.key, run.with_suffix(".txt")
    if difference.samples:
        samples = training.make_samples(run / "other-samples", **difference.samples)
    folders = sorted(run.glob("stages/*/attempts/*/step-*"))
    for folder in folders if difference.found is not None else ():
        manifest = checkpoint_folder.read_manifest(folder)
        manifest["identity"][key] = difference.found
        publish_sealed(folder / MANIFEST, manifest)
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    code = zygote.code_of(zygote.start(again, run, samples, difference.changes, output=output))
    said = output.read_text()
    naming = [line for line in said.splitlines() if key in line]
    if difference.outcome == REFUSED:
        assert code == CheckpointError.exit_code, f"{key}: exit code {code}: {said[-400:]}"
        assert len(naming) == 1, f"{key} is not named once: {said[-400:]}"
        assert " was " in naming[0], f"{key}: {naming[0]}"
        assert {path: path.read_bytes() for path in before} == before, f"{key}: the checkpoints were touched"
        return
    assert code == 0, f"{key}: exit code {code}: {said[-400:]}"
    assert training.newest(run) is not None
    wanted = 1 if difference.outcome == SAID else 0
    assert sum("no longer the same bit for bit" in line for line in naming) == wanted, f"{key}: {said[-400:]}"


def again(run: Path, samples: Path, changes: dict[str, Any]) -> None:
    training.train(run, samples, **changes)


INJECTIONS: dict[str, Injection] = {"single_fields": single_fields}
