"""`data.tokens`: any alphabet with its own tokenizer.json, here amino acids: 33 tokens, samples of up to 1,024."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from data_prep import tokens
from data_prep.errors import DataError
from data_prep.hdf5 import read_listed
from data_prep.manifest import load_verified
from data_prep.wordpiece import Vocabulary
from pipeline.run.rundir import RunDir
from support.running import one_line, submit

pytestmark = [pytest.mark.slow]

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
ALPHABET = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<null_1>", "<mask>"]
LENGTH = 1024
RECIPE = f"""name = "proteins"
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = {LENGTH}
[data]
tokens = "proteins"
test_fraction = 0.2
[train]
objective = "mlm"
precision = "fp32"
eval_samples = 8
[optimizer]
name = "adamw"
[phase1]
seq_len = {LENGTH}
max_predictions = 154
global_batch = 4
micro_batch = 2
learning_rate = 1e-3
warmup = 0.1
steps = 3
"""


def write_tokenizer(path: Path, alphabet: list[str] = ALPHABET) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(alphabet)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    """Of lengths from nothing to three samples; the first is too short to be masked."""
    draw = np.random.default_rng(0)
    lengths = [0, 2, 3, 1022, 1023, 3000, *draw.integers(30, 1500, 50).tolist()]
    return ["".join(draw.choice(list(LETTERS[:20]), length)) for length in lengths]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, sequences: list[str]) -> Path:
    """Each quarter of the sequences in another form."""
    folder = tmp_path_factory.mktemp("tokens") / "proteins"
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json")
    numbers = {letter: n for n, letter in enumerate(ALPHABET)}
    ids = [[numbers[letter] for letter in sequence] for sequence in sequences]
    with h5py.File(folder / "a.h5", "w") as file:  # padded, and with what stands around them
        rows = np.full((14, 3100), numbers["<pad>"], np.int16)
        for row, own in zip(rows, ids[:14], strict=True):
            row[: len(own) + 2] = [numbers["<cls>"], *own, numbers["<eos>"]]
        file.create_dataset("input_ids", data=rows, compression="gzip")
    with h5py.File(folder / "b.hdf5", "w") as file:
        file["input_ids"] = np.concatenate(ids[14:28])
        file["offsets"] = np.cumsum([0, *map(len, ids[14:28])])
    parquet.write_table(pa.table({"name": ["x"] * 14, "input_ids": ids[28:42]}), folder / "c.parquet")
    lines = [{"text": sequence} for sequence in sequences[42:49]] + [{"input_ids": row} for row in ids[49:]]
    (folder / "d.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "e.parquet")
    (folder / "notes.txt").write_text("LAGV")
    (folder / "._d.jsonl").write_bytes(bytes(9))
    return folder.parent


@pytest.fixture(scope="module")
def run(data: Path) -> RunDir:
    (data / "proteins.toml").write_text(RECIPE)
    done = submit(data / "run", data, "--recipe", data / "proteins.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 56 sequences are too short to be masked: left out" in done.stdout
    assert "1 files without sequences by their names, left out: notes.txt" in done.stdout
    return RunDir(data / "run")


def test_samples_are_the_sequences_cut_as_little_as_can_be(run, sequences) -> None:
    limit, found, texts = LENGTH - 2, Counter(), {}
    for split in ("train", "test"):
        samples, texts[split] = load_verified(run.stage(f"samples_{LENGTH}").path, split), set()
        assert samples.special == {"pad": 1, "unk": 3, "cls": 0, "sep": 2, "mask": 32}
        for listed in samples.shards:
            shard = read_listed(samples, listed)
            for start, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
                first, *own, last = shard.tokens[start:end].tolist()
                assert (first, last) == (0, 2)
                found["".join(ALPHABET[n] for n in own)] += 1
            texts[split] |= {(listed.path.name[-10:], number) for number in shard.document.tolist()}
    wanted = Counter()
    for sequence in sequences:
        count = -(-len(sequence) // limit)
        pieces = [len(part) for part in np.array_split(range(len(sequence)), count or 1)]
        ends = np.cumsum([0, *pieces])
        wanted.update(sequence[a:b] for a, b in itertools.pairwise(ends) if len(sequence) >= 3)
    assert found == wanted
    assert not texts["train"] & texts["test"]  # all of a sequence is held out, or nothing
    assert len(texts["test"]) > 4


def test_transformers_loads_model_and_tokenizer(run) -> None:
    folder = run.stage("export").path / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert model.config.vocab_size == len(ALPHABET)
    given = tokenizer("LAG<mask>V", return_tensors="pt")
    assert given["input_ids"].tolist() == [[4, 5, 6, 32, 7]]
    with torch.no_grad():
        assert model(**given).logits.shape == (1, 5, 33)
    assert "* proteins" in (run.path / "model" / "README.md").read_text()
    fill = transformers.pipeline("fill-mask", model=str(folder))
    assert len(fill(fill.tokenizer.mask_token)) == 5  # what the card says


def test_training_goes_on_from_the_model(run, data) -> None:
    (data / "model").symlink_to(run.stage("export").path / "model")
    done = submit(data / "more", data, "--recipe", data / "proteins.toml", "--set", 'phase1.start="model"')
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([4, 5, 6, 32], "sequence 1 (from 0) has the id of [MASK]"),
        ([4, 5, 1, 6], "sequence 1 (from 0) has the id of [PAD] inside"),
        ([4, 5, 33, 6], "sequence 1 (from 0) has an id outside the vocabulary of 33"),
        ([4, 5, 6.5, 6], "sequence 1 (from 0) has no list of ids and no text"),
        ("LAGV", "sequence 1 (from 0) has no list of ids and no text"),
        (None, "sequence 1 (from 0) has no list of ids and no text"),
    ],
)
def test_what_is_no_sequence_is_refused(tmp_path, ids, fault) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    values = [{"input_ids": row} for row in ([4, 5, 6, 7], ids)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values))
    with pytest.raises(DataError) as raised:
        tokens._make(tmp_path, tmp_path / "tokenizer.json", 16, 0.5, 1, (0, tmp_path / "a.jsonl"))
    assert fault in str(raised.value)


def test_an_alphabet_needs_mask_and_pad_alone(tmp_path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json", ["A", "C", "[PAD]", "[MASK]"])
    assert Vocabulary.load(tmp_path / "tokenizer.json", any_kind=True).special == {"pad": 2, "mask": 3}
    (tmp_path / "a.jsonl").write_text('{"input_ids": [0, 1, 0, 1, 1, 0, 0]}\n')
    made = tokens._make(tmp_path, tmp_path / "tokenizer.json", 16, 1e-9, 1, (0, tmp_path / "a.jsonl"))
    assert [row["tokens"] for row in made["shards"]] == [7]  # nothing stands around them
    write_tokenizer(tmp_path / "tokenizer.json", ["A", "C", "[PAD]"])
    with pytest.raises(DataError, match=r"lacks \[MASK\] or <mask>"):
        Vocabulary.load(tmp_path / "tokenizer.json", any_kind=True)


def test_what_needs_texts_is_refused_at_once(data) -> None:
    recipe = RECIPE.replace('"mlm"', '"mlm+nsp"').replace("tokens =", 'vocab = "vocab.txt"\ntokens =')
    (data / "wrong.toml").write_text(recipe + "[inference]\n")
    done = submit(data / "wrong", data, "--recipe", data / "wrong.toml")
    for words in ("inference goes with texts", "vocab goes with texts", 'train.objective = "mlm"'):
        one_line(done, 2, words)


def test_letters_that_the_tokenizer_does_not_know_are_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    lines = [{"text": f"lagvlagv{'LAGV' * number}"} for number in range(1, 40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    job = SimpleNamespace(out=tmp_path / "out", workers=1, say=lambda line, share=None: said.append(line))
    job.out.mkdir()
    facts = tokens.run(job, source=tmp_path, vocab=tmp_path / "tokenizer.json", seq_len=512, test_fraction=0.3, seed=1)
    assert sum(facts[split]["unknown_tokens"] for split in ("train", "test")) == 39 * 8
    assert sum(facts[split]["text_tokens"] for split in ("train", "test")) == sum(8 + 4 * n for n in range(1, 40))
    assert any("are [UNK]" in line for line in said)
