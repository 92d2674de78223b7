"""Formats in which people have text: compressed, tables, WikiExtractor's, a sentence a line; others by name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import books, extract, formats
from data_prep.document import Tally
from data_prep.errors import DataError
from support.documents import FakeJob, contents, texts

zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: zst files are not read here")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet is not read here")

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}
TEXTS = [f"The mill number {number} turned.\nIt stopped, and {'so on ' * number}went on." for number in range(80)]


def run(out: Path, workers: int = 1, **inputs: Any) -> tuple[FakeJob, dict[str, Any]]:
    job = FakeJob(out, workers)
    arguments: dict[str, Any] = {"wikipedia": [], "books": [], "jsonl": [], "max_document_mb": 1, **inputs}
    return job, extract.run(job, **arguments)


def rows(out: Path) -> list[tuple[str, str]]:
    return [(row["title"], row["text"]) for row in texts(out)]


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_text_and_records_are_read_as_they_are(packer: str, tmp_path: Path) -> None:
    content = {
        "t.txt": "\n\n".join(TEXTS).encode(),
        "j.jsonl": "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode(),
    }
    for name, data in content.items():
        kind = "books" if name == "t.txt" else "jsonl"
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.packed").write_bytes(PACKERS[packer](data))
        run(tmp_path / f"{name}-plain", **{kind: [tmp_path / name]})
        run(tmp_path / f"{name}-packed", **{kind: [tmp_path / f"{name}.packed"]})
        assert rows(tmp_path / f"{name}-plain") == rows(tmp_path / f"{name}-packed")
        assert len(rows(tmp_path / f"{name}-plain")) == 80
        whole = PACKERS[packer](data)
        (tmp_path / f"{name}.packed").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{name}\.packed: damaged or truncated {packer} data"):
            run(tmp_path / f"{name}-cut", **{kind: [tmp_path / f"{name}.packed"]})
        (tmp_path / f"{name}.packed").write_bytes(whole + PACKERS[packer](data) + bytes(512))
        run(tmp_path / f"{name}-twice", **{kind: [tmp_path / f"{name}.packed"]})
        assert len(rows(tmp_path / f"{name}-twice")) == 2 * len(rows(tmp_path / f"{name}-plain")) - (name == "t.txt")
        (tmp_path / f"{name}.packed").write_bytes(whole + b"XX" + PACKERS[packer](data)[2:])
        with pytest.raises(DataError, match=rf"{name}\.packed: damaged or truncated {packer} data"):
            run(tmp_path / f"{name}-odd", **{kind: [tmp_path / f"{name}.packed"]})


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_cell_that_no_header_names_is_refused(name: str, tmp_path: Path) -> None:
    separator = name.replace("a.csv", ",").replace("a.tsv", "\t")
    (tmp_path / name).write_text("id,text\n1,fine\n2,Dear reader, we lose you\n".replace(",", separator))
    with pytest.raises(DataError, match=rf"{name}:3: 3 cells where the header names 2"):
        run(tmp_path / "out", jsonl=[tmp_path / name])
    (tmp_path / name).write_text("id,text\n1,A line\nthat goes on\n".replace(",", separator))
    with pytest.raises(DataError, match=rf"{name}:3: 1 cells where the header names 2"):
        run(tmp_path / "out", jsonl=[tmp_path / name])
    (tmp_path / name).write_text("id,text,note\n1,A line\n2,More,x\n".replace(",", separator))
    _, facts = run(tmp_path / "out", jsonl=[tmp_path / name])
    assert facts["notes"] == [f"{name}: 1 rows with fewer cells than the header"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS * 9}), path)
    data = bytearray(path.read_bytes())
    data[30:60] = bytes(byte ^ 255 for byte in data[30:60])
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        run(tmp_path / "out", jsonl=[path])


def test_tables_by_a_named_column(tmp_path: Path) -> None:
    from pyarrow import parquet

    table = [{"body": text, "title": f"T {n}", "id": n} for n, text in enumerate(TEXTS)]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["id", "body", "title"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(table)
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "e.parquet", row_group_size=7)
    expected = [(row["title"], row["body"].strip()) for row in table]
    for name in ("a.csv", "b.tsv", "c.csv.gz", "d.jsonl", "e.parquet"):
        run(tmp_path / f"out-{name}", jsonl=[tmp_path / name], text_column="body")
        assert rows(tmp_path / f"out-{name}") == expected, name
        with pytest.raises(DataError, match=rf"{name}.* (has no column|no object with a string) .?['\"]text"):
            run(tmp_path / "none", jsonl=[tmp_path / name])
    assert texts(tmp_path / "out-e.parquet")[3]["id"] == "e-3"
    (tmp_path / "twice.csv").write_text("body,body\nOne.,Two.\n")
    with pytest.raises(DataError, match=r"twice\.csv has 2 columns 'body'"):
        run(tmp_path / "none", jsonl=[tmp_path / "twice.csv"], text_column="body")


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_is_cut_by_row_groups(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    run(tmp_path / "whole", jsonl=[tmp_path / "a.parquet"])
    monkeypatch.setattr(extract, "PART_BYTES", 500)
    run(tmp_path / "parts", workers, jsonl=[tmp_path / "a.parquet"])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len(contents(tmp_path / "parts")) > 4


def extracted(count: int) -> str:
    return "".join(
        f'<doc id="{n}" url="https://x.org/wiki?curid={n}" title="Mill &quot;{n}&quot;">\nMill "{n}"\n\n'
        f"The mill {n} turned. It stopped in 1911.\n\nThe river &lt; rose again.\n</doc>\n\n"
        for n in range(count)
    )


def test_files_of_wikiextractor_are_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki" / "AA").mkdir(parents=True)
    (tmp_path / "wiki" / "AA" / "wiki_00").write_text(extracted(30))
    (tmp_path / "wiki_01").write_text(extracted(30))
    expected = [
        (f'Mill "{n}"', f"The mill {n} turned. It stopped in 1911.\nThe river < rose again.") for n in range(30)
    ]
    for name in ("wiki", "wiki_01"):
        run(tmp_path / f"out-{name}", books=[tmp_path / name])
        assert rows(tmp_path / f"out-{name}") == expected
        assert texts(tmp_path / f"out-{name}")[4]["id"] == f"{name}-4"
    monkeypatch.setattr(extract, "PART_BYTES", 211)
    run(tmp_path / "parts", books=[tmp_path / "wiki_01"])
    assert rows(tmp_path / "parts") == expected
    (tmp_path / "wiki_01").write_text(extracted(3).removesuffix("</doc>\n\n"))
    with pytest.raises(DataError, match="has no </doc>"):
        run(tmp_path / "cut", books=[tmp_path / "wiki_01"])
    for start in ("\ufeff", "\n"):
        (tmp_path / "wiki_01").write_text(start + extracted(30))
        run(tmp_path / f"out{start!r}", books=[tmp_path / "wiki_01"])
        assert rows(tmp_path / f"out{start!r}") == expected


@pytest.mark.parametrize("part_bytes", [97, 211, 1 << 20])
def test_no_text_of_wikiextractor_is_dropped(part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "PART_BYTES", part_bytes)
    path = tmp_path / "wiki_00"
    path.write_text(extracted(3).replace("</doc>", "", 1) + extracted(2))
    with pytest.raises(DataError, match="the <doc> of 'Mill \"0\"' has no </doc>"):
        run(tmp_path / "open", books=[path])
    for stray in (extracted(3) + "Stray.\n" + extracted(2), extracted(3) + "Stray."):
        path.write_text(stray)
        with pytest.raises(DataError, match=f"text at byte {len(extracted(3))}, outside of any <doc>"):
            run(tmp_path / "stray", books=[path])


def test_a_sentence_a_line_without_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    lines = [f"sentence {n} of {'the ' * draw.randrange(9)}book ." for n in range(9000)]
    (tmp_path / "books.txt").write_text("\n".join(lines) + "\n")
    assert books.form(tmp_path / "books.txt") == "lines"
    run(tmp_path / "out", books=[tmp_path / "books.txt"])
    documents = [text for _, text in rows(tmp_path / "out")]
    assert [line for text in documents for line in text.split("\n")] == [" ".join(line.split()) for line in lines]
    assert len(documents) == -(-(tmp_path / "books.txt").stat().st_size // books.LINES_BYTES) > 3
    monkeypatch.setattr(extract, "PART_BYTES", 100_000)
    run(tmp_path / "parts", books=[tmp_path / "books.txt"])
    assert rows(tmp_path / "parts") == rows(tmp_path / "out")
    (tmp_path / "long.txt").write_text("A line.\nOne more.\n" * 20 + "x" * 30_000 + ".\nAn end.\n")
    _, facts = run(tmp_path / "long", books=[tmp_path / "long.txt"], max_document_mb=0.01)
    assert facts["skipped"] == {"over max_document_mb (0.01)": 1}
    assert "An end." in rows(tmp_path / "long")[0][1]
    for line in ("यह एक वाक्य है।", "یہ ایک جملہ ہے۔", "Նա ասաց։", "ሰላም ነው።", "သူ လာသည်။"):
        (tmp_path / "stops.txt").write_text(f"{line}\n" * 3)
        assert books.form(tmp_path / "stops.txt") == "lines", line
    (tmp_path / "wrapped.txt").write_text("A hand-wrapped\nparagraph of a book\nwithout blank lines.\n")
    assert books.form(tmp_path / "wrapped.txt") == "text"


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


FOREIGN = {
    "a.pdf": (b"%PDF-1.7 \xe2\xe3", "a PDF document"),
    "b.docx": (zipped("word/document.xml"), r"a Word document \(docx\)"),
    "c.epub": (zipped("META-INF/container.xml"), "an EPUB book"),
    "d.odt": (zipped("content.xml"), "an OpenDocument file"),
    "e.zip": (zipped("a.txt"), "a zip archive"),
    "f.tar.gz": (tarred(), "a tar archive"),
    "g.html": (b"\n<!DOCTYPE HTML><p>x", "an HTML page"),
    "h.doc": (b"\xd0\xcf\x11\xe0", "an old Office document"),
    "i.rtf": (b"{\\rtf1", "an RTF document"),
    "j.7z": (b"7z\xbc\xaf", "a 7z archive"),
    "k.txt": ("Text".encode("utf-16"), "UTF-16 text"),
    "l.txt": ("Text".encode("utf-32"), "UTF-32 text"),
    "m.txt": ("Это был долгий день, и он ушёл домой. ".encode("utf-16-le"), "no text, or UTF-16 text"),
    "n.txt.gz": (gzip.compress(b"<html><p>x"), "an HTML page"),
}
NO_PROSE = {
    "a.txt": (b"<mediawiki xmlns='x'>\n", "a MediaWiki export: name it in data.wikipedia"),
    "b.txt.bz2": (bz2.compress(b"<mediawiki>\n"), "a MediaWiki export"),
    "c.txt": (b'\xef\xbb\xbf<?xml version="1.0"?><TEI>', "XML"),
    "wiki_00": (b'{"id": "1", "text": "A."}\n{"id": "2", "text": "B."}\n', "JSON: name lines of it in data.jsonl"),
    "d.txt": (b'[\n  {\n    "text": "A."\n  }\n]', "JSON"),
    "e.txt": (b"PAR1\x15\x04", "a Parquet file"),
}


@pytest.mark.parametrize("name", NO_PROSE)
def test_what_is_no_prose_is_not_read_as_such(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    data, what = NO_PROSE[name]
    (folder / name).write_bytes(data)
    for given in (folder, folder / name):
        with pytest.raises(DataError, match=f"{name} is {what}"):
            run(tmp_path / "out", books=[given])


def test_what_is_no_text_is_named_for_what_it_is_and_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "good.txt").write_text("A book.")
    for name, (data, what) in FOREIGN.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / "books" / name).write_bytes(data)
        for kind in ("books", "jsonl"):
            with pytest.raises(DataError, match=f"{name} is {what}") as caught:
                run(tmp_path / "out", **{kind: [tmp_path / name]})
            assert name in ("k.txt", "l.txt", "m.txt") or "iconv" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", books=[tmp_path / "books"])
    assert str(caught.value).startswith(f"{len(FOREIGN)} files cannot be read: ")
    assert all(f"books/{name} is" in str(caught.value) for name in FOREIGN)


def test_all_unreadable_files_are_named_by_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in "abc":
        (tmp_path / "books" / f"{name}.txt").write_bytes(b"A line.\n" + b"\xc3\xa9 and \xff" * (name != "b"))
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", books=[tmp_path / "books"], jsonl=[tmp_path / "rows.jsonl"])
    for part in (
        "3 files",
        "a.txt: invalid UTF-8 at byte 15",
        "c.txt: invalid UTF-8 at byte 15",
        "rows.jsonl:2: no obj",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "encoding", "read"),
    [
        ("He said “no”, and – well … it’s 20 £ – left the café." * 5, "cp1252", True),
        (
            "Où est la forêt ? L’été, à côté du château, où l’on voit que l’œuvre du grand maître est terminée…" * 5,
            "cp1252",
            True,
        ),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy. " * 5, "cp1250", False),
        ("Zażółć gęślą jaźń, powiedział król. " * 5, "cp1250", False),
        ("Москва – столица России. " * 5, "cp1251", False),
        ("Η Αθήνα είναι η πρωτεύουσα. " * 5, "iso8859-7", False),
        ("İstanbul’da güneşli bir gün, ağaçlar. " * 5, "cp1254", False),
    ],
)
def test_windows_1252_is_known_by_its_bytes(text: str, encoding: str, read: bool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    tally = Tally(1)
    if read:
        document = books.book(tmp_path / "a.txt", tmp_path, tally)
        assert document is not None
        assert document.text == text
        assert tally.counts["texts_read_as_windows_1252"] == 1
    else:
        with pytest.raises(DataError, match="invalid UTF-8 at byte"):
            books.book(tmp_path / "a.txt", tmp_path, tally)


def test_what_is_no_book_is_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "README.md", "index.csv", "SHA256SUMS", "a.txt.md5", ".hidden", ".git/x", "cover.jpg"):
        (folder / name).write_text("A book.")
    job, facts = run(tmp_path / "out", books=[folder])
    assert facts["counts"]["documents"] == 1
    assert len(facts["inputs"][0]["left_out"]) == 7
    assert any("7 files are no books and left out: .git/x, .hidden, README.md, " in line for line in job.lines)


def test_zst_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(PACKERS["zst"](b"x"))
    with pytest.raises(DataError, match="pip install zstandard"), formats.opened(tmp_path / "a.zst"):
        pass
