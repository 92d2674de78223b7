"""``python -m pipeline.bench data``: speed and memory of each data stage on one core, beside what others use.

Prints the page docs/data.md, or with ``--json`` its figures. The text is the sample corpus, its export repeated to
``--mb`` of XML. Speeds are by processor time, so that a busy machine disturbs them little. Stages that share their work
run with one and with two workers by turns, and must make the same data; of ``--turns`` the least time of each counts.
"""

from __future__ import annotations

import argparse
import bz2
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_prep import extract, samples, shard, wordpiece
from data_prep.dumpfile import Seam
from data_prep.manifest import data_sha256, read_manifest
from data_prep.wikipedia import pages
from data_prep.wikitext import clean

Row = dict[str, Any]
LANGUAGE = {"lowercase": True, "strip_accents": True}
WIKIPEDIA = {"xml": 100_000, "text": 20_000}  # MB of the English one, markup and prose, roughly
INTRODUCTION = """\
# Data preparation: speed, memory, and what the English Wikipedia takes

Written by `python -m pipeline.bench data --mb {xml_mb} > docs/data.md`. One process, its processor time (user and
system), peak of its memory; what two workers and their parent take together, beside it.
"""

WHOLE = """
## The English Wikipedia

About 100 GB of XML, of which 20 GB are prose (here {share:.0%}). At the rates above, which hold for any size (parts of
32 MB, blocks of 12 MB), the stages take {hours:.1f} h of one core, {hours16:.1f} h with 16 workers where the disk keeps
up, besides unpacking bz2. A worker's memory is the peak above; vocab reads 200 MB at most. On the disk: documents and
shards 40 GB, samples of both lengths with dupe_factor 5 about 100 GB.
"""


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench data", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/sample"), help="the sample corpus (data/sample)")
    parser.add_argument("--mb", type=int, default=60, help="XML to make and read (60)")
    parser.add_argument("--json", action="store_true", help="figures instead of the page")
    parser.add_argument("--turns", type=int, default=1, help="of one and of two workers (1)")
    chosen = parser.parse_args(arguments)
    dump = chosen.data / "enwiki-sample.xml.bz2"
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        rows = [*stages(dump, Path(folder), chosen.mb, chosen.turns)]
        figures = {"xml_mb": chosen.mb, "stages": rows, "beside": beside(dump, Path(folder) / "vocab" / "vocab.txt")}
    print(json.dumps(figures) if chosen.json else "\n".join(page(figures)).removesuffix("\n"))
    return 0


def stages(dump: Path, folder: Path, mb: int, turns: int) -> Iterator[Row]:
    """One row for each stage, in the order of the chain."""
    grow(dump, folder / "grown.xml", mb)
    vocab = {"vocab": folder / "vocab" / "vocab.txt", **LANGUAGE, "dupe_factor": 5, "short_seq_prob": 0.1, "seed": 1}
    wikipedia = {"wikipedia": [folder / "grown.xml"], "books": [], "jsonl": [], "max_document_mb": 16.0}
    split = {"language": "en", "splitter": "sentencex", "train_shards": 4, "test_shards": 1, "test_fraction": 0.05}
    chain: tuple[tuple[str, Callable[..., Any], Path, dict[str, Any]], ...] = (
        ("extract", extract.run, folder / "grown.xml", wikipedia),
        ("shard", shard.run, folder / "extract", {"documents": folder / "extract", "seed": 1, **split}),
        ("vocab", wordpiece.run, folder / "shard", {"shards": folder / "shard", "vocab_size": 30522, **LANGUAGE}),
        ("samples 128", samples.run, folder / "shard", {"shards": folder / "shard", "seq_len": 128, **vocab}),
        ("samples 512", samples.run, folder / "shard", {"shards": folder / "shard", "seq_len": 512, **vocab}),
    )
    for name, run, source, settings in chain:
        row = {"stage": name, "mb": size_mb(source), **alone(run, folder / name.replace(" ", "_"), settings, 1)}
        if run is not wordpiece.run:  # training uses all processors with any number of workers
            again = [alone(run, folder / "again", settings, workers) for workers in [2, *[1, 2] * (turns - 1)]]
            row["cpu_s"] = min([row["cpu_s"], *(one["cpu_s"] for one in again[1::2])])
            row["two_workers_cpu_s"] = min(two["cpu_s"] for two in again[::2])
            if {other["data"] for other in again} != {row["data"]}:
                raise SystemExit(f"{name}: not the same data each time")
        yield row


def grow(dump: Path, path: Path, mb: int) -> None:
    """The export again and again, each page with another number, up to ``mb`` of XML."""
    xml = bz2.decompress(dump.read_bytes())
    first, last = xml.index(b"<page>"), xml.rindex(b"</mediawiki>")
    with open(path, "wb") as file:
        file.write(xml[:first])
        for copy in range(max(1, mb * 1_000_000 // len(xml))):
            file.write(xml[first:last].replace(b"<id>", b"<id>%d" % (copy + 1)))
        file.write(xml[last:])


def size_mb(path: Path) -> float:
    """MB of the files that a stage reads."""
    files = [path] if path.is_file() else [*path.glob("documents-*"), *path.glob("train-*"), *path.glob("test-*")]
    return sum(file.stat().st_size for file in files) / 1e6


def alone(run: Callable[..., Any], out: Path, settings: Mapping[str, Any], workers: int) -> Row:
    """Run a stage in a process of its own: its processor time and its workers', MB at its peak, rows of samples."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(run, out, dict(settings), workers))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)
    made = read_manifest(out) if (out / "manifest.json").exists() else {}
    figures = json.loads(out.with_suffix(".json").read_text())
    return {**figures, "samples": made.get("train", {}).get("rows", 0), "data": data_sha256(made)}


def _measure(run: Callable[..., Any], out: Path, settings: dict[str, Any], workers: int) -> None:
    run(SimpleNamespace(out=out, workers=workers, say=lambda line, share=None: None), **settings)
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    out.with_suffix(".json").write_text(json.dumps({"cpu_s": cpu_s, "peak_mb": own.ru_maxrss / 1024}))


def beside(dump: Path, vocab: Path) -> list[Row]:
    """Our cleaner and tokeniser and theirs on the same text, in turn."""
    found = [page.text for page in pages(dump, 0, dump.stat().st_size, Seam(), 1 << 24) if page.text]
    lines = [line for text in found for line in clean(text).split("\n")]
    encoder, words = wordpiece.Encoder(vocab, **LANGUAGE), wordpiece.Encoder(vocab, **LANGUAGE)
    subjects: list[tuple[str, list[str], Callable[[], object]]] = [
        ("wikitext.clean", found, lambda: [clean(text) for text in found]),
        ("WordPiece with " + encoder.backend, lines, lambda: encoder.encode(lines)),
        ("WordPiece by words", lines, lambda: words._encode_by_words(lines)),
        ("tokenizers encode_batch", lines, lambda: encoder._tokenizer.encode_batch(lines)),
    ]
    try:
        import mwparserfromhell
    except ImportError:
        pass
    else:
        parse = mwparserfromhell.parse
        subjects.append(("mwparserfromhell", found, lambda: [parse(text).strip_code() for text in found]))
    rows = []
    for name, texts, call in subjects:
        begun = time.process_time()
        call()
        spent, size = time.process_time() - begun, sum(len(text.encode()) for text in texts) / 1e6
        rows.append({"what": name, "mb": size, "mb_per_s": size / spent})
    return rows


def page(figures: Mapping[str, Any]) -> Iterator[str]:
    """The lines of docs/data.md."""
    yield INTRODUCTION.format(**figures)
    yield f"The sample export repeated to {figures['xml_mb']} MB of XML, samples with dupe_factor 5.\n"
    yield "| stage | reads, MB | s | MB/s | samples/s | peak, MB | 2 workers |\n|---|---|---|---|---|---|---|"
    total_h, text = 0.0, next(row["mb"] for row in figures["stages"] if row["stage"] == "shard")
    for row in figures["stages"]:
        rate, cpu_s = row["mb"] / row["cpu_s"], row["cpu_s"]
        made = f"{row['samples'] / cpu_s:,.0f}" if row["samples"] > 0 else ""
        two = f"{row['two_workers_cpu_s'] / cpu_s:.2f}" if "two_workers_cpu_s" in row else ""
        yield f"| {row['stage']} | {row['mb']:.0f} | {cpu_s:.1f} | {rate:.1f} | {made} | {row['peak_mb']:.0f} | {two} |"
        whole = WIKIPEDIA["xml"] if row["stage"] == "extract" else WIKIPEDIA["text"]
        total_h += (min(whole, 200) if row["stage"] == "vocab" else whole) / rate / 3600
    yield "\n| beside each other | MB | MB/s |\n|---|---|---|"
    for row in figures["beside"]:
        yield f"| {row['what']} | {row['mb']:.1f} | {row['mb_per_s']:.1f} |"
    yield WHOLE.format(hours=total_h, hours16=total_h / 16, share=text / figures["xml_mb"])
