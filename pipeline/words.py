"""Numbers, times and names as people read them. Pure: every command and the report write them the same way."""

from __future__ import annotations

import re
import sys
import time
import unicodedata
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

LARGEST = sys.float_info.max


def visible(words: str) -> str:
    """A text whose control characters are written out, fit for a page and for a terminal."""
    return words if words.isprintable() else "".join(map(_visible, words))


def _visible(character: str) -> str:
    """Control, surrogate, line-separating and direction-changing characters as ``\\x1b``, ``\\u202e``."""
    odd = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    if odd or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"):
        return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else repr(character)[1:-1]
    return character


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value out of a JSON file is a finite number."""
    plain = type(value) is float or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return plain and -LARGEST <= value <= LARGEST


def number(value: Any, digits: int = 4) -> str:
    """Whole and large numbers with thousands separators, others with ``digits`` significant digits."""
    if not is_number(value):
        return "not finite" if isinstance(value, float) else "not known" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def whole_numbers(text: str, least: int, most: int) -> list[int]:
    """``1,2,4-6`` as numbers; none for anything else, or a range that falls or has more than 100,000."""
    if not re.fullmatch(r"([0-9]{1,19}(-[0-9]{1,19})?(,(?!$)|$))+", text):
        return []
    spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    fit = all(least <= span[0] <= span[-1] <= min(most, span[0] + 99_999) for span in spans)
    return [count for span in spans for count in range(span[0], span[-1] + 1)] if fit else []


def spoken(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").strip()


def percent(share: Any) -> str:
    """A share of 1 as percent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if is_number(share) else "not known"


def with_error(value: Any, error: Any, digits: int = 2) -> str:
    """``2.21 ± 0.03``, without the error where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if is_number(error) else f"{value:.{digits}f}"


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


def in_short(seconds: float) -> str:
    """A duration in one unit: 40 s, 2 min, 3.4 h, 2.1 d."""
    for unit, size, most, digits in (("s", 1, 90, 0), ("min", 60, 90, 0), ("h", 3600, 48, 1)):
        if seconds < size * most:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def columns(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Rows of cells as lines for a terminal, two spaces between columns; those in ``right`` end flush."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells).rstrip()

    return [line(row) for row in rows]


def absent_model(path: Path, option: str) -> str:
    """What to do about a model that is not on this machine; how to fetch it where it may be a name on the hub."""
    name = str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in (".pt", ".bin"):
        return f"{option} {name}: there is no such file or folder"
    return (
        f"{option} {name}: no folder here. If it is a name on the hub, fetch it first, where there is network:  "
        f"hf download {name} --local-dir {path.name}"
    )
