"""docs/recipe.md out of the dataclasses: ``PYTHONPATH=. python tests/support/recipe_page.py > docs/recipe.md``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

from pipeline import config

SECTIONS = {
    "model": config.ModelConfig,
    "data": config.DataConfig,
    "train": config.TrainConfig,
    "optimizer": config.OptimizerConfig,
    "phase1": config.PhaseConfig,
    "squad": config.TaskConfig,
    "inference": config.InferenceConfig,
}
TOP = """# Every key of a recipe

Made from `pipeline/config.py` by `tests/support/recipe_page.py`; a test holds that it is current. A key without a
default must be given. Keys marked \\* may change without making finished stages stale. At the top of a file stand
`name`; `base`, a recipe of `pipeline/recipes` that this one changes; and `phases`, a list of tables to take.
"""


def page() -> str:
    return "\n".join([TOP, *(part for name, kind in SECTIONS.items() for part in section(name, kind))])


def section(name: str, kind: type) -> list[str]:
    """A heading, the class's words and a table."""
    words = (inspect.getdoc(kind) or "").replace("``", "`")
    rows = [row(spec, kind) for spec in dataclasses.fields(kind)]
    return [f"## [{name}]\n", f"{words}\n", "| key | values | default | |\n|---|---|---|---|", *rows, ""]


def row(spec: dataclasses.Field, kind: type) -> str:
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
    comment = re.search(rf"^    {spec.name}: .*?  # (.*)$", source, re.MULTILINE)
    default = "" if spec.default is dataclasses.MISSING else f"`{toml(spec.default)}`"
    star = "" if spec.metadata.get("science", True) is True else "\\*"
    taken = values(spec, typing.get_type_hints(kind)[spec.name])
    return f"| `{spec.name}`{star} | {taken} | {default} | {comment[1] if comment else ''} |"


def values(spec: dataclasses.Field, hint: object) -> str:
    """Types and bounds in words."""
    hint = next((each for each in typing.get_args(hint) if type(None) in typing.get_args(hint)), hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(hint))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    text = names.get(hint) or f"list of {names[typing.get_args(hint)[0]]}s"
    limits = {"low": "from {:,}", "above": "above {:,}", "high": "to {:,}"}
    bounds = [words.format(spec.metadata[key]) for key, words in limits.items() if spec.metadata.get(key) is not None]
    return " ".join([text, *bounds])


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    print(page(), end="")
