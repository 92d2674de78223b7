"""HTML as a tree of tags in which every plain string is escaped, and how numbers are written for people."""

from __future__ import annotations

import html
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

VOID = {"meta", "br"}

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --page: #ffffff; --panel: #f5f6f8; --ink: #1a1d23; --quiet: #5b6270; --line: #e1e4e9;
  --main: #0b5fb0; --thin: #7c9cc0; --second: #b4530a; --level: #55606e;
  --good: #12693a; --good-page: #e2f3e8; --bad: #a81c1c; --bad-page: #fdeaea; --busy: #7a5200; --busy-page: #fdf2d9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --panel: #1d2128; --ink: #e7eaef; --quiet: #a2aab7; --line: #2f353f;
    --main: #6db3ff; --thin: #7f9cc0; --second: #f0a35e; --level: #a9b3c1;
    --good: #7fd7a0; --good-page: #17301f; --bad: #ff9d9d; --bad-page: #3a1b1d; --busy: #f3cb74; --busy-page: #352a12;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font);
  -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; overflow-wrap: break-word; }
p { margin: .5rem 0; max-width: 46rem; }
h1 { margin: .1rem 0 .4rem; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; font-weight: 650; }
h2 { margin: 0 0 .6rem; font-size: 1.25rem; line-height: 1.3; letter-spacing: -.01em; font-weight: 650; }
section { margin-top: 2.5rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.kind { margin: 0; color: var(--quiet); font-size: .9rem; }
.note { color: var(--quiet); font-size: .9rem; }
.facts { max-width: none; }
.facts span { white-space: nowrap; }
.lead { margin-top: 1.1rem; font-size: 1.13rem; line-height: 1.5; }
.badge { display: inline-block; padding: .1rem .55rem; border-radius: 1rem; font-size: .8rem; font-weight: 600;
  line-height: 1.5; letter-spacing: 0; white-space: nowrap; background: var(--panel); color: var(--quiet); }
h1 .badge { vertical-align: .4rem; margin-left: .3rem; }
.badge.done { background: var(--good-page); color: var(--good); }
.badge.failed { background: var(--bad-page); color: var(--bad); }
.badge.running, .badge.waiting, .badge.cancelled { background: var(--busy-page); color: var(--busy); }
.trouble { margin: 1rem 0; padding: .7rem 1rem; max-width: none; border-left: 4px solid var(--busy);
  background: var(--busy-page); }
.trouble.failed { border-color: var(--bad); background: var(--bad-page); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.3rem 0 0; }
.tiles div { padding: .8rem 1rem; border-radius: .5rem; background: var(--panel); }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.55rem; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tiles dd.more { color: var(--quiet); font-size: .85rem; font-weight: 400; }
.scores { margin: 1.2rem 0 0; padding: 0; list-style: none; }
.scores li { padding: .15rem 0; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.8rem 2rem; margin: 1.2rem 0; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figure.whole { grid-column: 1 / -1; }
figcaption { margin-bottom: .35rem; font-weight: 600; font-size: .95rem; }
.narrow { display: none; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
.attempts td:nth-child(2) { white-space: nowrap; }
figcaption span { color: var(--quiet); font-weight: 400; font-size: .9em; }
th { text-align: left; font-weight: 600; color: var(--quiet); vertical-align: bottom; }
th, td { padding: .42rem 1.1rem .42rem 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
td { vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
details { border-bottom: 1px solid var(--line); }
summary { padding: .55rem 0; cursor: pointer; font-weight: 600; font-size: .95rem; }
@media (max-width: 42rem) {
  main { padding: 1.4rem 1rem 3rem; }
  h1 { font-size: 1.7rem; }
  .scores { margin: 1.2rem 0 0; padding: 0; list-style: none; }
.scores li { padding: .15rem 0; }
.charts { grid-template-columns: minmax(0, 1fr); }
  .wide { display: none; }
  .narrow { display: block; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .stages thead { display: none; }
  .stages tr { display: grid; grid-template-columns: 1fr auto auto; gap: 0 .9rem; padding: .5rem 0;
    border-bottom: 1px solid var(--line); }
  .stages td { padding: .1rem 0; border: 0; }
  .stages td:nth-child(3) { display: none; }
  .stages td:nth-child(5) { grid-column: 1 / -1; color: var(--quiet); }
}
@media print {
  :root { --page: #fff; --panel: #f5f6f8; --ink: #000; --quiet: #444; --line: #ccc; --main: #0b5fb0; --thin: #7c9cc0;
    --second: #b4530a; --level: #55606e; --good: #12693a; --bad: #a81c1c; --busy: #7a5200;
    --good-page: #e2f3e8; --bad-page: #fdeaea; --busy-page: #fdf2d9; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  tr, .tiles, .trouble { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""


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
    """Children one after the other."""
    return Html("".join(text(child) for child in children if child is not None))


def text(value: Any) -> Html:
    """A value as text of a page: markup characters as entities, control characters as visible escapes."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(str(value))))


def visible(words: str) -> str:
    """A text whose control characters are written out, fit for a page and for a terminal."""
    return "".join(map(_visible, words))


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


def folded(title: str, content: Html) -> Html:
    """Something that opens when asked for."""
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


# -------------------------------------------------------------------- numbers for people


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value out of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(value: Any, digits: int = 4) -> str:
    """Whole and large numbers with thousands separators, others with ``digits`` significant digits."""
    if not is_number(value):
        return "not finite" if isinstance(value, float) else "not known" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def spoken(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").strip()


def percent(share: Any) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if is_number(share) else "not known"


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
