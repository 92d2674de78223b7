"""A document of the corpus, the counts of what was left out and why, and the files documents are written to."""

import hashlib
import json
import math
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from data_prep.errors import escaped
from data_prep.publish import publishing

FILE_BYTES = 32_000_000
EXAMPLES = 20
LOST_NAMES = 1000
STOPS = ".!?…।॥۔؟։።។။"  # what ends a sentence before a blank; also Hindi's, Urdu's, Arabic's, Armenian, Amharic …
WIDE_STOPS = "。！？"  # and without one
_quoted = json.encoder.encode_basestring  # what json.dumps calls, without its detours
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `text` holds paragraphs separated by one newline."""

    id: str
    title: str
    source: str
    text: str


def printable(text: str, limit: int = 80) -> str:
    """`text` on one line for a log or an error: control characters shown as ``\\x1b``, cut at `limit`."""
    text = escaped(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plain(text: str) -> str:
    """`text` with single blanks, without control characters, soft hyphens and zero-width spaces."""
    lines = (" ".join(line.split()) for line in CONTROL.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


def content_id(name: str, text: str) -> str:
    """An id that follows the text, not its place: equal texts fall into the same split."""
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@dataclass
class Tally:
    """What a part read: counts by name, what was skipped with up to 20 example titles a reason, and the sentences
    that were left out, by the template or tag in them that has no words. Longer documents than `max_document_mb` are
    skipped."""

    max_document_mb: float = math.inf
    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def limit(self) -> float:
        """Bytes of the longest document."""
        return self.max_document_mb * 1e6

    def skip_too_large(self, title: str) -> None:
        self.skip(f"over max_document_mb ({self.max_document_mb:g})", title)

    def skip(self, reason: str, title: str) -> None:
        """Count one article that gives no document."""
        self.skipped[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(printable(title))

    def add(self, facts: dict[str, Any]) -> None:
        """Add the counts of a later part, given as `facts()`."""
        self.counts.update(facts["counts"])
        self.skipped.update(facts["skipped"])
        self.lost.update(facts["sentences_left_out"])
        for reason, titles in facts["examples"].items():
            known = self.examples.setdefault(reason, [])
            known += titles[: EXAMPLES - len(known)]

    def facts(self) -> dict[str, Any]:
        """As JSON values, names in a fixed order."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "examples": dict(sorted(self.examples.items())),
            "sentences_left_out": dict(sorted(self.lost.items(), key=lambda item: (-item[1], item[0]))[:LOST_NAMES]),
        }


class DocumentFiles:
    """Writes the documents of one part to ``documents-PPPPP.jsonl``, ``documents-PPPPP-0001.jsonl`` … of 32 MB.

    The first file always exists, perhaps empty. A file appears whole or not at all.
    """

    def __init__(self, folder: Path, part: int, tally: Tally) -> None:
        self.folder, self.part, self.tally = folder, part, tally
        self.entries: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "DocumentFiles":
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        self._stack.__exit__(kind, error, trace)

    def write(self, document: Document) -> None:
        """Append one document and count it."""
        row = f'"id": {_quoted(document.id)}, "title": {_quoted(document.title)}, "source": {_quoted(document.source)}'
        line = f'{{{row}, "text": {_quoted(document.text)}}}\n'.encode()
        if self.entries[-1]["bytes"] and self.entries[-1]["bytes"] + len(line) > FILE_BYTES:
            self._close()
            self._open()
        assert self._file is not None
        self._file.write(line)
        self._digest.update(line)
        self.entries[-1]["bytes"] += len(line)
        self.entries[-1]["documents"] += 1
        self.tally.counts["documents"] += 1
        self.tally.counts["words"] += len(document.text.split())
        self.tally.counts["text_bytes"] += len(document.text.encode())

    def _open(self) -> None:
        name = f"documents-{self.part:05d}" + (f"-{len(self.entries):04d}" if self.entries else "") + ".jsonl"
        self._file = self._stack.enter_context(publishing(self.folder / name))
        self._digest = hashlib.sha256()
        self.entries.append({"file": name, "documents": 0, "bytes": 0, "sha256": ""})

    def _close(self) -> None:
        self.entries[-1]["sha256"] = self._digest.hexdigest()
        self._stack.close()
