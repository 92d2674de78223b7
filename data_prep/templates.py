"""Templates of MediaWiki as the words that a reader sees, by the table ``templates.toml``; raised digits."""

import functools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

Form = list[tuple[str, str, str]]  # (text before a field, the field, its filter)
Entry = tuple[dict[frozenset[str], Form], frozenset[str]]  # forms by the arguments they use; what does not count

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_RAISED = str.maketrans("0123456789+-−=()ni ", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ ")
_LOWERED = str.maketrans("0123456789+-−=() ", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ ")
_RAISABLE = re.compile(r"[0-9+\-−=()ni ]+")
_LOWERABLE = re.compile(r"[0-9+\-−=() ]+")
_LETTERS = re.compile(r"[A-Za-z]{1,4}")  # pKₐ is written pKa; a raised letter is a power
_ORDINAL = re.compile(r"st|nd|rd|th|er|re|ère|e|ème|o|a|TM|SM|®|™", re.IGNORECASE)
_FORMULA_PART = re.compile(r"(?P<count>\d+)|(?P<charge>\d*[+\-−])|(?:[A-Z][a-z]?|\(|\)\d*)+")
_WHOLE_FORMULA = re.compile(r"(?:[A-Z][a-z]?\d*|\(|\)\d*)+")
_NAMED = re.compile(r"\s*([a-z]\w*|\d)\s*=(?!=)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-−+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\+\d+/\d+)?|\d+/\d+")
_RANGES = {
    "to": " to ", "to(-)": " to ", "-": "–", "–": "–", "and": " and ", "and(-)": " and ", "or": " or ", "by": " by ",
    "x": " × ", "×": " × ", "+/-": " ± ", "±": " ± ", ",": ", ",
}  # fmt: skip
_FACTORS = {"e3": "thousand ", "e6": "million ", "e9": "billion "}
_COMPOUND = {("ft", "in"), ("lb", "oz"), ("st", "lb"), ("mi", "yd"), ("mi", "ft"), ("yd", "ft"), ("yd", "in")}
_SHOWN_WITH_INPUT = {None, "or", "b", "br", "br()", "sqbr", "flip", "comma", "slash", "/", "table", "tablecen"}


def raised(text: str) -> str | None:
    """`text` as a superscript that cannot be misread: ``5`` as ``⁵``, ordinals as they are; else None."""
    if _ORDINAL.fullmatch(text):
        return text
    return text.translate(_RAISED) if _RAISABLE.fullmatch(text) else None


def lowered(text: str) -> str | None:
    """`text` as a subscript: ``2`` as ``₂``, letters as they are; None where Unicode has none."""
    if _LETTERS.fullmatch(text):
        return text
    return text.translate(_LOWERED) if _LOWERABLE.fullmatch(text) else None


def render(parts: list[str]) -> str | None:
    """The words that a template shows; "" where it shows none in running text; None where they are not known.

    `parts`: its name and arguments. A template with an argument that no form of the table foresees is not known.
    """
    name = parts[0].strip().lower().replace("_", " ").removeprefix("template:")
    if name.startswith("formatnum:"):
        name, parts = "formatnum", ["", parts[0].partition(":")[2]]
    if name in ("convert", "cvt"):
        return _convert(_arguments(parts))
    forms, ignored = _TABLE.get(name) or _by_pattern(name)
    if forms is None:
        return None
    if not forms:
        return ""
    given = {key: value for key, value in _arguments(parts).items() if value and key not in ignored}
    form = forms.get(frozenset(given)) or forms.get(frozenset("*"))
    return None if form is None else _fill(form, {**given, "name": name.upper()})


def ends_table(parts: list[str]) -> bool:
    """Whether a template stands for the ``|}`` of a table."""
    return parts[0].strip().lower() in _ENDS_TABLE


def is_spoken(name: str) -> bool:
    """Whether a template tells how a word is pronounced."""
    return name.lower().startswith(_SPOKEN)


def _arguments(parts: list[str]) -> dict[str, str]:
    """Arguments by name; those without one are "1", "2" …"""
    arguments: dict[str, str] = {}
    position = 0
    for part in parts[1:]:
        if match := _NAMED.match(part):
            arguments[match[1].lower()] = part[match.end() :].strip()
        else:
            position += 1
            arguments[str(position)] = part.strip()
    return arguments


def _fill(form: Form, given: Mapping[str, str]) -> str | None:
    words = []
    for text, field, how in form:
        words.append(text)
        if field == "*":
            value = _formula([item for key, item in given.items() if key.isdecimal()])
        elif how == "none" or not field:
            value = ""
        elif how == "month":
            number = int(given[field]) if given[field].isdecimal() else 0
            value = MONTHS[number - 1] if 0 < number <= 12 else None if number else given[field]
        elif how:
            value = raised(given[field]) if how == "sup" else lowered(given[field])
        else:
            value = given[field]
        if value is None:
            return None
        words.append(value)
    return "".join(words)


def _formula(parts: list[str]) -> str | None:
    """``H|2|O`` as ``H₂O``; charges are raised; None for what is no formula."""
    if len(parts) == 1 and _WHOLE_FORMULA.fullmatch(parts[0]):
        return re.sub(r"\d+", lambda match: match[0].translate(_LOWERED), parts[0])
    words = []
    for part in parts:
        match = _FORMULA_PART.fullmatch(part)
        if match is None:
            return None
        words.append(part.translate(_LOWERED if match["count"] else _RAISED) if match.lastgroup else part)
    return "".join(words)


def _convert(given: dict[str, str]) -> str | None:
    """The quantity that ``{{convert}}`` was given, without what it was converted to."""
    if given.get("disp") not in _SHOWN_WITH_INPUT:
        return None
    items = [given[key] for key in map(str, range(1, 12)) if key in given]
    words, position, last = "", 0, ""
    while position < len(items) and _NUMBER.fullmatch(items[position]):
        words += items[position].replace("+", " ", 1) if "/" in items[position] else items[position]
        position += 1
        if items[position : position + 1] and items[position] in _RANGES:
            words += _RANGES[items[position]]
        else:
            unit = items[position] if position < len(items) else ""
            factor = _FACTORS.get(unit[:2], "")
            read = _UNITS.get(unit[2:] if factor else unit)
            if read is None or (last and (last, unit) not in _COMPOUND):
                return None
            words += f" {factor}{read}"
            if (unit, *items[position + 2 : position + 3]) not in _COMPOUND:
                return words
            words, last = words + " ", unit
        position += 1
    return None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.replace("\n", " ").split(", ") if name.strip(" ,")]


def _form(text: str) -> Form:
    return [(before, field or "", how or "") for before, field, how, _ in Formatter().parse(text)]


@functools.lru_cache(maxsize=4096)
def _by_pattern(name: str) -> Entry | tuple[None, frozenset[str]]:
    return next((entry for pattern, entry in _PATTERNS if pattern.fullmatch(name)), (None, frozenset()))


def _entries(table: dict[str, Any]) -> list[tuple[str, Entry]]:
    entries: list[tuple[str, Entry]] = [(name, ({}, frozenset())) for name in _names(table["nothing"])]
    for row in table["template"]:
        forms = [_form(text) for text in row["forms"]]
        by_arguments = {frozenset(field for _, field, _ in form if field not in ("", "name")): form for form in forms}
        ignored = frozenset([*_names(table["ignored"]), *_names(row.get("ignored", ""))])
        entries += [(name, (by_arguments, ignored)) for name in _names(row["names"])]
    return entries


_DATA = tomllib.loads((Path(__file__).parent / "templates.toml").read_text(encoding="utf-8"))
_TABLE = {name: entry for name, entry in _entries(_DATA) if "*" not in name}
_PATTERNS = [
    (re.compile(re.escape(name).replace(r"\*", ".*")), entry) for name, entry in _entries(_DATA) if "*" in name
]
_ENDS_TABLE = frozenset(_names(_DATA["ends_table"]))
_SPOKEN = tuple(name.rstrip("*") for name in _names(_DATA["spoken"]))
_UNITS = {**{unit: unit for unit in _names(_DATA["units"].pop("as_written"))}, **_DATA["units"]}
