"""The models that are trained: BERT with its pretraining, question answering or classification head."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bert.config import BertConfig
from pipeline.bert.dropout import dropout
from pipeline.bert.encoder import Bert, DenseGelu, initialise, layer_norm
from pipeline.bert.packing import Batch
from pipeline.bert.regions import region


class Transform(DenseGelu):
    """Linear, GELU and LayerNorm before the vocabulary projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[K, H]``."""
        return layer_norm(super().forward(hidden), self.LayerNorm)


class Predictions(nn.Module):
    """The masked-token head; its projection is the word embedding itself, so only a bias is its own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits ``[K, V]`` of hidden states ``[K, H]``."""
        return functional.linear(self.transform(hidden), word_embeddings, self.bias)


class PreTrainingHeads(nn.Module):
    """Masked tokens and next sentence (class 1: segment B is random)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """BERT with both pretraining heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.cls = PreTrainingHeads(config)

    def forward(self, batch: Batch, masked_index: Tensor) -> tuple[Tensor, Tensor]:
        """``(mlm_logits [K, V], nsp_logits [N, 2])``; ``masked_index [K]``: flat slots (`Batch.slot`)."""
        hidden = self.bert(batch)
        masked = hidden.index_select(0, masked_index)
        mlm_logits = self.cls.predictions(masked, self.bert.embeddings.word_embeddings.weight)
        return mlm_logits, self.cls.seq_relationship(self.bert.pooled(hidden, batch))


class BertForQuestionAnswering(nn.Module):
    """BERT with a start and an end score per token; no dropout before it, as in the original.

    Its pooler, which no score reaches, is not trained: it takes no gradient, and with it no decay.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.bert.pooler.requires_grad_(False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(start, end)``, each ``[N, seq_len]``; -inf behind a sample's end."""
        scores = self.qa_outputs(self.bert(batch))
        place = torch.arange(batch.seq_len, device=scores.device)
        outside = place >= batch.length[:, None]
        slot = (batch.first[:, None] + place).masked_fill(outside, 0)
        laid = scores.index_select(0, slot.flatten()).view(*slot.shape, 2)
        start, end = laid.masked_fill(outside[..., None], -torch.inf).unbind(-1)
        return start, end


class BertForSequenceClassification(nn.Module):
    """BERT with dropout and a linear on the pooled [CLS]."""

    def __init__(self, config: BertConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[N, num_labels]``."""
        pooled = self.bert.pooled(self.bert(batch), batch)
        p = self.config.hidden_dropout_prob if self.training else 0.0
        logits: Tensor = self.classifier(dropout(pooled, p))
        return logits


Model = BertForPreTraining | BertForQuestionAnswering | BertForSequenceClassification
AnyModel = TypeVar("AnyModel", bound=Model)


def initialised(model: AnyModel, generator: torch.Generator) -> AnyModel:
    """``model`` with fresh parameters (`pipeline.bert.encoder.initialise`)."""
    initialise(model, model.config, generator)
    return model


@region
def pretraining_loss_sums(
    mlm_logits: Tensor, labels: Tensor, nsp_logits: Tensor, nsp_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """``(mlm_sum, nsp_sum)``: cross-entropies summed over masked tokens and over pairs, in fp32.

    The caller divides by the counts of the whole step, so that the loss does not depend on how the step was cut.
    """
    mlm_sum = functional.cross_entropy(mlm_logits.float(), labels.long(), reduction="sum")
    nsp_sum = functional.cross_entropy(nsp_logits.float(), nsp_labels.long(), reduction="sum")
    return mlm_sum, nsp_sum


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which of ``logits [K, C]`` are highest at their label, bool ``[K]``."""
    # max() finds the index 2.6 times faster than argmax() does on a CPU
    return logits.max(-1).indices == labels
