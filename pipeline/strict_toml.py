"""TOML to frozen dataclasses: strict keys, types and bounds; all errors at once, each with file, line and key.

Knows nothing of what is configured. Imported by the login-node commands, so nothing heavy may be imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")

MAX_BYTES = 1_000_000
# Of a key of n names tomllib remembers all n beginnings: 100,000 names are 200 kB of text and 40 GB of memory.
LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*\.[ \t]*){20}""")


@dataclass(frozen=True)
class Source:
    """Where values come from, to say it in errors: the file, its text, and the keys that --set gave.

    What a program has written may hold keys of a newer version: ``unknown`` collects those. People's are refused.
    """

    file: str
    text: str
    set_keys: frozenset[str] = frozenset()
    unknown: list[str] | None = None

    def at(self, section: str, key: str) -> str:
        dotted = f"{section}.{key}" if section else key
        if any(f"{given}.".startswith(f"{dotted}.") for given in self.set_keys):
            return f"--set {dotted}"
        line = self._line(section, key)
        return f"{self.file}{f':{line}' if line else ''}: {dotted}"

    def _line(self, section: str, key: str) -> int | None:
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            bare = line.split("#")[0].strip()
            if bare.startswith("["):
                current = bare.strip("[] ")
                if current == (f"{section}.{key}" if section else key):
                    return number
            elif current == section and bare.split("=")[0].strip().strip('"') == key:
                return number
        return None


def read_toml(cls: type[T], name: str, folder: Path, kind: str, settings: Iterable[str]) -> T:
    """The dataclass of a file: a path, or a name in ``folder``; its ``base`` names another file that it changes.

    Raises ConfigError with a line for each error.
    """
    path, text, table = _read(name, folder, kind)
    seen = [path]
    while isinstance(base := table.pop("base", None), str):
        beside = path.parent / base if base.endswith(".toml") else base
        below, _, values = _read(str(beside), folder, f"{path}: base: {kind}")
        if below in seen:
            raise ConfigError(f"{path}: base: {' and '.join(map(str, seen))} go round in a circle")
        seen.append(below)
        table = _laid_over(values, table)
    errors: list[str] = []
    table, keys = apply_settings(table, settings, errors)
    loaded = build(cls, table, Source(str(path), text, keys), "", errors)
    raise_all(errors)
    assert loaded is not None
    return loaded


def _read(name: str, folder: Path, kind: str) -> tuple[Path, str, dict[str, Any]]:
    """A file's place, text and tables."""
    path = Path(name) if name.endswith(".toml") or "/" in name else folder / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        raise ConfigError(f"no {kind} {name!r}: {_hint(name, known)}; a path to a .toml file works too")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size / 1e6:.1f} MB; a {kind} has at most {MAX_BYTES / 1e6:.0f} MB")
    try:
        text = path.read_text(encoding="utf-8")
        return path, text, parsed(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error or type(error).__name__}") from None


def _laid_over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``table``, table by table."""
    return base | {
        key: {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in table.items()
    }


def parsed(text: str) -> dict[str, Any]:
    """The tables of a TOML text, in bounded time and memory; ValueError or RecursionError when it is none."""
    if LONG_KEY.search(text):
        raise ValueError("a key of over 20 names")
    import tomllib  # only now: most commands read a run, which has none

    return tomllib.loads(text)


def apply_settings(
    table: dict[str, Any], settings: Iterable[str], errors: list[str]
) -> tuple[dict[str, Any], frozenset[str]]:
    keys = set()
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted.strip():
            errors.append(f"--set {setting}: write it as key=value, for example --set phase1.steps=100")
            continue
        try:
            (value,) = parsed(f"value = {text}").values()  # not a second key behind a line end
        except (ValueError, RecursionError):
            value = text  # a bare word is a string
        *parents, last = dotted.strip().split(".")
        inner = table = dict(table)
        for parent in parents:
            inner[parent] = dict(inner[parent]) if isinstance(inner.get(parent), dict) else {}
            inner = inner[parent]
        inner[last] = value
        keys.add(dotted.strip())
    return table, frozenset(keys)


def build(cls: type[T], table: dict[str, Any], source: Source, section: str, errors: list[str]) -> T | None:
    """An instance of ``cls``, or None with lines appended to ``errors``."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    before = len(errors)
    tables = [key for spec in fields.values() for key in _named(spec, table)]
    for key in table:
        dotted = f"{section}.{key}" if section else key
        if key in fields or key in tables:
            continue
        if source.unknown is not None and not any(f"{given}.".startswith(f"{dotted}.") for given in source.set_keys):
            source.unknown.append(dotted)
        else:
            deeper = [f"did you mean {name}?" for name in homes(cls, key, table)] if not section else []
            hint = deeper[0] if deeper else _hint(key, [*fields, *tables])
            errors.append(f"{source.at(section, key)}: unknown key; {hint}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if "tables" in spec.metadata:
            values[name] = _tables(typing.get_args(hints[name])[1], spec, table, source, errors)
        elif name in table:
            inner = f"{section}.{name}" if section else name
            values[name] = _value(hints[name], table[name], source, section, spec, inner, errors)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            where = f"{source.file}: {f'[{section}] ' if section else ''}"
            errors.append(f"{where}{name} is missing")
    return cls(**values) if len(errors) == before else None


def homes(cls: type, key: str, tables: Iterable[str] = ()) -> list[str]:
    """Dotted names of the keys called ``key`` one table below ``cls``; ``tables`` are the numbered ones of a file."""
    hints = typing.get_type_hints(cls)
    kinds: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        many = _named(spec, dict.fromkeys(tables))
        options = typing.get_args(hints[spec.name]) or (hints[spec.name],)
        kinds |= {name: kind for name in many or [spec.name] for kind in options if dataclasses.is_dataclass(kind)}
    return [f"{name}.{key}" for name, kind in kinds.items() if key in {spec.name for spec in dataclasses.fields(kind)}]


def table_of(made: Any) -> dict[str, Any]:
    """What `build` reads: the JSON form of a dataclass in the shape of its file."""
    table: dict[str, Any] = {}
    many = [spec.name for spec in dataclasses.fields(made) if "tables" in spec.metadata]
    for name, value in dataclasses.asdict(made).items():
        table |= {name: list(value), **value} if name in many else {name: value}
    return table


def _named(spec: dataclasses.Field[Any], table: Mapping[str, Any]) -> list[str]:
    """The keys of ``table`` that a field of many tables takes, by number."""
    pattern = spec.metadata.get("tables")
    return sorted((key for key in table if pattern and re.fullmatch(pattern, key)), key=lambda key: (len(key), key))


def _tables(
    kind: type[T], spec: dataclasses.Field[Any], table: dict[str, Any], source: Source, errors: list[str]
) -> dict[str, T | None]:
    """The tables of a field by name, in the order that the list under the field's own name gives."""
    names, where = _named(spec, table), source.at("", spec.name)
    built = {name: build(kind, table[name], source, name, errors) for name in names if isinstance(table[name], dict)}
    errors += [f"{source.at('', name)}: expected a table, found {_show(table[name])}" for name in {*names} - {*built}]
    chosen = table.get(spec.name, names)
    if not isinstance(chosen, list) or not chosen or any(chosen.count(name) != 1 for name in chosen):
        errors.append(f"{where}: expected a list of different tables of this file, at least one, found {_show(chosen)}")
        return {}
    errors += [f"{where}: no table [{name}]; {_hint(str(name), names)}" for name in chosen if name not in names]
    return {name: built.get(name) for name in chosen if name in names}


def _value(
    kind: Any, value: Any, source: Source, section: str, spec: dataclasses.Field[Any], inner: str, errors: list[str]
) -> Any:
    where = source.at(section, spec.name)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:  # TOML has no null: this comes from a stored run
            return None
        (kind,) = {*typing.get_args(kind)} - {types.NoneType}  # the only unions in a configuration are "X or nothing"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            errors.append(f"{where}: expected a table [{inner}], found {_show(value)}")
            return None
        return build(typing.cast(type, kind), value, source, inner, errors)
    if origin is Literal:
        if value not in args:
            errors.append(f"{where} = {_show(value)}: {_hint(str(value), args)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            errors.append(f"{where} = {_show(value)}: expected a list, such as {_example(args[0])}")
            return None
        if Ellipsis not in args and len(value) != len(args):
            errors.append(f"{where} = {_show(value)}: expected {len(args)} values, found {len(value)}")
            return None
        return tuple(_value(args[0], item, source, section, spec, inner, errors) for item in value)
    if origin is dict:
        if not isinstance(value, dict) or any(type(item) is not args[1] for item in value.values()):
            errors.append(f"{where}: expected a table of {args[1].__name__} values")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        errors.append(f"{where} = {_show(value)}: expected {_NAMES[kind]}, found {_NAMES.get(type(value), 'a table')}")
        return value
    _check_bounds(value, spec, where, errors)
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}


def _check_bounds(value: Any, spec: dataclasses.Field[Any], where: str, errors: list[str]) -> None:
    low, high, above = (spec.metadata.get(key) for key in ("low", "high", "above"))
    if isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{where} = {value}: expected a finite number")
    elif low is not None and value < low:
        errors.append(f"{where} = {value}: must be at least {low}")
    elif high is not None and value > high:
        errors.append(f"{where} = {value}: must be at most {high}")
    elif above is not None and value <= above:
        errors.append(f"{where} = {value}: must be greater than {above}")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        errors.append(f"{where}: must be below 2^63")
    elif isinstance(value, str) and not value.isprintable():
        errors.append(f"{where}: control characters are not allowed")


def _hint(word: str, known: Iterable[Any]) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _example(kind: Any) -> str:
    return '["enwiki.xml.bz2"]' if kind is str else "[0.9, 0.999]" if kind is float else "[1, 2]"


def raise_all(lines: Iterable[str]) -> None:
    if text := "\n".join(lines):
        raise ConfigError(text)
