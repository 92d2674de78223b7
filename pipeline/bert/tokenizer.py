"""The tokenizer of a model folder: what transformers' files say of it is honoured, or refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.publish import as_json
from data_prep.wordpiece import SPECIAL, Encoder, Vocabulary, unknown_note, varied_strings
from pipeline.bert.config import read_object
from pipeline.errors import ConfigError

WHOLE, PLAIN, CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
ADDED, SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
FILES = (WHOLE, PLAIN, CONFIG, ADDED, SPECIAL_MAP)
# What CONFIG may say, the first of each being what it means without a word; others change the ids.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "do_lower_case": (True, False),
    "strip_accents": (None, True, False),
    "tokenize_chinese_chars": (True,),
    "tokenizer_class": (None, "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
}
# What a tokenizer.json must say, by section.
NEEDED = (
    ("pre_tokenizer", "type", "BertPreTokenizer"),
    ("model", "type", "WordPiece"),
    ("model", "unk_token", SPECIAL["unk"]),
    ("model", "continuing_subword_prefix", "##"),
    ("model", "max_input_chars_per_word", 100),
)
LISTS = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "added_tokens")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, vocab.txt or tokenizer.json, and how text is prepared for it."""

    vocab: Path
    lowercase: bool
    strip_accents: bool

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens; DataError."""
        return Vocabulary.load(self.vocab)

    @cached_property
    def encoder(self) -> Encoder:
        """Text -> ids; DataError when the vocabulary is one for text in another case."""
        self.vocabulary.check_case(self.lowercase, self.vocab)
        return Encoder(self.vocab, self.lowercase, self.strip_accents)

    def unknown_note(self, origin: str, tokens: NDArray[Any]) -> str:
        """A line when more than 1 % of the ``tokens`` (ids) of a text are [UNK]; else nothing."""
        return unknown_note(origin, int((tokens == self.vocabulary.special["unk"]).sum()), len(tokens))

    def files(self, max_length: int) -> dict[str, str]:
        """Name and content of what describes it to transformers."""
        described = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": True,
            "model_max_length": max_length,
            **{f"{name}_token": token for name, token in SPECIAL.items()},
        }
        tokens = "".join(f"{token}\n" for token in self.vocabulary.tokens)
        return {PLAIN: tokens, CONFIG: as_json(described)}


@dataclass(frozen=True)
class AnyTokenizer:
    """A tokenizer.json of any kind, kept as it is; by it no text is read."""

    vocab: Path

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens; DataError."""
        return Vocabulary.load(self.vocab, any_kind=True)

    def files(self, max_length: int) -> dict[str, str]:
        """As `Tokenizer.files`."""
        tokens, special = self.vocabulary.tokens, self.vocabulary.special
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            **{f"{name}_token": tokens[number] for name, number in special.items()},
        }
        return {WHOLE: self.vocab.read_text(encoding="utf-8"), CONFIG: as_json(described)}


def read_tokenizer(folder: Path, vocab: Path | None = None, **settings: bool) -> Tokenizer:
    """The tokenizer that lies in ``folder``; ``vocab`` and ``settings`` stand in for its vocabulary and its words.

    As in transformers, tokenizer.json goes before vocab.txt, text is lower-cased unless do_lower_case says otherwise,
    and strip_accents follows it when not given; but a tokenizer.json without do_lower_case beside it decides itself.
    ConfigError when there is no vocabulary; DataError for what this WordPiece cannot honour: other values, other
    special tokens, tokens added to the vocabulary, files that contradict each other.
    """
    chosen = vocab or next((folder / name for name in (WHOLE, PLAIN) if (folder / name).is_file()), None)
    if chosen is None:
        raise ConfigError(f"{folder} holds no {PLAIN} or {WHOLE}: name the one it was trained with by --vocab FILE")
    config = _object(folder / CONFIG) | settings
    for name, allowed in ALLOWED.items():
        value = config.get(name, allowed[0])
        if (type(value), value) not in [(type(one), one) for one in allowed]:
            known = " or ".join(json.dumps(one).strip('"') for one in allowed if one is not None)
            raise DataError(f"{folder / CONFIG}: {name} is {value!r}, not {known}")
    _check_tokens(folder / CONFIG, config)
    _check_tokens(folder / SPECIAL_MAP, _object(folder / SPECIAL_MAP))
    _check_tokens(folder / ADDED, {"added_tokens": list(_object(folder / ADDED))})
    lowercase, strip_accents = config.get("do_lower_case", True), config.get("strip_accents")
    if chosen.suffix == ".json":
        lowercase, strip_accents = _of_whole(chosen, config)
        if (folder / PLAIN).is_file() and (line := difference(folder / PLAIN, chosen)):
            raise DataError(f"{line}; keep the one that belongs to the weights")
    return Tokenizer(chosen, lowercase, lowercase if strip_accents is None else strip_accents)


def difference(theirs: Path, ours: Path) -> str:
    """The first place in which two vocabularies differ, in words; nothing when they are the same."""
    pairs = itertools.zip_longest(Vocabulary.load(theirs).tokens, Vocabulary.load(ours).tokens)
    for number, pair in enumerate(pairs, 1):
        there, here = ("nothing" if token is None else repr(token) for token in pair)
        if there != here:
            return f"{theirs} differs from {ours} in line {number}: {there}, not {here}"
    return ""


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, DataError) if path.exists() else {}


def _check_tokens(path: Path, values: Mapping[str, Any]) -> None:
    """DataError for a token that ``values`` of ``path`` add to the vocabulary or put in place of a special one."""
    for key, value in values.items():
        needed = SPECIAL.get(key.removesuffix("_token"))
        for token in _contents(value) if key in LISTS or key.endswith("_token") else ():
            if needed and token != needed:
                raise DataError(f"{path}: {key} is {token!r}, needed is {needed}")
            if token not in SPECIAL.values():
                raise DataError(f"{path}: {key} adds {token!r}: this tokenizer has no tokens beside its vocabulary")


def _contents(value: Any) -> list[str]:
    """The tokens of an entry: a name, a description with its ``content``, or several of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    return [token for item in value for token in _contents(item)] if isinstance(value, list) else []


def _of_whole(path: Path, config: Mapping[str, Any]) -> tuple[bool, bool]:
    """``(lowercase, strip_accents)`` with which our WordPiece does what a tokenizer.json says; DataError if with none.

    Its normalizer may be anything that makes of many odd strings what a BertNormalizer makes of them.
    """
    from tokenizers import Tokenizer as Theirs
    from tokenizers.normalizers import BertNormalizer

    strings = varied_strings(Vocabulary.load(path).tokens)
    try:
        theirs = Theirs.from_file(str(path))
        values = json.loads(theirs.to_str())
    except Exception as error:  # tokenizers raises nothing more exact
        raise DataError(f"{path} is no tokenizer.json: {error}") from error
    _check_tokens(path, values)
    for section, name, needed in NEEDED:
        if (value := (values[section] or {}).get(name)) != needed:
            raise DataError(f"{path}: {section} has {name} {value!r}, needed is {needed!r}")
    for lowercase, strip_accents in itertools.product((True, False), repeat=2):
        ours = BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        if theirs.normalizer and all(theirs.normalizer.normalize_str(x) == ours.normalize_str(x) for x in strings):
            break
    else:
        raise DataError(f"{path}: no BertNormalizer does what its normalizer does: {str(values['normalizer'])[:200]}")
    for name, value in (("do_lower_case", lowercase), ("strip_accents", strip_accents)):
        if config.get(name) not in (None, value):
            raise DataError(f"{path} has {name} {value}, {CONFIG} beside it {config[name]}: make them agree")
    return lowercase, strip_accents
