"""The BERT encoder (Devlin et al. 2018, post-norm) over packed rows.

Module names are Hugging Face's, so that ``state_dict()`` keys need no translation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bert.attention import Blocks, SelfAttention, blocks_of
from pipeline.bert.config import BertConfig
from pipeline.bert.dropout import dropout
from pipeline.bert.linear import Linear
from pipeline.bert.packing import Batch
from pipeline.bert.regions import region

GELU_APPROXIMATION = {"erf": "none", "tanh": "tanh"}
# The linears that NVIDIA's code fuses with their activation and therefore leaves at PyTorch's default start.
FUSED_LINEARS = ("intermediate.dense", "pooler.dense", "predictions.transform.dense")


def layer_norm(values: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm`` of ``values``, in their dtype; the arithmetic is fp32."""
    return functional.layer_norm(values, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(values.dtype)


@region
def sum_norm(summands: Sequence[Tensor], norm: nn.LayerNorm, p: float, dtype: torch.dtype) -> Tensor:
    """Sum of embeddings ``[R, S, H]``, ``norm``, dropout; fp32 in, ``dtype`` out."""
    return dropout(layer_norm(functools.reduce(torch.add, summands), norm), p).to(dtype)


class Embeddings(nn.Module):
    """Sum of word, position and segment vectors, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.p = config.hidden_dropout_prob

    def forward(self, batch: Batch) -> Tensor:
        """``[R, S, H]`` of the tokens, positions and segments ``[R, S]``, in the dtype of the matrix products."""
        word = self.word_embeddings(batch.tokens)
        summands = (word, self.position_embeddings(batch.positions), self.token_type_embeddings(batch.segments))
        return sum_norm(summands, self.LayerNorm, self.p if self.training else 0.0, matmul_dtype(word))


def matmul_dtype(values: Tensor) -> torch.dtype:
    """What matrix products of ``values`` are computed in: autocast's dtype, else their own."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


class ResidualOutput(nn.Module):
    """Linear, dropout, the sum with the residual and LayerNorm: how both halves of a layer end."""

    def __init__(self, config: BertConfig, in_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.p = config.hidden_dropout_prob

    def forward(self, values: Tensor, residual: Tensor) -> Tensor:
        """``[R, S, H]``."""
        return layer_norm(residual + dropout(self.dense(values), self.p if self.training else 0.0), self.LayerNorm)


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """``[R, S, H]``."""
        out: Tensor = self.output(self.self(hidden, blocks), hidden)
        return out


class DenseGelu(nn.Module):
    """Linear and GELU."""

    def __init__(self, config: BertConfig, out_features: int) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, out_features)
        self.approximation = GELU_APPROXIMATION[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """``[…, out_features]``."""
        return functional.gelu(self.dense(hidden), approximate=self.approximation)


class Layer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = DenseGelu(config, config.intermediate_size)
        self.output = ResidualOutput(config, config.intermediate_size)

    def forward(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """``[R, S, H]``."""
        hidden = self.attention(hidden, blocks)
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out


@region
def run_layer(layer: nn.Module, hidden: Tensor, blocks: Blocks) -> Tensor:
    out: Tensor = layer(hidden, blocks)
    return out


class Encoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """``[R, S, H]``."""
        for layer in self.layer:
            hidden = run_layer(layer, hidden, blocks)
        return hidden


class Pooler(nn.Module):
    """Linear and tanh on the vector of [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """``[N, H]``."""
        return torch.tanh(self.dense(first))


class Bert(nn.Module):
    """Embeddings, encoder and pooler of one `BertConfig`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states ``[R*S, H]`` by flat slot; those of pads mean nothing."""
        hidden = self.embeddings(batch)
        out: Tensor = self.encoder(hidden, blocks_of(batch, self.config, hidden.dtype))
        return out.flatten(0, 1)

    def pooled(self, hidden: Tensor, batch: Batch) -> Tensor:
        """``[N, H]``: the pooled [CLS] of each sample, in the order of the samples."""
        out: Tensor = self.pooler(hidden.index_select(0, batch.first))
        return out


def initialise(module: nn.Module, config: BertConfig, generator: torch.Generator) -> None:
    """Overwrite all parameters below ``module``; the same generator state gives the same weights.

    Weights are Normal(0, initializer_range), not truncated (as NVIDIA and Hugging Face do, unlike the paper),
    biases 0, LayerNorm 1 and 0. With ``init = "nvidia"`` the `FUSED_LINEARS` keep PyTorch's default for
    linears: weight and bias uniform within 1/sqrt(fan_in).
    """
    with torch.no_grad():
        for name, part in module.named_modules():
            for own in part.parameters(recurse=False):
                own.zero_()  # what no line below sets: biases, that of the vocabulary included
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(1)
            elif isinstance(part, nn.Linear) and config.init == "nvidia" and name.endswith(FUSED_LINEARS):
                bound = 1 / math.sqrt(part.in_features)
                part.weight.uniform_(-bound, bound, generator=generator)
                part.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(part, (nn.Linear, nn.Embedding)):
                part.weight.normal_(0, config.initializer_range, generator=generator)
