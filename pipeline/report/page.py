"""HTML as a tree of tags in which every plain string is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.words import visible

STACKED = ((3, "stack"), (6, "tall"))
"""Tables of more columns: on a narrow screen and a tablet their cells stand below each other, each with its head."""
FOLDING = ("pivot", "stages")  # tables that have their own way to be narrow
VOID = {"meta", "br"}

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


class Html(str):
    """Markup made by this module: the only strings that are not escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """``<name attributes>children</name>``. Plain strings are escaped, None is left out.

    Attribute names: a trailing underscore is dropped, inner ones become hyphens (``class_``, ``aria_label``).
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    return Html("".join(text(child) for child in children if child is not None))


def text(value: Any) -> Html:
    """A value as text of a page: markup characters as entities, control characters as visible escapes."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(str(value))))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numeric: Sequence[int] = (), class_: str = "") -> Html:
    """A table; the columns ``numeric`` are aligned to the right."""

    def cells(kind: str, row: Sequence[Any]) -> list[Html]:
        return [
            tag(kind, cell, class_="n" if index in numeric else None, data_label=text(head[index]))
            for index, cell in enumerate(row)
        ]

    for most, stacked in STACKED if class_ not in FOLDING else ():
        if len(head) > most:
            class_ = f"{class_} {stacked}".strip()

    header = tag(
        "thead",
        tag("tr", *[tag("th", cell, scope="col", class_="n" if i in numeric else None) for i, cell in enumerate(head)]),
    )
    body = tag("tbody", *[tag("tr", *cells("td", row)) for row in rows])
    return tag("div", tag("table", header, body, class_=class_ or None), class_="scroll")


def svg(key: str, title: str, words: str, *pieces: Html, width: int, height: int, **more: Any) -> Html:
    """A drawing with its title, and described in ``words``; ``key`` makes its ids unique in the page."""
    named = tag("title", title, id=f"{key}-title"), tag("desc", words, id=f"{key}-desc")
    about = {"role": "img", "aria_labelledby": f"{key}-title {key}-desc"}
    return tag("svg", *named, *pieces, viewBox=f"0 0 {width} {height}", **more, **about)


class Section(Html):
    """A part of the page with a heading; ``heading`` and ``name`` are what the contents say of it and point to."""

    heading: str
    name: str


def section(title: str, *children: Any) -> Section:
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    part = Section(tag("section", tag("h2", title), *children, id=name))
    part.heading, part.name = title, name
    return part


def contents(parts: Iterable[Html | None]) -> Html:
    """Links to the sections among ``parts``."""
    links = [tag("a", part.heading, href=f"#{part.name}") for part in parts if isinstance(part, Section)]
    return tag("nav", *links, aria_label="contents")


def folded(title: str, content: Html) -> Html:
    return tag("details", tag("summary", title), content)


def note(*children: Any) -> Html:
    """A paragraph in the quieter colour."""
    return tag("p", *children, class_="note")


def document(title: str, style: str, *body: Any) -> str:
    """A whole page that needs nothing else: no script, no font, no file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"
