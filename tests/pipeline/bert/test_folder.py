"""A model folder: what transformers writes we read with equal ids and logits, and the other way round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from data_prep.errors import DataError
from data_prep.wordpiece import SPECIAL, Encoder, Vocabulary, unknown_note
from pipeline.bert.config import HUGGING_FACE_ACTIVATIONS, BertConfig, is_padding
from pipeline.bert.folder import ModelFolder, Source, read_folder, write_folder
from pipeline.bert.heads import BertForPreTraining, BertForQuestionAnswering, initialised
from pipeline.bert.packing import pack
from pipeline.bert.tokenizer import Tokenizer, read_tokenizer
from pipeline.bert.weight_files import load_into
from pipeline.bert.weights import load_start
from pipeline.errors import CheckpointError, ConfigError

LETTERS = "abcdeistuABCDESTÄäÖöéèÉßСсйЙиИ"
TOKENS = [*SPECIAL.values(), *LETTERS, *(f"##{x}" for x in LETTERS), *"中文.,-'1[]"]
TOKENS += ["bad", "Bad", "the", "café", "cafe"]
KNOWN = st.sampled_from(LETTERS + " \t\u0301\u0308中文\x00\x7f\u200d.,[]")
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), KNOWN))
SENTENCE = "Bad café, the bad ÄÖÜ 中文"
CASES = [(True, None), (True, True), (True, False), (False, None), (False, True), (False, False)]
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip


def vocab_file(folder: Path, tokens: list[str] = TOKENS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder / "vocab.txt"


def whole(folder: Path, change: Callable[[Any], None] = lambda tokenizer: None, **flags: Any) -> Path:
    """A folder with a tokenizer.json alone, of BERT's tokenizer as ``change`` left it."""
    folder.mkdir(exist_ok=True)
    ids = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = tokenizers.BertWordPieceTokenizer(ids, **flags)._tokenizer
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encoder.encode([text])[0].tolist()
    return ids


# ------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """(ours, theirs) of a folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("theirs")
    lowercase, strip_accents = request.param
    vocab = vocab_file(folder / "vocab")
    theirs = transformers.BertTokenizerFast(str(vocab), do_lower_case=lowercase, strip_accents=strip_accents)
    theirs.save_pretrained(folder / "saved")
    assert sorted(path.name for path in (folder / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return unchecked(read_tokenizer(folder / "saved")), transformers.AutoTokenizer.from_pretrained(folder / "saved")


def unchecked(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` without the check of the vocabulary's case: these vocabularies are for any."""
    tokenizer.__dict__["encoder"] = Encoder(tokenizer.vocab, tokenizer.lowercase, tokenizer.strip_accents)
    return tokenizer


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_ids_equal_those_of_the_tokenizer_that_transformers_saved(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ids_of(ours, text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("lowercase", "strip_accents"), CASES)
def test_ids_equal_transformers_beside_a_vocab_txt(tmp_path: Path, lowercase: bool, strip_accents: bool | None) -> None:
    vocab_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": NUMBER}))
    values = {"do_lower_case": lowercase, "strip_accents": strip_accents}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(SENTENCE, add_special_tokens=False)["input_ids"]
    assert ids_of(unchecked(read_tokenizer(tmp_path)), SENTENCE) == theirs


def sequence(*steps: Any) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        tokenizer.normalizer = normalizers.Sequence(list(steps))

    return change


BERT, LOWER = normalizers.BertNormalizer, normalizers.Lowercase()
AMOUNTING = {
    "plain": (lambda tokenizer: None, (True, True)),
    "one": (sequence(BERT(lowercase=False)), (False, False)),
    "nested": (sequence(normalizers.Sequence([BERT(lowercase=True)])), (True, True)),
    "lower-cased after": (sequence(BERT(lowercase=False, strip_accents=True), LOWER), (True, True)),
    "lower-cased, accents kept": (sequence(BERT(lowercase=False), LOWER), (True, False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", AMOUNTING)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_a_tokenizer_json_alone_decides_on_case_and_accents(
    tmp_path_factory: pytest.TempPathFactory, kind: str, text: str
) -> None:
    change, flags = AMOUNTING[kind]
    folder = whole(tmp_path_factory.getbasetemp() / kind, change, lowercase=True)
    ours = unchecked(read_tokenizer(folder))
    assert (ours.lowercase, ours.strip_accents) == flags
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ids_of(ours, text) == theirs.encode(text, add_special_tokens=False).ids


def model(**values: Any) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        ids = tokenizer.get_vocab()
        tokenizer.model = models.WordPiece(ids, **{"unk_token": "[UNK]", **values})

    return change


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sequence(normalizers.NFD(), LOWER, normalizers.StripAccents()), "StripAccents"),
        (sequence(normalizers.NFKC(), BERT()), "NFKC"),
        (sequence(BERT(handle_chinese_chars=False)), "'handle_chinese_chars': False"),
        (sequence(BERT(clean_text=False)), "'clean_text': False"),
        (attribute("normalizer", None), "its normalizer does: None"),
        (attribute("pre_tokenizer", pre_tokenizers.Whitespace()), "pre_tokenizer has type 'Whitespace'"),
        (attribute("pre_tokenizer", None), "pre_tokenizer has type None"),
        (model(max_input_chars_per_word=50), "max_input_chars_per_word 50, needed is 100"),
        (model(continuing_subword_prefix="@@"), "continuing_subword_prefix '@@', needed is '##'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_tokenizer(whole(tmp_path, change))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


TOKEN = {"content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NUMBER = len(TOKENS)
ADDITIONS: dict[str, tuple[str, Any]] = {
    "added_tokens": ("added_tokens.json", {"<x>": NUMBER}),
    "additional_special_tokens": ("tokenizer_config.json", {"additional_special_tokens": ["<x>"]}),
    "extra_special_tokens": ("tokenizer_config.json", {"extra_special_tokens": {"x_token": "<x>"}}),
    "added_tokens_decoder": ("tokenizer_config.json", {"added_tokens_decoder": {str(NUMBER): TOKEN}}),
    "bos_token": ("tokenizer_config.json", {"bos_token": "<x>"}),
    "special map": ("special_tokens_map.json", {"additional_special_tokens": ["<x>"]}),
    "mask by another name": ("special_tokens_map.json", {"mask_token": TOKEN}),
    "pad by another name": ("tokenizer_config.json", {"pad_token": "<x>"}),
}


@pytest.mark.parametrize("kind", ADDITIONS)
def test_an_added_token_is_refused_by_name_and_one_of_the_five_is_not(tmp_path: Path, kind: str) -> None:
    name, values = ADDITIONS[kind]
    vocab_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": NUMBER}))
    (tmp_path / name).write_text(json.dumps(values))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == NUMBER + 1  # to them it is one more
    with pytest.raises(DataError, match=rf"{name}: \w+ (adds|is) '<x>'"):
        read_tokenizer(tmp_path)
    own = SPECIAL["pad"] if kind.startswith("pad") else SPECIAL["mask"]
    (tmp_path / name).write_text(json.dumps(values).replace("<x>", own))
    assert read_tokenizer(tmp_path) == Tokenizer(tmp_path / "vocab.txt", True, True)
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "[CLS]"}')
    with pytest.raises(DataError, match=r"sep_token is '\[CLS\]', needed is \[SEP\]"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_with_an_added_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: added_tokens adds '<x>'"):
        read_tokenizer(whole(tmp_path, lambda tokenizer: tokenizer.add_tokens(["<x>"])))


@pytest.mark.parametrize("value", [None, "false", "true", 0, 1, [], "no"])
def test_do_lower_case_is_true_or_false_to_every_reader_as_to_transformers(tmp_path: Path, value: Any) -> None:
    vocab_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": NUMBER}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": value}))
    with pytest.raises(TypeError, match="bool"):
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    readers: list[Callable[[Path], Any]] = [
        read_tokenizer,
        lambda folder: ModelFolder(folder).tokenizer,
        lambda folder: load_start(folder, BertConfig(vocab_size=8), folder / "vocab.txt"),
    ]
    saved(tmp_path / "model")
    for read in readers:
        (tmp_path / "model" / "tokenizer.json").unlink(missing_ok=True)
        shutil.copy(tmp_path / "vocab.txt", tmp_path / "model")
        shutil.copy(tmp_path / "tokenizer_config.json", tmp_path / "model")
        with pytest.raises(DataError, match=r"do_lower_case is .*, not true or false"):
            read(tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strip_accents": "yes"}, "strip_accents is 'yes', not true or false"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False, not true"),
        (
            {"tokenizer_class": "BertJapaneseTokenizer"},
            "is 'BertJapaneseTokenizer', not BertTokenizer or",
        ),
        ([], "a JSON object is needed, found list"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, values: Any, words: str) -> None:
    vocab_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(DataError) as error:
        read_tokenizer(tmp_path)
    assert words in str(error.value)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    whole(tmp_path, lowercase=False)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(DataError, match=r"has do_lower_case False, tokenizer_config\.json beside it True"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"strip_accents": true}')
    with pytest.raises(DataError, match="has strip_accents False"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"strip_accents": null, "do_lower_case": false}')
    vocab_file(tmp_path, [*TOKENS[:7], "x", *TOKENS[8:]])
    with pytest.raises(DataError, match="in line 8: 'x', not 'c'; keep the one"):
        read_tokenizer(tmp_path)
    vocab_file(tmp_path)
    assert read_tokenizer(tmp_path) == Tokenizer(tmp_path / "tokenizer.json", False, False)
    with pytest.raises(ConfigError, match=r"holds no vocab\.txt or tokenizer\.json"):
        read_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"[PAD]": 1}}}')
    with pytest.raises(DataError, match="holds no WordPiece vocabulary"):
        read_tokenizer(tmp_path)


def test_the_same_vocabulary_is_the_same_whatever_its_file(tmp_path: Path) -> None:
    plain = Vocabulary.load(vocab_file(tmp_path / "plain"))
    text = "\ufeff" + "\r\n".join(TOKENS)
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    assert Vocabulary.load(tmp_path / "vocab.txt") == Vocabulary.load(whole(tmp_path) / "tokenizer.json") == plain
    assert plain.tokens == tuple(TOKENS)


def test_a_vocabulary_in_another_case_than_the_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    words = [f"{a}{b}ord" for a in "abcdefghij" for b in "klmnopqrst"]
    for capitals, refused in ((0, False), (5, False), (6, True), (100, True)):
        mixed = [word.title() if i < capitals else word for i, word in enumerate(words)]
        tokens = [*SPECIAL.values(), "[unused1]", "7", "中", *mixed]
        vocab_file(tmp_path, tokens)
        Tokenizer(tmp_path / "vocab.txt", False, False).encoder.tokens("x")
        lowered = Tokenizer(tmp_path / "vocab.txt", True, True)
        if refused:
            with pytest.raises(DataError, match=f"{capitals} of 100 words have capitals"):
                lowered.encoder.tokens("x")
        else:
            lowered.encoder.tokens("x")


def test_more_than_one_percent_unknown_is_a_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(vocab_file(tmp_path), False, False)
    assert tokenizer.unknown_note("a.tsv", np.array([1] + [7] * 99)) == ""
    line = tokenizer.unknown_note("a.tsv", np.array([1, 1] + [7] * 98))
    assert line.startswith("a.tsv: 2 of 100 tokens (2.0%) are [UNK]")
    assert unknown_note("empty", 0, 0) == ""


# ------------------------------------------------------------------------------------------ whole folders


def saved(folder: Path, kind: str = "BertForPreTraining", multiple: int = 1, **values: Any) -> Any:
    """A model and a tokenizer as transformers writes them, in ``folder``."""
    config = transformers.BertConfig(vocab_size=NUMBER, **SHAPE, **values)
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(config).eval()
    if multiple > 1:
        theirs.resize_token_embeddings(NUMBER, pad_to_multiple_of=multiple)
    theirs.save_pretrained(folder)
    vocab = vocab_file(folder)
    transformers.BertTokenizerFast(str(vocab), do_lower_case=False).save_pretrained(folder)
    vocab.unlink()
    return theirs


def logits(ours: BertForPreTraining, ids: list[int]) -> torch.Tensor:
    batch = pack(ids, [len(ids)], [len(ids)], 16)
    with torch.no_grad():
        mlm: torch.Tensor = ours.eval()(batch, batch.slot)[0]
    return mlm[:, :NUMBER]


@pytest.mark.parametrize("multiple", [1, 8, 64, 128])
def test_a_table_padded_beyond_the_vocabulary_is_cut_and_goes_out_with_its_real_size(
    tmp_path: Path, multiple: int
) -> None:
    theirs = saved(tmp_path / "theirs", multiple=multiple)
    assert theirs.config.vocab_size == -(-NUMBER // multiple) * multiple
    folder = ModelFolder(tmp_path / "theirs")
    config, rows = folder.config, -(-NUMBER // 8) * 8
    assert (config.vocab_size, len(folder.state["cls.predictions.bias"])) == (rows, rows)
    ours = BertForPreTraining(config)
    load_into(ours, folder.state)
    start = load_start(tmp_path / "theirs", config, folder.tokenizer.vocab)
    assert all(torch.equal(tensor, folder.state[name]) for name, tensor in start.items())

    ids = ids_of(folder.tokenizer, SENTENCE)
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")(SENTENCE).input_ids[1:-1]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).prediction_logits[0, :, :NUMBER]
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-5)

    write_folder(tmp_path / "a", read_folder(tmp_path / "theirs"), folder.tokenizer, card="")
    arrays = {name: tensor.numpy() for name, tensor in ours.state_dict().items()}
    write_folder(tmp_path / "b", Source(config, arrays, "it"), folder.tokenizer, card="")
    for name in ("a", "b"):
        again, report = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.config.vocab_size == len(tokenizer) == NUMBER
        assert tokenizer(SENTENCE).input_ids[1:-1] == ids
        with torch.no_grad():
            found = again.eval()(input_ids=torch.tensor([ids])).prediction_logits[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=200)
@given(size=st.integers(1, 40_000), rows=st.integers(1, 40_200))
def test_a_padding_is_the_next_multiple_of_8_64_or_128(size: int, rows: int) -> None:
    wider = [rows >= size and rows % multiple == 0 and rows - size < multiple for multiple in (8, 64, 128)]
    assert is_padding(rows, size) == any(wider)


def test_a_table_that_is_no_padding_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, multiple=256)
    with pytest.raises(DataError, match=rf"has {NUMBER} tokens and the model beside it 256 rows"):
        _ = ModelFolder(tmp_path).config
    tokenizer = read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="it was trained with another vocabulary"):
        write_folder(tmp_path / "out", read_folder(tmp_path), tokenizer, card="")


def test_a_task_goes_from_transformers_to_us_and_back(tmp_path: Path) -> None:
    """Fine-tuning's way: a new head, saved, and loaded with that head by us and by transformers."""
    saved(tmp_path / "theirs", multiple=64)
    folder = ModelFolder(tmp_path / "theirs")
    model = initialised(BertForQuestionAnswering(folder.config), torch.Generator().manual_seed(1)).eval()
    folder.load_into(model, "qa_outputs.", seed=3)
    folder.save(model, tmp_path / "ours", (), "card")
    again = BertForQuestionAnswering(folder.config).eval()
    ModelFolder(tmp_path / "ours").load_into(again, "qa_outputs.", seed=None)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    batch = pack([2, 7, 9, 3], [4], [2], 8)
    with torch.no_grad():
        first, second = model(batch), again(batch)
        out = theirs(input_ids=torch.tensor([[2, 7, 9, 3]]), token_type_ids=torch.tensor([[0, 0, 1, 1]]))
    for own, other, their in zip(first, second, (out.start_logits, out.end_logits), strict=True):
        assert torch.equal(own, other)
        torch.testing.assert_close(own[:, :4], their, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"no qa_outputs\.\* in it"):
        folder.load_into(again, "qa_outputs.", seed=None)


@pytest.mark.parametrize("name", HUGGING_FACE_ACTIVATIONS)
def test_every_name_of_a_gelu_gives_transformers_logits(tmp_path: Path, name: str) -> None:
    theirs = saved(tmp_path, hidden_act=name)
    folder, ids = ModelFolder(tmp_path), [2, 7, 9, 30, 3]
    ours = BertForPreTraining(folder.config)
    load_into(ours, folder.state)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).prediction_logits[0]
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-5)
    act = {"erf": "tanh", "tanh": "erf"}[folder.config.hidden_act]
    other = BertForPreTraining(replace(folder.config, hidden_act=act))
    load_into(other, folder.state)
    assert (logits(other, ids) - expected).abs().max() > 1e-4  # the other GELU is seen


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 440473133\n".format("ab" * 32)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
     "added_tokens.json", "special_tokens_map.json"],
)  # fmt: skip
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    if name == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises((CheckpointError, DataError)) as error:
        _ = ModelFolder(tmp_path).config, ModelFolder(tmp_path).state
    assert str(error.value) == (
        f"{tmp_path / name} is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned"
    )


def test_the_hash_of_a_folder_sees_every_file_that_shapes_a_training(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    before = ModelFolder(tmp_path / "a").sha256
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        with open(tmp_path / name / name, "ab") as file:
            file.write(b" ")
        assert ModelFolder(tmp_path / name).sha256 != before
    (tmp_path / "a" / "README.md").write_text("other words")
    assert ModelFolder(tmp_path / "a").sha256 == before
