"""MediaWiki exports: real dumps against ElementTree, parts against the whole, and damage that must never pass."""

import bz2
import gzip
import random
import resource
import time
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from data_prep import dumpfile, formats, wikipedia
from data_prep.document import Document, Tally
from data_prep.errors import DataError

HEADER = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de"><siteinfo><dbname>dewiki</dbname>'
    '<namespaces><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces>'
    "</siteinfo>\n"
)
FOOTER = "</mediawiki>\n"


def page(number: int, text: str, ns: int = 0, redirect: bool = False) -> str:
    mark = '<redirect title="x" />' if redirect else ""
    return (
        f"  <page><title>Seite {number}</title><ns>{ns}</ns><id>{number}</id>{mark}<revision><id>9</id>"
        f"<contributor><username>text</username><id>7</id></contributor><text>{escape(text)}</text></revision></page>\n"
    )


def some_pages(count: int = 60) -> list[str]:
    draw = random.Random(5)
    words = ["Hund", "Straße", "[[Datei:A.jpg|mini]]", "läuft", "{{cn}}", "'''fett'''", "日本", "<br>"]
    return [page(n, f"Text {n} " + " ".join(draw.choices(words, k=draw.randint(1, 80)))) for n in range(1, count + 1)]


def plain_export(pages: list[str]) -> bytes:
    return (HEADER + "".join(pages) + FOOTER).encode()


def streams(pages: list[str]) -> list[bytes]:
    groups = ["".join(pages[i : i + 7]) for i in range(0, len(pages), 7)]
    return [bz2.compress(part.encode()) for part in (HEADER, *groups, FOOTER)]


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "plain": plain_export,
    "gz": lambda pages: gzip.compress(plain_export(pages)),
    "bz2": lambda pages: bz2.compress(plain_export(pages)),
    "multistream": lambda pages: b"".join(streams(pages)),
}


def read(path: Path, part_bytes: int = 10**9, max_document_mb: float = 16) -> tuple[list[Document], Tally]:
    """All documents, read part by part, as the extract stage does."""
    site, tally = wikipedia.read_site(path), Tally(max_document_mb)
    found: list[Document] = []
    seams = []
    size = path.stat().st_size
    step = size if dumpfile.is_one_stream(path) else part_bytes
    for start in range(0, size, step):
        seam = dumpfile.Seam()
        found += wikipedia.documents(path, start, min(start + step, size), seam, tally, site, path.name)
        seams.append((seam.first, seam.stop))
    dumpfile.check_seams(path, seams)
    return found, tally


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def writer(data: bytes) -> Path:
        path = tmp_path / "dump.xml"
        path.write_bytes(data)
        return path

    return writer


def test_real_export_equals_elementtree(sample_dir: Path) -> None:
    path = sample_dir / "enwiki-sample.xml.bz2"
    with bz2.open(path) as file:
        root = ET.parse(file).getroot()
    theirs = [
        (p.findtext("{*}title"), p.findtext("{*}ns"), p.findtext("{*}id"), p.findtext("{*}revision/{*}text"))
        for p in root.iterfind("{*}page")
    ]
    seam = dumpfile.Seam()
    ours = [(p.title, p.ns, p.id, p.text) for p in wikipedia.pages(path, 0, path.stat().st_size, seam, 10**9)]
    assert ours == theirs
    documents, tally = read(path)
    assert tally.counts["articles"] == 106 == len(documents) + sum(tally.skipped.values())
    assert tally.counts["pages"] == 206 == 106 + tally.counts["redirects"] + tally.counts["pages_of_other_namespaces"]


def test_bulgarian_namespaces_come_from_the_export(carriers: Path) -> None:
    documents, _ = read(carriers / "bgwiki-latest-pages-articles-shortened.xml.bz2")
    assert documents[0].id.startswith("bgwiki-")
    assert not any(name in d.text for d in documents for name in ("Файл:", "Картинка:", "Категория:"))


@pytest.mark.parametrize("kind", WRITERS)
def test_parts_equal_the_whole(kind: str, write: Callable[[bytes], Path]) -> None:
    path = write(WRITERS[kind](some_pages()))
    whole, tally = read(path)
    assert [document.id for document in whole] == [f"dewiki-{n}" for n in range(1, 61)]
    assert "Datei" not in whole[0].text + whole[1].text
    assert dumpfile.is_one_stream(path) == (kind not in ("plain", "multistream"))
    for part_bytes in (1, 37, 500, 2000) if path.stat().st_size < 40_000 else (501, 4000):
        if path.stat().st_size / part_bytes < 3000:
            parts, again = read(path, part_bytes)
            assert (parts, again) == (whole, tally), part_bytes


@pytest.mark.parametrize("kind", ["plain", "multistream"])
def test_marks_across_chunks_are_found(
    kind: str, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(WRITERS[kind](some_pages()))
    whole = read(path)
    for chunk in (1, 5, 11):
        monkeypatch.setattr(dumpfile, "CHUNK", chunk)
        assert read(path, 2000) == whole


def test_what_is_no_article_or_no_document_is_counted(write: Callable[[bytes], Path]) -> None:
    pages = [
        page(1, "Prosa."),
        page(2, "#WEITERLEITUNG [[x]]", redirect=True),
        page(3, "#REDIRECT[[x]]"),
        page(4, "Vorlage", ns=10),
        page(5, "{{nur}}\n* Liste"),
        page(6, "ö" * 600),
        page(7, ""),
    ]
    documents, tally = read(write(plain_export(pages)), max_document_mb=0.001)
    assert [document.title for document in documents] == ["Seite 1"]
    assert tally.facts()["counts"] == {"articles": 4, "pages": 7, "pages_of_other_namespaces": 1, "redirects": 2}
    assert tally.skipped == {"no prose": 2, "over max_document_mb (0.001)": 1}
    assert tally.examples == {"no prose": ["Seite 5", "Seite 7"], "over max_document_mb (0.001)": ["Seite 6"]}


@pytest.mark.slow
def test_every_truncation_is_refused(write: Callable[[bytes], Path]) -> None:
    pieces = streams(some_pages())
    draw = random.Random(1)
    for kind, writer in WRITERS.items():
        data = writer(some_pages())
        cuts = [
            0,
            *(draw.randrange(len(data) - 14) for _ in range(100)),
        ]  # the last bytes may be </mediawiki>'s line end
        if kind == "multistream":
            cuts += [sum(map(len, pieces[:n])) for n in range(len(pieces))]
        for cut in cuts:
            for part_bytes in (700, 10**9):
                with pytest.raises(DataError, match=r"dump\.xml(?:.*byte \d+| is empty)"):
                    read(write(data[:cut]), part_bytes)


@pytest.mark.parametrize("kind", WRITERS)
def test_trailing_junk_is_refused(kind: str, write: Callable[[bytes], Path]) -> None:
    padding = [] if kind == "gz" else [b"\0" * 20]  # gzip allows it
    for junk in (b"junk", b"<page>", b"BZh", bz2.compress(b"<page/>"), *padding):
        with pytest.raises(DataError, match=r"dump\.xml"):
            read(write(WRITERS[kind](some_pages()) + junk), 900)


def test_a_lost_stream_is_noticed(write: Callable[[bytes], Path]) -> None:
    pieces = streams(some_pages())
    pieces[4] = b"\0" * len(pieces[4])
    for part_bytes in (300, 700, 10**9):
        with pytest.raises(DataError, match="fetch"):
            read(write(b"".join(pieces)), part_bytes)


def test_a_gap_between_parts_is_noticed(write: Callable[[bytes], Path]) -> None:
    path = write(b"x" * 30)
    dumpfile.check_seams(path, [(0, 12), (None, None), (12, 30), (None, None)])
    for seams in ([(0, 12), (13, 30)], [(0, 12)], [(None, None), (5, 30)]):
        with pytest.raises(DataError, match="no readable page"):
            dumpfile.check_seams(path, list(seams))


def test_damage_inside_is_never_a_silent_loss(write: Callable[[bytes], Path]) -> None:
    """A flipped bit in bz2 data is noticed or changes nothing (a stream's block size); in plain XML it may change a
    letter, never the count."""
    draw = random.Random(2)
    for kind in ("multistream", "plain"):
        data = WRITERS[kind](some_pages())
        whole = read(write(data), 3000)[0]
        for _ in range(60):
            at = draw.randrange(len(HEADER), len(data) - 20)
            broken = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
            try:
                documents, tally = read(write(broken), 3000)
            except DataError:
                continue
            assert kind == "plain" or documents == whole
            counts = tally.counts
            assert (
                counts["pages"] == 60 == counts["articles"] + counts["pages_of_other_namespaces"] + counts["redirects"]
            )
            assert counts["articles"] == len(documents) + sum(tally.skipped.values())


HA = "".join(f'<!ENTITY h{n} "{f"&h{n - 1};" * 10 if n else "ha"}">' for n in range(30))
DOCTYPES = {
    "billion laughs": f"<!DOCTYPE x [{HA}]>",
    "one long entity": f'<!DOCTYPE x [<!ENTITY h29 "{"ha" * 500_000}">]>',
    "an entity of itself": '<!DOCTYPE x [<!ENTITY h29 "&h29;">]>',
    "a file of this machine": '<!DOCTYPE x [<!ENTITY h29 SYSTEM "file:///etc/passwd">]>',
    "an endless device": '<!DOCTYPE x [<!ENTITY h29 SYSTEM "file:///dev/zero">]>',
    "the network": '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">',
    "parameter entities": "<!DOCTYPE x [<!ENTITY % a \"<!ENTITY h29 'ha'>\"> %a; %a;]>",
    "default attributes": f'<!DOCTYPE x [<!ATTLIST page a CDATA "{"ha" * 500_000}">]>',
}


@pytest.mark.parametrize("kind", DOCTYPES)
def test_entity_bombs_are_refused_at_once(kind: str, write: Callable[[bytes], Path]) -> None:
    data = DOCTYPES[kind].encode() + plain_export([page(n, "Text.") for n in range(1, 200)]).replace(b"Text", b"&h29;")
    path, before, started = write(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DataError, match="has a DOCTYPE"):
        read(path)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
GOOD = page(1, "Text.")
MANY_NAMES = "".join(f'<namespace key="{n}">Name {n}</namespace>' for n in range(2000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((HEADER + FOOTER).encode(), ""),
        (b"", "is empty"),
        (b"   \n", "without </mediawiki>"),
        (b"<html><body/></html>", "is an HTML page"),
        (b"Just some text", "syntax error at byte 0"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"\xfd7zXZ\0", "damaged or truncated xz"),
        (plain_export([GOOD]).decode().encode("utf-16"), "is UTF-16"),
        (b'<?xml version="1.0" encoding="latin-1"?>' + plain_export([GOOD]), "encoding latin-1"),
        (plain_export([GOOD]).replace(b"Text", b"T\xe4xt\xff and more"), "invalid UTF-8 at byte"),
        (plain_export([GOOD]).replace(b"Text", b"T\x00xt"), "Seite 1"),
        (plain_export([GOOD]).replace(b"Text", b"T\x1bxt"), "Seite 1"),
        (plain_export([GOOD]).replace(b"Text", b"&nbsp;"), "undefined entity"),
        (plain_export([GOOD]).replace(b"Text", b"&#xD800;"), "invalid character number"),
        (plain_export([GOOD]).replace(b"Text", b"\xed\xa0\x80"), "invalid UTF-8"),
        (plain_export([GOOD]).replace(b"Text", b"&#27;[31m"), "invalid character number"),
        (plain_export([GOOD]).replace(b"</text>", b""), "mismatched tag"),
        (plain_export([GOOD]).replace(b"</page>", b""), "mismatched tag"),
        (BOMB.encode() + plain_export([GOOD]).replace(b"Text", b"&b;"), "DOCTYPE"),
        (plain_export([GOOD.replace("<ns>", "<a>" * 30)]), "deep"),
        (plain_export([GOOD.replace("<ns>", '<ns a="' + "x" * 20_000_000)]), "never ends"),
        (HEADER.encode() + bz2.compress(b"x"), "dump.xml"),
        (
            (HEADER.replace("<namespaces>", "<namespaces>" + MANY_NAMES) + GOOD + FOOTER).encode(),
            "over 1000 namespaces",
        ),
    ],
)
def test_bad_exports_are_refused_in_one_line(data: bytes, message: str, write: Callable[[bytes], Path]) -> None:
    path = write(data)
    if not message:  # an export without pages: read whole, refused by the stage
        assert read(path)[1].counts["pages"] == 0
        return
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_hostile_titles_are_escaped(write: Callable[[bytes], Path]) -> None:
    pages = [page(1, "").replace("Seite 1", "\x85\u202e red &#x9b;31m\n"), page(2, "Prosa.").replace("Seite", "\x85 S")]
    documents, tally = read(write(plain_export(pages)))
    assert tally.examples["no prose"][0].isprintable()
    assert documents[0].title.isprintable()


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress])
def test_a_decompression_bomb_is_refused(
    pack: Callable[[bytes], bytes], write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dumpfile, formats):
        monkeypatch.setattr(module, "BOMB_BYTES", 1 << 22)
        monkeypatch.setattr(module, "BOMB_RATIO", 500)
    path = write(pack(HEADER.encode() + b"<page><revision><text>" + b" " * 20_000_000))
    with pytest.raises(DataError, match="a bomb"):
        list(wikipedia.pages(path, 0, path.stat().st_size, dumpfile.Seam(), 1000))


def test_a_bomb_of_many_small_streams_is_refused(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumpfile, "BOMB_BYTES", 1 << 22)
    head = bz2.compress(HEADER.encode() + b"<page><title>T</title><revision><text>")
    path = write(head + bz2.compress(b" " * 1_000_000) * 1000)
    with pytest.raises(DataError, match="a bomb"):
        list(wikipedia.pages(path, 0, path.stat().st_size, dumpfile.Seam(), 1000))


def test_line_ends_and_a_byte_order_mark_change_no_document(write: Callable[[bytes], Path]) -> None:
    data = plain_export([page(1, "Ein Satz.\n\nNoch einer.")])
    expected = read(write(data))
    assert read(write(data.replace(b"\n", b"\r\n"))) == expected
    assert read(write(b"\xef\xbb\xbf" + data)) == expected


def test_a_huge_article_needs_little_memory(write: Callable[[bytes], Path]) -> None:
    path = write(gzip.compress(plain_export([page(1, "wort " * 10_000_000), page(2, "Prosa.")]), 1))
    tracemalloc.start()
    documents, tally = read(path, max_document_mb=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [document.title for document in documents] == ["Seite 2"]
    assert tally.examples == {"over max_document_mb (1)": ["Seite 1"]}
    assert peak < 10_000_000


def test_further_content_slots_and_other_models_are_no_prose(tmp_path: Path) -> None:
    slot = "<content><role>mediainfo</role><model>wikibase</model><text>{&quot;labels&quot;: 1}</text></content>"
    pages = [
        page(1, "The mill turned.").replace("</revision>", slot + "</revision>"),
        page(2, '{"a": "The mill turned."}').replace("<text>", "<model>json</model><text>"),
        page(3, ".mill { color: red }").replace("<text>", "<model>css</model><text>"),
        page(4, "It {{odd}} turned. It stopped.").replace("<text>", "<model>wikitext</model><text>"),
    ]
    (tmp_path / "dump.xml").write_bytes(plain_export(pages))
    documents, tally = read(tmp_path / "dump.xml")
    assert [document.text for document in documents] == ["The mill turned.", "It stopped."]
    assert tally.facts()["skipped"] == {"no wikitext but css": 1, "no wikitext but json": 1}
    assert tally.facts()["sentences_left_out"] == {"odd": 1}
