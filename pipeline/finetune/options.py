"""How tasks are fine-tuned and inference is timed, as data: recipe fields ([squad], [inference], …) and defaults.

Imported by the login-node commands, so nothing heavy may be imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SQUAD = "squad"
MODES = ("train", "eval", "prediction")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


def bounded(*default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A field with bounds, ``low <= value <= high`` and ``value > above``; required without a default."""
    metadata = {"low": low, "high": high, "above": above}
    return field(default=default[0], metadata=metadata) if default else field(metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One task: what it is called, how it is trained, how long its inputs and answers may be.

    ``batch`` sequences make one optimizer step, computed ``micro_batch`` at a time. ``learning_rate`` rises
    over the share ``warmup`` of all steps and falls linearly to 0. ``doc_stride`` to ``null_threshold`` are
    used by squad only. Every one of ``seeds`` is trained from the same weights.
    """

    dataset: str  # the name shown to people
    epochs: int = bounded(low=1, high=1000)
    batch: int = bounded(low=1)
    micro_batch: int = bounded(32, low=1)
    learning_rate: float = bounded(above=0)
    warmup: float = bounded(low=0, high=0.99)  # share of all steps
    weight_decay: float = bounded(0.01, low=0)
    max_seq_len: int = bounded(low=8)  # tokens
    doc_stride: int = bounded(128, low=1)  # tokens from one window of a context to the next
    max_query_length: int = bounded(64, low=1)  # tokens
    n_best: int = bounded(20, low=1)
    max_answer_length: int = bounded(30, low=1)  # tokens
    version_2: bool = False  # SQuAD 2.0: questions without an answer
    null_threshold: float = 0.0  # answer "" when its score leads the best answer's by more than this
    seeds: tuple[int, ...] = bounded((1,), low=0, high=2**63 - 1)
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """The inference benchmark: answers and labels per second, and how long one batch takes.

    Every measurement lasts about ``seconds`` at each of ``batches`` (sequences). ``compare`` also measures
    transformers, in turn with ours, where it is installed.
    """

    batches: tuple[int, ...] = bounded((1, 8, 32), low=1, high=4096)
    seconds: float = bounded(1.0, above=0, high=600)
    precision: Precision = "fp32"
    squad_seq_len: int = bounded(384, low=16)  # tokens
    glue_seq_len: int = bounded(128, low=16)  # tokens
    compare: bool = True


# NVIDIA's published recipes where they exist (SQuAD, MRPC, SST-2), the BERT paper's for the other two.
DEFAULTS: dict[str, dict[str, Any]] = {
    SQUAD: {"epochs": 2, "batch": 32, "learning_rate": 3e-5, "warmup": 0.1, "max_seq_len": 384},
    "mrpc": {"epochs": 3, "batch": 128, "learning_rate": 1.8e-5, "warmup": 0.3, "max_seq_len": 128},
    "sst2": {"epochs": 3, "batch": 1024, "learning_rate": 1e-5, "warmup": 0.1, "max_seq_len": 128},
    "cola": {"epochs": 3, "batch": 32, "learning_rate": 2e-5, "warmup": 0.1, "max_seq_len": 128},
    "mnli": {"epochs": 3, "batch": 32, "learning_rate": 2e-5, "warmup": 0.1, "max_seq_len": 128},
}


def defaults(task: str, **changed: Any) -> FinetuneConfig:
    """The configuration of ``task`` with ``changed`` fields replaced; ``dataset`` must be among them."""
    return FinetuneConfig(**(DEFAULTS[task] | changed))
