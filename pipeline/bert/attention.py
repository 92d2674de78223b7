"""Self-attention in which a token sees the tokens of its own sample only.

Which way it is computed follows from device, precision and row length by the fixed table in `blocks_of`, never from
a timing at run time, so that a resumed run computes the same bits. The ways on a CPU are the reference of those on a
GPU: all give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bert.config import BertConfig
from pipeline.bert.dropout import dropout, keep_factors
from pipeline.bert.linear import Linear
from pipeline.bert.packing import LONGEST_ROW_BY_ROWS, Batch

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
PREDICT = "predict"  # on the CPU without gradients: sample after sample by SDPA, whose forward alone is fastest


def flash(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, p: float) -> Tensor:
    """Attention of ``[T, heads, D]`` inside each stretch ``cu[i]:cu[i+1]`` of at most ``longest`` slots.

    ``p`` is the dropout of the probabilities, from the device's default generator. bf16 and fp16 on sm_80 and newer.
    """
    forward = torch.ops.aten._flash_attention_forward
    out: Tensor = forward(query, key, value, cu, cu, longest, longest, p, False, False)[0]
    return out


def efficient(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, p: float) -> Tensor:
    """As `flash`, in any precision on any GPU."""
    forward = torch.ops.aten._efficient_attention_forward
    rows = (part.unsqueeze(0) for part in (query, key, value))
    out: Tensor = forward(*rows, None, cu, cu, longest, longest, p, 0, True)[0]
    return out.squeeze(0)


def jagged(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, p: float) -> Tensor:
    """As `efficient`, by public functions alone, which take more of the host's time and are not compiled."""
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(part.contiguous(), cu, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for part in (query, key, value)
    )
    out: Tensor = functional.scaled_dot_product_attention(query, key, value, dropout_p=p).transpose(1, 2).values()
    return out


# The positional arguments that the operators above are called with; further ones must have defaults.
FLASH_ARGUMENTS = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
EFFICIENT_ARGUMENTS = (
    "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
    "compute_log_sumexp"
)


def takes(operator: str, arguments: str) -> bool:
    """Whether this PyTorch has the private ``operator`` as we call it; if not, `jagged` serves instead of it."""
    overloads = getattr(torch.ops.aten, operator, None)
    if overloads is None:
        return False
    schema = overloads.default._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    return positional == arguments.split() and all(a.has_default_value() for a in schema if a.kwarg_only)


def varlen_of(device: torch.device, dtype: torch.dtype, head_size: int) -> Varlen:
    """The operator for a stream on a GPU."""
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    if recent and dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0:
        return flash if takes("_flash_attention_forward", FLASH_ARGUMENTS) else jagged
    return efficient if takes("_efficient_attention_forward", EFFICIENT_ARGUMENTS) else jagged


@dataclass(frozen=True)
class Blocks:
    """What all layers of one forward share about who sees whom; only the fields that ``path`` needs are set.

    ``varlen`` is the operator for the stretches ``cu`` of at most ``longest`` slots. ``bias [R*heads, S, S]`` is 0
    inside a stretch and -inf across. ``runs`` are the lengths of the stretches in slot order.
    """

    path: str
    varlen: Varlen | None = None
    cu: Tensor | None = None
    longest: int = 0
    bias: Tensor | None = None
    runs: tuple[int, ...] = ()


def attention_path(device_type: str, width: int) -> str:
    """``varlen``, ``rows`` or ``samples``: how to attend in rows of ``width`` slots with gradients.

    ``rows`` multiplies whole rows and masks what crosses samples; ``samples`` loops over the samples and wastes
    nothing on other samples or pads. Forward and backward on 2 CPU threads with dropout 0.1, 12 heads of 64:
    128 slots 39 ms (bf16) and 58 ms (fp32) by rows, 66 and 65 by samples; 512 slots 136 and 261 ms by rows, 69 and
    101 by samples.
    """
    if device_type != "cpu":
        return "varlen"
    return "rows" if width <= LONGEST_ROW_BY_ROWS else "samples"


def blocks_of(batch: Batch, config: BertConfig, dtype: torch.dtype) -> Blocks:
    """The shared `Blocks` of a micro-batch that is computed in ``dtype``; no device is asked for a value."""
    rows, width = batch.tokens.shape
    device = batch.tokens.device
    path = attention_path(device.type, width)
    if path == "varlen":
        longest = min(batch.seq_len, rows * width)  # the efficient operator refuses more than there are slots
        return Blocks(path, varlen_of(device, dtype, config.head_size), batch.cu, longest)
    if path == "samples" or not torch.is_grad_enabled():
        runs = tuple(run for run in batch.cu.diff().tolist() if run)
        return Blocks(path if torch.is_grad_enabled() else PREDICT, runs=runs)
    stretch = torch.repeat_interleave(batch.cu.diff()).view(rows, width)
    across = stretch[:, None, :, None] != stretch[:, None, None, :]
    bias = torch.zeros(across.shape, dtype=dtype).masked_fill_(across, -torch.inf)
    heads = config.num_attention_heads
    return Blocks(path, bias=bias.expand(rows, heads, width, width).reshape(rows * heads, width, width))


class SelfAttention(nn.Module):
    """Scaled dot-product attention; query, key and value stay three parameters but are one matmul."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.p = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """Context ``[R, S, H]`` of ``hidden [R, S, H]``."""
        linears = (self.query, self.key, self.value)
        if blocks.path == PREDICT:
            return self._predict([linear(hidden).flatten(0, 1) for linear in linears], blocks.runs).view(hidden.shape)
        operands = zip(*(linear.operands() for linear in linears), strict=True)
        weight, bias = (torch.cat([part.to(hidden.dtype) for part in parts]) for parts in operands)
        mixed = functional.linear(hidden, weight, bias)
        if blocks.path == "rows":
            return self._by_rows(mixed, blocks)
        slots = mixed.view(-1, 3, self.heads, self.head_size)
        context = self._by_varlen(slots, blocks) if blocks.path == "varlen" else self._by_samples(slots, blocks.runs)
        return context.reshape(hidden.shape)

    def _by_varlen(self, slots: Tensor, blocks: Blocks) -> Tensor:
        """All stretches by one operator; ``[R*S, 3, heads, D]`` in, ``[R*S, heads, D]`` out."""
        assert blocks.varlen is not None
        assert blocks.cu is not None
        query, key, value = slots.unbind(1)
        return blocks.varlen(query, key, value, blocks.cu, blocks.longest, self.p if self.training else 0.0)

    def _by_rows(self, mixed: Tensor, blocks: Blocks) -> Tensor:
        """Whole rows at once; ``[R, S, 3H]`` in, ``[R, S, H]`` out."""
        assert blocks.bias is not None
        rows, width, _ = mixed.shape
        split = mixed.view(rows, width, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        query, key, value = split.reshape(3, rows * self.heads, width, self.head_size).unbind(0)
        scores = torch.baddbmm(blocks.bias, query, key.transpose(1, 2), alpha=self.head_size**-0.5)
        probabilities = dropout(scores.softmax(-1), self.p if self.training else 0.0)
        context = torch.bmm(probabilities, value).view(rows, self.heads, width, self.head_size)
        return context.transpose(1, 2).flatten(2)

    def _by_samples(self, slots: Tensor, runs: tuple[int, ...]) -> Tensor:
        """One stretch of slots after the other; ``[R*S, 3, heads, D]`` in, ``[R*S, heads, D]`` out."""
        p = self.p if self.training else 0.0
        sizes = [self.heads * run * run for run in runs]
        factors = torch.split(keep_factors(sum(sizes), p, slots.dtype), sizes) if p else None
        contexts = []
        for index, part in enumerate(torch.split(slots, list(runs))):
            query, key, value = part.permute(1, 2, 0, 3).unbind(0)
            scores = torch.bmm(query * self.head_size**-0.5, key.transpose(1, 2))
            probabilities = scores.softmax(-1)
            if factors is not None:
                probabilities = probabilities * factors[index].view(probabilities.shape)
            contexts.append(torch.bmm(probabilities, value).transpose(0, 1))
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
