"""GLUE-format files, truncation and scores against the originals' rules and torchmetrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_f1_score,
    binary_matthews_corrcoef,
)

from data_prep.errors import DataError
from pipeline.finetune.glue import METRICS, TASKS, build_samples
from pipeline.finetune.table import Table, read_table

MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """One token per character: its code."""
    flat = np.array([ord(c) for text in texts for c in text], np.uint32)
    return flat, np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)


def test_cola_reads_its_test_file_of_two_columns_and_blank_last_lines(tmp_path: Path) -> None:
    asked = read_table(write(tmp_path, "index\tsentence\n0\tOne.\n1\tTwo.\n"), TASKS["cola"], labelled=False)
    assert (asked.texts, asked.lines) == ((["One.", "Two."],), [2, 3])
    table = read_table(write(tmp_path, "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n\r\n\n"), TASKS["cola"])
    assert (table.texts, table.lines) == ((["One.", "Two."],), [1, 2])


def test_official_mrpc_with_byte_order_mark_quotes_and_crlf(tmp_path: Path) -> None:
    rows = ['1\t7\t8\tHe said "no\tShe\u2028said "no', "0\t9\t10\t\"\t'"]
    table = read_table(write(tmp_path, "\ufeff" + "\r\n".join([MRPC, *rows]) + "\r\n"), TASKS["mrpc"])
    assert table.texts == (['He said "no', '"'], ['She\u2028said "no', "'"])
    assert table.classes is not None
    assert table.classes.tolist() == [1, 0]
    assert table.lines == [2, 3]


def test_official_sst2_cola_and_mnli(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "sentence\tlabel\nhide new secretions \t0\n"), TASKS["sst2"])
    assert table.texts == (["hide new secretions "],)
    table = read_table(write(tmp_path, "gj04\t1\t\tThey left.\ngj04\t0\t*\tThey leaved."), TASKS["cola"])
    assert table.texts == (["They left.", "They leaved."],)
    assert table.classes is not None
    assert (table.classes.tolist(), table.lines) == ([1, 0], [1, 2])
    header = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    table = read_table(write(tmp_path, f"{header}\n0\tfiction\ta\tb\tneutral\tentailment"), TASKS["mnli"])
    assert table.classes is not None
    assert table.classes.tolist() == [1]


def test_unlabelled_files_can_be_read_to_predict(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "index\tsentence\n0\tgood"), TASKS["sst2"], labelled=False)
    assert (table.texts, table.classes) == ((["good"],), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Quality\t#1 String\n1\ta", r"train\.tsv:1: column '#2 String' is missing; found 'Quality', '#1 St"),
        (f"{MRPC}\n1\t2\t3\ta\tb\n1\t2\t3\ta", r"train\.tsv:3: 4 cells; expected 5: Quality"),
        (f"{MRPC}\n1\t2\t3\ta\tb\tc", r"train\.tsv:2: 6 cells; expected 5"),
        (f"{MRPC}\n\n1\t2\t3\ta\tb", r"train\.tsv:2: 1 cells; expected 5"),
        (f"{MRPC}\nyes\t2\t3\ta\tb", r"train\.tsv:2: label 'yes' is unknown; expected one of 0, 1"),
        (f"{MRPC}\n", r"train\.tsv:1: no examples below the header"),
        ("", r"train\.tsv: the file is empty"),
        (f"{MRPC}\n1\t2\t3\ta\t".encode() + b"\xe9t\xe9", r"train\.tsv:2: not UTF-8 at byte 8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path, content), TASKS["mrpc"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tsv: cannot be read: No such file"):
        read_table(tmp_path / "none.tsv", TASKS["mrpc"])


def test_single_sentences_are_cut(tmp_path: Path) -> None:
    samples = build_samples(Table((["abc", "abcdefgh"],), np.array([1, 0]), [1, 2]), encode, 6, cls=1, sep=2)
    assert samples.lengths.tolist() == samples.b_start.tolist() == [5, 6]
    assert samples.take(np.array([1])).tokens.tolist() == [1, 97, 98, 99, 100, 2]
    assert samples.targets is not None
    assert samples.targets.tolist() == [1, 0]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(5, 24))
def test_pairs_are_cut_as_the_original_cuts_them(first: int, second: int, max_seq_len: int) -> None:
    a, b = list("a" * first), list("b" * second)
    while len(a) + len(b) > max_seq_len - 3:
        (a if len(a) > len(b) else b).pop()
    table = Table((["a" * first], ["b" * second]), None, [1])
    samples = build_samples(table, encode, max_seq_len, cls=1, sep=2)
    assert samples.tokens.tolist() == [1, *map(ord, a), 2, *map(ord, b), 2]
    assert samples.b_start.tolist() == [len(a) + 2]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_scores_equal_torchmetrics(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    p, t = torch.tensor(predicted), torch.tensor(labels)
    assert METRICS["accuracy"](predicted, labels) == pytest.approx(100 * float(binary_accuracy(p, t)), abs=1e-4)
    assert METRICS["f1"](predicted, labels) == pytest.approx(100 * float(binary_f1_score(p, t)), abs=1e-4)
    if 0 < predicted.sum() < len(pairs) and 0 < labels.sum() < len(pairs):
        expected = 100 * float(binary_matthews_corrcoef(p, t))
        assert METRICS["matthews"](predicted, labels) == pytest.approx(expected, abs=1e-4)
    else:
        assert METRICS["matthews"](predicted, labels) == 0
    assert METRICS["mean"](predicted, labels) == pytest.approx(
        (METRICS["accuracy"](predicted, labels) + METRICS["f1"](predicted, labels)) / 2
    )
