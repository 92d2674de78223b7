"""One's own classification: any labelled table in, probabilities out, as transformers computes them."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from pipeline.finetune.glue import macro_f1
from pipeline.finetune.table import Columns, read_table, text_columns
from support.running import call, one_line

ANY = Columns(text=("a", "b"), label="c", labels=())
CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "good", "bad", "fair"]
WORDS = ("bad", "fair", "good")


@given(st.lists(st.tuples(CELL, CELL, st.sampled_from(["no", "yes", "it depends"])), min_size=2))
def test_every_format_tells_the_same(tmp_path_factory, rows) -> None:
    """Python's csv and json write, we read; tab-separated cells have no quotes."""
    folder = tmp_path_factory.mktemp("formats")
    rows += [("x", "y", "no"), ("x", "y", "yes")]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("b", "c", "a"), *((b, c, a) for a, b, c in rows)])
    (folder / "t.csv").write_bytes(buffer.getvalue().encode())
    lines = [json.dumps({"a": a, "more": None, "b": b, "c": c}, ensure_ascii=len(a) % 2 == 0) for a, b, c in rows]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    separated = ["a\tb\tc", *map("\t".join, rows)]
    (folder / "t.tsv").write_bytes("\r\n".join(separated).encode())
    tables = [read_table(folder / f"t.{kind}", ANY) for kind in ("csv", "jsonl", "tsv")]
    for table in tables:
        assert table.texts == ([a for a, _, _ in rows], [b for _, b, _ in rows])
        assert table.classes is not None
        assert [table.labels[number] for number in table.classes] == [c for _, _, c in rows]
        assert list(table.labels) == sorted({c for _, _, c in rows})
    assert tables[0].lines == tables[2].lines == [number + 1 for number in tables[1].lines]


def test_cells_of_csv_may_hold_lines_and_numbers_sort_as_numbers(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"two\nlines, ""quoted""",10\nplain,9\n\n')
    table = read_table(path, Columns(text=text_columns(path, "label"), label="label", labels=()))
    assert (table.texts, table.labels, table.lines) == ((['two\nlines, "quoted"', "plain"],), ("9", "10"), [2, 4])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"a": "x", "b": "y"}', r"t\.jsonl:1: key 'c' is missing; found 'a', 'b'"),
        ("t.jsonl", '{"a": "x", "b": ["y"], "c": 1}', r"t\.jsonl:1: 'b' is list; expected a text"),
        ("t.jsonl", '{"a": "x", "b": "y", "c": 1}\n[', r"t\.jsonl:2: no JSON"),
        ("t.jsonl", "[1]", r"t\.jsonl:1: expected a JSON object, found list"),
        ("t.csv", 'a,b,c\n"x,y,z', r"t\.csv:2: unexpected end of data"),
        ("t.csv", "a,b,c\nx,y", r"t\.csv:2: 2 cells; expected 3: a, b, c"),
        ("t.csv", "a;b;c\nx;y;z", r"t\.csv:1: column 'a' is missing; found 'a;b;c'"),
        ("t.csv", "a,b,c\nx,y,1\nx,y,\nx,y,2", r"t\.csv:3: 'c' is empty; label this row or leave it out"),
        ("t.csv", "a,b,b,c\nx,y,z,1", r"t\.csv:1: 2 columns are called 'b'"),
        ("t.json", '[{"a": "x", "b": "y", "c": 1}]', r"t\.json: a \.json file is no table; write it as JSON lines"),
        ("t.JSON", "[]", r"t\.JSON: a \.json file is no table"),
        ("t.jsonl", '{"a": "\\ud83d", "b": "y", "c": 1}', r"t\.jsonl:1: no JSON: .*surrogates not allowed"),
        ("t.tsv", "a\tb\tc\nx\ty\tno\nx\ty\tno ", r"t\.tsv: labels 'no ?' and 'no ?' of column 'c' differ in case or"),
        ("t.csv", "a,b,c\nx,y,Yes\nx,y,yes", r"t\.csv: labels .* differ in case or blanks alone"),
        ("t.tsv", "a\tb\tc\nx\ty\tz", r"t\.tsv: column 'c' holds 1 different labels; needed 2 to 1000"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, ANY)


def test_endings_in_capitals_and_long_cells_of_csv_are_read(tmp_path) -> None:
    path = tmp_path / "T.CSV"
    path.write_text(f'a,b,c\n"{"x, " * 100_000}",y,1\nx,y,2\n')
    assert len(read_table(path, ANY).texts[0][0]) == 300_000
    (tmp_path / "T.JSONL").write_text('{"a": "x", "b": "y", "c": 1}\n{"a": "x", "b": "y", "c": 2}')
    assert read_table(tmp_path / "T.JSONL", ANY).labels == ("1", "2")


def test_the_text_column_is_found_or_asked_for(tmp_path) -> None:
    for head, found in (("label\treview", "review"), ("id\tsentence\tlabel", "sentence"), ("review", "review")):
        (tmp_path / "t.tsv").write_text(f"{head}\n")
        assert text_columns(tmp_path / "t.tsv", "label") == (found,)
    (tmp_path / "t.tsv").write_text("id\treview\tlabel\n")
    with pytest.raises(DataError, match="by --text; found id, review, label"):
        text_columns(tmp_path / "t.tsv", "label")


def test_macro_f1_by_its_definition() -> None:
    """Means over classes of 2 TP / (2 TP + FP + FN): a 2/3, b 1/2, c 0."""
    predicted, labels = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 1])
    assert macro_f1(predicted, labels) == pytest.approx(100 * (2 / 3 + 2 / 5 + 0) / 3)


@pytest.mark.slow
def test_three_classes_learnt_and_predicted_as_transformers_does(tmp_path) -> None:
    config = transformers.BertConfig(vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=32)  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    records = [{"review": f"{'abcdefgh'[i % 8]} {WORDS[i % 3]}", "stars": i % 3} for i in range(48)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "new.csv").write_text("stars,review\n2,a good\n0,bad b\n")
    files = ("--model", tmp_path / "model", "--train", tmp_path / "train.jsonl", "--eval", tmp_path / "new.csv")
    small = ("--max-seq-len", "16", "--epochs", "20", "--batch", "8", "--learning-rate", "3e-3", "--threads", "1")
    done = call("finetune", "classify", *files, "--label", "stars", "--out", tmp_path / "out", *small)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["scores"] == {"accuracy": 100.0, "macro_f1": 100.0}
    assert scores["baselines"]["majority"]["accuracy"] == 50.0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == {"2": "2", "3": "0"}
    detailed = json.loads((tmp_path / "out" / "detailed_predictions.json").read_text())
    assert detailed["2"]["text"] == ["a good"]

    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    with torch.no_grad():
        chances = theirs(**tokenizer(["a good", "bad b"], return_tensors="pt")).logits.softmax(1)
    assert list(theirs.config.id2label.values()) == ["0", "1", "2"]
    for line, row in zip("23", chances.tolist(), strict=True):
        assert list(detailed[line]["probabilities"].values()) == pytest.approx(row, abs=1e-5)

    # The model carries its classes: a file without labels is predicted with them.
    (tmp_path / "unlabelled.csv").write_text("review\na good\nbad b\n")
    trained = ("--model", tmp_path / "out" / "model", "--eval", tmp_path / "unlabelled.csv", *small[:2])
    done = call("finetune", "classify", *trained, "--mode", "prediction", "--out", tmp_path / "more")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "more" / "predictions.json").read_text()) == {"2": "2", "3": "0"}
    one_line(call("finetune", "sst2", *files, "--out", tmp_path / "o", "--text", "a"), 2, "belong to classify")
    for text in ("review,review", "stars", "review,stars"):
        words = ("--out", tmp_path / "o", "--text", text, "--label", "stars")
        one_line(call("finetune", "classify", *files, *words), 2, "name one or two columns, each once, and not 'stars'")
