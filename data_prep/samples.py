"""Stage ``samples``: text shards -> HDF5 shards of ``[CLS] A [SEP] B [SEP]``, each sentence pair with its NSP label.

One text shard becomes one HDF5 file. All randomness is keyed by (seed, split, shard, duplicate), so the bytes do
not depend on who makes a shard, nor on kills and reruns.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest, splitmix
from data_prep.errors import DataError
from data_prep.fanout import Job, run_all
from data_prep.hdf5 import Shard, token_dtype, write_shard
from data_prep.pairs import SPECIAL_TOKENS, assemble, draw_pairs, truncate
from data_prep.publish import remove_leftovers
from data_prep.splitmix import Ints
from data_prep.wordpiece import Encoder, Vocabulary, unknown_note

SPLITS = ("train", "test")


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


@dataclass(frozen=True)
class Text:
    """A tokenised text shard: sentences end to end in ``tokens``, cut by ``sentence_offsets [n + 1]``; document d
    begins with sentence ``document_offsets[d]`` and is block ``document_numbers[d]`` of the file."""

    tokens: NDArray[np.uint32]
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
) -> dict[str, Any]:
    """Write ``train-00000.hdf5 …``, ``test-00000.hdf5 …`` and ``manifest.json`` into ``job.out``.

    Each text is paired ``dupe_factor`` times (test text once). Returns the counts of the manifest. Raises
    DataError for a text shard that does not match its manifest, or a vocabulary without special tokens or in another
    case than the text.
    """
    settings = Settings(vocab, seq_len, lowercase, strip_accents, dupe_factor, short_seq_prob, seed)
    vocabulary = Vocabulary.load(vocab)
    vocabulary.check_case(lowercase, vocab)
    source = manifest.read_manifest(shards)
    rows = run_all(
        functools.partial(_make, shards, job.out, settings, vocabulary.sha256),
        source["shards"],
        job.workers,
        lambda done, total: job.say(f"{done} of {total} shards of samples written"),
    )
    value = {
        "format": manifest.FORMAT,
        "seq_len": seq_len,
        "vocab_size": vocabulary.size,
        "vocab_sha256": vocabulary.sha256,
        "seed": seed,
        "special": vocabulary.special,
        "source_manifest": source["manifest_sha256"],
        "shards": rows,
        **{split: _totals([row for row in rows if row["split"] == split], seq_len) for split in SPLITS},
    }
    shares = [(split, *(value[split].get(key, 0) for key in ("unknown_tokens", "text_tokens"))) for split in SPLITS]
    value["notes"] = [line for split, *counts in shares if (line := unknown_note(f"{split} text", *counts))]
    for line in value["notes"]:
        job.say(line)
    return dict(run_all(functools.partial(_finish, job.out), [value], 1)[0])


def make_samples(text: Text, settings: Settings, vocabulary: Vocabulary, source: str, *key: int) -> Shard:
    """All samples of one text, ``settings.dupe_factor`` times, in the order duplicate, document, place.

    ``key`` numbers the shard; with the seed and the duplicate it keys the randomness. ``source`` is the digest of
    the text.
    """
    limit = settings.seq_len - SPECIAL_TOKENS
    keys = np.concatenate([splitmix.key(settings.seed, *key, duplicate) for duplicate in range(settings.dupe_factor)])
    pairs = draw_pairs(text.sentence_offsets, text.document_offsets, limit, settings.short_seq_prob, keys)
    tokens, offsets, b_start = assemble(
        text.tokens.astype(token_dtype(vocabulary.size)),
        truncate(pairs, limit),
        vocabulary.special["cls"],
        vocabulary.special["sep"],
    )
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


def tokenise(content: str, encoder: Encoder, limit: int) -> Text:
    """Encode a text shard (one sentence a line, a blank line after each document).

    Sentences and documents without a token are left out and counted. The names [CLS] and [SEP] in the text itself
    become [UNK], so that every sample has exactly the three special tokens of its form.
    """
    special = encoder.vocabulary.special
    lines = content.removesuffix("\n\n").split("\n")
    tokens, line_offsets = encoder.encode(lines)
    forged = (tokens == special["cls"]) | (tokens == special["sep"])
    tokens = np.where(forged, np.uint32(special["unk"]), tokens)
    blank = np.array([not line for line in lines])
    lengths = np.diff(line_offsets)
    document_of_line = np.cumsum(blank)
    sentences = np.flatnonzero(lengths)
    document_numbers, first = np.unique(document_of_line[sentences], return_index=True)
    documents = int(blank.sum()) + 1
    return Text(
        tokens,
        np.append(line_offsets[sentences], len(tokens)),
        np.append(first, len(sentences)),
        document_numbers,
        {
            "documents": len(document_numbers),
            "documents_without_tokens": documents - len(document_numbers),
            "sentences": len(sentences),
            "sentences_without_tokens": len(lines) - int(blank.sum()) - len(sentences),
            "sentences_over_limit": int((lengths > limit).sum()),
            "text_tokens": len(tokens),
            "unknown_tokens": int((tokens == special["unk"]).sum()),
        },
    )


@functools.lru_cache(maxsize=1)
def _encoder(vocab: Path, _vocab_sha256: str, lowercase: bool, strip_accents: bool) -> Encoder:
    return Encoder(vocab, lowercase, strip_accents)


def _make(shards: Path, out: Path, settings: Settings, vocab_sha256: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One text shard to one HDF5 shard, unless an earlier try finished it."""
    name, split = str(entry["file"]), str(entry["split"])
    path = out / Path(name).with_suffix(".hdf5")
    if split == "test":
        settings = replace(settings, dupe_factor=1)
    recipe = {key: value for key, value in vars(settings).items() if key != "vocab"}
    identity = manifest.identity_of(text=entry["sha256"], vocab=vocab_sha256, file=name, **recipe)
    if (facts := manifest.noted(path, identity)) is not None:
        return facts
    content = (shards / name).read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise DataError(
            f"{shards / name} has SHA-256 {digest[:12]}.., its manifest says {entry['sha256'][:12]}..: "
            "run the shard stage again"
        )
    encoder = _encoder(settings.vocab, vocab_sha256, settings.lowercase, settings.strip_accents)
    text = tokenise(content.decode(), encoder, settings.seq_len - SPECIAL_TOKENS)
    del content
    if not len(text.document_numbers):
        raise DataError(f"{shards / name} holds no text that the vocabulary {settings.vocab} can encode")
    number = int("".join(filter(str.isdigit, Path(name).stem)))
    made = make_samples(text, settings, encoder.vocabulary, digest, SPLITS.index(split), number)
    written = write_shard(path, made)
    facts = {
        "file": path.name,
        "split": split,
        **written,
        **text.facts,
        "random_next": int(made.is_random_next.sum()),
        "full_rows": int((np.diff(made.offsets) == settings.seq_len).sum()),
    }
    manifest.note(path, identity, facts)
    return facts


def _totals(rows: list[dict[str, Any]], seq_len: int) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for row in rows:
        totals.update({key: value for key, value in row.items() if isinstance(value, int)})
    places = max(1, totals["rows"] * seq_len)
    return {"shards": len(rows), **totals, "padding": round(1 - totals["tokens"] / places, 4)}


def _finish(out: Path, value: dict[str, Any]) -> dict[str, Any]:
    manifest.publish_manifest(out, value)
    manifest.remove_notes(out)
    remove_leftovers(out)
    return {key: item for key, item in value.items() if key not in ("shards", "special")}
