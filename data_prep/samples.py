"""Stage ``samples``: text shards -> HDF5 shards of ``[CLS] A [SEP] B [SEP]``, each sentence pair with its NSP label.

A text shard becomes one HDF5 file, a large one several: one for each block of whole documents, so that memory does not
grow with the shards nor with the number of duplicates. All randomness is keyed by (seed, split, shard, block,
duplicate), so the bytes do not depend on who makes a block, nor on kills and reruns.
"""

from __future__ import annotations

import functools
import itertools
import mmap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest, splitmix
from data_prep.errors import DataError
from data_prep.fanout import Job, once, run_all
from data_prep.hdf5 import Shard, token_dtype, write_shard
from data_prep.pairs import SPECIAL_TOKENS, assemble, draw_pairs, draw_singles, truncate
from data_prep.splitmix import Ints
from data_prep.wordpiece import Encoder, Vocabulary, unknown_note

SPLITS = ("train", "test")
BLOCK_BYTES = 12_000_000  # of text: with its samples a worker stays below 600 MB
BLOCK_DUPLICATES = 10
CHUNK_BYTES = 1 << 18  # of text


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a shard, besides its text."""

    vocab: Path
    seq_len: int
    lowercase: bool
    strip_accents: bool
    dupe_factor: int
    short_seq_prob: float
    seed: int
    pairs: bool = True

    @property
    def limit(self) -> int:
        """Tokens of text in a sample."""
        return self.seq_len - SPECIAL_TOKENS + (not self.pairs)


@dataclass(frozen=True)
class Block:
    """What one HDF5 file is made from: bytes ``start`` to ``end`` of a text shard, whole documents."""

    file: str
    split: str
    sha256: str  # of the text shard
    number: int  # among the blocks of its shard; the randomness of the first is keyed as if there were no other
    part: int  # among the files of its shard
    start: int
    end: int
    first_document: int
    first_duplicate: int
    duplicates: int

    @property
    def shard(self) -> int:
        return int("".join(filter(str.isdigit, Path(self.file).stem)))

    @property
    def name(self) -> str:
        return f"{Path(self.file).stem}{f'-{self.part:03d}' if self.part else ''}.hdf5"


@dataclass(frozen=True)
class Text:
    """A tokenised text shard: sentences end to end in ``tokens``, cut by ``sentence_offsets [n + 1]``; document d
    begins with sentence ``document_offsets[d]`` and is block ``document_numbers[d]`` of the file."""

    tokens: NDArray[np.unsignedinteger]
    sentence_offsets: Ints
    document_offsets: Ints
    document_numbers: Ints
    facts: dict[str, int]


def run(
    job: Job,
    *,
    shards: Path,
    vocab: Path,
    seq_len: int,
    lowercase: bool,
    strip_accents: bool,
    dupe_factor: int,
    short_seq_prob: float,
    seed: int,
    pairs: bool = True,
) -> dict[str, Any]:
    """Write ``train-00000.hdf5 …``, ``test-00000.hdf5 …`` and ``manifest.json`` into ``job.out``.

    Each text is paired ``dupe_factor`` times (test text once); without ``pairs`` a sample is ``[CLS] A [SEP]``.
    Returns the counts of the manifest. Raises DataError for a text shard that does not match its manifest, or a
    vocabulary without special tokens or in another case than the text.
    """
    settings = Settings(vocab, seq_len, lowercase, strip_accents, dupe_factor, short_seq_prob, seed, pairs)
    vocabulary = Vocabulary.load(vocab)
    vocabulary.check_case(lowercase, vocab)
    source = manifest.read_manifest(shards)
    blocks = [
        Block(**block)
        for row in run_all(functools.partial(_blocks, shards, settings), source["shards"], job.workers)
        for block in row
    ]
    _encoder(vocab, vocabulary.sha256, lowercase, strip_accents)  # once, for all workers that begin as forks
    written = run_all(
        functools.partial(_make, shards, job.out, settings, vocabulary.sha256),
        blocks,
        job.workers,
        lambda done, total: job.say(f"{done} of {total} shards of samples written", done / total),
        [(block.end - block.start) * (2 + block.duplicates) for block in blocks],
    )
    rows = [row for row in written if row["rows"]]
    for name in sorted({block.file for block in blocks}):
        if not any(row["rows"] for block, row in zip(blocks, written, strict=True) if block.file == name):
            raise DataError(f"{shards / name} holds no text that the vocabulary {vocab} can encode")
    return publish_samples(job, vocabulary, rows, manifest.data_sha256(source), seq_len=seq_len, seed=seed, pairs=pairs)


def check(*, vocab: Path, **others: object) -> None:
    """DataError for a vocabulary that is none."""
    Vocabulary.load(vocab)


def publish_samples(
    job: Job, vocabulary: Vocabulary, rows: list[dict[str, Any]], source: str, *, seq_len: int, seed: int, pairs: bool
) -> dict[str, Any]:
    """Write the manifest of the shards ``rows``, which were made from what has the digest ``source``; its counts."""
    value: dict[str, Any] = {
        "format": manifest.FORMAT,
        "seq_len": seq_len,
        "vocab_size": vocabulary.size,
        "vocab_sha256": vocabulary.sha256,
        "seed": seed,
        **({} if pairs else {"pairs": False}),
        "special": vocabulary.special,
        "source_manifest": source,
        "shards": rows,
        **{split: _totals([row for row in rows if row["split"] == split], seq_len) for split in SPLITS},
    }
    shares = [(split, *(value[split].get(key, 0) for key in ("unknown_tokens", "text_tokens"))) for split in SPLITS]
    value["notes"] = [line for split, *counts in shares if (line := unknown_note(f"{split} text", *counts))]
    if long := sum(value[split].get("sentences_over_limit", 0) for split in SPLITS):
        total, form = sum(value[split].get("sentences", 0) for split in SPLITS), f"samples of {seq_len} tokens"
        value["notes"].append(f"{long} of {total} sentences are too long for {form}: cut into pieces, all kept")
    for line in value["notes"]:
        job.say(line)
    once(manifest.finish, job.out, value)
    return {key: item for key, item in value.items() if key not in ("shards", "special")}


def make_samples(
    text: Text, settings: Settings, vocabulary: Vocabulary, source: str, *key: int, duplicates: range | None = None
) -> Shard:
    """All samples of one text for ``duplicates`` (those of the settings), in the order duplicate, document, place.

    ``key`` numbers the shard and block; with the seed and the duplicate it keys the randomness. ``source`` is the
    digest of the text shard.
    """
    limit = settings.limit
    keys = [splitmix.key(settings.seed, *key, number) for number in duplicates or range(settings.dupe_factor)]
    draw = draw_pairs if settings.pairs else draw_singles
    pairs = draw(text.sentence_offsets, text.document_offsets, limit, settings.short_seq_prob, np.concatenate(keys))
    truncated = truncate(pairs, limit) if settings.pairs else pairs
    tokens, offsets, b_start = assemble(text.tokens, truncated, vocabulary.special["cls"], vocabulary.special["sep"])
    return Shard(
        tokens=tokens,
        offsets=offsets,
        b_start=b_start.astype(np.uint16),
        is_random_next=pairs.is_random_next.astype(np.uint8),
        document=text.document_numbers[pairs.document].astype(np.uint32),
        seq_len=settings.seq_len,
        vocab_sha256=vocabulary.sha256,
        seed=settings.seed,
        source=source,
    )


def tokenise(content: bytes, encoder: Encoder, limit: int, first_document: int = 0) -> Text:
    """Encode text of a shard (UTF-8, one sentence a line, a blank line after each document).

    Sentences and documents without a token are left out and counted. The names [CLS] and [SEP] in the text itself
    become [UNK], so that every sample has exactly the three special tokens of its form. A sentence over ``limit``
    tokens is cut into several, so that none of its words is lost to truncation.
    """
    special, dtype = encoder.vocabulary.special, token_dtype(encoder.vocabulary.size)
    parts, at, size = [], 0, len(content) - 2 * content.endswith(b"\n\n")
    while at <= size:  # some lines at a time: their objects and tokens stay in the cache
        end = content.find(b"\n", at + CHUNK_BYTES, size)
        end = size if end < 0 else end
        lines = content[at:end].split(b"\n")
        ids, ends = encoder.encode(lines)
        blank = np.diff(ends) == 0
        blank[blank] = [not lines[number] for number in np.flatnonzero(blank).tolist()]
        parts.append((ids.astype(dtype), np.diff(ends), blank))
        at = end + 1
    tokens, lengths, blank = map(np.concatenate, zip(*parts, strict=True))
    tokens[(tokens == special["cls"]) | (tokens == special["sep"])] = special["unk"]
    document_of_line = np.cumsum(blank)
    sentences = np.flatnonzero(lengths)
    document_numbers, first = np.unique(document_of_line[sentences], return_index=True)
    documents = int(blank.sum()) + 1
    offsets = np.append((np.cumsum(lengths) - lengths)[sentences], len(tokens))
    document_offsets = np.append(first, len(sentences))
    cuts = cut_places(tokens, offsets, limit, encoder.vocabulary.continuing)
    return Text(
        tokens,
        np.insert(offsets, np.searchsorted(offsets, cuts), cuts),
        document_offsets + np.searchsorted(cuts, offsets[document_offsets]),
        document_numbers + first_document,
        {
            "documents": len(document_numbers),
            "documents_without_tokens": documents - len(document_numbers),
            "sentences": len(sentences),
            "sentences_without_tokens": int((~blank).sum()) - len(sentences),
            "sentences_over_limit": int((lengths > limit).sum()),
            "text_tokens": len(tokens),
            "unknown_tokens": int(np.count_nonzero(tokens == special["unk"])),
        },
    )


def cut_places(tokens: NDArray[np.unsignedinteger], offsets: Ints, limit: int, continuing: NDArray[np.bool_]) -> Ints:
    """Where sentences over ``limit`` tokens are cut, ascending places in ``tokens``; before a word where there is one.

    Two pieces together have ``limit`` tokens, so they fill one sample, and one with a random next sentence is kept
    whole as well; a piece of ``limit`` tokens would always get a random next and lose half of itself.
    ``continuing [vocabulary]``: the ids that go on with a word.
    """
    cuts: list[int] = []
    for sentence in np.flatnonzero(np.diff(offsets) > limit).tolist():
        at, end = int(offsets[sentence]), int(offsets[sentence + 1])
        while end - at > (limit + 1) // 2:
            half = at + (limit + 1) // 2
            words = np.flatnonzero(~continuing[tokens[at + 1 : half + 1]])
            middle = at + 1 + int(words[-1]) if len(words) else half
            cuts.append(middle)
            if end - at <= limit:
                break
            words = middle + 1 + np.flatnonzero(~continuing[tokens[middle + 1 : min(middle + limit + 1, end)]])
            at = int(words[min(int(np.searchsorted(words, at + limit)), len(words) - 1)]) if len(words) else at + limit
            cuts.append(at)
    return np.array(cuts, np.int64)


@functools.lru_cache(maxsize=1)
def _encoder(vocab: Path, _vocab_sha256: str, lowercase: bool, strip_accents: bool) -> Encoder:
    return Encoder(vocab, lowercase, strip_accents)


def _blocks(shards: Path, settings: Settings, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Check one text shard against its manifest and cut it, between documents, into what one file is made from."""
    path, size = shards / str(entry["file"]), int(entry["bytes"])
    manifest.verify_file(path, size, str(entry["sha256"]))
    count = max(1, -(-size // BLOCK_BYTES))
    copies = settings.dupe_factor if entry["split"] == "train" else 1
    groups = [(first, min(BLOCK_DUPLICATES, copies - first)) for first in range(0, copies, BLOCK_DUPLICATES)]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        ends = [content.find(b"\n\n", number * size // count) for number in range(1, count)]
        starts = sorted({0, size, *(place + 2 for place in ends if place >= 0)})
        before = (content[a:b].count(b"\n\n") for a, b in itertools.pairwise(starts[:-1]))
        documents = np.cumsum([0, *before]).tolist()
    places = itertools.product(enumerate(itertools.pairwise(starts)), groups)
    return [
        vars(Block(path.name, entry["split"], entry["sha256"], number, part, start, end, documents[number], *group))
        for part, ((number, (start, end)), group) in enumerate(places)
    ]


def _make(shards: Path, out: Path, settings: Settings, vocab_sha256: str, block: Block) -> dict[str, Any]:
    """One block of a text shard to one HDF5 shard, unless an earlier try finished it; no ``rows``: it has no token."""
    path = out / block.name
    recipe = {key: value for key, value in vars(settings).items() if key != "vocab" and (key, value) != ("pairs", True)}
    identity = manifest.identity_of(block=vars(block), vocab=vocab_sha256, **recipe)
    if (facts := manifest.noted(path, identity)) is not None:
        return facts
    with open(shards / block.file, "rb") as file:
        file.seek(block.start)
        content = file.read(block.end - block.start)
    encoder = _encoder(settings.vocab, vocab_sha256, settings.lowercase, settings.strip_accents)
    text = tokenise(content, encoder, settings.limit, block.first_document)
    del content
    if not len(text.document_numbers):
        return {"rows": 0}
    key = (SPLITS.index(block.split), block.shard, *([block.number] if block.number else []))
    copies = range(block.first_duplicate, block.first_duplicate + block.duplicates)
    samples = make_samples(text, settings, encoder.vocabulary, block.sha256, *key, duplicates=copies)
    written = write_shard(path, samples)
    facts = {
        "file": path.name,
        "split": block.split,
        **written,
        # a text that is paired for several files is counted once
        **(text.facts if not block.first_duplicate else dict.fromkeys(text.facts, 0)),
        "random_next": int(samples.is_random_next.sum()),
        "full_rows": int((np.diff(samples.offsets) == settings.seq_len).sum()),
    }
    manifest.note(path, identity, facts)
    return facts


def _totals(rows: list[dict[str, Any]], seq_len: int) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for row in rows:
        totals.update({key: value for key, value in row.items() if isinstance(value, int)})
    places = max(1, totals["rows"] * seq_len)
    return {"shards": len(rows), **totals, "padding": round(1 - totals["tokens"] / places, 4)}
