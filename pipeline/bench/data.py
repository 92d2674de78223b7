"""``python -m pipeline.bench data``: speed and memory of each data stage on one core, beside what others use.

Prints the page docs/data.md, or with ``--json`` its figures. The text is the sample corpus, its export repeated to
``--mb`` of XML. Speeds are by processor time, so that a busy machine disturbs them little.
"""

from __future__ import annotations

import argparse
import bz2
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_prep import extract, samples, shard, wordpiece
from data_prep.dumpfile import Seam
from data_prep.manifest import read_manifest
from data_prep.wikipedia import pages
from data_prep.wikitext import clean

Row = dict[str, Any]
LANGUAGE = {"lowercase": True, "strip_accents": True}
WIKIPEDIA = {"xml": 100_000, "text": 20_000}  # MB of the English one, markup and prose, roughly
INTRODUCTION = """\
# Data preparation: speed, memory, and what the English Wikipedia takes

Written by `python -m pipeline.bench data --mb {xml_mb} > docs/data.md`. One process, its processor time (user and
system), peak of its memory.
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
    chosen = parser.parse_args(arguments)
    dump = chosen.data / "enwiki-sample.xml.bz2"
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        rows = [*stages(dump, Path(folder), chosen.mb)]
        figures = {"xml_mb": chosen.mb, "stages": rows, "beside": beside(dump, Path(folder) / "vocab" / "vocab.txt")}
    print(json.dumps(figures) if chosen.json else "\n".join(page(figures)).removesuffix("\n"))
    return 0


def stages(dump: Path, folder: Path, mb: int) -> Iterator[Row]:
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
        yield {"stage": name, "mb": size_mb(source), **alone(run, folder / name.replace(" ", "_"), settings)}


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


def alone(run: Callable[..., Any], out: Path, settings: Mapping[str, Any]) -> Row:
    """Run a stage in a process of its own: seconds of its processor, MB at its peak, rows of samples."""
    out.mkdir()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cpu_s, peak_mb = pool.apply(_measure, (run, out, dict(settings)))
    made = read_manifest(out).get("train", {}).get("rows", 0) if (out / "manifest.json").exists() else 0
    return {"cpu_s": cpu_s, "peak_mb": peak_mb, "samples": made}


def _measure(run: Callable[..., Any], out: Path, settings: dict[str, Any]) -> tuple[float, float]:
    run(SimpleNamespace(out=out, workers=1, say=lambda line, share=None: None), **settings)
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    yield "| stage | reads, MB | s | MB/s | samples/s | peak, MB |\n|---|---|---|---|---|---|"
    total_h, text = 0.0, next(row["mb"] for row in figures["stages"] if row["stage"] == "shard")
    for row in figures["stages"]:
        rate, cpu_s = row["mb"] / row["cpu_s"], row["cpu_s"]
        made = f"{row['samples'] / cpu_s:,.0f}" if row["samples"] > 0 else ""
        yield f"| {row['stage']} | {row['mb']:.0f} | {cpu_s:.1f} | {rate:.1f} | {made} | {row['peak_mb']:.0f} |"
        whole = WIKIPEDIA["xml"] if row["stage"] == "extract" else WIKIPEDIA["text"]
        total_h += (min(whole, 200) if row["stage"] == "vocab" else whole) / rate / 3600
    yield "\n| beside each other | MB | MB/s |\n|---|---|---|"
    for row in figures["beside"]:
        yield f"| {row['what']} | {row['mb']:.1f} | {row['mb_per_s']:.1f} |"
    yield WHOLE.format(hours=total_h, hours16=total_h / 16, share=text / figures["xml_mb"])
