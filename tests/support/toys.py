"""A tiny model as transformers saves it, and learnable files in every task's official format."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pipeline.config import FinetuneConfig
from pipeline.finetune.options import defaults

NOUNS = ["fox", "dog", "cat", "bird", "fish", "horse", "cow", "ant"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NOUNS, *"abcdefghijkl", "who", "good", "bad", ".", "##s"]


def write_model(folder: Path, positions: int = 64) -> None:
    """A random model as transformers saves it."""
    import torch
    import transformers

    folder.mkdir()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=positions,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": true}')


def examples(folder: Path, task: str, count: int = 32) -> Path:
    """Learnable examples in the task's official format."""
    source = random.Random(1)
    words = [source.choices("abcdefghijkl", k=source.randrange(2, 12)) for _ in range(count)]
    names = [source.choice(NOUNS) for _ in range(count)]
    if task == "squad":
        paragraphs = []
        for i, (own, name) in enumerate(zip(words, names, strict=True)):
            at = source.randrange(len(own) + 1)
            context = " ".join([*own[:at], f"({name}s).", *own[at:]])
            answer = {"text": f"{name}s", "answer_start": context.index(name)}
            qa = {"id": f"q{i}", "question": "Who?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [qa]})
        text = json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})
    else:
        rows = []
        for i, (own, name) in enumerate(zip(words, names, strict=True)):
            sentence = " ".join([*own, ("bad", "good")[i % 2]])
            rows.append(
                {
                    "mrpc": f"{i % 2}\t1\t2\t{sentence}\t{name}",
                    "sst2": f"{sentence} \t{i % 2}",
                    "cola": f"x\t{i % 2}\t\t{sentence}",
                    "mnli": f"{i}\t{name}\t{sentence}\t{('contradiction', 'neutral')[i % 2]}",
                }[task]
            )
        headers = {
            "mrpc": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"],
            "sst2": ["sentence\tlabel"],
            "cola": [],
            "mnli": ["index\tsentence1\tsentence2\tgold_label"],
        }
        text = "\n".join([*headers[task], *rows]) + "\n"
    path = folder / f"{task}.txt"
    path.write_text(text)
    return path


def config_of(task: str, **changed: Any) -> FinetuneConfig:
    small = {"epochs": 30, "batch": 16, "learning_rate": 2e-3, "warmup": 0.1, "max_seq_len": 32}
    squad = {"max_query_length": 4, "doc_stride": 8} if task == "squad" else {}
    return defaults(task, **({"dataset": f"toy {task}"} | small | squad | changed))
