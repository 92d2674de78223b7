"""Stage ``extract``: Wikipedia exports, books and JSON lines to files of documents with a manifest.

Inputs are cut into parts of fixed size, each part becomes its own files; so the bytes do not depend on how many
processes work, and a part that an earlier, killed try finished is kept.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep import books, dumpfile, formats, manifest, records, wikipedia
from data_prep.document import Document, DocumentFiles, Tally, printable
from data_prep.dumpfile import Seam, check_seams
from data_prep.errors import DataError
from data_prep.fanout import Job, once, run_all, tasks
from data_prep.publish import file_sha256

PART_BYTES = 32_000_000
COMPRESSED_PART_BYTES = 8_000_000
FAULTS = 20  # named at once
LOOKED_AT = 1000  # books of a folder, before a job begins
FORMAT = 3  # raise it when the same input gives other documents


@dataclass(frozen=True)
class Part:
    """One piece of an input, worked on by one process."""

    kind: str  # wikipedia | books | text | lines | docs | json | table | parquet
    path: Path
    number: int = 0
    start: int = 0
    end: int = 0
    files: tuple[Path, ...] = ()  # of a folder of books
    site: wikipedia.Site | None = None
    sha256: str = ""  # of the input
    piece: Path | None = None  # of a compressed stream: its text from start to end


def run(
    job: Job,
    *,
    wikipedia: list[Path],
    books: list[Path],
    jsonl: list[Path],
    max_document_mb: float,
    text_column: str = "text",
) -> dict[str, Any]:
    """Write ``documents-….jsonl`` and ``manifest.json`` into ``job.out``; return counts, inputs and skips.

    `wikipedia`: MediaWiki exports; `books`: folders of text files, or files of documents between blank lines, of a
    sentence a line, or of WikiExtractor; `jsonl`: records with a text in `text_column`: JSON lines, CSV, TSV, Parquet.
    All but Parquet may be compressed (gz, bz2, xz, zst). Documents over `max_document_mb` are skipped and counted.
    Raises DataError naming all inputs that cannot be read whole, and when nothing is left.
    """
    # Every input by its kind: what cannot be read is named for all of them at once, before any work.
    inputs = _inputs(wikipedia, books, jsonl)
    described = run_all(_describe, inputs, job.workers)
    _refuse(described)
    # Parts of about the same size, the units of sharing and of going on after a kill.
    parts = [
        replace(part, number=number)
        for number, part in enumerate(
            part for entry, facts in zip(inputs, described, strict=True) for part in _parts(entry, facts)
        )
    ]
    job.say(f"{len(inputs)} inputs, {sum(facts['bytes'] for facts in described) / 1e6:.1f} MB, {len(parts)} parts")
    every = max(1, len(parts) // 20)

    def progress(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            job.say(f"{done} of {total} parts read", done / total)

    results = run_all(
        functools.partial(_read, job.out, max_document_mb, text_column),
        parts,
        job.workers,
        progress,
        [_size(part) for part in parts],
    )
    # A dump of one stream is unpacked only now, piece by piece: a part for each.
    for (kind, path), entry in zip(inputs, described, strict=True):
        if kind == "wikipedia" and dumpfile.is_one_stream(path):
            read = functools.partial(_read, job.out, max_document_mb, text_column)
            for part, result in _read_stream(job, path, str(entry["sha256"]), len(parts), read):
                parts.append(part)
                results.append(result)
    _refuse(results)
    facts: dict[str, Any] = once(_finish, job.out, inputs, described, parts, results)
    for line in facts.pop("said"):
        job.say(line)
    return facts


def check(
    *,
    wikipedia: Sequence[Path],
    books: Sequence[Path],
    jsonl: Sequence[Path],
    max_document_mb: float,
    text_column: str = "text",
) -> None:
    """DataError for what is wrong at first sight, of a folder in the first `LOOKED_AT` books."""
    _refuse([_look(entry, text_column, max_document_mb) for entry in _inputs(wikipedia, books, jsonl)])


def _inputs(wikipedia: Sequence[Path], books: Sequence[Path], jsonl: Sequence[Path]) -> list[tuple[str, Path]]:
    inputs = [("wikipedia", path) for path in wikipedia]
    inputs += [("books" if path.is_dir() else "text", path) for path in books]
    inputs += [("jsonl", path) for path in jsonl]
    names = [path.name for _, path in inputs]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two inputs are called {name}: rename one, documents carry the name of their input")
    for kind, path in inputs:
        if kind != "books" and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"{path} is {what}; only data.books may name a folder, everything else is read as a file")
    return inputs


def _look(entry: tuple[str, Path], column: str, max_document_mb: float) -> dict[str, Any]:
    kind, path = entry
    faults = []
    for file in books.book_files(path)[:LOOKED_AT] if kind == "books" else [path]:
        try:
            if kind == "wikipedia":
                wikipedia.read_site(path)
            elif kind == "jsonl":
                records.look(path, column, max_document_mb)
            else:
                books.form(file)
        except DataError as error:
            faults.append(str(error))
    return {"faults": faults}


def _refuse(results: list[dict[str, Any]]) -> None:
    """Raise DataError for all that could not be read, each by file and place."""
    if faults := [fault for result in results for fault in result.get("faults", [])]:
        more = f" | and {len(faults) - FAULTS} more" if len(faults) > FAULTS else ""
        count = f"{len(faults)} files cannot be read: " if len(faults) > 1 else ""
        raise DataError(count + " | ".join(faults[:FAULTS]) + more)


def _describe(entry: tuple[str, Path]) -> dict[str, Any]:
    """Name, size, SHA-256 and form of an input; of a folder the digest of its files' names and digests."""
    kind, path = entry
    if kind != "books":
        try:
            form = books.form(path) if kind == "text" else records.kind(path) if kind == "jsonl" else kind
        except DataError as error:
            return {"faults": [str(error)]}
        size = path.stat().st_size
        groups = {"row_groups": int(records.parquet_file(path).num_row_groups)} if form == "parquet" else {}
        return {"name": path.name, "form": form, "bytes": size, "sha256": file_sha256(path), **groups}
    files, faults = books.book_files(path), []
    digest = hashlib.sha256()
    for file in files:
        try:
            formats.refuse_foreign(file)
        except DataError as error:
            faults.append(str(error))
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode(errors="surrogateescape"))
    size = sum(file.stat().st_size for file in files)
    facts = {"name": path.name, "form": kind, "bytes": size, "sha256": digest.hexdigest(), "files": len(files)}
    return {**facts, "left_out": books.left_out(path), "faults": faults}


def _parts(entry: tuple[str, Path], facts: dict[str, Any]) -> Iterator[Part]:
    """The parts of an input: some books of a folder each, else ranges of its bytes or row groups."""
    path, kind, sha256, site = entry[1], str(facts["form"]), str(facts["sha256"]), None
    size, step = int(facts["bytes"]), PART_BYTES
    if kind == "books":
        group: list[Path] = []
        size = 0
        for file in books.book_files(path):
            group.append(file)
            size += file.stat().st_size
            if size >= PART_BYTES:
                yield Part(kind, path, files=tuple(group), sha256=sha256)
                group, size = [], 0
        if group:
            yield Part(kind, path, files=tuple(group), sha256=sha256)
        return
    if kind == "wikipedia":
        site = wikipedia.read_site(path)
        if dumpfile.is_one_stream(path):
            return  # its text is cut while it is unpacked
        step = COMPRESSED_PART_BYTES if formats.compression(path) else PART_BYTES
    elif kind == "parquet":
        groups = int(facts["row_groups"])
        size, step = groups, max(1, groups * PART_BYTES // max(1, size))
    elif kind == "table" or formats.compression(path):
        size = step = formats.END  # cannot be cut
    elif kind == "lines":
        step = -(-PART_BYTES // books.LINES_BYTES) * books.LINES_BYTES
    for start in range(0, size, step):
        yield Part(kind, path, start=start, end=min(start + step, size), site=site, sha256=sha256)


def _read_stream(
    job: Job, path: Path, sha256: str, number: int, read: Callable[[Part], dict[str, Any]]
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Read an export that is one compressed stream, some pieces of its text at a time; parts count from `number`."""
    size, site = path.stat().st_size, wikipedia.read_site(path)
    alone = f"one core unpacks it, about {size / dumpfile.STREAM_BYTES_PER_H:.1f} h"
    if formats.compression(path) != "bz2":
        job.say(f"{path.name} cannot be split: {alone}")
    elif not dumpfile.is_unpacked_in_parallel(path):
        advice = "pip install indexed_bzip2, or take the multistream file"
        job.say(f"{path.name} is one bz2 stream: {alone}; {advice}")
    stream = dumpfile.pieces(path, job.out, PART_BYTES, job.workers)  # cut by one task alone
    while pieces := once(_cut, stream, 2 * job.workers * tasks(os.environ)):
        parts = [
            Part("wikipedia", path, number + place, start, end, site=site, sha256=sha256, piece=Path(piece))
            for place, (piece, start, end) in enumerate(pieces)
        ]
        number += len(parts)
        yield from zip(parts, run_all(read, parts, job.workers, None, [_size(part) for part in parts]), strict=True)
        job.say(f"{path.name}: {parts[-1].end / 1e6:.0f} MB of text read")


def _cut(stream: Iterator[tuple[Path, int, int]], count: int) -> list[tuple[str, int, int]]:
    """The next pieces of a stream; none: it is read whole."""
    return [(str(piece), start, end) for piece, start, end in itertools.islice(stream, count)]


def _size(part: Part) -> int:
    """Bytes to read, roughly: what is compressed counts for what it will be."""
    if part.piece is not None:
        return part.end - part.start
    if part.files:
        return sum(file.stat().st_size for file in part.files)
    whole = part.path.stat().st_size
    share = min(part.end - part.start, whole) if part.kind != "parquet" else whole
    return share * (4 if formats.compression(part.path) else 1)


def _read(out: Path, max_document_mb: float, text_column: str, part: Part) -> dict[str, Any]:
    """Write the documents of one part, unless an earlier try finished it; return its files and counts, or faults."""
    first = out / f"documents-{part.number:05d}.jsonl"
    identity = manifest.identity_of(
        format=FORMAT,
        input=[part.kind, part.path.name, part.sha256, part.number, part.start, part.end],
        files=[str(file.relative_to(part.path)) for file in part.files],
        max_document_mb=max_document_mb,
        text_column=text_column,
    )
    known = manifest.noted(first, identity)
    if known is not None:
        try:
            manifest.verify(out, known["files"], digests=False)
            if part.piece is not None:
                part.piece.unlink(missing_ok=True)
            return known
        except DataError:
            pass  # one of several files is gone: read the part again
    tally, seam = Tally(max_document_mb), Seam()
    faults: list[str] = []
    with DocumentFiles(out, part.number, tally) as files:
        for documents in _readers(part, seam, tally, text_column):
            try:
                for document in documents:
                    files.write(document)
            except DataError as error:
                faults.append(str(error))
    if part.piece is not None:
        part.piece.unlink(missing_ok=True)
    if faults:
        return {"faults": faults}
    lost = tally.counts["articles"] - tally.counts["documents"] - sum(tally.skipped.values())
    if lost:
        raise DataError(f"{part.path}: {lost} of {tally.counts['articles']} articles are unaccounted for; report this")
    facts = {"files": files.entries, "seam": [seam.first, seam.stop], **tally.facts()}
    manifest.note(first, identity, facts)
    return facts


def _readers(part: Part, seam: Seam, tally: Tally, text_column: str) -> Iterator[Iterator[Document]]:
    """What reads the files of a part, one after the other."""
    place = (part.path, part.start, part.end)
    match part.kind:
        case "wikipedia":
            assert part.site is not None
            if part.piece is not None:
                place = (part.piece, 0, part.piece.stat().st_size)
            yield wikipedia.documents(*place, seam, tally, part.site, part.path.name)
        case "books":
            for file in part.files:
                yield books.book_documents(file, part.path, tally)
        case "text":
            yield books.text_documents(*place, tally)
        case "lines":
            yield books.line_documents(*place, tally)
        case "docs":
            yield books.extracted_documents(*place, tally)
        case "table":
            yield records.table_documents(part.path, tally, text_column)
        case "parquet":
            yield records.parquet_documents(*place, tally, text_column)
        case _:
            yield records.json_documents(*place, tally, text_column)


def _finish(
    out: Path,
    inputs: list[tuple[str, Path]],
    described: list[dict[str, Any]],
    parts: list[Part],
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """Check that nothing was lost between parts, clean up and publish the manifest."""
    total, remarks, notes = Tally(), [], []
    for (kind, path), facts in zip(inputs, described, strict=True):
        own = [result for part, result in zip(parts, results, strict=True) if part.path == path]
        tally = Tally()
        for result in own:
            tally.add(result)
        if kind == "wikipedia":
            if not dumpfile.is_one_stream(path):
                check_seams(path, [(first, stop) for first, stop in (result["seam"] for result in own)])
            if not tally.counts["pages"]:
                raise DataError(f"{path} holds no page: take a pages-articles export")
        total.add(tally.facts())
        facts["counts"], facts["skipped"] = tally.facts()["counts"], tally.facts()["skipped"]
        remarks += _remarks(facts, tally)
        notes += _notes(facts, tally)
    if not total.counts["documents"]:
        names = ", ".join(path.name for _, path in inputs)
        raise DataError(f"no document in {names}: {_reasons(total) or 'the input is empty'}")
    files = [entry for result in results for entry in result["files"] if entry["documents"]]
    keep = {entry["file"] for entry in files}
    for path in out.glob("documents-*.jsonl"):
        if path.name not in keep:
            path.unlink()
    counted = total.facts()
    manifest.finish(out, {"format": 1, "inputs": described, **counted, "files": files})
    return {"inputs": described, **counted, "notes": notes, "said": remarks + notes}


def _reasons(tally: Tally) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(tally.skipped.items()))


def _remarks(described: dict[str, Any], tally: Tally) -> list[str]:
    """What a person should know of one input, one line each."""
    name = described["name"]
    counts = tally.counts
    lines = [f"{name}: {counts['documents']} documents, {counts['words']} words of {counts['articles']} articles"]
    if counts["redirects"] or counts["pages_of_other_namespaces"]:
        other = counts["pages_of_other_namespaces"]
        lines[0] += f" ({counts['redirects']} redirects and {other} pages outside the article namespace left out)"
    for reason, count in sorted(tally.skipped.items()):
        examples = ", ".join(tally.examples[reason][:3])
        advice = "; raise data.max_document_mb to keep them" if reason.startswith("over") else ""
        lines.append(f"{name}: {count} skipped, {reason}: {examples}{' …' if count > 3 else ''}{advice}")
    return lines


def _notes(described: dict[str, Any], tally: Tally) -> list[str]:
    """What was left out of one input or repaired without being a document of its own; the report says it, too."""
    name, counts, lines = described["name"], tally.counts, []
    if tally.lost:
        most = ", ".join(f"{printable(lost, 40)} {count}" for lost, count in tally.lost.most_common(5))
        lines.append(f"{name}: {tally.lost.total()} sentences left out for templates without words, most for {most}")
    if out := described.get("left_out", []):
        names = ", ".join(map(printable, out[:5])) + (" …" if len(out) > 5 else "")
        lines.append(f"{name}: {len(out)} files are no books and left out: {names}")
    if repaired := [f"{counts[key]} {key.replace('_', ' ')}" for key in books.REPAIRS if counts[key]]:
        lines.append(f"{name}: {', '.join(repaired)}")
    if counts["books_without_blank_lines"]:
        lines.append(f"{name}: {counts['books_without_blank_lines']} books have no blank line: one document each")
    return lines
