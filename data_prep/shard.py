"""Stage ``shard``: documents -> text shards of one sentence a line, balanced by bytes, a test part held out.

Bounded memory: a first pass keeps 25 bytes a document (where it starts, how long it is, which split), the second
streams; between them what repeats is found, and what of general text is replayed. The bytes depend on the documents and
the settings only, not on workers, kills or reruns.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep import manifest, overlap, repeats
from data_prep.errors import DataError
from data_prep.fanout import Job, once, run_all
from data_prep.publish import publish_bytes, publishing
from data_prep.sentences import splitter as make_splitter

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")
# Further values of the split column: a document without a word, one that is left out, and general text to be replayed,
# of which a part comes to the training split.
EMPTY, REPEATED, REPLAY, UNUSED = 2, 3, 4, 5
LEFT_OUT = {REPEATED: "repeats an earlier document", UNUSED: "beyond the share to replay"}
RUNS_PER_SHARD = 64
"""A shard is filled with about this many runs of neighbouring documents: long enough to read in sequence, short
enough that every shard sees the whole corpus and that shards differ in size by 2 % at most."""

INDEX = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("split", "u1"), ("draw", "<u4"), ("lines", "<u4")])  # long ones


@dataclass(frozen=True)
class Span:
    """Documents ``first`` to ``last - 1`` of one documents file (counting those of all splits)."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class ShardPlan:
    """One text shard to write."""

    name: str
    split: Split
    spans: tuple[Span, ...]
    bytes: int


def run(
    job: Job,
    *,
    documents: Path,
    language: str,
    splitter: str,
    train_shards: int,
    test_shards: int,
    test_fraction: float,
    seed: int,
    deduplicate: bool = False,
    replay: Sequence[str] = (),
    replay_share: float = 0.0,
    evaluation: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write ``train-00000.txt …``, ``test-00000.txt …`` and ``manifest.json`` into ``job.out``.

    Lines are sentences, a blank line ends a document. ``test_fraction`` of the documents, chosen by a hash of
    (seed, document id), go to the test shards. Documents and long lines that repeat an earlier one are counted, and
    left out with ``deduplicate``. Of the corpora named in ``replay`` so many documents are taken, chosen by the same
    hash and all for training, that they make ``replay_share`` of the training text, or all where they are less.
    Of the ``evaluation`` files it is said how many of their texts stand in the training text; the shards do not
    depend on them. Returns the counts of the manifest without its file list.
    Raises DataError for an unreadable document (file and line named) or too few documents for the shards.
    """
    make_splitter(language, splitter)  # refuse an unknown one before reading gigabytes
    sought = overlap.wanted(tuple(evaluation), language, splitter)
    extracted = manifest.read_manifest(documents)
    source, files = manifest.data_sha256(extracted), extracted["files"]
    left_out: dict[str, Any] = {"deduplicate": True} if deduplicate else {}
    left_out |= {"replay": sorted(replay), "share": replay_share} if replay else {}
    general = tuple(Path(name).name for name in replay)
    identity = manifest.identity_of(source=source, language=language, splitter=splitter, seed=seed, **left_out)
    index_identity = manifest.identity_of(
        format=2, source=source, test_fraction=test_fraction, seed=seed, general=general
    )
    counts = run_all(
        functools.partial(_index, documents, job.out, test_fraction, seed, general, index_identity),
        files,
        job.workers,
        None,
        [entry["bytes"] for entry in files],
    )
    job.say(f"{sum(row['documents'] for row in counts)} documents in {len(files)} files indexed")
    names = [str(entry["file"]) for entry in files]
    repeated = once(_select, job.out, names, deduplicate, replay_share)
    repetitions = (
        f"{repeated['documents']} documents and {repeated['lines']} long lines repeat an earlier one: "
        + ("left out" if deduplicate else "kept, data.deduplicate = true leaves them out")
        + f"; {repeated['test_lines_in_train']} of {repeated['test_lines']} long lines held out are in training, too"
    )
    job.say(repetitions)
    indexes = {name: np.load(_path(job.out, name, "chosen")) for name in names}
    if replay:
        unused = sum(int((index["split"] == UNUSED).sum()) for index in indexes.values())
        full = "" if unused else f": there is no more, data.replay_share = {replay_share:g} may not be reached"
        job.say(f"{', '.join(general)}, to be replayed: {unused} documents left out{full}")
    plans = plan(indexes, "train", train_shards)
    if test_fraction > 0:
        plans += plan(indexes, "test", test_shards)
    for split, wanted in (("train", train_shards), ("test", test_shards)):
        count = sum(shard.split == split for shard in plans)
        if 0 < count < wanted:
            job.say(f"{count} {split} shards instead of {wanted}: there are not enough documents for more")
    shards = run_all(
        functools.partial(_write, documents, job.out, language, splitter, tuple(evaluation), identity),
        plans,
        job.workers,
        lambda done, total: job.say(f"{done} of {total} text shards written", done / total),
        [plan.bytes for plan in plans],
    )
    met = {number for shard in shards for number in shard.pop("evaluation")}
    totals = _totals(counts, shards, indexes.values())
    totals |= {"repeated": {**repeated, "left_out": deduplicate}, "notes": [repetitions]}
    once(_finish, job.out, {"format": 1, "language": language, "source_manifest": source, "shards": shards, **totals})
    for row, line in overlap.told(sought, met):  # not in the manifest, which says which data these are
        job.say(line)
        totals.setdefault("evaluation", []).append(row)
        totals["notes"].append(line)
    return totals


def held_out(document_id: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the test part: a property of its id alone, stable when others come or go."""
    return _draw(document_id, seed) < fraction * 2.0**64


def _draw(document_id: str, seed: int) -> int:
    """64 bits that look random and depend on the document's id and the seed alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{document_id}".encode(), digest_size=8).digest(), "big")


def replay_bound(indexes: Sequence[NDArray[Any]], share: float) -> int:
    """Replayed documents with a draw below this make ``share`` of the training text, all of them at most."""
    own, general = (sum(int(i["bytes"][i["split"] == split].sum()) for i in indexes) for split in (0, REPLAY))
    return min(1 << 32, int(2.0**32 * share / (1 - share) * own / general)) if general else 0


def plan(indexes: dict[str, NDArray[Any]], split: Split, shards: int) -> list[ShardPlan]:
    """Give every document of ``split`` to one of ``shards`` shards: each run of neighbours to the lightest.

    ``indexes``: file name -> INDEX array. Shards get at least two documents each (a pair with a random next
    sentence needs another document) and differ by less than one run or one document in bytes.
    There are fewer shards where there are too few documents. Raises DataError when there are fewer than two.
    """
    names = list(indexes)
    chosen = [np.flatnonzero(index["split"] == SPLITS.index(split)) for index in indexes.values()]
    file = np.repeat(np.arange(len(names)), [len(numbers) for numbers in chosen])
    number = np.concatenate([*chosen, np.zeros(0, np.int64)])
    sizes = np.concatenate(
        [np.zeros(0, np.int64), *(index["bytes"][rows] for index, rows in zip(indexes.values(), chosen, strict=True))]
    )
    if len(sizes) < 2:
        every = sum(map(len, indexes.values()))
        advice = (
            f"set data.test_fraction to {min(0.5, 6 / every):.2f}" if every > 4 and split == "test" else "more text"
        )
        raise DataError(f"{len(sizes)} {split} documents of {every} are too few, two are needed at least: {advice}")
    shards = min(shards, len(sizes) // 2)
    starts = np.cumsum(sizes) - sizes
    bucket = starts // max(1, sizes.sum() // (RUNS_PER_SHARD * shards))
    if len(np.unique(bucket)) < 2 * shards:
        bucket = np.arange(len(sizes))
    # a run ends where the bucket or the file changes
    first = np.flatnonzero(np.diff(bucket, prepend=-1).astype(bool) | np.diff(file, prepend=-1).astype(bool))
    last = np.append(first[1:], len(sizes))
    run_bytes = np.add.reduceat(sizes, first)
    lightest = [(False, 0, shard) for shard in range(shards)]  # (has two documents, bytes, shard)
    held, weights = [0] * shards, [0] * shards
    spans: list[list[Span]] = [[] for _ in range(shards)]
    for begin, end, size in zip(first.tolist(), last.tolist(), run_bytes.tolist(), strict=True):
        _, weight, shard = heapq.heappop(lightest)
        spans[shard].append(Span(names[file[begin]], int(number[begin]), int(number[end - 1]) + 1))
        held[shard] += end - begin
        weights[shard] += size
        heapq.heappush(lightest, (held[shard] >= 2, weight + size, shard))
    return [
        ShardPlan(f"{split}-{shard:05d}.txt", split, tuple(spans[shard]), weights[shard]) for shard in range(shards)
    ]


def _path(out: Path, name: str, what: str) -> Path:
    """What is kept of a documents file: the INDEX ("index") of all its documents, of those "chosen" after repetitions
    were left out, the "rows" of `repeats`, the numbers of its long lines left out as "repeated", ascending.
    """
    return out / f".{name}.{what}.npy"


def _index(
    documents: Path, out: Path, fraction: float, seed: int, general: Sequence[str], identity: str, entry: dict[str, Any]
) -> dict[str, int]:
    """First pass over one documents file: where each document starts, its bytes of text, its split."""
    name = str(entry["file"])
    path = _path(out, name, "index")
    if (facts := manifest.noted(path, identity)) is not None and _path(out, name, "rows").exists():
        return facts  # without rows it was killed while it tidied up
    manifest.verify(documents, [entry])
    found: list[tuple[int, ...]] = []  # as INDEX has them
    whole: list[tuple[int, int]] = []  # as `repeats.ROW`
    long: list[tuple[int, int]] = []
    offset, origin = 0, documents / name
    with open(origin, "rb") as file:
        for line_number, line in enumerate(file, 1):
            document_id, text, source = _parse(line, origin, line_number)
            own, *others = repeats.rows_of(text.encode())
            whole.append(own)
            long += others
            split = REPLAY if source in general else int(held_out(document_id, fraction, seed))
            split = split if text.strip() else EMPTY
            found.append((offset, own[1], split, _draw(document_id, seed) >> 32, len(others)))
            offset += len(line)
    index = np.array(found, INDEX)
    _publish(_path(out, name, "rows"), np.array(whole + long, repeats.ROW))
    _publish(path, index)
    facts = {"documents": len(index), "skipped_empty": int((index["split"] == EMPTY).sum())}
    manifest.note(path, identity, facts)
    return facts


def _publish(path: Path, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    publish_bytes(path, buffer.getbuffer())


def _select(out: Path, names: Sequence[str], deduplicate: bool, share: float) -> dict[str, int]:
    """Count what repeats in all documents files, and choose what makes the ``share`` to replay.

    Writes for each file its index with those marked that are left out, and the numbers of its lines that are.
    """
    loaded = {name: np.load(_path(out, name, "index")) for name in names}
    names = sorted(names, key=lambda name: bool((loaded[name]["split"] == REPLAY).any()))  # one's own text is kept
    indexes = [loaded[name] for name in names]
    rows = [np.load(_path(out, name, "rows"), mmap_mode="r") for name in names]
    splits = [np.where(index["split"] == REPLAY, 0, index["split"]) for index in indexes]
    counts, documents, lines = repeats.find(splits, [index["lines"] for index in indexes], rows)
    if not deduplicate:
        documents[:], lines[:] = False, False
    document = line = 0
    for name, index, row in zip(names, indexes, rows, strict=True):
        again = np.flatnonzero(lines[line : (line := line + len(row) - len(index))])
        owner = np.repeat(np.arange(len(index)), index["lines"])[again]
        np.subtract.at(index["bytes"], owner, row["bytes"][len(index) + again].astype(np.int64) + 1)
        nothing_left = (index["split"] != EMPTY) & (index["bytes"] <= 0)
        index["split"][documents[document : (document := document + len(index))] | nothing_left] = REPEATED
        _publish(_path(out, name, "repeated"), again)
    bound = replay_bound(indexes, share)
    for name, index in zip(names, indexes, strict=True):
        general = index["split"] == REPLAY
        drawn = general & (index["draw"].astype(np.int64) < bound)
        index["split"][general], index["split"][drawn] = UNUSED, 0
        _publish(_path(out, name, "chosen"), index)
    return counts


def _parse(line: bytes, path: Path, number: int) -> tuple[str, str, str]:
    """Id, text and the name of the corpus of a document."""
    try:
        document = json.loads(line.decode())
        document_id, text = document["id"], document["text"]
        if not (isinstance(document_id, str) and isinstance(text, str)):
            raise TypeError("id and text must be strings")
        if not (document_id.isascii() and text.isascii()):
            f"{document_id}{text}".encode()  # a lone surrogate cannot be written
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} line {number} is not a document ({error}): run the extract stage again") from None
    return document_id, text, str(document.get("source")).partition("/")[0]


def _documents(folder: Path, out: Path, split: Split, spans: Sequence[Span]) -> Iterator[str]:
    """Texts of the spans' documents that belong to ``split``, without lines that are left out; one at a time."""
    wanted = SPLITS.index(split)
    for span in spans:
        index = np.load(_path(out, span.file, "chosen"), mmap_mode="r")
        repeated = set(np.load(_path(out, span.file, "repeated")).tolist())
        first_line = np.cumsum(index["lines"], dtype=np.int64) - index["lines"]
        numbers = span.first + np.flatnonzero(index["split"][span.first : span.last] == wanted)
        origin, position = folder / span.file, -1
        with open(origin, "rb") as file:
            for number, start in zip(numbers.tolist(), index["offset"][numbers].tolist(), strict=True):
                if position != start:
                    file.seek(start)
                line = file.readline()
                position = start + len(line)
                text = _parse(line, origin, number + 1)[1]
                yield repeats.without(text, repeated, int(first_line[number])) if repeated else text


def _write(
    documents: Path,
    out: Path,
    language: str,
    splitter: str,
    evaluation: tuple[Path, ...],
    identity: str,
    plan: ShardPlan,
) -> dict[str, Any]:
    """Second pass: write one text shard, unless an earlier try finished it, and find evaluation texts in it."""
    path = out / plan.name
    sought = overlap.wanted(evaluation if plan.split == "train" else (), language, splitter)
    spans = [[s.file, s.first, s.last] for s in plan.spans]
    identity = manifest.identity_of(base=identity, spans=spans, evaluation=sought.sha256)
    if (facts := manifest.noted(path, identity)) is not None:
        return facts
    split = make_splitter(language, splitter)
    digest = hashlib.sha256()
    met: set[int] = set()
    written = documents_done = sentences_done = words = 0
    with publishing(path) as file:
        for text in _documents(documents, out, plan.split, plan.spans):
            sentences = [sentence for paragraph in text.split("\n") for sentence in split(paragraph)]
            data = ("\n".join(sentences) + "\n\n").encode()
            file.write(data)
            digest.update(data)
            if sought.numbers:
                met |= overlap.sentences_in(data, sought)
            written += len(data)
            documents_done += 1
            sentences_done += len(sentences)
            words += data.count(b" ") + len(sentences)  # single blanks between words, as splitters promise
    facts = {
        "file": plan.name,
        "split": plan.split,
        "documents": documents_done,
        "sentences": sentences_done,
        "words": words,
        "bytes": written,
        "sha256": digest.hexdigest(),
        "evaluation": sorted(met),
    }
    manifest.note(path, identity, facts)
    return facts


def _totals(
    counts: list[dict[str, int]], shards: list[dict[str, Any]], indexes: Iterable[NDArray[Any]]
) -> dict[str, Any]:
    left_out = sum((Counter(index["split"].tolist()) for index in indexes), Counter())
    skipped = {"no text": left_out[EMPTY]}
    skipped |= {LEFT_OUT[split]: left_out[split] for split in LEFT_OUT if left_out[split]}
    totals: dict[str, Any] = {"documents_in": sum(row["documents"] for row in counts), "skipped": skipped}
    for split in SPLITS:
        own = [shard for shard in shards if shard["split"] == split]
        totals[split] = {
            key: sum(shard[key] for shard in own) for key in ("documents", "sentences", "words", "bytes")
        } | {"shards": len(own)}
    lost = totals["documents_in"] - sum(totals["skipped"].values())
    lost -= totals["train"]["documents"] + totals["test"]["documents"]
    assert lost == 0, f"{lost} documents lost"
    return totals


def _finish(out: Path, value: dict[str, Any]) -> None:
    manifest.finish(out, value)
    for path in out.glob(".*.npy"):
        path.unlink(missing_ok=True)
