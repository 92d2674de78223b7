"""``python -m data_prep.download wikipedia --date 20261101 | squad | mrpc | sst2``: the files that the recipes name.

What to fetch stands in ``data_prep/sources.toml``. A download that broke off goes on where it was, also in another
call; a file appears under its name when its published digest matches. No stage ever downloads.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import http.client
import io
import os
import shutil
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from data_prep.errors import DataError
from data_prep.publish import publish_bytes, publish_text, sync_folder
from data_prep.sample_text.packages import NotReachable

TRIES = 5  # in a row that bring nothing
WAIT_S, TIMEOUT_S = 2.0, 60.0
CHUNK = 1 << 20
AGENT = {"User-Agent": "bert-slurm-pipeline/0.1", "Accept-Encoding": "identity"}


def main() -> int:
    known = tomllib.loads((Path(__file__).parent / "sources.toml").read_text(encoding="utf-8"))
    options = argparse.ArgumentParser(prog="python -m data_prep.download", description=__doc__)
    add = options.add_argument
    add("source", choices=list(known))
    add("--to", type=Path, default=Path("data"), metavar="DIR", help="the --data of submit (data)")
    add("--date", metavar="YYYYMMDD", help="of the dump: https://dumps.wikimedia.org/enwiki lists them")
    add("--wiki", default="enwiki", help="dewiki, simplewiki, … (enwiki)")
    add("--mirror", metavar="URL", help="instead of https://HOST, before the paths of sources.toml")
    chosen = options.parse_args()
    if chosen.source == "wikipedia" and not (chosen.date or "").isdecimal():
        options.error("wikipedia needs --date YYYYMMDD; https://dumps.wikimedia.org/enwiki lists what there is")
    try:
        download(known[chosen.source], chosen.to, {"wiki": chosen.wiki, "date": chosen.date}, chosen.mirror)
        if after := AFTER.get(chosen.source):
            after(chosen.to / chosen.source)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 6)
    return 0


def download(source: dict[str, Any], to: Path, names: dict[str, str], mirror: str | None) -> None:
    """All files of a source, below ``to``. Raises NotReachable (exit 7), DataError for a wrong digest, OSError."""
    for file in source["files"]:
        path = to / file["to"].format(**names)
        path.parent.mkdir(parents=True, exist_ok=True)
        url, sums = (_at(mirror, file[key].format(**names)) if key in file else "" for key in ("url", "sha1sums"))
        fetch(url, path, "sha1" if sums else "sha256", _listed(sums, path.name) if sums else file["sha256"])
    print(f"licence: {source['licence']}")


def fetch(url: str, path: Path, algorithm: str, digest: str) -> None:
    """``url`` as ``path``, whole and with this digest or not at all; a file that is there is never overwritten.

    What has come is kept as ``.NAME.part`` and completed by the next try or call. A whole file with another digest is
    fetched once more from its beginning: it may have been changed in between.
    """
    if path.exists():
        if _digest(path, algorithm) != digest:
            raise DataError(f"{path} is there but is not the file of {url} ({algorithm} {digest[:12]}..): move it away")
        print(f"{path}: already there and whole")
        return
    part = path.with_name(f".{path.name}.part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{path} is being downloaded by another process: wait for it") from None
        for again in (False, True):
            _complete(url, file, path)
            file.flush()
            os.fsync(file.fileno())
            if (actual := _digest(part, algorithm)) == digest:
                os.replace(part, path)
                sync_folder(path.parent)
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {algorithm} as published")
                return
            size = part.stat().st_size
            file.truncate(0)
            if not again:
                print(f"{path}: {size} bytes with another {algorithm} than published, fetched once more")
    part.unlink()
    raise DataError(
        f"{url} gave {size} bytes with {algorithm} {actual[:12]}.., published is {digest[:12]}..: it was changed or a "
        "proxy answers; try another --mirror"
    )


def _complete(url: str, file: IO[bytes], path: Path) -> None:
    """Append to ``file`` what it lacks of ``url``, over as many connections as that takes."""
    fruitless, most, problem = 0, 0, ""
    while fruitless < TRIES:
        if fruitless:
            time.sleep(WAIT_S * 2 ** (fruitless - 1))
        before = file.seek(0, os.SEEK_END)
        request = urllib.request.Request(url, headers=AGENT | ({"Range": f"bytes={before}-"} if before else {}))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                if before and not str(answer.headers["Content-Range"]).startswith(f"bytes {before}-"):
                    file.truncate(before := 0)  # it gives the whole file, from its beginning
                promised = answer.headers["Content-Length"]
                if _copy(answer, file, int(promised) if promised else None, path):
                    return
            problem = f"it ended after {file.tell()} bytes and promised {before + int(promised)}"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is lacking, or what is here is longer than what it has
                return
            if error.code < 500 and error.code != 429:
                raise NotReachable(f"{url}: HTTP {error.code} {error.reason}: is there such a file?") from None
            problem = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "filename", None) or getattr(error, "errno", None) == 28:
                raise
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
        fruitless = 0 if (now := file.seek(0, os.SEEK_END)) > most else fruitless + 1
        most = max(most, now)
    raise NotReachable(
        f"{url} cannot be fetched ({problem}): without a network, fetch it elsewhere and put it to {path}; "
        f"{file.tell()} bytes are kept"
    )


def _copy(answer: IO[bytes], file: IO[bytes], size: int | None, path: Path) -> bool:
    """Append ``answer``; whether it was whole. Raises DataError before the disk is full."""
    if size and size > (free := shutil.disk_usage(path.parent).free):
        raise DataError(f"{path}: {size / 1e6:.0f} MB are to come and {free / 1e6:.0f} MB are free")
    copied, last_share = 0, 0
    while chunk := answer.read(CHUNK):
        file.write(chunk)
        copied += len(chunk)
        if size and (share := 20 * copied // size) > last_share and size > 100 * CHUNK:
            last_share = share
            print(f"{path}: {copied / 1e6:.0f} of {size / 1e6:.0f} MB")
    return size is None or copied >= size


def _listed(url: str, name: str) -> str:
    """The digest of ``name`` in a list that ``sha1sum`` wrote."""
    text = io.BytesIO()
    _complete(url, text, Path(name))
    rows = [line.split() for line in text.getvalue().decode(errors="replace").splitlines()]
    digests = [row[0] for row in rows if len(row) == 2 and row[1].lstrip("*") == name]
    if len(digests) != 1:
        raise DataError(f"{url} does not list {name}: the dump may still be in the making, take an earlier --date")
    return digests[0]


def _at(mirror: str | None, url: str) -> str:
    parts = urlsplit(url)
    return mirror.rstrip("/") + parts.path if mirror else url


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def unpack_sst2(folder: Path) -> None:
    """``train.tsv`` and ``dev.tsv`` out of SST-2.zip."""
    with zipfile.ZipFile(folder / "SST-2.zip") as archive:
        for name in ("train.tsv", "dev.tsv"):
            publish_bytes(folder / name, archive.read(f"SST-2/{name}"))


def split_mrpc(folder: Path) -> None:
    """``train.tsv`` and ``dev.tsv`` out of Microsoft's training part, cut as GLUE's download script does."""
    header, *rows = (folder / "msr_paraphrase_train.txt").read_text(encoding="utf-8-sig").strip().split("\n")
    ids = (folder / "mrpc_dev_ids.tsv").read_text(encoding="utf-8").split("\n")
    wanted = {tuple(row) for row in csv.reader(ids, delimiter="\t")}
    held_out = [tuple(row.split("\t")[1:3]) in wanted for row in rows]
    for name, is_dev in (("train.tsv", False), ("dev.tsv", True)):
        chosen = [row.strip() for row, dev in zip(rows, held_out, strict=True) if dev == is_dev]
        publish_text(folder / name, "\n".join([header.strip(), *chosen]) + "\n")


AFTER: dict[str, Callable[[Path], None]] = {"sst2": unpack_sst2, "mrpc": split_mrpc}

if __name__ == "__main__":
    sys.exit(main())
