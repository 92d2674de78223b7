"""The tasks that can be fine-tuned and what they take unless told otherwise, as data.

Imported by the login-node commands, so nothing heavy may be imported here.
"""

from __future__ import annotations

from typing import Any

from pipeline.config import FinetuneConfig

SQUAD, CLASSIFY = "squad", "classify"
MODES = ("train", "eval", "prediction")


# NVIDIA's published recipes where they exist (SQuAD, MRPC, SST-2), the BERT paper's for the others.
DEFAULTS: dict[str, dict[str, Any]] = {
    SQUAD: {"epochs": 2, "batch": 32, "learning_rate": 3e-5, "warmup": 0.1, "max_seq_len": 384},
    "mrpc": {"epochs": 3, "batch": 128, "learning_rate": 1.8e-5, "warmup": 0.3, "max_seq_len": 128},
    "sst2": {"epochs": 3, "batch": 1024, "learning_rate": 1e-5, "warmup": 0.1, "max_seq_len": 128},
    "cola": {"epochs": 3, "batch": 32, "learning_rate": 2e-5, "warmup": 0.1, "max_seq_len": 128},
    "mnli": {"epochs": 3, "batch": 32, "learning_rate": 2e-5, "warmup": 0.1, "max_seq_len": 128},
    CLASSIFY: {"epochs": 3, "batch": 32, "learning_rate": 3e-5, "warmup": 0.1, "max_seq_len": 128},
}


def defaults(task: str, **changed: Any) -> FinetuneConfig:
    """The configuration of ``task`` with ``changed`` fields replaced; ``dataset`` must be among them."""
    return FinetuneConfig(**(DEFAULTS[task] | changed))
