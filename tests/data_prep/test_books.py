"""Books, blank-line separated documents and JSON lines: rules, parts against the whole, bad input by name and place."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import books, records
from data_prep.document import Document, Tally
from data_prep.errors import DataError


def one_book(path: Path, data: bytes, limit_mb: float = 1) -> tuple[Document | None, Tally]:
    path.write_bytes(data)
    tally = Tally(limit_mb)
    return books.book(path, path.parent, tally), tally


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfCHAPTER I\r\n\r\nA line\r\nand  more.\r\n \t\r\nEnd.", "CHAPTER I\nA line and more.\nEnd."),
        ("Zwei\u00ad Wör\u200bter\x0c\x1b[1m.\n\n\n\n***\n\nEnde\x85da".encode(), "Zwei Wörter [1m.\n***\nEnde da"),
        (b"hard\nwrapped\nbook", "hard wrapped book"),
        (b"long " * 60 + b"\nline", "long " * 59 + "long\nline"),
        (b"old\rmac", "old mac"),
    ],
)
def test_paragraphs(data: bytes, text: str, tmp_path: Path) -> None:
    document, tally = one_book(tmp_path / "a.txt", data)
    assert document is not None
    assert document.text == text
    assert tally.counts["books_without_blank_lines"] == (
        b"\n\n" not in data and b"\n \t" not in data and b"\r\n\r" not in data
    )


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf", b"123 -- 456", "\u200b\x00".encode()])
def test_books_without_a_letter_are_counted(data: bytes, tmp_path: Path) -> None:
    document, tally = one_book(tmp_path / "a.txt", data)
    assert document is None
    assert tally.facts()["skipped"] == {"no letters": 1}


def test_large_books_are_skipped_by_name(tmp_path: Path) -> None:
    document, tally = one_book(tmp_path / "large\x1b.txt", b"word " * 300, limit_mb=0.001)
    assert document is None
    assert tally.examples == {"over max_document_mb (0.001)": ["large\\x1b.txt"]}


def test_invalid_utf8_names_file_and_byte(tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match=rf"a\.txt: invalid UTF-8 at byte {len(mark) + 5} \(0xe9\)"):
            one_book(tmp_path / "a.txt", mark + b"\xc3\xa9caf\xe9 noir")


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (b"\xef\xbb\xbfA b.\r\nC.\rD.\r\n", {"byte_order_marks_removed": 1, "carriage_returns_read_as_line_ends": 3}),
        (b"A\x00 b\x00\x1b[31m.\n\nC.", {"control_characters_removed": 3}),
        (b"A b.\n\nC.", {}),
    ],
)
def test_what_is_repaired_is_counted_in_every_form(data: bytes, counts: dict[str, int], tmp_path: Path) -> None:
    document, tally = one_book(tmp_path / "a.txt", data)
    assert document is not None
    assert {key: tally.counts[key] for key in books.REPAIRS if tally.counts[key]} == counts
    row = json.dumps({"text": data.decode("utf-8-sig")}).encode()
    (tmp_path / "a.jsonl").write_bytes(data[:3] + row if data.startswith(b"\xef") else row)
    for read, name in ((books.text_documents, "a.txt"), (records.json_documents, "a.jsonl")):
        path, tally = tmp_path / name, Tally(1)
        assert list(read(path, 0, path.stat().st_size, tally))
        assert {key: tally.counts[key] for key in books.REPAIRS if tally.counts[key]} == counts


def test_lone_surrogates_are_removed_and_counted(tmp_path: Path) -> None:
    path, tally = tmp_path / "a.jsonl", Tally(1)
    path.write_bytes(rb'{"text": "Ein \ud800 Wort \udfff\u0000.", "title": "\u001b[31mrot\ud800"}')
    (document,) = records.json_documents(path, 0, path.stat().st_size, tally)
    assert (document.title, document.text) == ("[31mrot", "Ein Wort .")
    assert tally.counts["control_characters_removed"] == 3
    path.write_bytes(b'{"text": "\xed\xa0\x80"}')  # the same, written as bytes
    with pytest.raises(DataError, match="invalid UTF-8 at byte 10"):
        list(records.json_documents(path, 0, path.stat().st_size, tally))


def test_links_pipes_and_loops_among_the_books_are_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "books", tmp_path / "outside"
    for made in (folder / "inner", outside):
        made.mkdir(parents=True)
        (made / "a.txt").write_text("A book.")
    for name, make in {
        "secret.txt": lambda path: path.symlink_to(outside / "a.txt"),
        "passwd": lambda path: path.symlink_to("/etc/passwd"),
        "loop.txt": lambda path: path.symlink_to(path),
        "nowhere.txt": lambda path: path.symlink_to("nothing"),
        "top": lambda path: path.symlink_to(folder),
        "folder": lambda path: path.symlink_to(outside),
        "pipe.txt": lambda path: os.mkfifo(path),
        "zero": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        make(folder / name)
        with pytest.raises(DataError, match=f"books/{name}"):
            books.book_files(folder)
        (folder / name).unlink()
    (folder / "b.txt").symlink_to("inner/a.txt")
    (tmp_path / "link").symlink_to(folder)
    for top in (folder, tmp_path / "link"):
        assert [path.name for path in books.book_files(top)] == ["b.txt", "a.txt"]


def test_folder_is_read_in_order_and_whole(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c", ".hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(p.relative_to(tmp_path)) for p in books.book_files(tmp_path)] == ["a/b/c", "a/z.txt", "b.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no file"):
        books.book_files(empty)


def in_parts(read: Callable[..., Iterable[Document]], path: Path, part_bytes: int) -> tuple[list[Document], Tally]:
    found: list[Document] = []
    tally = Tally(0.0001)
    for start in range(0, path.stat().st_size, part_bytes):
        found += read(path, start, start + part_bytes, tally)
    return found, tally


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["", "", " \t", "a line", "Zeile ü", "w " * 30, "x" * 120, "1"]), max_size=14),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 60),
)
def test_any_cut_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ending: str, last: bool, part_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes((ending.join(lines) + ending * last).encode())
    documents, tally = in_parts(books.text_documents, path, part_bytes)
    expected, articles = [], 0
    for block in _blocks(lines):
        articles += 1
        size = len(ending.join(block).encode())
        text = " ".join(" ".join(block).split())
        if size + len(ending) <= 100 and any(map(str.isalpha, text)):
            expected.append(text)
    kept = [document.text for document in documents]
    # near the limit, the white space that is not kept decides
    short = [[text for text in texts if len(text.encode()) < 70] for texts in (kept, expected)]
    assert short[0] == short[1]
    assert tally.counts["articles"] == articles == len(documents) + sum(tally.skipped.values())
    assert in_parts(books.text_documents, path, 10**9) == (documents, tally)


def _blocks(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def test_text_file_says_where(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\n\ntwo \xff\n")
    with pytest.raises(DataError, match=r"t\.txt: invalid UTF-8 at byte 9"):
        in_parts(books.text_documents, path, 4)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [
        {"text": "One\r\ntwo  three.\n\nFour", "id": 7, "title": "T\x1b[31m"},
        {"text": "No id"},
        {"text": "\u0000 12"},
        {"text": "x" * 101, "title": "big\x07"},
        {"text": "lone \ud800 surrogate", "id": "a b", "meta": {"n": [1]}},
        {"text": "y" * 900},
    ]
    path.write_text(
        "\ufeff" + "\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + "\n".join(map(json.dumps, rows[2:]))
    )
    whole, tally = in_parts(records.json_documents, path, 10**9)
    assert [(d.id, d.title, d.text) for d in whole] == [
        ("d-7", "T[31m", "One\ntwo three.\nFour"),
        (whole[1].id, "", "No id"),
        ("d-a b", "", "lone surrogate"),
    ]
    assert whole[1].id.startswith("d.jsonl-")
    assert tally.facts()["skipped"] == {"no letters": 1, "over max_document_mb (0.0001)": 2}
    assert tally.examples["over max_document_mb (0.0001)"] == ["big\\x07", "d.jsonl at byte 319"]
    for part_bytes in (1, 10, 77):
        assert in_parts(records.json_documents, path, part_bytes) == (whole, tally)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"plain words", "not JSON"),
        (b'["text"]', 'no object with a string "text"'),
        (b'{"txt": "a"}', 'no object with a string "text"'),
        (b'{"text": 5}', 'no object with a string "text"'),
        (b'{"text": "a", "title": 5}', '"title" is not a string'),
        (b'{"text": "a", "id": [1]}', '"id" is neither'),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_names_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(records.json_documents(path, 0, 10**6, Tally(1)))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
