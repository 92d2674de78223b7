"""Self-attention in which a token sees the tokens of its own sample only.

Which way it is computed follows from device and row length by the fixed table in `attention_path`, never from a
timing at run time, so that a resumed run computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bert.config import BertConfig
from pipeline.bert.dropout import dropout, keep_factors
from pipeline.bert.packing import Batch

LONGEST_ROW_BY_ROWS = 192
PREDICT = "predict"  # on the CPU without gradients: sample after sample by SDPA, whose forward alone is fastest


def attention_path(device_type: str, width: int) -> str:
    """``rows``, ``samples`` or ``sdpa``: how to attend in rows of ``width`` slots.

    ``rows`` multiplies whole rows and masks what crosses samples; ``samples`` loops over the samples and wastes
    nothing on other samples or pads. Forward and backward on 2 CPU threads with dropout 0.1, 12 heads of 64:
    128 slots 39 ms (bf16) and 58 ms (fp32) by rows, 66 and 65 by samples, 104 and 93 by SDPA; 512 slots 136 and
    261 ms by rows, 69 and 101 by samples, 391 and 395 by SDPA.
    """
    if device_type != "cpu":
        return "sdpa"
    return "rows" if width <= LONGEST_ROW_BY_ROWS else "samples"


@dataclass(frozen=True)
class Blocks:
    """What all layers of one forward share about who sees whom; only the field that ``path`` needs is set.

    ``bias [R*heads, S, S]`` is 0 inside a sample and -inf across; ``runs`` are the lengths of the stretches of
    slots that attend to each other (samples and stretches of pads), in slot order; ``same [R, 1, S, S]`` is the
    boolean mask.
    """

    path: str
    bias: Tensor | None = None
    runs: tuple[int, ...] = ()
    same: Tensor | None = None


def blocks_of(batch: Batch, heads: int, dtype: torch.dtype) -> Blocks:
    """Build the shared `Blocks` of a micro-batch. Pads see pads only, so no row of the softmax is empty."""
    block = batch.block
    device = block.device.type
    predicting = device == "cpu" and not torch.is_grad_enabled()
    path = PREDICT if predicting else attention_path(device, block.shape[1])
    if path in ("samples", PREDICT):
        edge = torch.ones_like(block, dtype=torch.bool)
        edge[:, 1:] = block[:, 1:] != block[:, :-1]
        starts = edge.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([block.numel()])])
        return Blocks(path, runs=tuple((ends - starts).tolist()))
    same = block[:, None, :, None] == block[:, None, None, :]
    if path == "sdpa":
        return Blocks(path, same=same)
    bias = torch.zeros(same.shape, dtype=dtype, device=block.device).masked_fill_(~same, -torch.inf)
    rows, _, width, _ = bias.shape
    return Blocks(path, bias=bias.expand(rows, heads, width, width).reshape(rows * heads, width, width))


class SelfAttention(nn.Module):
    """Scaled dot-product attention; query, key and value stay three parameters but are one matmul."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.p = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """Context ``[R, S, H]`` of ``hidden [R, S, H]``."""
        linears = (self.query, self.key, self.value)
        if blocks.path == PREDICT:
            return self._predict([linear(hidden).flatten(0, 1) for linear in linears], blocks.runs).view(hidden.shape)
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        mixed = functional.linear(hidden, weight, bias)
        if blocks.path == "samples":
            return self._by_samples(mixed.flatten(0, 1), blocks.runs).view(hidden.shape)
        rows, width, _ = hidden.shape
        split = mixed.view(rows, width, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        if blocks.path == "rows":
            context = self._by_rows(query, key, value, blocks)
        else:
            p = self.p if self.training else 0.0
            context = functional.scaled_dot_product_attention(query, key, value, attn_mask=blocks.same, dropout_p=p)
        return context.transpose(1, 2).flatten(2)

    def _by_rows(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Tensor:
        """Whole rows at once; ``[R, heads, S, D]`` in and out."""
        assert blocks.bias is not None
        flat = [part.reshape(-1, *part.shape[2:]) for part in (query, key, value)]
        scores = torch.baddbmm(blocks.bias, flat[0], flat[1].transpose(1, 2), alpha=self.head_size**-0.5)
        probabilities = dropout(scores.softmax(-1), self.p, self.training)
        return torch.bmm(probabilities, flat[2]).view(query.shape)

    def _by_samples(self, mixed: Tensor, runs: tuple[int, ...]) -> Tensor:
        """One stretch of slots after the other; ``[R*S, 3H]`` in, ``[R*S, H]`` out."""
        p = self.p if self.training else 0.0
        sizes = [self.heads * run * run for run in runs]
        factors = torch.split(keep_factors(sum(sizes), p, mixed.dtype), sizes) if p else None
        contexts = []
        for index, part in enumerate(torch.split(mixed, list(runs))):
            query, key, value = part.view(-1, 3, self.heads, self.head_size).permute(1, 2, 0, 3).unbind(0)
            scores = torch.bmm(query * self.head_size**-0.5, key.transpose(1, 2))
            probabilities = scores.softmax(-1)
            if factors is not None:
                probabilities = probabilities * factors[index].view(probabilities.shape)
            contexts.append(torch.bmm(probabilities, value).transpose(0, 1).flatten(1))
        return torch.cat(contexts)

    def _predict(self, projected: list[Tensor], runs: tuple[int, ...]) -> Tensor:
        """As `_by_samples`, forward only; query, key and value ``[R*S, H]`` in, ``[R*S, H]`` out."""
        equal = len(set(runs)) == 1
        rows, width = (len(runs), runs[0]) if equal else (1, -1)
        split = [part.view(rows, width, self.heads, self.head_size).transpose(1, 2) for part in projected]
        pieces = [tuple(split)] if equal else zip(*(torch.split(part, list(runs), 2) for part in split), strict=True)
        p = self.p if self.training else 0.0
        contexts = [functional.scaled_dot_product_attention(q, k, v, dropout_p=p) for q, k, v in pieces]
        context = contexts[0] if equal else torch.cat(contexts, dim=2)
        return context.transpose(1, 2).reshape(projected[0].shape)
