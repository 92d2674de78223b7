"""Evaluation texts of the tasks that stand in the training text: what a task's score may owe to having been read.

The rule: a text counts where one of its sentences stands in the training text. Sentences are compared by their letters
and digits alone, so that case, blanks, punctuation and the loose tokens of GLUE's files make no difference.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError, refuse_pointer
from data_prep.sentences import splitter as make_splitter

SHORTEST = 30  # letters and digits: shorter sentences recur by chance
MOST_TEXTS = 100_000  # of a file are looked for, about 50 MB
_FOLDED = bytes(code + 32 if 65 <= code <= 90 else code for code in range(256))
_DROPPED = bytes(code for code in range(128) if not chr(code).isalnum() and chr(code) != "\n")


@dataclass(frozen=True)
class Wanted:
    """Sentences to look for: their numbers by their letters, and for each file those of each text."""

    numbers: dict[bytes, int]
    texts: dict[Path, list[list[int]]]
    unread: dict[Path, str]  # files that cannot be read, and why: who trains on the task refuses them

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(b"\n".join(self.numbers)).hexdigest()


def letters(lines: bytes) -> list[bytes]:
    """The letters and digits of each line of UTF-8 text, in lower case where they are ASCII."""
    return lines.translate(_FOLDED, _DROPPED).split(b"\n")


@functools.lru_cache(maxsize=2)
def wanted(files: tuple[Path, ...], language: str, splitter: str) -> Wanted:
    """What to look for of evaluation files."""
    split = make_splitter(language, splitter)
    sought = Wanted({}, {}, {})
    for path in files:
        try:
            texts = list(itertools.islice(_texts(path), MOST_TEXTS))
        except (OSError, DataError) as error:
            sought.unread[path] = str(error)
            continue
        sought.texts[path] = []
        for text in texts:
            lines = "\n".join(sentence for paragraph in text.splitlines() for sentence in split(paragraph))
            long = [key for key in letters(lines.encode(errors="replace")) if len(key) >= SHORTEST]
            if long:
                sought.texts[path].append([sought.numbers.setdefault(key, len(sought.numbers)) for key in long])
    return sought


def sentences_in(data: bytes, sought: Wanted) -> set[int]:
    """Numbers of those that stand in ``data``, UTF-8 text of one sentence a line."""
    return {sought.numbers[key] for key in sought.numbers.keys() & letters(data)}


def told(sought: Wanted, found: set[int]) -> Iterator[tuple[dict[str, Any], str]]:
    """For each file its counts, and the line that says them; ``found``: numbers of the sentences that were met."""
    for path, why in sought.unread.items():
        yield {"file": f"{path.parent.name}/{path.name}", "unread": why}, f"{why}; not looked for in the training text"
    for path, texts in sought.texts.items():
        own = {number for text in texts for number in text}
        counts = {
            "file": f"{path.parent.name}/{path.name}",
            "texts": len(texts),
            "texts_in_training": sum(not found.isdisjoint(text) for text in texts),
            "sentences": len(own),
            "sentences_in_training": len(own & found),
        }
        line = "{file}: {texts_in_training} of {texts} evaluation texts share a sentence with the training text"
        rest = f" ({{sentences_in_training}} of {{sentences}} sentences of {SHORTEST} letters or more)"
        yield counts, (line + rest).format(**counts)


def _texts(path: Path) -> Iterator[str]:
    """Each context of a SQuAD file, each row of a table or of JSON lines, its cells a line each."""
    refuse_pointer(path)
    try:
        if path.suffix == ".json":
            yield from _contexts(json.loads(path.read_bytes()))
            return
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            if path.suffix == ".csv":
                rows: Any = csv.reader(file)
            elif path.suffix == ".jsonl":
                rows = (_strings(json.loads(line)) for line in file if line.strip())
            else:
                rows = (line.rstrip("\r\n").split("\t") for line in file)
            yield from map("\n".join, rows)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"evaluation file {path} cannot be read ({error})") from None


def _contexts(value: Any) -> Iterator[str]:
    """The strings called ``context`` anywhere in a JSON value."""
    if isinstance(value, dict):
        if isinstance(value.get("context"), str):
            yield value["context"]
        value = list(value.values())
    if isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_contexts, value))


def _strings(value: Any) -> Sequence[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
