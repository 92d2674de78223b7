"""What a pretraining has learnt, in a sentence that its figures bear out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.words import is_number


def gain_of(figures: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Of hidden words the gain over word counts, its standard error, and the gain with the words around shuffled."""
    return figures.get("eval_mask_gain"), figures.get("eval_mask_gain_se"), figures.get("shuffled_mask_gain")


def context_in_words(figures: Mapping[str, Any]) -> str:
    """Whether the model predicts hidden words better than word counts, and loses most of it when their order goes.

    ``figures`` are those of `pipeline.pretrain.evaluate.evaluate`, with ``shuffled_mask_gain`` once a phase is done.
    """
    gain, error, control = gain_of(figures)
    if not (is_number(gain) and is_number(error)):
        return "Whether the model uses context was not measured."
    than = f"nats {'better' if gain >= 0 else 'worse'} than word counts"
    better = f"where a word is hidden it is {abs(gain):.2f} ± {error:.2f} {than}"
    if gain <= 3 * error:
        chance = ", no more than chance" if gain >= -3 * error else ""
        return f"The model has not learnt to use context: {better}{chance}."
    if not is_number(control):
        return f"Of hidden words: {better}; the control, the same words in random order, comes at the end of the phase."
    left = f"{control:.2f} with the words around in random order"
    if control <= gain / 2:
        return f"The model uses context: {better}, and only {left}."
    return f"The model knows which words occur together, hardly their order: {better}, and still {left}."


def dataset(scores: Mapping[str, Any]) -> str:
    """The name that a task's data go by; the stage's name says nothing about them."""
    return str(scores.get("dataset") or "data set without a name")


def worth_in_words(scores: Mapping[str, Any], scratch: Mapping[str, Any]) -> str:
    """What pretraining is worth to a task: its score beside that of the same model from random weights.

    The error of a difference is that of two independent shares of the examples; twice it is called no difference.
    """
    metric, count = str(scores.get("ranked_by")), scores.get("examples")
    name = dataset(scores)
    with_, without = ((record.get("scores") or {}).get(metric) for record in (scores, scratch))
    if not (is_number(with_) and is_number(without) and is_number(count) and count):
        return f"{name}: what pretraining is worth was not measured."
    error = math.sqrt(sum(share * (100 - share) for share in (with_, without)) / count)
    figures = f"{metric} {with_:.1f} with it, {without:.1f} without, on {count:,} examples"
    if abs(with_ - without) <= 2 * error:
        return f"{name}: pretraining makes no difference that shows ({figures}; standard error {error:.1f})."
    change = f"{'adds' if with_ > without else 'costs'} {abs(with_ - without):.1f} ± {error:.1f} points"
    return f"{name}: pretraining {change} ({figures})."
