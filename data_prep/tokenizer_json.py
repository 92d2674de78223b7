"""A ``tokenizer.json`` of any kind: its tokens by id, and which of them are special."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import DataError

SPELLINGS = {  # of others, each a token's name in a tokenizer.json of any kind
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>", "[BOS]", "<bos>"),
    "sep": ("[SEP]", "<sep>", "</s>", "[EOS]", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}


def tokens_of(path: Path) -> list[str]:
    """The tokens of a tokenizer.json of any kind by id, added ones included."""
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises nothing more exact
        raise DataError(f"{path} is no tokenizer.json: {error}") from None
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise DataError(f"{path}: its {len(tokens)} tokens do not have the ids 0 to {len(tokens) - 1}")
    return tokens


def special_of(path: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """The ids of pad and mask, and of unk, cls and sep where they are there; DataError without the first two."""
    special = {name: next((ids[s] for s in spelled if s in ids), None) for name, spelled in SPELLINGS.items()}
    if missing := [" or ".join(SPELLINGS[name]) for name in ("pad", "mask") if special[name] is None]:
        raise DataError(f"{path} ({len(ids)} tokens) lacks {', '.join(missing)}: add it to the tokenizer")
    return {name: number for name, number in special.items() if number is not None}
