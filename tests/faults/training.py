"""A real pretraining of a toy model on random samples, for trials that stop, starve or replace it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.hdf5 import Shard, write_shard
from data_prep.manifest import publish_manifest
from data_prep.publish import publish_json
from pipeline.config import ModelConfig, OptimizerConfig, PhaseConfig, TrainConfig
from pipeline.engine.checkpoint import Checkpoint, newest_verified
from pipeline.node.job import Job, Topology
from pipeline.run.rundir import RunDir

STAGE, VOCAB, SEQ_LEN = "phase1", 64, 24
MODEL = ModelConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=SEQ_LEN,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
TRAIN = TrainConfig(
    precision="fp32", reduction="tree", eval_every=1000, eval_samples=4, checkpoint_every=2, keep_checkpoints=2
)
OPTIMIZER = OptimizerConfig(backend="torch")
PHASE = PhaseConfig(
    seq_len=SEQ_LEN, max_predictions=4, global_batch=6, micro_batch=2, learning_rate=1e-3, warmup=0.1, steps=8
)


def make_samples(folder: Path, seed: int = 0, rows: int = 64, vocab_sha256: str = "00" * 32) -> Path:
    """A samples folder of random tokens with one training and one test shard."""
    folder.mkdir(parents=True)
    entries = []
    for split in ("train", "test"):
        dice = np.random.default_rng([seed, split == "test"])
        lengths = dice.integers(12, SEQ_LEN + 1, size=rows)
        tokens = dice.integers(5, VOCAB, size=int(lengths.sum())).astype(np.uint16)
        ends = np.cumsum(lengths)
        tokens[ends - lengths], tokens[ends - 1] = 2, 3
        b_start = (lengths // 2).astype(np.uint16)
        tokens[ends - lengths + b_start - 1] = 3
        shard = Shard(
            tokens,
            np.append(0, ends).astype(np.int64),
            b_start,
            dice.integers(0, 2, size=rows).astype(np.uint8),
            np.arange(rows, dtype=np.uint32),
            SEQ_LEN,
            vocab_sha256,
            seed,
            "11" * 32,
        )
        path = folder / f"{split}-00000.hdf5"
        entries.append({"file": path.name, "split": split, **write_shard(path, shard)})
    publish_manifest(
        folder,
        {
            "format": 1,
            "seq_len": SEQ_LEN,
            "vocab_size": VOCAB,
            "vocab_sha256": vocab_sha256,
            "seed": seed,
            "special": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
            "shards": entries,
        },
    )
    return folder


def train(run: Path, samples: Path, rank: int = 0, world_size: int = 1, launch: str = "", **changes: Any) -> None:
    """One rank of one attempt, as the worker does it; ``changes`` are fields of the four configurations.

    Raises what ends the training; marks the stage done at its end.
    """
    from pipeline.pretrain.task import run as pretrain

    threads = changes.pop("threads", 1)
    configs = [changed(config, changes) for config in (MODEL, TRAIN, OPTIMIZER, PHASE)]
    assert not changes, f"no configuration has {', '.join(changes)}"
    folder = RunDir(run).stage(STAGE)
    topology = Topology(rank, world_size, rank, launch or f"launch-{os.getpid()}")
    if rank == 0 and not RunDir(run).exists:
        run.mkdir(parents=True, exist_ok=True)
        publish_json(run / "run.json", {})
    attempt = folder.new_attempt(topology.launch) if rank == 0 else folder.join_attempt(topology.launch)
    assert attempt is not None
    job = Job(RunDir(run), STAGE, attempt, topology, workers=1, threads=threads)
    model, train, optimizer, phase = configs
    inputs = {"samples": samples, "vocab": samples / "vocab.txt"}
    result = pretrain(job, model=model, train=train, optimizer=optimizer, phase=phase, **inputs)
    if rank == 0:
        folder.mark_done({"stage": STAGE, "attempt": attempt.number, "result": result})


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """``config`` with the ``changes`` that are fields of it, which are taken out of ``changes``."""
    own = {field.name for field in dataclasses.fields(config)} & changes.keys()
    return dataclasses.replace(config, **{name: changes.pop(name) for name in own})


def newest(run: Path) -> Checkpoint | None:
    """The checkpoint that the next attempt would go on from."""
    return newest_verified(RunDir(run).stage(STAGE).path, lambda line: None)
