"""MediaWiki pages-articles exports to documents: streamed with expat, one document per article, nothing unaccounted."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from data_prep import dumpfile
from data_prep.document import Document, Tally, printable
from data_prep.errors import DataError
from data_prep.wikitext import NAMESPACES, clean

PAGE_FIELDS = {"title": 3, "ns": 3, "id": 3, "model": 4, "text": 4}
"""depth of the element; deeper ones of these names belong to further content slots of a page"""
MAX_DEPTH = 20
MAX_TOKEN = 1 << 24  # bytes of one tag; expat keeps it whole
MAX_NAMESPACES = 1000  # the largest wikis have about 50
REDIRECT = re.compile(r"\s*#\w+\s*:?\s*\[\[")


@dataclass
class Page:
    """One page element; `text` is None where it was longer than allowed."""

    title: str = ""
    ns: str = "0"
    id: str = ""
    redirect: bool = False
    model: str = "wikitext"
    text: str | None = ""


@dataclass
class Site:
    """What the export says about its wiki."""

    name: str = ""
    namespaces: dict[str, int] = field(default_factory=lambda: dict(NAMESPACES))


class _Parser:
    """expat with handlers that collect pages; memory is bounded by one page of `max_text` characters."""

    def __init__(self, where: str, max_text: int) -> None:
        self.where, self.max_text = where, max_text
        self.site, self.site_done = Site(), False
        self.pages: list[Page] = []
        self.page: Page | None = None
        self.path: list[str] = []
        self.pieces: list[str] | None = None  # character data of the element being read, where wanted
        self.length = 0
        self.key = ""
        self.fed = 0
        self.expat = expat.ParserCreate()
        self.expat.buffer_text = True
        self.expat.buffer_size = 1 << 16
        self.expat.StartElementHandler = self.start
        self.expat.EndElementHandler = self.end
        self.expat.StartDoctypeDeclHandler = self.refuse_doctype
        self.expat.XmlDeclHandler = self.declaration

    def feed(self, data: bytes, final: bool = False) -> list[Page]:
        """Parse more bytes and return the pages that ended in them."""
        try:
            self.expat.Parse(data, final)
        except expat.ExpatError as error:
            raise DataError(self.explain(error, data, final)) from None
        self.fed += len(data)
        if self.fed - self.expat.CurrentByteIndex > MAX_TOKEN and not final:
            raise DataError(f"{self.where}: a tag at byte {self.expat.CurrentByteIndex} of the XML never ends")
        done, self.pages = self.pages, []
        return done

    def explain(self, error: expat.ExpatError, data: bytes, final: bool) -> str:
        offset = self.expat.ErrorByteIndex
        title = self.page.title if self.page and self.page.title else ""
        place = f"byte {offset} of the XML" + (f" (page {printable(title)!r})" if title else "")
        if final:
            return f"{self.where} is truncated: the XML stops at {place} without </mediawiki>: fetch it again"
        reason = expat.ErrorString(error.code) or "unreadable"
        if _invalid_utf8(data, offset - self.fed):
            reason = "invalid UTF-8"
        return f"{self.where}: {reason} at {place}: not an intact MediaWiki export, fetch it again"

    def refuse_doctype(self, name: str, *_: Any) -> None:
        raise DataError(f"{self.where}: has a DOCTYPE ({printable(name)}); exports have none, entities are refused")

    def declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding and encoding.lower() != "utf-8":
            raise DataError(f"{self.where}: encoding {printable(encoding)}; only UTF-8 exports are read")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if not self.path and name != "mediawiki":
            raise DataError(
                f"{self.where} is not a MediaWiki export: its root element is <{printable(name)}>, not <mediawiki>; "
                "take a pages-articles file"
            )
        self.path.append(name)
        if len(self.path) > MAX_DEPTH:
            raise DataError(f"{self.where}: elements nested over {MAX_DEPTH} deep: not a MediaWiki export")
        if self.page is None:
            if name == "page":
                self.page, self.site_done = Page(), True
            elif name in ("namespace", "dbname", "sitename"):
                self.key = attributes.get("key", "")
                self.collect()
        elif name == "redirect":
            self.page.redirect = True
        elif PAGE_FIELDS.get(name) == len(self.path):
            self.collect()

    def collect(self) -> None:
        self.pieces, self.length = [], 0
        self.expat.CharacterDataHandler = self.characters

    def characters(self, data: str) -> None:
        self.length += len(data)
        if self.pieces is not None and self.length <= self.max_text:
            self.pieces.append(data)

    def end(self, name: str) -> None:
        self.path.pop()
        if self.pieces is not None:
            value = "".join(self.pieces)
            if self.page is not None:
                # of several revisions the last one counts
                setattr(self.page, name, value if self.length <= self.max_text else None if name == "text" else "?")
            elif name == "namespace" and value and self.key.lstrip("-").isdecimal():
                self.site.namespaces[value.replace("_", " ").lower()] = int(self.key[:9])
                if len(self.site.namespaces) > MAX_NAMESPACES:
                    raise DataError(f"{self.where}: over {MAX_NAMESPACES} namespaces: not a MediaWiki export")
            elif name == "dbname" or (name == "sitename" and not self.site.name):
                self.site.name = value
            self.pieces = None
            self.expat.CharacterDataHandler = None
        if name == "page" and self.page is not None:
            self.pages.append(self.page)
            self.page = None
        elif name == "siteinfo":
            self.site_done = True


def _invalid_utf8(data: bytes, at: int) -> bool:
    """Whether no character can be read at an offset of `data`."""
    for length in range(1, 5):
        try:
            return not data[at : at + length].decode()
        except UnicodeDecodeError:
            continue
    return 0 <= at < len(data) - 4


def read_site(path: Path) -> Site:
    """Name and namespaces of the wiki, from the start of the export. Raises DataError for another file."""
    dumpfile.refuse_unreadable(path)
    parser = _Parser(str(path), 1000)
    for data in dumpfile.chunks(path, 0, 1, dumpfile.Seam()):
        parser.feed(data)
        if parser.site_done:
            return parser.site
    parser.feed(b"", final=True)
    return parser.site


def pages(path: Path, start: int, end: int, seam: dumpfile.Seam, max_text: int) -> Iterator[Page]:
    """Pages that begin in bytes [start, end), which are all of a file of one stream; texts over `max_text` characters
    come as None.
    """
    size = path.stat().st_size
    where = str(path) if (start, end) == (0, size) else f"{path} (part at byte {start})"
    parser = _Parser(where, max_text)
    if start:
        parser.feed(b"<mediawiki>")
    for data in dumpfile.chunks(path, start, end, seam):
        yield from parser.feed(data)
    if (seam.stop if seam.stop is not None else end) < size or (start and seam.first is None):
        parser.feed(b"</mediawiki>")
    yield from parser.feed(b"", final=True)


def documents(
    path: Path, start: int, end: int, seam: dumpfile.Seam, tally: Tally, site: Site, source: str
) -> Iterator[Document]:
    """Articles of one part of the export `source` as documents; all pages are counted in `tally`.

    Pages outside namespace 0 and redirects are no articles; an article that is too large (of UTF-8 wikitext),
    of another content model (JSON, CSS) or without any prose is skipped by name.
    """
    for page in pages(path, start, end, seam, int(tally.limit)):
        tally.counts["pages"] += 1
        if page.ns.strip() != "0":
            tally.counts["pages_of_other_namespaces"] += 1
        elif page.redirect or (page.text and REDIRECT.match(page.text)):
            tally.counts["redirects"] += 1
        else:
            tally.counts["articles"] += 1
            if page.text is None or (3 * len(page.text) > tally.limit and len(page.text.encode()) > tally.limit):
                tally.skip_too_large(page.title)
                continue
            if page.model != "wikitext":
                tally.skip(f"no wikitext but {printable(page.model, 20)}", page.title)
                continue
            text = clean(page.text, site.namespaces, tally.lost)
            if text:
                title = "".join(c for c in page.title if c.isprintable())
                wiki = site.name or source.partition(".")[0]
                yield Document(f"{wiki}-{page.id.strip()}", title, source, text)
            else:
                tally.skip("no prose", page.title)
