"""What benchmarks ask and train on: texts of a file, or invented ones, as long as a task's are or as samples may be."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.publish import publish_text
from data_prep.wordpiece import SPECIAL
from pipeline.bert.config import BertConfig, padded_vocab
from pipeline.bert.folder import write_description
from pipeline.bert.tokenizer import Tokenizer
from pipeline.config import FinetuneConfig, InferenceConfig
from pipeline.errors import ConfigError
from pipeline.finetune.glue import TASKS
from pipeline.finetune.options import SQUAD, defaults
from pipeline.finetune.problems import SquadProblem
from pipeline.finetune.samples import Samples
from pipeline.finetune.squad import Question, Squad, read_squad, split_words
from pipeline.finetune.table import read_table
from pipeline.words import absent_model

GLUE = "glue"
PAIRS = 256  # as many different sequences as are asked, in turn
QUESTION_TOKENS = 12  # of a full-length sequence
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
VOCAB_SIZE = 30522  # of a model with random weights
WORDS = {SQUAD: (10, 112), "mrpc": (22, 22), "sst2": (10,)}  # of each text of a sample: about the means of the files

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Workload:
    """One task's inputs: pairs of texts that fit into ``seq_len`` tokens, and where they are from."""

    task: str
    seq_len: int
    pairs: Pairs


def workloads(config: InferenceConfig, text: Path | None, tokenizer: Tokenizer) -> list[Workload]:
    """SQuAD (question, paragraph) and GLUE (question, one sentence of the paragraph, as in QNLI).

    They are drawn evenly from ``text``, a file in SQuAD's format; without one they are made of the vocabulary's
    words, about as long as SQuAD's. A paragraph beyond one window is cut to its first. DataError for a bad file.
    """
    squad = _evenly(read_squad(text, version_2=True, answers=False)) if text else invented(tokenizer)
    asked = [(question.text, squad.contexts[question.context]) for question in squad.questions]
    first = [(q.text, _sentence(squad.contexts[q.context], q)) for q in squad.questions]
    return [
        Workload(SQUAD, config.squad_seq_len, cut_to_one_window(asked, config.squad_seq_len, tokenizer)),
        Workload(GLUE, config.glue_seq_len, cut_to_one_window(first, config.glue_seq_len, tokenizer)),
    ]


def _evenly(squad: Squad) -> Squad:
    """At most `PAIRS` questions, from all over the file."""
    chosen = np.linspace(0, len(squad.questions) - 1, min(PAIRS, len(squad.questions))).round().astype(int)
    return Squad(squad.contexts, [squad.questions[i] for i in chosen.tolist()])


def _sentence(context: str, question: Question) -> str:
    """The sentence that holds the first answer, else the paragraph's first."""
    position = question.answers[0][1] if question.answers else 0
    ends = [match.end() for match in SENTENCE_END.finditer(context)]
    begin = max((end for end in ends if end <= position), default=0)
    return context[begin : min((end for end in ends if end > position), default=len(context))].strip()


def settings_of(seq_len: int) -> FinetuneConfig:
    """SQuAD's settings for windows of ``seq_len`` tokens; a question may take a quarter of them, at most 64."""
    return defaults(SQUAD, dataset="benchmark", max_seq_len=seq_len, max_query_length=min(64, seq_len // 4))


def cut_to_one_window(pairs: Pairs, seq_len: int, tokenizer: Tokenizer) -> Pairs:
    """The pairs with every second text cut behind the last word that fits into the first window of its question."""
    problem = SquadProblem(settings_of(seq_len), tokenizer)
    problem.ask(squad_of(pairs))
    windows: dict[int, int] = {}
    for feature in problem.features:
        windows[feature.question.context] = feature.window + 1
    kept: Pairs = []
    for feature in problem.features:
        if feature.window == 0:
            question, context = pairs[feature.question.context]
            whole = windows[feature.question.context] == 1
            words = split_words(context)[0]
            kept.append((question, context if whole else " ".join(words[: int(feature.word[-1])]) or words[0]))
    return kept


def squad_of(pairs: Pairs) -> Squad:
    """Each pair as a question on a paragraph of its own."""
    questions = [Question(str(i), question, i, ()) for i, (question, _) in enumerate(pairs)]
    return Squad([context for _, context in pairs], questions)


def invented(tokenizer: Tokenizer) -> Squad:
    """Questions and paragraphs of words of the vocabulary, about as long as those of SQuAD v1.1 (10 and 120 words)."""
    generator = np.random.default_rng(0)
    text = _writer(tokenizer, generator)
    lengths = generator.lognormal(np.log(112), 0.4, PAIRS)
    contexts = [text(length, ".") for length in lengths.tolist()]
    return Squad(contexts, [Question(str(i), text(10, "?"), i, ()) for i in range(PAIRS)])


def _writer(tokenizer: Tokenizer, generator: np.random.Generator) -> Callable[[float, str], str]:
    """Writes sentences of about so many words together."""
    words = _words(tokenizer)

    def text(mean: float, end: str) -> str:
        sentences = []
        while mean > 0:
            count = max(3, round(generator.lognormal(np.log(min(mean, 20)), 0.35)))
            sentences.append(" ".join(generator.choice(words, count)) + end)
            mean -= count
        return " ".join(sentences)

    return text


def _words(tokenizer: Tokenizer) -> list[str]:
    tokens = tokenizer.encoder.vocabulary.tokens
    return [t for t in tokens if t.isalpha() and len(t) > 2] or [t for t in tokens if t.isalnum()] or list(tokens)


Texts = list[tuple[str, ...]]
"""One or two texts for each sample of a task."""


def invented_texts(task: str, count: int, tokenizer: Tokenizer) -> Texts:
    """Texts about as long as those of a task's files."""
    generator = np.random.default_rng(0)
    text = _writer(tokenizer, generator)
    return [tuple(text(mean * generator.lognormal(0, 0.4), ".") for mean in WORDS[task]) for _ in range(count)]


def full_texts(task: str, count: int, tokenizer: Tokenizer, seq_len: int) -> Texts:
    """Texts whose samples are ``seq_len`` tokens long, every one of them."""
    words, generator = _words(tokenizer), np.random.default_rng(0)
    pieces = np.diff(tokenizer.encoder.encode(words)[1])
    whole = [word for word, number in zip(words, pieces.tolist(), strict=True) if number == 1]
    question = min(QUESTION_TOKENS, seq_len // 4)
    sizes = (question, seq_len - 3 - question) if task == SQUAD else (seq_len,) * len(WORDS[task])
    return [tuple(" ".join(generator.choice(whole, size)) for size in sizes) for _ in range(count)]


def texts_of(path: Path, task: str, count: int) -> Texts:
    """Texts from all over a task's file, again and again where it has fewer; DataError."""
    if task == SQUAD:
        squad = read_squad(path, version_2=True, answers=False)
        texts: Texts = [(question.text, squad.contexts[question.context]) for question in squad.questions]
    else:
        texts = list(zip(*read_table(path, TASKS[task], labelled=False).texts, strict=True))
    return [texts[i] for i in np.linspace(0, len(texts) - 1, count).round().astype(int).tolist()]


def write_task(path: Path, task: str, texts: Texts) -> None:
    """The file of a task with invented labels, on which no time depends: an answer is its paragraph's first word."""
    if task == SQUAD:
        articles = [{"paragraphs": [_paragraph(str(i), *pair)]} for i, pair in enumerate(texts)]
        publish_text(path, json.dumps({"data": articles}))
        return
    columns = (*TASKS[task].text, TASKS[task].label)
    rows = [dict(zip(columns, (*each, str(i % 2)), strict=True)) for i, each in enumerate(texts)]
    publish_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _paragraph(name: str, question: str, context: str) -> dict[str, Any]:
    first = (split_words(context)[0] or [""])[0]
    answers = [{"text": first, "answer_start": context.index(first)}]
    return {"context": context, "qas": [{"id": name, "question": question, "answers": answers}]}


def full_samples(count: int, seq_len: int, vocab_size: int) -> Samples:
    """``count`` samples of exactly ``seq_len`` arbitrary tokens."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=count * seq_len)
    return Samples(tokens, np.arange(count + 1) * seq_len, np.full(count, min(QUESTION_TOKENS, seq_len)))


def write_shape(size: str, to: Path) -> None:
    """A folder ``to`` with configuration and an invented vocabulary, but no weights, of BERT ``base`` or ``large``."""
    if size not in SIZES:
        raise ConfigError(f"{absent_model(Path(size), '--model')}; {' and '.join(SIZES)} have random weights")
    write_untrained(to, SIZES[size], VOCAB_SIZE)


def write_untrained(to: Path, shape: Mapping[str, Any], vocab_size: int) -> None:
    """A folder ``to`` with a configuration and an invented vocabulary, but no weights."""
    syllables = list(map("".join, itertools.product("bcdfghjklmnprstvwz", "aeiou")))
    pairs = list(map("".join, itertools.product(syllables, repeat=2)))
    words = (*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-", *syllables, *pairs)
    pieces = itertools.chain.from_iterable((word, f"##{word}") for word in words)
    more = map("".join, itertools.product(pairs, syllables))
    tokens = itertools.islice(itertools.chain(SPECIAL.values(), pieces, more), vocab_size)
    publish_text(to / "vocab.txt", "".join(f"{token}\n" for token in tokens))
    config = BertConfig(vocab_size=padded_vocab(vocab_size), **shape)
    write_description(to, config, Tokenizer(to / "vocab.txt", lowercase=True, strip_accents=True))
