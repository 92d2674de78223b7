"""Ids equal transformers' and the reference's; a trained vocabulary is the same bytes in every process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import wordpiece
from data_prep.errors import DataError
from data_prep.manifest import file_entry, publish_manifest
from data_prep.wordpiece import SPECIAL, Encoder, Vocabulary, varied_strings

REPOSITORY = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text())


def vocab_file(path: Path, tokens: list[str]) -> Path:
    path.write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def vocab(carriers: Path) -> Path:
    """The vocabulary of bert-base-uncased."""
    return carriers / "minilm" / "vocab.txt"


@pytest.fixture(scope="module")
def english(vocab: Path) -> Encoder:
    return Encoder(vocab, True, True)


@pytest.fixture(scope="module")
def paragraphs(sample_dir: Path) -> list[str]:
    with open(sample_dir / "boolq.jsonl") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(1500), strict=False)]


@pytest.mark.parametrize("backend", ["nanotoken", "tokenizers"])
def test_golden_vectors(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "tokenizers":
        monkeypatch.setitem(sys.modules, "nanotoken", None)
    encoder = Encoder(vocab_file(tmp_path / "vocab.txt", GOLDEN["vocab"]), True, True)
    assert encoder.backend == backend
    for sample in GOLDEN["samples"]:
        assert encoder.tokens(sample["text"]) == sample["tokens"], sample["text"]


@pytest.mark.parametrize(("lowercase", "strip_accents"), [(True, True), (False, False), (True, False)])
def test_ids_equal_transformers_on_real_text(
    vocab: Path, paragraphs: list[str], lowercase: bool, strip_accents: bool
) -> None:
    from transformers import BertTokenizer

    ours = Encoder(vocab, lowercase, strip_accents)
    theirs = BertTokenizer(str(vocab), do_lower_case=lowercase, strip_accents=strip_accents)
    assert ours.backend == "nanotoken"
    ids, offsets = ours.encode(paragraphs)
    expected = theirs(paragraphs, add_special_tokens=False)["input_ids"]
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())] == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_all_backends_agree_on_any_text(english: Encoder, text: str) -> None:
    slow = english._encode_slowly([text, "a"])
    for encode in (english.encode, english._encode_by_words):
        for ids, offsets in (encode([text, "a"]), encode([text.encode(), b"a"])):
            assert np.array_equal(ids, slow[0])
            assert np.array_equal(offsets, slow[1])


def test_words_are_remembered_and_forgotten_in_time(
    english: Encoder, paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordpiece, "KNOWN_WORDS", 3000)
    texts = [
        *paragraphs[:200],
        *varied_strings(english.vocabulary.tokens),
        *SPECIAL.values(),
        "x\u2028 y [MASK]. [SEP]",
    ]
    slow = english._encode_slowly(texts)
    for start in range(0, len(texts), 40):
        ids, _ = english._encode_by_words(texts[start : start + 40])
        assert np.array_equal(ids, slow[0][slow[1][start] : slow[1][min(start + 40, len(texts))]])
        assert len(english._known) < 6000


def test_an_unequal_nanotoken_is_not_used(vocab: Path, english: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    import nanotoken

    assert english.backend == "nanotoken"
    honest = nanotoken.Tokenizer.encode_batch

    def wrong(self: Any, texts: list[str], **keywords: Any) -> Any:
        return honest(self, [text.replace("é", "x") for text in texts], **keywords)

    monkeypatch.setattr(nanotoken.Tokenizer, "encode_batch", wrong)
    encoder = Encoder(vocab, True, True)
    assert encoder.backend == "tokenizers"
    assert encoder.tokens("Café") == ["cafe"]


def test_accents_and_case_are_kept_when_asked(tmp_path: Path) -> None:
    path = vocab_file(tmp_path / "vocab.txt", [*SPECIAL.values(), "Österreich", "osterreich", "österreich"])
    assert Encoder(path, False, False).tokens("Österreich") == ["Österreich"]
    assert Encoder(path, True, False).tokens("Österreich") == ["österreich"]
    assert Encoder(path, True, True).tokens("Österreich") == ["osterreich"]


def test_an_empty_list_and_empty_texts(english: Encoder) -> None:
    for encode in (english.encode, english._encode_slowly, english._encode_by_words):
        for texts in ([], [""], ["", "the", " "]):
            ids, offsets = encode(texts)
            assert ids.dtype == np.uint32
            assert offsets.dtype == np.int64
            assert offsets.tolist() == [0, 0, 1, 1][: len(texts) + 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\nthe\n", r"vocab\.txt \(4 lines\) lacks \[SEP\], \[MASK\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nof\nthe\n", r"vocab\.txt has 'the' twice, in lines 6 and 8"),
        (b"[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\n", r"vocab\.txt line 3 is empty"),
        (b"[PAD]\n\xff\n", r"vocab\.txt is not UTF-8 \(byte 6\)"),
        (b"", r"vocab\.txt line 1 is empty"),
    ],
)
def test_a_bad_vocabulary_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Vocabulary.load(path)
    with pytest.raises(DataError, match="does not exist"):
        Vocabulary.load(tmp_path / "other.txt")


def test_line_numbers_are_ids(tmp_path: Path) -> None:
    tokens = ["a\u2028b", *SPECIAL.values(), "x"]
    for content in ("\n".join(tokens), "\n".join(tokens) + "\n", "\r\n".join(tokens) + "\r\n"):
        (tmp_path / "vocab.txt").write_bytes(content.encode())
        vocabulary = Vocabulary.load(tmp_path / "vocab.txt")
        assert vocabulary.tokens == tuple(tokens)
        assert vocabulary.special == {"pad": 1, "unk": 2, "cls": 3, "sep": 4, "mask": 5}
        assert vocabulary.size == 7


def text_shards(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    entries = []
    for number, part in enumerate((texts[::2], texts[1::2], ["only in the test part: " + "qxq " * 50])):
        path = folder / f"{'test' if number == 2 else 'train'}-{number % 2:05d}.txt"
        path.write_text("\n\n".join(part) + "\n\n")
        entries.append({**file_entry(path), "split": path.name.split("-")[0]})
    publish_manifest(folder, {"shards": entries})
    return folder


PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from data_prep import wordpiece
job = SimpleNamespace(out=Path(sys.argv[2]), workers=1, say=print)
wordpiece.run(job, shards=Path(sys.argv[1]), vocab_size=int(sys.argv[3]), lowercase=True, strip_accents=True)
"""


def trained(shards: Path, out: Path, size: int, **environment: str) -> bytes:
    out.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(shards), str(out), str(size)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment})
    return (out / "vocab.txt").read_bytes()


def test_training_gives_the_same_bytes_in_every_process(tmp_path: Path, paragraphs: list[str]) -> None:
    shards = text_shards(tmp_path / "shards", [*paragraphs[:300], "Ünïcödé ¿qué? “дом” 中文 Ω‽ naïve𝒳"])
    one = trained(shards, tmp_path / "one", 3000, PYTHONHASHSEED="1", RAYON_NUM_THREADS="1")
    two = trained(shards, tmp_path / "two", 3000, PYTHONHASHSEED="2", RAYON_NUM_THREADS="2")
    assert one == two
    tokens = one.decode().split("\n")
    assert tokens[:5] == list(SPECIAL.values())
    assert len(tokens) == 3001
    assert "qxq" not in tokens
    assert {"the", "because", "##ing"} <= set(tokens)
    vocabulary = Vocabulary.load(tmp_path / "one" / "vocab.txt")
    ids, _ = Encoder(tmp_path / "one" / "vocab.txt", True, True).encode(paragraphs[300:])
    assert (ids == vocabulary.special["unk"]).mean() < 0.002


def test_the_vocabulary_is_made_from_all_documents_and_by_any_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the text is read: every source must be among it, also the last third of every shard."""
    texts = [f"{('early', 'middle', 'late')[number // 400]} words {number}" for number in range(1200)]
    shards = text_shards(tmp_path / "shards", texts)
    size = sum(path.stat().st_size for path in shards.glob("train-*"))
    monkeypatch.setattr(wordpiece, "TRAINING_TEXT_MB", size / 1e7)
    made = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        out.mkdir()
        job = SimpleNamespace(out=out, workers=workers, say=print)
        wordpiece.run(job, shards=shards, vocab_size=120, lowercase=True, strip_accents=True)
        made.append((out / "vocab.txt").read_text())
        assert [path.name for path in out.iterdir()] == ["vocab.txt"]
    assert made[0] == made[1]
    assert {"early", "middle", "late"} <= set(made[0].split("\n"))
    chosen = wordpiece._choose(
        shards, tmp_path, 0.1, {"lowercase": True, "strip_accents": True}, {"file": "train-00000.txt"}
    )
    assert 0.05 < Path(chosen["file"]).stat().st_size / (shards / "train-00000.txt").stat().st_size < 0.15


def test_a_small_text_says_that_the_vocabulary_is_smaller(tmp_path: Path) -> None:
    shards = text_shards(tmp_path / "shards", ["A few words, few of them twice."] * 4)
    said: list[str] = []

    class SayingJob:
        out, workers, say = tmp_path, 1, said.append

    facts = wordpiece.run(SayingJob(), shards=shards, vocab_size=5000, lowercase=True, strip_accents=True)
    assert facts["vocab_size"] == len((tmp_path / "vocab.txt").read_text().splitlines()) < 100
    assert facts["asked"] == 5000
    assert f"only {facts['vocab_size']} of the 5000" in said[0]


def test_the_self_check_is_varied() -> None:
    strings = varied_strings(["the", "##s"])
    assert len(strings) == 400
    assert strings == varied_strings(["the", "##s"])
    assert len({character for text in strings for character in text}) > 300


def test_a_tokenizer_of_another_kind_is_no_wordpiece(tmp_path: Path) -> None:
    ids = {token: number for number, token in enumerate([*SPECIAL.values(), "the"])}
    for kind in ("WordPiece", "BPE"):
        (tmp_path / "a.json").write_text(json.dumps({"model": {"type": kind, "vocab": ids}}))
        if kind == "BPE":
            with pytest.raises(DataError, match="holds no WordPiece vocabulary"):
                Vocabulary.load(tmp_path / "a.json")
        else:
            assert Vocabulary.load(tmp_path / "a.json").size == 6
