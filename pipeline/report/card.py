"""The card of a trained model, README.md of its folder: what it is, what it was trained on and how well it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.report.facts import Facts
from pipeline.report.learnt import context_in_words, dataset
from pipeline.report.scores import beside_baselines
from pipeline.words import is_number, number, percent, visible, with_error

USAGE = """from transformers import pipeline

fill = pipeline("fill-mask", model=".")  # the folder of this file
print(fill({})[0]["token_str"])"""
TEXT, TOKENS = 'f"The {fill.tokenizer.mask_token} of the city."', "fill.tokenizer.mask_token"


def card(facts: Facts) -> str:
    """Markdown with the tags that Hugging Face's hub reads. The licence of a model follows from those of its texts."""
    recipe, exported = facts.recipe, facts.results.get("export", {})
    data, model = recipe.data, recipe.model
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
language: {visible(data.language)}
license: other
license_name: that-of-the-texts
---

# {visible(facts.name)}

BERT of {number(exported.get("parameters"))} parameters: {model.num_hidden_layers} layers of {model.hidden_size}, \
{model.num_attention_heads} heads, {number(exported.get("vocab_size"))} \
{"lower-cased " if data.lowercase else ""}pieces, at most {model.max_position_embeddings} tokens; \
{visible(str(exported.get("step_of")))}.

```python
{USAGE.format(TOKENS if data.tokens else TEXT)}
```

## What it has learnt

{context_in_words(facts.figures(phase)) if (phase := facts.evaluated) else "It has not been evaluated."}

## Held-out figures

{figures(facts)}

## Scores

{bullets((f"{dataset(found)}: {beside_baselines(facts, task)}" for task, found in facts.scores.items()), "None yet.")}

## Training

{training(facts)}

Optimizer {recipe.optimizer.name}, weight decay {recipe.optimizer.weight_decay:g}, precision {recipe.train.precision}, \
{recipe.train.masking} masking of {percent(recipe.train.masked_lm_prob)}, seed {recipe.train.seed}.

## Data

{bullets(data.corpora, "Not recorded.")}

Licences of the texts:

{bullets(data.licences, "Not recorded: check them before you pass the model on.")}
"""


def bullets(lines: Iterable[str], none: str) -> str:
    return "\n".join(f"* {visible(line)}" for line in lines) or none


def figures(facts: Facts) -> str:
    """What each phase ended with, beside what it would be without context."""
    kinds = (
        ("MLM loss, nats", "eval_mlm_loss", "context_free_loss"),
        ("loss at [MASK], nats", "eval_mask_loss", "unigram_mask_loss"),
        ("accuracy at [MASK]", "eval_mask_accuracy", "unigram_mask_accuracy"),
        ("next sentence, accuracy", "eval_nsp_accuracy", "nsp_majority"),
    )
    rows = [
        (
            phase.name,
            name,
            with_error(found.get(key), found.get(f"{key}_se"), 3),
            number(found.get(base)) if is_number(found.get(base)) else "–",
        )
        for phase in facts.phases
        if phase.evaluations
        for found in [facts.figures(phase)]
        for name, key, base in kinds
        if key in found
    ]
    return markdown(("phase", "figure", "model", "without context"), rows)


def training(facts: Facts) -> str:
    head = ("phase", "tokens", "batch", "steps", "learning rate", "warm-up", "schedule", "last training loss")
    rows = [
        (phase.name, *map(number, (config.seq_len, config.global_batch, config.steps, config.learning_rate,
                                   config.warmup)), config.schedule, number(phase.last("loss")))
        for phase in facts.phases
        for config in [phase.config]
    ]  # fmt: skip
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
