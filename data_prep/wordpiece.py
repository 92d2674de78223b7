"""WordPiece: the vocabulary file, text -> ids, and stage ``vocab``, which trains a vocabulary from the shards."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest
from data_prep.errors import DataError, refuse_pointer
from data_prep.fanout import Job, once, run_all
from data_prep.publish import publish_bytes, publishing, remove_leftovers
from data_prep.tokenizer_json import special_of, tokens_of

Ragged = tuple[NDArray[np.uint32], NDArray[np.int64]]
Texts = Sequence[str] | Sequence[bytes]  # bytes are UTF-8, which nanotoken takes faster
Encode = Callable[[Texts], Ragged]
Case = dict[str, bool]  # how text is normalised: lowercase, strip_accents

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_ASCII_PARTS = re.compile(r"[0-9A-Za-z]+|[^0-9A-Za-z]")
KNOWN_WORDS = 1_000_000  # about 200 MB
TRAINING_TEXT_MB = 200  # enough for a vocabulary of 30,000; documents chosen by hash from all training shards
ALPHABET_COVERAGE = 0.9999  # share of the characters of the text that get a piece of their own; the rest become [UNK]
CAPITALS = 0.05
"""Share of words with capitals above which a vocabulary is not one for lower-cased text; bert-base-uncased has none."""
UNKNOWN = 0.01  # share of [UNK] in a text that is worth a line


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary: place (from 0) = id. ``special`` maps pad, unk, cls, sep, mask to ids; one of any kind may have no
    other of these than pad and mask.

    ``sha256`` is that of the tokens, a line each: a BOM, line ends and the file's format are no difference.
    """

    tokens: tuple[str, ...]
    sha256: str
    special: dict[str, int]

    @property
    def size(self) -> int:
        """Number of tokens, before any padding of the model's matrix."""
        return len(self.tokens)

    @functools.cached_property
    def continuing(self) -> NDArray[np.bool_]:
        """``[size]`` whether a piece goes on with a word (``##s``)."""
        return np.array([token.startswith("##") for token in self.tokens])

    @classmethod
    def load(cls, path: Path, *, any_kind: bool = False) -> Vocabulary:
        """Read a ``vocab.txt`` or the WordPiece of a ``tokenizer.json``; with ``any_kind`` any ``tokenizer.json``.

        DataError for a special token or line that is missing, double, or not UTF-8.
        """
        if path.exists() and not path.is_file():
            raise DataError(f"vocabulary {path} is no regular file")
        try:
            refuse_pointer(path)
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"vocabulary {path} does not exist") from None
        except UnicodeDecodeError as error:
            raise DataError(f"vocabulary {path} is not UTF-8 (byte {error.start})") from None
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        if path.suffix == ".json":
            lines = tokens_of(path) if any_kind else _tokens_of_json(path, text)
        ids: dict[str, int] = {}
        for number, token in enumerate(lines):
            if not token:
                raise DataError(f"vocabulary {path} line {number + 1} is empty")
            if token in ids:
                raise DataError(f"vocabulary {path} has {token!r} twice, in lines {ids[token] + 1} and {number + 1}")
            ids[token] = number
        if any_kind and path.suffix == ".json":
            special = special_of(path, ids)
        elif missing := [token for token in SPECIAL.values() if token not in ids]:
            raise DataError(
                f"vocabulary {path} ({len(lines)} lines) lacks {', '.join(missing)}: a BERT vocabulary has "
                f"{' '.join(SPECIAL.values())}, each on its own line"
            )
        else:
            special = {name: ids[token] for name, token in SPECIAL.items()}
        return cls(tuple(lines), hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest(), special)

    def check_case(self, lowercase: bool, origin: Path) -> None:
        """DataError when text is lower-cased, but more than `CAPITALS` of the words are written with capitals."""
        words = [token for token in self.tokens if token.lower() != token.upper() and token[0] != "["]
        capitals = sum(word != word.lower() for word in words)
        if lowercase and capitals > CAPITALS * len(words):
            raise DataError(
                f"vocabulary {origin}: {capitals} of {len(words)} words have capitals and would never be met, since "
                "text is lower-cased: switch lower-casing off (data.lowercase = false, of a model do_lower_case in its "
                "tokenizer_config.json), or take the uncased vocabulary"
            )


def unknown_note(origin: str, unknown: int, tokens: int) -> str:
    """A line when more than `UNKNOWN` of the tokens of a text are [UNK]; else nothing."""
    if unknown <= UNKNOWN * tokens:
        return ""
    return (
        f"{origin}: {unknown} of {tokens} tokens ({unknown / tokens:.1%}) are [UNK]: does the vocabulary belong to "
        "this text, its case and its accents?"
    )


def _tokens_of_json(path: Path, text: str) -> list[str]:
    """The tokens of a tokenizer.json by id, which must count from 0."""
    try:
        model = json.loads(text)["model"]
        ids: dict[str, int] = model["vocab"]
        tokens = sorted(ids, key=ids.__getitem__)
        counted = [ids[token] for token in tokens] == list(range(len(tokens)))
        whole = counted and model.get("type") in (None, "WordPiece")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path} holds no WordPiece vocabulary (model.vocab: each token with its id, from 0 on)")
    return tokens


class Encoder:
    """Text -> WordPiece ids, the same as transformers' BertTokenizer without [CLS] and [SEP].

    Uses nanotoken when it is installed and passes a self-check against ``tokenizers`` on this very vocabulary,
    else ``tokenizers`` with a memory of words; ``backend`` says which.
    """

    def __init__(self, vocab_path: Path, lowercase: bool, strip_accents: bool) -> None:
        self.vocabulary = Vocabulary.load(vocab_path)
        self._tokenizer = _tokenizer(self.vocabulary, lowercase, strip_accents)
        fast = self._nanotoken()
        self._encode: Encode = fast or self._encode_by_words
        self._known: dict[str, tuple[int, ...]] = {}
        self.backend = "nanotoken" if fast else "tokenizers"

    def encode(self, texts: Texts) -> Ragged:
        """Ids of all texts end to end (uint32 ``[T]``) and where each begins (int64 ``[len(texts) + 1]``)."""
        return self._encode(texts)

    def tokens(self, text: str) -> list[str]:
        """The pieces of ``text``, continuing ones with ``##``."""
        ids, _ = self._encode([text])
        return [self.vocabulary.tokens[number] for number in ids.tolist()]

    def _encode_slowly(self, texts: Sequence[str]) -> Ragged:
        # not encode_batch, which leaves threads behind: workers begin as forks only where there are none
        rows = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return np.fromiter(itertools.chain.from_iterable(rows), np.uint32), np.cumsum([0, *map(len, rows)])

    def _encode_by_words(self, texts: Texts) -> Ragged:
        """As ``_encode_slowly``; each word between blanks (U+0020, which BERT never joins over) is encoded once."""
        parts = [self._by_words(texts[start : start + 4096]) for start in range(0, len(texts), 4096)]
        lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in parts)])
        return np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in parts)]), np.cumsum(lengths)

    def _by_words(self, texts: Texts) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts end to end, and how many each has."""
        rows = [(text if isinstance(text, str) else text.decode()).split(" ") for text in texts]
        words = list(itertools.chain.from_iterable(rows))
        if len(self._known) > KNOWN_WORDS:
            self._known.clear()
        self._learn(set(words).difference(self._known))
        pieces = list(map(self._known.__getitem__, words))
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.uint32)
        ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))])
        return ids, np.diff(ends[np.cumsum([0, *map(len, rows)])])

    def _learn(self, words: set[str]) -> None:
        """Encode new words; those of ASCII by their parts between punctuation, where BERT cuts: they recur."""
        cut = {
            word: _ASCII_PARTS.findall(word)
            for word in words
            if word.isascii() and word.isprintable() and "[" not in word  # which may begin a special token
        }
        plain = words.difference(cut).union(*cut.values()).difference(self._known)
        new = list(plain)
        for start in range(0, len(new), 10_000):
            some = new[start : start + 10_000]
            encoded = self._tokenizer.encode_batch_fast(some, add_special_tokens=False)
            self._known.update(zip(some, (tuple(encoding.ids) for encoding in encoded), strict=True))
        for word, parts in cut.items():
            if len(parts) != 1:
                self._known[word] = tuple(itertools.chain.from_iterable(map(self._known.__getitem__, parts)))

    def _nanotoken(self) -> Encode | None:
        try:
            import nanotoken

            tokenizer = nanotoken.Tokenizer.from_json(self._tokenizer.to_str())

            def encode(texts: Texts) -> Ragged:
                ragged = tokenizer.encode_batch(texts, add_special_tokens=False, parallel=False)
                return ragged.ids, ragged.offsets

            sample = varied_strings(self.vocabulary.tokens)
            ids, offsets = encode(sample)
            true_ids, true_offsets = self._encode_slowly(sample)
            same = np.array_equal(ids, true_ids) and np.array_equal(offsets, true_offsets)
        except Exception:  # a young package: whatever is wrong with it, the other one works
            return None
        return encode if same else None


def varied_strings(tokens: Sequence[str], count: int = 400) -> list[str]:
    """Strings that reach the corners of BERT's tokeniser: accents, CJK, controls, long words, odd Unicode."""
    source = random.Random(0)
    alphabets = [
        "abcXYZ .,-'", "éèüößñçÅİıſǅﬁ ", "中文漢字かな한국 a", "\t\n\r\x00\x1c\x7f\x85\xa0\u2028\u200b\u200d\ufeff�",
        "0123456789 .,%$#@_~^|", "́̈̄̃aeouАБВабвΣσς", "अनुच्छेद עברית عربى ไทย", "😀👩‍👩‍👧🏽 x",
    ]  # fmt: skip
    strings = ["", " ", "a" * 99, "a" * 100, "a" * 101, *SPECIAL.values(), "x[MASK]y [mask] [SEP]", "##s", "don't"]
    while len(strings) < count:
        kind = source.randrange(4)
        if kind == 0:
            strings.append("".join(source.choices(source.choice(alphabets), k=source.randrange(40))))
        elif kind == 1:
            strings.append("".join(source.choices("".join(alphabets), k=source.randrange(60))))
        elif kind == 2:
            strings.append("".join(chr(_code_point(source)) for _ in range(source.randrange(20))))
        else:
            words = [source.choice(tokens).removeprefix("##") for _ in range(source.randrange(1, 20))]
            strings.append(source.choice([" ", ""]).join(words).capitalize())
    return strings


def _code_point(source: random.Random) -> int:
    code = source.randrange(1, 0x30000)
    return 0x61 if 0xD800 <= code < 0xE000 else code


def _tokenizer(vocabulary: Vocabulary, lowercase: bool, strip_accents: bool) -> Any:
    from tokenizers import BertWordPieceTokenizer

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    return BertWordPieceTokenizer(ids, lowercase=lowercase, strip_accents=strip_accents)._tokenizer


def run(job: Job, *, shards: Path, vocab_size: int, lowercase: bool, strip_accents: bool) -> dict[str, Any]:
    """Train ``vocab.txt`` on documents of the training shards of folder ``shards``; the same bytes each time.

    The documents are chosen by a hash of their text, so that every source has its share, up to TRAINING_TEXT_MB.
    Returns ``vocab_size`` (lines written; fewer than asked when the text is too small), ``asked`` and ``sha256``.
    """
    entries = [entry for entry in manifest.read_manifest(shards)["shards"] if entry["split"] == "train"]
    manifest.verify(shards, entries, digests=False)
    sizes = [int(entry["bytes"]) for entry in entries]
    share = TRAINING_TEXT_MB * 1e6 / sum(sizes)
    case = {"lowercase": lowercase, "strip_accents": strip_accents}
    choose = functools.partial(_choose, shards, job.out, share, case)
    chosen = run_all(choose, entries, job.workers, None, sizes)
    facts: dict[str, Any] = once(_train, job.out / "vocab.txt", chosen, vocab_size, case)
    if facts["vocab_size"] < vocab_size:
        job.say(f"the text yields only {facts['vocab_size']} of the {vocab_size} vocabulary entries asked for")
    return facts


def _choose(shards: Path, out: Path, share: float, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
    """Write the chosen documents of a shard to a file of its own; say which characters they have, and inside words."""
    counts, inside = np.zeros(0x110000, np.int64), np.zeros(0x110000, bool)
    path = out / f".{entry['file']}.sample.tmp"
    with open(shards / str(entry["file"]), "rb") as file, publishing(path) as sample:
        for document in _paragraphs(file):
            digest = hashlib.blake2b(document, digest_size=8).digest()
            if int.from_bytes(digest, "big") < share * 2.0**64:
                sample.write(document)
    for block in _blocks([path]):
        _count(block, case, counts, inside)
    seen = np.flatnonzero(counts)
    return {
        "file": str(path),
        "counts": {str(code): count for code, count in zip(seen.tolist(), counts[seen].tolist(), strict=True)},
        "inside": np.flatnonzero(inside).tolist(),
    }


def _paragraphs(file: BinaryIO) -> Iterator[bytes]:
    """The documents of a text shard, each with its blank line."""
    lines: list[bytes] = []
    for line in file:
        lines.append(line)
        if line == b"\n":
            yield b"".join(lines)
            lines.clear()
    yield b"".join(lines)


def _train(path: Path, chosen: list[dict[str, Any]], vocab_size: int, case: Case) -> dict[str, Any]:
    counts: Counter[int] = Counter()
    for row in chosen:
        counts.update({int(code): count for code, count in row["counts"].items()})
    alphabet = _alphabet(counts, vocab_size)
    continuing = alphabet & {chr(code) for row in chosen for code in row["inside"]}
    files = [Path(row["file"]) for row in chosen]
    blocks = functools.partial(_blocks, files, 1 << 16)  # the trainer reads 256 of them ahead
    tokens = train(blocks, alphabet, continuing, vocab_size, case)
    publish_bytes(path, "".join(token + "\n" for token in tokens).encode())
    remove_leftovers(path.parent)
    vocabulary = Vocabulary.load(path)
    return {"vocab_size": vocabulary.size, "asked": vocab_size, "sha256": vocabulary.sha256}


def train(
    blocks: Callable[[], Iterator[str]], alphabet: set[str], continuing: set[str], vocab_size: int, case: Case
) -> list[str]:
    """Train a WordPiece vocabulary on the texts of ``blocks()``: tokens by id, the special ones first.

    ``alphabet``: the characters that get a piece of their own; ``continuing``: those of them seen inside a word. The
    trainer of ``tokenizers`` numbers the continuing characters (``##a``) in the order of a hash table, and ties
    between merges are broken by these numbers, so its result differs from run to run. Declaring both alphabets
    beforehand, sorted, makes it a function of the text.
    """
    from tokenizers import BertWordPieceTokenizer

    while True:
        declared = [*SPECIAL.values(), *(f"##{character}" for character in sorted(continuing))]
        tokenizer = BertWordPieceTokenizer(**case)
        tokenizer.train_from_iterator(
            blocks(),
            vocab_size=vocab_size,
            limit_alphabet=len(alphabet),
            initial_alphabet=sorted(alphabet),
            special_tokens=declared,
            show_progress=False,
        )
        ids = tokenizer.get_vocab()
        undeclared = {token[2] for token in ids if len(token) == 3 and token.startswith("##")} - continuing
        if not undeclared:
            return sorted(ids, key=ids.__getitem__)
        # tokenizers' idea of punctuation differs from unicodedata's for a few characters
        continuing = continuing | undeclared


def _alphabet(counts: Mapping[int, int], vocab_size: int) -> set[str]:
    """The most frequent characters: ALPHABET_COVERAGE of the text, and at most half of the vocabulary."""
    frequent = sorted((code for code in counts if not chr(code).isspace()), key=lambda code: (-counts[code], code))
    covered = np.cumsum([counts[code] for code in frequent])
    kept = int(np.searchsorted(covered, ALPHABET_COVERAGE * covered[-1])) + 1 if frequent else 0
    return {chr(code) for code in frequent[: min(kept, max(1, vocab_size // 2))]}


def _count(block: str, case: Case, counts: NDArray[np.int64], inside: NDArray[np.bool_]) -> None:
    """Add the characters of ``block``, as BERT normalises it, to ``counts``; mark those seen inside a word."""
    from tokenizers.normalizers import BertNormalizer

    codes = np.frombuffer(BertNormalizer(**case).normalize_str(block).encode("utf-32-le"), np.uint32)
    in_block = np.bincount(codes)
    counts[: len(in_block)] += in_block
    splits = np.zeros(len(in_block), bool)
    for code in np.flatnonzero(in_block).tolist():
        splits[code] = _splits_words(chr(code))
    inside[codes[1:][~splits[codes[1:]] & ~splits[codes[:-1]]]] = True


def _splits_words(character: str) -> bool:
    """Whether BERT's pre-tokeniser cuts before and after the character: white space and punctuation."""
    if character.isascii():
        return not character.isalnum()
    return character.isspace() or unicodedata.category(character).startswith("P")


def _blocks(files: Sequence[Path], block_bytes: int = 1 << 20) -> Iterator[str]:
    """The text of the files, in blocks that end at a line end."""
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(block_bytes):
                yield (block + file.readline()).decode("utf-8")
