"""``python -m data_prep.inspect SHARD --sample 17``: one sample in words: what is masked, and which text it is from.

The mask is that of a training with ``--seed``, ``--masked-share`` and ``--max-predictions`` in ``--epoch`` of the data,
counted from 0 (``masking = "dynamic"``). Vocabulary, text shards and documents are looked for where a run has them,
beside the folder of the shard.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.document import printable
from data_prep.errors import DataError, escaped
from data_prep.hdf5 import Shard, read_listed
from data_prep.manifest import SampleSet, load
from data_prep.masking import mask_tokens
from data_prep.publish import file_sha256, open_plain
from data_prep.wordpiece import Vocabulary


def main() -> int:
    options = parser().parse_args()
    try:
        print("\n".join(map(escaped, described(options))))  # tokens and titles are text of others
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m data_prep.inspect", description=__doc__)
    add = options.add_argument
    add("shard", type=Path, help="an HDF5 file of a samples folder")
    add("--sample", type=int, default=0, metavar="N", help="its number in the file, from 0")
    add("--epoch", type=int, default=0, metavar="N", help="pass over the data, from 0")
    add("--seed", type=int, default=42, help="of the training (default: 42)")
    add("--masked-share", type=float, default=0.15, help="train.masked_lm_prob (default: 0.15)")
    add("--masking-unit", choices=("token", "word"), default="token", help="train.masking_unit (default: token)")
    add("--max-predictions", type=int, default=20, help="of the phase (default: 20)")
    add("--vocab", type=Path, metavar="FILE", help="default: vocab/vocab.txt beside the samples folder")
    return options


def described(options: argparse.Namespace) -> Iterator[str]:
    """The lines about a sample. Raises DataError."""
    folder = options.shard.resolve().parent
    split = options.shard.name.partition("-")[0]
    samples = load(folder, split)
    number = next((n for n, shard in enumerate(samples.shards) if shard.path.name == options.shard.name), None)
    if number is None:
        raise DataError(f"{options.shard}: the manifest of {folder} does not list it")
    shard = read_listed(samples, samples.shards[number])
    if not 0 <= options.sample < len(shard.offsets) - 1:
        raise DataError(f"{options.shard} has samples 0 to {len(shard.offsets) - 2}, not {options.sample}")
    vocab = options.vocab or folder.parent / "vocab" / "vocab.txt"
    vocabulary = Vocabulary.load(vocab, any_kind=True)
    if vocabulary.sha256 != samples.vocab_sha256:
        raise DataError(f"{vocab} is not the vocabulary of {folder}: name it with --vocab")
    row = options.sample
    first = sum(each.rows for each in samples.shards[:number])
    tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]].astype(np.int32)
    yield f"sample {row} of {options.shard.name}, number {first + row} of {samples.rows} in the {split} split"
    follows = "a random sentence" if shard.is_random_next[row] else "what follows"
    parts = f"B, from token {shard.b_start[row]} on, is {follows}" if shard.b_start[row] < len(tokens) else "no B"
    yield f"{len(tokens)} of {samples.seq_len} tokens; {parts}"
    yield from masked(samples, tokens, first + row, vocabulary, options)
    yield from origin(folder.parent, samples, shard, row)


def masked(
    samples: SampleSet, tokens: np.ndarray, number: int, vocabulary: Vocabulary, options: argparse.Namespace
) -> Iterator[str]:
    """The tokens as a model sees them, and each predicted place with what it was."""
    special = samples.special
    seen, places, labels = mask_tokens(
        tokens,
        np.array([len(tokens)]),
        np.array([number + options.epoch * samples.rows]),
        seed=options.seed,
        vocab_size=samples.vocab_size,
        special=special,
        masked_lm_prob=options.masked_share,
        max_predictions=options.max_predictions,
        continuing=vocabulary.continuing if options.masking_unit == "word" else None,
    )
    words = vocabulary.tokens
    yield "text:  " + " ".join(words[token] for token in tokens)
    yield f"seen in epoch {options.epoch}, seed {options.seed}:  " + " ".join(words[token] for token in seen)
    for place, label in zip(places.tolist(), labels.tolist(), strict=True):
        kind = "[MASK]" if seen[place] == special["mask"] else "kept" if seen[place] == label else words[seen[place]]
        yield f"  {place:4d}  {words[label]}  ({kind})"


def origin(stages: Path, samples: SampleSet, shard: Shard, row: int) -> Iterator[str]:
    """Title and source of A's document, by its first sentence; what is not there any more is said."""
    text = next((path for path in sorted((stages / "shard").glob("*.txt")) if file_sha256(path) == shard.source), None)
    if text is None:
        yield f"its text shard is not in {stages / 'shard'}"
        return
    sentence = next(block for n, block in enumerate(_blocks(text)) if n == shard.document[row])
    yield f"A is from document {shard.document[row]} of {text.name}, which begins: {printable(sentence, 100)}"
    for path in sorted((stages / "extract").glob("documents-*.jsonl")):
        with open_plain(path) as file:
            for line in file:
                try:
                    document = json.loads(line)
                    words, title, source = (str(document[key]) for key in ("text", "title", "source"))
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise DataError(f"{path} holds a line that is no document of ours") from None
                if " ".join(words.split()).startswith(sentence):
                    yield f"title: {printable(title)}; source: {source} ({path.name})"
                    return
    yield f"its document is not in {stages / 'extract'}"


def _blocks(text: Path) -> Iterator[str]:
    """The first sentence of each document of a text shard."""
    begins = True
    with open(text, encoding="utf-8") as file:
        for line in file:
            if begins and line != "\n":
                yield line.rstrip("\n")
            begins = line == "\n"


if __name__ == "__main__":
    sys.exit(main())
