"""Run by `test_model` in a child process: the model's micro-batch and the optimizer's step on the fake GPU, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from fake_gpu import DEVICE, Operation, Trace, fake_gpu
from torch import nn

from pipeline.bert.config import BertConfig
from pipeline.bert.heads import BertForPreTraining, BertForQuestionAnswering, pretraining_loss_sums
from pipeline.bert.packing import Batch, arrangement, layout
from pipeline.bert.regions import compile_regions
from pipeline.engine.cast import CastWeights
from pipeline.engine.optim import Lamb
from pipeline.engine.reduce import GradientBuffer

SEQ_LEN, LENGTHS = 128, [128] * 20 + [77] * 12
CONFIG = BertConfig(vocab_size=512, hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
LARGE = BertConfig(
    vocab_size=30528, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def facts(operations: list[Operation]) -> dict[str, Any]:
    """What the bars are about."""
    return {
        "waits": [operation.name for operation in operations if operation.waits],
        "outside": [operation.name for operation in operations if operation.region is None],
        "regions": sorted({operation.region for operation in operations if operation.region}),
        "names": sorted({operation.name for operation in operations}),
        "shapes": sorted({shape for operation in operations for shape, _ in operation.results}),
        "devices": sorted({device for operation in operations for _, device in operation.results}),
        "generators": sorted({device for operation in operations for device in operation.generators}),
    }


def inputs(count: int) -> tuple[Batch, list[torch.Tensor]]:
    """A batch as it arrives, and index tensors ``[count]``, ``[count]``, ``[N]``."""
    arranged = arrangement(DEVICE.type, SEQ_LEN)
    arrays = layout(np.ones(sum(LENGTHS)), LENGTHS, LENGTHS, SEQ_LEN, arranged)
    tensors = {name: torch.empty(array.shape, dtype=torch.int32, device=DEVICE) for name, array in arrays.items()}
    batch = Batch.of(tensors | {"seq_len": SEQ_LEN})
    return batch, [torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (count, count, len(LENGTHS))]


def micro_batches(trace: Trace, precision: str, model: nn.Module, losses: Any) -> dict[str, Any]:
    """Facts of the second of two micro-batches of one step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast, CastWeights(model, GradientBuffer(parameters), autocast):
        for _ in range(2):
            trace.operations.clear()
            batch, indices = inputs(300)
            losses(model, batch, *indices).backward()
    weights = {tuple(parameter.shape) for parameter in parameters if parameter.dim() == 2}
    casts = [
        each
        for each in trace.operations
        if each.name == "_to_copy" and each.results[0][0] in weights and each.dtypes[0] == torch.bfloat16
    ]
    return facts(trace.operations) | {"parameters": len(parameters), "casts": len(casts)}


def pretraining(
    model: nn.Module, batch: Batch, places: torch.Tensor, labels: torch.Tensor, nsp: torch.Tensor
) -> torch.Tensor:
    """The loss of one micro-batch."""
    mlm_logits, nsp_logits = model(batch, places)
    with torch.autocast(DEVICE.type, enabled=False):
        return torch.stack(pretraining_loss_sums(mlm_logits, labels, nsp_logits, nsp)).sum()


def answering(model: nn.Module, batch: Batch, places: object, labels: object, answers: torch.Tensor) -> torch.Tensor:
    """The loss of one micro-batch of a question answering task."""
    start, end = model(batch)
    with torch.autocast(DEVICE.type, enabled=False):
        return sum(nn.functional.cross_entropy(scores.float(), answers.long()) for scores in (start, end))


def optimizer(trace: Trace) -> dict[str, Any]:
    """Facts of a step of LAMB on BERT-large, and the bytes that it moves."""
    with DEVICE:
        model = BertForPreTraining(LARGE)
    lamb = Lamb(model.named_parameters(), gradients=GradientBuffer(list(model.parameters())))
    trace.operations.clear()
    trace.traffic.clear()
    lamb.step(1e-3, max_grad_norm=1.0)
    outside = sum(operation.nbytes for operation in trace.operations if operation.region is None)
    return facts(trace.operations) | {"gigabytes": (outside + sum(nbytes for _, nbytes in trace.traffic)) / 1e9}


def main() -> None:
    """Trace everything and print it."""
    compile_regions(DEVICE)
    with fake_gpu() as trace:
        with DEVICE:
            model, answers = BertForPreTraining(CONFIG), BertForQuestionAnswering(CONFIG)
        result = {
            "bf16": micro_batches(trace, "bf16", model, pretraining),
            "fp32": micro_batches(trace, "fp32", model, pretraining),
            "squad": micro_batches(trace, "bf16", answers, answering),
            "optimizer": optimizer(trace),
        }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
