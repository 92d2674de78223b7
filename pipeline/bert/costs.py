"""What a model costs: parameters, and the arithmetic of training on samples. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bert.config import BertConfig

BACKWARD = 2  # times the forward's arithmetic: one matrix product for the input's gradient, one for the weight's


def parameters(config: BertConfig) -> int:
    """Parameters of the model with its pretraining heads, padding rows of the vocabulary included."""
    hidden, inner = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2) * hidden
    layer = 4 * hidden * (hidden + 1) + (hidden + 1) * inner + (inner + 1) * hidden + 4 * hidden
    heads = 2 * hidden * (hidden + 1) + 2 * hidden + config.vocab_size + 2 * (hidden + 1)  # pooler, transform, biases
    return embeddings + config.num_hidden_layers * layer + heads


def training_flops(config: BertConfig, lengths: Sequence[int], masked: int) -> float:
    """Floating-point operations (a multiplication and an addition are two) of forward and backward.

    Counts matrix products alone, of real tokens: ``lengths`` are those of the samples, ``masked`` their masked tokens.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    encoder = layers * sum(lengths) * (8 * hidden**2 + 4 * hidden * config.intermediate_size)
    attention = layers * sum(length**2 for length in lengths) * 4 * hidden
    heads = masked * 2 * hidden * (hidden + config.vocab_size) + len(lengths) * 2 * hidden * (hidden + 2)
    return float((1 + BACKWARD) * (encoder + attention + heads))
