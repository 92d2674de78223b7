"""Downloads from a server that drops connections, lies about sizes and changes files: the whole right file or none."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import random
import re
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import download
from data_prep.errors import DataError
from data_prep.sample_text.packages import NotReachable
from support.running import ROOT

CONTENT = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(2_000_000)

Answer = Callable[[int, int], tuple[bytes, int]]
"""(number of the request, first byte asked for) -> what is sent, which length is claimed; then the line is cut"""


def whole(_: int, first: int) -> tuple[bytes, int]:
    return CONTENT[first:], len(CONTENT) - first


def drops(_: int, first: int) -> tuple[bytes, int]:
    return CONTENT[first : first + 700_000], len(CONTENT) - first


def promises_too_much(number: int, first: int) -> tuple[bytes, int]:
    return CONTENT[first:], len(CONTENT) - first + (1000 if number < 2 else 0)


def promises_too_little(number: int, first: int) -> tuple[bytes, int]:
    return CONTENT[first:], len(CONTENT) - first - (1000 if number < 1 else 0)


def changes(number: int, first: int) -> tuple[bytes, int]:
    return (OTHER[first:1_000_000], len(OTHER) - first) if number < 1 else whole(number, first)


def is_another(_: int, first: int) -> tuple[bytes, int]:
    return OTHER[first:], len(OTHER) - first


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    servers: list[http.server.ThreadingHTTPServer] = []
    monkeypatch.setattr(download, "WAIT_S", 0.0)

    def start(answers: dict[str, Answer], *, ranges: bool = True) -> str:
        numbers = {path: itertools.count() for path in answers}

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path not in answers:
                    return self.send_error(404)
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                first = int(asked[1]) if asked and ranges else 0
                data, length = answers[self.path](next(numbers[self.path]), first)
                if first and length <= 0:
                    return self.send_error(416)
                self.send_response(206 if first else 200)
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{first + length}")
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("answer", [whole, drops, promises_too_much, promises_too_little, changes, is_another])
def test_the_whole_right_file_or_none(tmp_path: Path, serve: Callable[..., str], answer: Answer, ranges: bool) -> None:
    url = serve({"/file": answer}, ranges=ranges) + "/file"
    path, digest = tmp_path / "file", hashlib.sha256(CONTENT).hexdigest()
    if answer is is_another or (answer is drops and not ranges):
        why = "with sha256 .* published is" if answer is is_another else "promised 3000000"
        with pytest.raises(DataError, match=why):
            download.fetch(url, path, "sha256", digest)
        assert not path.exists()
        return
    download.fetch(url, path, "sha256", digest)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_broken_download_goes_on_in_another_call_and_nothing_is_overwritten(
    tmp_path: Path, serve: Callable[..., str]
) -> None:
    asked: list[int] = []

    def once(_: int, first: int) -> tuple[bytes, int]:
        asked.append(first)
        return CONTENT[first:], len(CONTENT) - first

    url, digest, path = serve({"/file": once}) + "/file", hashlib.sha256(CONTENT).hexdigest(), tmp_path / "file"
    (tmp_path / ".file.part").write_bytes(CONTENT[:1_234_567])
    download.fetch(url, path, "sha256", digest)
    assert (asked, path.read_bytes()) == ([1_234_567], CONTENT)
    download.fetch(url, path, "sha256", digest)
    assert len(asked) == 1
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"is not the file of .* move it away"):
        download.fetch(url, path, "sha256", digest)
    assert path.read_bytes() == b"mine"


def test_a_dump_is_checked_by_the_list_beside_it(tmp_path: Path, serve: Callable[..., str]) -> None:
    source = tomllib.loads((ROOT / "data_prep" / "sources.toml").read_text())["wikipedia"]
    names, name = {"wiki": "enwiki", "date": "20261101"}, "enwiki-20261101-pages-articles-multistream.xml.bz2"
    sums = f"{'0' * 40}  enwiki-20261101-other\n{hashlib.sha1(CONTENT).hexdigest()}  {name}\n".encode()
    folder = "/enwiki/20261101"
    listed = {f"{folder}/enwiki-20261101-sha1sums.txt": lambda _, first: (sums[first:], len(sums) - first)}
    mirror = serve({f"{folder}/{name}": drops, **listed})
    download.download(source, tmp_path, names, mirror)
    assert (tmp_path / name).read_bytes() == CONTENT
    with pytest.raises(NotReachable, match=r"20261102-sha1sums\.txt: HTTP 404"):
        download.download(source, tmp_path, names | {"date": "20261102"}, mirror)


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.setattr(sys, "argv", ["download", "squad", "--to", str(tmp_path), "--mirror", "http://127.0.0.1:9"])
    said = []
    monkeypatch.setattr(sys, "stderr", type("Err", (), {"write": lambda self, text: said.append(text)})())
    assert download.main() == 7
    line = "".join(said)
    assert "train-v1.1.json cannot be fetched ([Errno 111] Connection refused): without a network, fetch it" in line
    assert line.count("\n") == 1


def test_the_tasks_files_are_what_their_readers_take(tmp_path: Path) -> None:
    rows = [f'{n % 2}\t{n}\t{n + 100}\tFirst {n}.\tSecond "{n}.' for n in range(6)]
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    (tmp_path / "msr_paraphrase_train.txt").write_bytes("\r\n".join(["\ufeff" + header, *rows, ""]).encode())
    (tmp_path / "mrpc_dev_ids.tsv").write_text("1\t101\n4\t104\n")
    download.split_mrpc(tmp_path)
    assert (tmp_path / "dev.tsv").read_text().splitlines() == [header, rows[1], rows[4]]
    assert (tmp_path / "train.tsv").read_text().splitlines() == [header, rows[0], rows[2], rows[3], rows[5]]
    with zipfile.ZipFile(tmp_path / "SST-2.zip", "w") as archive:
        for name in ("train.tsv", "dev.tsv", "test.tsv"):
            archive.writestr(f"SST-2/{name}", name)
    download.unpack_sst2(tmp_path)
    assert (tmp_path / "dev.tsv").read_text() == "dev.tsv"
