"""Fetching real text: what is made from it, and what happens without a network or with a wrong file."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from data_prep.sample_text import fetch as sample_text
from data_prep.sample_text import packages, tasks
from data_prep.sample_text.packages import Package


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def tsv(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().split("\n")[:-1]]


def test_pretraining_text(sample_dir: Path) -> None:
    sizes = {name: len(jsonl(sample_dir / f"{name}.jsonl")) for name in ("boolq", "quac", "reviews")}
    assert sizes["boolq"] > 11_000
    assert sizes["quac"] > 900
    assert sizes["reviews"] > 5_000
    for name in sizes:
        for row in jsonl(sample_dir / f"{name}.jsonl"):
            assert row["text"].strip()
            assert "<br" not in row["text"]
            assert row["title"] or name != "boolq"
    books = sorted(path.name for path in (sample_dir / "books").iterdir())
    assert "britannica_shakespeare.txt" in books
    assert len(books) in (5, 11)  # 11 where apt has Jane Austen
    assert "not redistribute" in (sample_dir / "README.txt").read_text()


def test_question_answering_is_squad_format(sample_dir: Path) -> None:
    contexts, questions = {}, {}
    for part in ("train", "eval"):
        data = json.loads((sample_dir / f"qa-{part}.json").read_text())
        assert data["version"] == "1.1"
        paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
        contexts[part] = {paragraph["context"] for paragraph in paragraphs}
        entries = [(paragraph["context"], entry) for paragraph in paragraphs for entry in paragraph["qas"]]
        questions[part] = [entry["id"] for _, entry in entries]
        for context, entry in entries:
            assert entry["question"].strip()
            assert len(entry["answers"]) == 1 or part == "eval"
            for answer in entry["answers"]:
                start = answer["answer_start"]
                assert context[start : start + len(answer["text"])] == answer["text"] != ""
    assert 1150 <= len(questions["train"]) <= 1200
    assert len(questions["eval"]) == 250
    assert len(set(questions["train"] + questions["eval"])) == len(questions["train"]) + 250
    assert not contexts["train"] & contexts["eval"]
    pretrained = {row["text"] for name in ("boolq", "quac") for row in jsonl(sample_dir / f"{name}.jsonl")}
    assert not contexts["eval"] & pretrained
    assert contexts["train"] & pretrained  # the comparison above can fail


def test_pairs_are_mrpc_format(sample_dir: Path) -> None:
    passages = {}
    for part, count in (("train", 2000), ("dev", 500)):
        header, *rows = tsv(sample_dir / f"pairs-{part}.tsv")
        assert header == ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        assert len(rows) == count
        assert all(len(row) == 5 and '"' not in "".join(row) for row in rows)
        assert [row[0] for row in rows].count("1") == count // 2
        passages[part] = {row[4] for row in rows}
        assert len(passages[part]) == count
    assert not passages["train"] & passages["dev"]
    pretrained = {" ".join(r["text"].replace('"', "'").split()) for r in jsonl(sample_dir / "boolq.jsonl")}
    assert not passages["dev"] & pretrained
    assert passages["train"] <= pretrained


def test_sentiment_is_sst2_format(sample_dir: Path) -> None:
    sentences = {}
    for part, least, most in (("train", 8530, 8530), ("dev", 2000, 2136)):
        header, *rows = tsv(sample_dir / f"sentiment-{part}.tsv")
        assert header == ["sentence", "label"]
        assert least <= len(rows) <= most
        assert 0.45 < [row[1] for row in rows].count("1") / len(rows) < 0.55
        assert all(len(row) == 2 and row[1] in "01" and "&amp;" not in row[0] for row in rows)
        sentences[part] = {"".join(filter(str.isalnum, row[0])) for row in rows}
    assert not sentences["train"] & sentences["dev"]


def test_carriers(carriers: Path) -> None:
    assert json.loads((carriers / "rxnfp" / "config.json").read_text())["hidden_size"] == 256
    assert len((carriers / "minilm" / "vocab.txt").read_text().splitlines()) == 30522
    assert "Official evaluation script for v1.1" in (carriers / "squad_v1_evaluate.py").read_text()


def test_second_run_needs_no_network(sample_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    lines: list[str] = []
    sample_text.fetch(sample_dir.parent, say=lines.append)
    assert lines == [f"{sample_dir}: already there and whole"]


@pytest.mark.slow
def test_without_a_network_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / ".fetch-old").mkdir()  # of a killed run
    assert sample_text.main(["--to", str(tmp_path)]) == 7
    error = capsys.readouterr().err
    assert error.startswith("error: pip could not fetch gensim==4.4.0 (")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_another_archive_of_that_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(tmp_path / "mirror" / "gensim-4.4.0-py3-none-any.whl", {"gensim/x": b"evil"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    assert sample_text.main(["--to", str(tmp_path / "to")]) == 3
    error = capsys.readouterr().err
    assert "does not have SHA-256 91a7fa5e814e7b1b" in error
    assert error.count("\n") == 1


def make_wheel(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr("gensim-4.4.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: gensim\nVersion: 4.4.0\n")
        wheel.writestr("gensim-4.4.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.slow
def test_members_come_out_of_wheels_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "mirror" / "gensim-4.4.0-py3-none-any.whl"
    make_wheel(wheel, {"gensim/x": b"text"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    package = Package("gensim", "4.4.0", "wheel", sha256(wheel.read_bytes()), {"gensim/x": sha256(b"text")})
    assert packages.members(package, tmp_path) == {"gensim/x": b"text"}


def test_members_come_out_of_tars_and_debs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tar({"a/text": b"inside"})
    sdist = tar({"p/in.tar.gz": inner, "p/plain": b"outside"})
    payload = tar({"./usr/x": b"debian"})
    deb = b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        for name, data in (("debian-binary", b"2.0\n"), ("control.tar.gz", b"odd"), ("data.tar.gz", payload))
    )
    for kind, archive, wanted in (
        ("sdist", sdist, {"p/in.tar.gz!a/text": b"inside", "p/plain": b"outside"}),
        ("deb", deb, {"./usr/x": b"debian"}),
    ):

        def run(command: list[str], archive: bytes = archive, **options: Any) -> subprocess.CompletedProcess[str]:
            target = Path(options["cwd"]) / ("" if command[0] == "apt-get" else "got")
            target.mkdir(exist_ok=True)
            (target / "archive").write_bytes(archive)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(shutil, "which", lambda name: name)
        checks = {name: sha256(data) for name, data in wanted.items()}
        package = Package("p", "1", kind, sha256(archive), checks)  # type: ignore[arg-type]
        assert packages.members(package, tmp_path) == wanted
        assert not (tmp_path / "p").exists()
        with pytest.raises(DataError, match="archive has SHA-256"):
            packages.members(replace(package, sha256="00"), tmp_path)
        with pytest.raises(DataError, match=r"has SHA-256 .* expected 00"):
            packages.members(replace(package, members=dict.fromkeys(wanted, "00")), tmp_path)
        with pytest.raises(DataError, match="cannot read y"):
            packages.members(replace(package, members={"y": "00"}), tmp_path)


def test_damaged_files_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("text")
    sample_text._seal(tmp_path)
    assert sample_text._problem(tmp_path) == ""
    (tmp_path / "x").write_text("Text")
    assert "SHA-256" in sample_text._problem(tmp_path)
    (tmp_path / "x").unlink()
    assert "missing" in sample_text._problem(tmp_path)


def test_r_database_of_novels() -> None:
    lines = ["A NOVEL", "", "Text é", "FINIS"]
    body = b"".join(b"\0\x04\0\x09" + len(line.encode()).to_bytes(4, "big") + line.encode() for line in lines)
    block = b"X\n\0\0\0\x03" + b"\0\x04\x02\x01\0\x03\x05\0\0\0\0\x05UTF-8" + b"\0\0\0\x10" + b"\0\0\0\x04" + body
    packed = len(block).to_bytes(4, "big") + zlib.compress(block)
    assert list(sample_text._austen(packed * 2)) == [("a_novel", "A NOVEL\n\nText é\nFINIS\n")] * 2


@pytest.mark.parametrize(
    ("answers", "spans"),
    [
        ("the cat sat the cat", ["the cat sat", "the cat"]),
        ("the cat, on the mat.", ["the cat", "on the mat."]),
        ("CANNOTANSWER the cat", []),
        ("dogs bark", []),
    ],
)
def test_run_together_answers_are_split(answers: str, spans: list[str]) -> None:
    assert tasks._quac_spans(answers, "So the cat sat on the mat.") == spans


def test_held_out_snippets_are_none_of_the_train_ones() -> None:
    rated = [("a good , film", "1", "rotten_tomatoes"), ("long review", "0", "imdb")]
    snippets = b"1\t2.5\tA GOOD film!\r\n2\t-1\tBad &amp; dull\r\n3\t0.1\tBad & dull\n4\t0\tNothing\n"
    train, dev = tasks.sentiment(rated, snippets)
    assert train == "sentence\tlabel\na good , film\t1\n"
    assert dev == "sentence\tlabel\nbad & dull\t0\n"
