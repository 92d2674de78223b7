"""SQuAD-format JSON to features: questions beside windows of their context, as the original BERT builds them.

Method: Devlin et al. 2019 and the feature rules of google-research/bert's SQuAD task, done once per context.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from pipeline.config import FinetuneConfig

BLANKS = " \t\r\n\u202f"
Encode = Callable[[list[str]], tuple[NDArray[Any], NDArray[np.int64]]]  # texts → (ids, offsets)
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Question:
    """One question; ``answers`` are (text, index of its first character in the context), the first trains."""

    id: str
    text: str
    context: int  # index into `Squad.contexts`
    answers: tuple[tuple[str, int], ...]
    is_impossible: bool = False


@dataclass(frozen=True)
class Squad:
    """The content of one file in file order."""

    contexts: list[str]
    questions: list[Question]

    def references(self) -> dict[str, list[str]]:
        """Accepted answers by question id; an impossible question accepts only the empty text."""
        return {q.id: [text for text, _ in q.answers] or [""] for q in self.questions}


@dataclass(frozen=True)
class Feature:
    """One question beside one window of its context: [CLS] question [SEP] window [SEP].

    ``tokens`` are ids, ``b_start`` the index of the window's first token. Both arrays run over the window's
    tokens: ``word`` is each token's word of the context, ``max_context`` whether this window shows the token
    with more context than any other window. ``start, end`` are token indices of the answer, 0 when the window
    does not hold it.
    """

    question: Question
    window: int
    tokens: NDArray[np.int64]
    b_start: int
    word: NDArray[np.int64]
    max_context: NDArray[np.bool_]
    start: int
    end: int


def read_squad(path: Path, *, version_2: bool = False, answers: bool = True) -> Squad:
    """Read a file in the SQuAD v1.1 layout, or 2.0 with ``version_2``.

    ``answers=False`` accepts questions without any, to predict only. DataError names file, question, fault.
    """
    contexts: list[str] = []
    questions: list[Question] = []
    seen: set[str] = set()
    for number, article in enumerate(_value(_load(path), "data", list, f"{path}")):
        where = f"{path}: article {number}"
        for index, paragraph in enumerate(_value(article, "paragraphs", list, where)):
            place = f"{where}, paragraph {index}"
            context = _value(paragraph, "context", str, place)
            for entry in _value(paragraph, "qas", list, place):
                name = _value(entry, "id", str, place)
                if name in seen:
                    raise DataError(f"{path}: question id {name!r} stands twice; ids must differ")
                seen.add(name)
                spot = f"{path}: question {name!r}"
                impossible = version_2 and entry.get("is_impossible", False)
                if not isinstance(impossible, bool):
                    raise DataError(f"{spot}: 'is_impossible' must be true or false, found {impossible!r:.40}")
                spans = _answers(entry, spot) if "answers" in entry and not impossible else ()
                if answers and not spans and not impossible:
                    hint = "" if version_2 else "; a SQuAD 2.0 file needs --version-2"
                    raise DataError(f"{spot} has no answer{hint}")
                text = _value(entry, "question", str, spot)
                questions.append(Question(name, text, len(contexts), spans, impossible))
            contexts.append(context)
    if not questions:
        raise DataError(f"{path}: no question in it; expected SQuAD JSON with data, paragraphs and qas")
    return Squad(contexts, questions)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None  # a number of thousands of digits
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be SQuAD JSON") from None


def _value(table: Any, key: str, kind: type[Kind], where: str) -> Kind:
    if not isinstance(table, dict) or key not in table:
        keys = ", ".join(sorted(map(str, table))[:8]) if isinstance(table, dict) else type(table).__name__
        raise DataError(f"{where}: {key!r} is missing; found {keys or 'nothing'}")
    value = table[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} must be a {kind.__name__}, found {type(value).__name__}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {key!r} holds half a surrogate pair, which is no character") from None
    return value


def _answers(entry: Any, where: str) -> tuple[tuple[str, int], ...]:
    listed = _value(entry, "answers", list, where)
    return tuple((_value(a, "text", str, where), _value(a, "answer_start", int, where)) for a in listed)


# ------------------------------------------------------------------------------------------------ features


@dataclass(frozen=True)
class _Tokenised:
    """A context as words and tokens: token t belongs to word ``word[t]``, word w begins at ``first[w]``."""

    words: list[str]
    char_word: NDArray[np.int64]
    tokens: NDArray[np.int64]
    word: NDArray[np.int64]
    first: NDArray[np.int64]


def split_words(context: str) -> tuple[list[str], NDArray[np.int64]]:
    """Words of a context, and each character's word (a blank belongs to the word before it, or to -1)."""
    codes = np.frombuffer(context.encode("utf-32-le"), np.uint32)
    inside = ~np.isin(codes, [ord(blank) for blank in BLANKS])
    begins = inside & ~np.concatenate([[False], inside[:-1]])
    return re.findall(f"[^{BLANKS}]+", context), np.cumsum(begins) - 1


def build_features(
    squad: Squad, encode: Encode, config: FinetuneConfig, *, cls: int, sep: int, training: bool
) -> tuple[list[Feature], list[str]]:
    """All features in question order, and the ids of training questions whose answer is not in their context.

    ``encode`` gives WordPiece ids of many texts at once, ``cls`` and ``sep`` are ids. Such questions, and
    nothing else, are left out when ``training``.
    """
    contexts = _tokenise(squad.contexts, encode)
    questions = encode_each(encode, [question.text for question in squad.questions])
    wanted = [q.answers[0][0] if training and q.answers else "" for q in squad.questions]
    targets = encode_each(encode, wanted)
    features: list[Feature] = []
    skipped: list[str] = []
    for question, asked, target in zip(squad.questions, questions, targets, strict=True):
        context = contexts[question.context]
        span = None
        if training and not question.is_impossible:
            span = _answer_tokens(context, question, target)
            if span is None:
                skipped.append(question.id)
                continue
        features += _windows(question, context, asked[: config.max_query_length], span, config, cls, sep)
    return features, skipped


def _tokenise(contexts: Sequence[str], encode: Encode) -> list[_Tokenised]:
    """Split every context into words and tokenise each distinct word once."""
    split = [split_words(context) for context in contexts]
    number = {word: i for i, word in enumerate(dict.fromkeys(w for words, _ in split for w in words))}
    pieces = encode_each(encode, list(number))
    tokenised = []
    for words, char_word in split:
        own = [pieces[number[word]] for word in words]
        lengths = np.array([len(piece) for piece in own], np.int64)
        tokens = np.concatenate([np.zeros(0, np.int64), *own])
        first = np.cumsum(lengths) - lengths
        tokenised.append(_Tokenised(words, char_word, tokens, np.repeat(np.arange(len(words)), lengths), first))
    return tokenised


def encode_each(encode: Encode, texts: list[str]) -> list[NDArray[np.int64]]:
    """The ids of each text."""
    if not texts:
        return []
    ids, offsets = encode(texts)
    return np.split(ids.astype(np.int64), offsets[1:-1])


def _answer_tokens(context: _Tokenised, question: Question, answer: NDArray[np.int64]) -> tuple[int, int] | None:
    """First and last token of the first answer, or None when it is not where the file says.

    They are its own tokens (``answer``) where these stand inside its words', else all tokens of its words.
    """
    text, begin = question.answers[0]
    if not len(answer) or begin < 0 or begin + len(text) > len(context.char_word):
        return None
    first, last = (max(0, int(context.char_word[i])) for i in (begin, begin + len(text) - 1))
    held = " ".join(" ".join(context.words[first : last + 1]).split())
    if " ".join(text.split()) not in held:
        return None
    low = int(context.first[first])
    high = int(context.first[last + 1]) if last + 1 < len(context.words) else len(context.tokens)
    for start in range(low, high - len(answer) + 1):
        if np.array_equal(context.tokens[start : start + len(answer)], answer):
            return start, start + len(answer) - 1
    return (low, high - 1) if low < high else None


def _windows(
    question: Question,
    context: _Tokenised,
    asked: NDArray[np.int64],
    span: tuple[int, int] | None,
    config: FinetuneConfig,
    cls: int,
    sep: int,
) -> Iterable[Feature]:
    """Cut a context into windows as long as the question leaves room for, ``doc_stride`` tokens apart."""
    room = config.max_seq_len - len(asked) - 3
    starts = [0] if len(context.tokens) else []
    while starts and starts[-1] + room < len(context.tokens):
        starts.append(starts[-1] + min(room, config.doc_stride))
    lengths = [min(room, len(context.tokens) - start) for start in starts]
    best = _best_window(len(context.tokens), starts, lengths)
    b_start = len(asked) + 2
    for window, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        inside = slice(start, start + length)
        holds = span is not None and start <= span[0] and span[1] < start + length
        target = (span[0] - start + b_start, span[1] - start + b_start) if span and holds else (0, 0)
        yield Feature(
            question=question,
            window=window,
            tokens=np.concatenate([[cls], asked, [sep], context.tokens[inside], [sep]]),
            b_start=b_start,
            word=context.word[inside],
            max_context=best[inside] == window,
            start=target[0],
            end=target[1],
        )


def _best_window(tokens: int, starts: list[int], lengths: list[int]) -> NDArray[np.int64]:
    """Each token's window with the largest min(tokens left, tokens right) + 0.01 * length; ties: the first."""
    best, most = np.zeros(tokens, int), np.full(tokens, -np.inf)
    for window, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        place = np.arange(length)
        value = np.minimum(place, length - 1 - place) + 0.01 * length
        better = value > most[start : start + length]
        best[start : start + length][better] = window
        most[start : start + length][better] = value[better]
    return best
