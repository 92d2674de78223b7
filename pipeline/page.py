"""HTML as a tree of tags in which every plain string is escaped, and how numbers are written for people."""

from __future__ import annotations

import html
import math
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

VOID = {"meta"}


class Html(str):
    """Markup made by this module: the only strings that are not escaped again."""

    __slots__ = ()


def tag(name: str, *children: Any, **attributes: Any) -> Html:
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
    """Children one after the other."""
    return Html("".join(text(child) for child in children if child is not None))


def text(value: Any) -> Html:
    """A value as text of a page: markup characters as entities, control characters as visible escapes."""
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(map(_visible, str(value)))))


def _visible(character: str) -> str:
    """Control, surrogate, line-separating and direction-changing characters as ``\\x1b``, ``\\u202e``."""
    odd = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    if odd or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"):
        return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else repr(character)[1:-1]
    return character


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numeric: Sequence[int] = (), class_: str = "") -> Html:
    """A table; the columns ``numeric`` are aligned to the right."""

    def cells(kind: str, row: Sequence[Any]) -> list[Html]:
        return [tag(kind, cell, class_="n" if index in numeric else None) for index, cell in enumerate(row)]

    header = tag(
        "thead",
        tag("tr", *[tag("th", cell, scope="col", class_="n" if i in numeric else None) for i, cell in enumerate(head)]),
    )
    body = tag("tbody", *[tag("tr", *cells("td", row)) for row in rows])
    return tag("div", tag("table", header, body, class_=class_ or None), class_="scroll")


def section(title: str, *children: Any) -> Html:
    return tag("section", tag("h2", title), *children)


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


# -------------------------------------------------------------------- numbers for people


def is_number(value: Any) -> bool:
    """Whether a value out of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """Whole numbers with thousands separators, others with ``digits`` significant digits; else the value's text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: Any) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f} %" if is_number(share) else "not known"


def duration(seconds: Any) -> str:
    """Seconds as ``41.3 s``, ``7 min 12 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if not is_number(seconds) or seconds < 0:
        return "not known"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: Any) -> str:
    """Bytes as ``12.3 MB`` (powers of 1000)."""
    if not is_number(count):
        return "not known"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def moment(seconds: Any) -> str:
    """A Unix time as date and time in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"
