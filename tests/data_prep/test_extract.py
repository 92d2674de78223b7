"""The extract stage: same bytes for any number of workers and after kills, nothing lost, nothing half-written."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep import document, dumpfile, extract, manifest
from data_prep.errors import DataError
from support.documents import FakeJob, contents, texts

HEADER = "<mediawiki><siteinfo><dbname>xwiki</dbname></siteinfo>\n"


def page(number: int, text: str) -> str:
    return f"<page><title>P{number}</title><ns>0</ns><id>{number}</id><revision><text>{text}</text></revision></page>\n"


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, list[Path]]:
    folder = tmp_path / "in"
    (folder / "books").mkdir(parents=True)
    pages = [page(n, f"Prose number {n} " + "word " * n) for n in range(120)]
    groups = [HEADER, *("".join(pages[i : i + 10]) for i in range(0, 120, 10)), "</mediawiki>\n"]
    (folder / "multi.xml.bz2").write_bytes(b"".join(bz2.compress(group.encode()) for group in groups))
    (folder / "plain.xml").write_text(HEADER + "".join(pages[:50]) + page(99, "{{none}}") + "</mediawiki>")
    for name in "abcde":
        (folder / "books" / f"{name}.txt").write_text(f"Book {name}.\n\nIts text.\n" * 20)
    (folder / "text.txt").write_text("\n\n".join(f"Text {n}\nof lines." for n in range(100)))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {n}."}) + "\n" for n in range(200)))
    return {
        "wikipedia": [folder / "multi.xml.bz2", folder / "plain.xml"],
        "books": [folder / "books", folder / "text.txt"],
        "jsonl": [folder / "rows.jsonl"],
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "PART_BYTES", 1500)
    monkeypatch.setattr(extract, "COMPRESSED_PART_BYTES", 500)
    monkeypatch.setattr(document, "FILE_BYTES", 2000)


@pytest.mark.usefixtures("small_parts")
def test_everything_is_read_and_described(inputs: dict[str, list[Path]], tmp_path: Path) -> None:
    job = FakeJob(tmp_path / "out")
    facts = extract.run(job, **inputs, max_document_mb=1)
    rows = texts(job.out)
    assert len(rows) == 120 + 50 + 5 + 100 + 200 == facts["counts"]["documents"]
    assert facts["counts"]["articles"] == len(rows) + 1
    assert facts["counts"]["words"] == sum(len(row["text"].split()) for row in rows)
    assert facts["skipped"] == {"no prose": 1}
    assert facts["examples"] == {"no prose": ["P99"]}
    assert {row["source"] for row in rows} == {path.name for paths in inputs.values() for path in paths}
    assert len({row["id"] for row in rows if row["source"] != "plain.xml"}) == 120 + 5 + 100 + 200
    found = manifest.read_manifest(job.out)
    manifest.verify(job.out, found["files"])
    assert sum(entry["documents"] for entry in found["files"]) == len(rows)
    assert len(found["files"]) > 20
    assert all(entry["bytes"] <= 2000 or entry["documents"] == 1 for entry in found["files"])
    assert any(entry["file"].endswith("-0001.jsonl") for entry in found["files"])
    assert contents(job.out).keys() == {"manifest.json", *(entry["file"] for entry in found["files"])}
    multi = inputs["wikipedia"][0]
    assert found["inputs"][0]["sha256"] == hashlib.sha256(multi.read_bytes()).hexdigest()
    assert found["inputs"][0]["bytes"] == multi.stat().st_size
    assert any("1 skipped, no prose: P99" in line for line in job.lines)


@pytest.mark.usefixtures("small_parts")
def test_killed_tries_and_old_files_leave_no_trace(
    inputs: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, job = FakeJob(tmp_path / "clean"), FakeJob(tmp_path / "out")
    read, calls, die_at = extract._readers, 0, 10**9

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(extract, "_readers", counting)
    extract.run(clean, **inputs, max_document_mb=1)
    parts, calls, die_at = calls, 0, 15
    with pytest.raises(KeyboardInterrupt):
        extract.run(job, **inputs, max_document_mb=1)
    assert not (job.out / "manifest.json").exists()
    seconds = sorted(job.out.glob("documents-*-0001.jsonl"))
    seconds[-1].unlink()  # one of two files of a finished part
    (job.out / "documents-00000.jsonl").write_text("damaged")
    (job.out / "documents-77777.jsonl").write_text("{}")
    (job.out / ".documents-00001.jsonl.1-a.tmp").write_text("half")
    calls, die_at = 0, 10**9
    extract.run(job, **inputs, max_document_mb=1)
    assert contents(job.out) == contents(clean.out)
    assert seconds[-1].name != "documents-00000-0001.jsonl"
    assert calls == parts - 14 + 2, "the 12 intact parts of the killed try are kept, no other"


@pytest.mark.usefixtures("small_parts")
def test_a_changed_input_is_read_again(
    inputs: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, path = FakeJob(tmp_path / "out"), inputs["jsonl"][0]
    finish = extract._finish
    monkeypatch.setattr(extract, "_finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        extract.run(job, wikipedia=[], books=[], jsonl=[path], max_document_mb=1)
    monkeypatch.setattr(extract, "_finish", finish)
    path.write_text(path.read_text().replace("Row", "New"))  # of the same size
    extract.run(job, wikipedia=[], books=[], jsonl=[path], max_document_mb=1)
    assert all(row["text"].startswith("New") for row in texts(job.out))


def test_any_number_of_workers_gives_the_same_bytes(sample_dir: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "wikipedia": [sample_dir / "enwiki-sample.xml.bz2"],
        "books": [],
        "jsonl": [sample_dir / "quac.jsonl"],
    }
    for workers in (1, 3):
        extract.run(FakeJob(tmp_path / f"w{workers}", workers), **arguments, max_document_mb=0.5)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3")
    found = manifest.read_manifest(tmp_path / "w1")
    assert found["counts"]["articles"] == found["counts"]["documents"] + sum(found["skipped"].values())


def one_stream(folder: Path, kind: str, data: bytes) -> Path:
    path = folder / f"dump.xml.{kind}"
    path.write_bytes({"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress}[kind](data))
    return path


EXPORT = (
    HEADER + "".join(page(n, f"Prose number {n}. " + "word " * n) for n in range(150)) + "</mediawiki>\n"
).encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bz2", "gz", "xz"])
def test_a_single_stream_is_cut_by_its_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "PART_BYTES", 1500)
    empty: dict[str, list[Path]] = {"wikipedia": [], "books": [], "jsonl": []}
    (tmp_path / "dump.xml").write_bytes(EXPORT)
    path = one_stream(tmp_path, kind, EXPORT)
    plain, job, two, serial = (
        FakeJob(tmp_path / name, count) for name, count in zip("abcd", (1, 1, 2, 2), strict=True)
    )
    extract.run(plain, **empty | {"wikipedia": [tmp_path / "dump.xml"]}, max_document_mb=1)
    facts = extract.run(job, **empty | {"wikipedia": [path]}, max_document_mb=1)
    assert facts["counts"]["articles"] == 150
    assert sorted(row["text"] for row in texts(job.out)) == sorted(row["text"] for row in texts(plain.out))
    assert {(row["source"], row["id"].partition("-")[0]) for row in texts(job.out)} == {(path.name, "xwiki")}
    assert len(contents(job.out)) > 10
    extract.run(two, **empty | {"wikipedia": [path]}, max_document_mb=1)
    monkeypatch.setattr(dumpfile, "is_unpacked_in_parallel", lambda path: False)
    extract.run(serial, **empty | {"wikipedia": [path]}, max_document_mb=1)
    assert contents(job.out) == contents(two.out) == contents(serial.out)
    said = "is one bz2 stream: one core unpacks it" if kind == "bz2" else "cannot be split: one core unpacks it"
    assert any(said in line for line in serial.lines)


@pytest.mark.usefixtures("small_parts")
def test_a_single_stream_is_resumed_by_pieces_of_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"wikipedia": [one_stream(tmp_path, "bz2", EXPORT)], "books": [], "jsonl": []}
    clean, job = FakeJob(tmp_path / "clean"), FakeJob(tmp_path / "out")
    extract.run(clean, **arguments, max_document_mb=1)
    readers, calls = extract._readers, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return readers(*arguments)

    monkeypatch.setattr(extract, "_readers", dying)
    with pytest.raises(KeyboardInterrupt):
        extract.run(job, **arguments, max_document_mb=1)
    assert list(job.out.glob(".*.piece.tmp"))
    extract.run(job, **arguments, max_document_mb=1)
    assert contents(job.out) == contents(clean.out)
    pieces = len({name.partition("-")[2][:5] for name in contents(clean.out) if name.startswith("documents")})
    assert calls == 9 + pieces - 8


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("tool", ["indexed_bzip2", ""])
def test_a_damaged_stream_is_named_whatever_unpacks_it(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tool == "indexed_bzip2":
        pytest.importorskip(tool, reason=f"{tool} is not installed: what it packs is not read here")
    monkeypatch.setattr(dumpfile, "is_unpacked_in_parallel", lambda path: bool(tool))
    path = one_stream(tmp_path, "bz2", EXPORT)
    whole = path.read_bytes()
    # it takes bytes after the last stream for padding; the text is whole then
    junk = [] if tool else [whole + b"junk"]
    for broken in (whole[:-20], whole[:400], whole[:300] + b"x" + whole[301:], *junk):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"dump\.xml\.bz2"):
            extract.run(FakeJob(tmp_path / "out", 2), wikipedia=[path], books=[], jsonl=[], max_document_mb=1)


@pytest.mark.parametrize("kind", ["wikipedia", "jsonl", "books"])
def test_what_is_no_file_is_refused_and_nothing_hangs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe",) if kind == "books" else ("pipe", "folder"):
        inputs: dict[str, list[Path]] = {"wikipedia": [], "jsonl": [], "books": [], kind: [tmp_path / name]}
        with pytest.raises(DataError, match=f"{name} is (a folder|no regular file)"):
            extract.run(FakeJob(tmp_path / "out"), **inputs, max_document_mb=1)


def test_hostile_names_stay_one_printable_line(tmp_path: Path) -> None:
    name = b"rot\x1b[31m\n\xff\xc2\x9b.txt".decode(errors="surrogateescape")
    (tmp_path / "books").mkdir()
    path = tmp_path / "books" / name
    path.write_bytes(b"good\n\nbad \xff\n")
    empty: dict[str, list[Path]] = {"wikipedia": [], "jsonl": [], "books": [tmp_path / "books"]}
    with pytest.raises(DataError) as caught:
        extract.run(FakeJob(tmp_path / "out"), **empty, max_document_mb=1)
    assert str(caught.value).isprintable()
    assert r"rot\x1b[31m\n\udcff\x9b.txt: invalid UTF-8 at byte 10" in str(caught.value)
    path.write_bytes(b"\xef\xbb\xbf1\r\n2")
    (tmp_path / "books" / "a.txt").write_bytes(b"\xef\xbb\xbfA word\x00.\r\n")
    job = FakeJob(tmp_path / "out")
    extract.run(job, **empty, max_document_mb=1)
    assert all(line.isprintable() for line in job.lines)
    expected = "books: 2 byte order marks removed, 2 carriage returns read as line ends, 1 control characters removed"
    assert expected in job.lines


KILLED = """
import sys, time
from pathlib import Path
from data_prep import extract
extract.PART_BYTES = 300_000
class Job:
    out, workers = Path(sys.argv[1]), 2
    def say(self, line, share=None): print(line, flush=True)
if __name__ == "__main__":
    extract.run(Job(), wikipedia=[], books=[], jsonl=[Path(sys.argv[2])], max_document_mb=1)
"""


def test_kill_and_rerun_gives_the_same_bytes(sample_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = Path(__file__).parents[2]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        command = [sys.executable, str(script), str(tmp_path / name), str(sample_dir / "quac.jsonl")]
        for delay_s in (0.4, 0.8) if name == "b" else ():
            process = subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(folder)}, stdout=subprocess.DEVNULL)
            time.sleep(delay_s)
            process.kill()
            process.wait()
        subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("case", ["no page", "no prose", "same name", "empty json", "damaged"])
def test_refusals(case: str, inputs: dict[str, list[Path]], tmp_path: Path) -> None:
    arguments: dict[str, list[Path]] = {"wikipedia": [], "books": [], "jsonl": []}
    dump = tmp_path / "dump.xml"
    if case == "no page":
        dump.write_text(HEADER + "</mediawiki>")
        arguments["wikipedia"], message = [dump], "holds no page"
    elif case == "no prose":
        dump.write_text(HEADER + page(1, "{{x}}") + "</mediawiki>")
        arguments["wikipedia"], message = [dump], "no document in dump.xml: 1 no prose"
    elif case == "same name":
        arguments["jsonl"], message = (
            [tmp_path / "a" / "x.jsonl", tmp_path / "x.jsonl"],
            "two inputs are called x.jsonl",
        )
    elif case == "empty json":
        (tmp_path / "x.jsonl").write_text("\n")
        arguments["jsonl"], message = [tmp_path / "x.jsonl"], "the input is empty"
    else:
        arguments = inputs
        data = bytearray(inputs["wikipedia"][0].read_bytes())
        data[len(data) // 2] ^= 64
        inputs["wikipedia"][0].write_bytes(data)
        message = "in the bz2 stream at byte"
    job = FakeJob(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        extract.run(job, **arguments, max_document_mb=1)
    assert not (job.out / "manifest.json").exists()
