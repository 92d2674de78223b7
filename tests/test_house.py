"""The bars of the house: sizes of files and functions, the number of rooms, and pages that name only what exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "data_prep", "slurm")
TOOLS = (  # beside the product: a cluster, a corpus and a bench for machines that one has not
    "slurm/devcluster",
    "data_prep/sample_t",
    "pipeline/bench/gpu",
)

FLAT = 23  # files of pipeline outside its rooms; one more for each command that comes
ROOMS = 35  # packages and flat files that a newcomer meets
LINES = 28_250  # of the product, tools and benchmarks apart
FILE, FUNCTION = 400, 100  # lines

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/cluster.md",
    "docs/recipes.md",
    "docs/from_trainer.md",
    "docs/how_long.md",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def product() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in files if not relative(path).startswith(TOOLS)]


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions, classes and assigned names, those of classes as ``Class.name``."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, node
            case ast.ClassDef():
                yield prefix + node.name, node
                yield from definitions(node.body, f"{prefix}{node.name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, node


def definitions_in(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    return definitions(ast.parse(path.read_text(encoding="utf-8")).body)


def test_files_are_short_enough_to_be_read(product):
    assert [relative(path) for path in product if length(path) > FILE] == []


def test_functions_are_short_enough_to_be_read(product):
    long = {
        f"{relative(path)}:{name}"
        for path in product
        for name, node in definitions_in(path)
        if not isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= FUNCTION
    }
    assert not long


def test_the_product_stays_small(product):
    assert sum(length(path) for path in product if not relative(path).startswith("pipeline/bench/")) <= LINES


def test_the_rooms_can_be_counted():
    flat = [path for path in (ROOT / "pipeline").glob("*.py") if path.name != "__init__.py"]
    rooms = {path.parent for path in (ROOT / "pipeline").glob("*/*.py")}
    assert len(flat) <= FLAT
    assert len(flat) + len(rooms) + len(PACKAGES) - 1 <= ROOMS


def test_no_file_knows_the_machine_that_it_was_written_on():
    places = re.compile(r"(?<![\w.$}])/(?:work|root|home|Users)/[\w.-]+|\.\./" + "shared")
    text = {".py", ".md", ".toml", ".sh", ".sbatch", ".csv", ".css", ".c", ".def", ".yml", ".yaml", ".txt", ""}
    folders = [*PACKAGES, "tests", "docs", "benchmarks", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("[!.]*"))
    found = [
        f"{relative(path)}: {place}"
        for path in files
        if path.is_file() and path.suffix in text and "__pycache__" not in path.parts
        for place in places.findall(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


def named_in(page: str) -> set[str]:
    """Every ``folder/file`` and ``folder/file:name`` of ours in a page's code."""
    top = "|".join([*PACKAGES, "tests", "docs", "benchmarks"])
    names = re.compile(rf"(?<![\w/.-])(?:{top})/[\w./*-]*(?::[A-Za-z_][\w.]*)?")
    return set(names.findall((ROOT / page).read_text(encoding="utf-8")))


def exists(name: str) -> bool:
    path, _, inside = name.partition(":")
    files = list(ROOT.glob(path))
    return bool(files) and (not inside or inside in dict(definitions_in(files[0])))


def test_pages_name_only_what_exists():
    missing = {name for page in PAGES for name in named_in(page) if not exists(name)}
    assert not missing


def test_a_name_that_does_not_exist_is_noticed():
    assert exists("pipeline/stage.py:Stage.record")
    assert exists("tests/faults/checkpoints*.py")
    assert not exists("pipeline/stage.py:Stage.nothing")
    assert not exists("pipeline/nothing.py")


def test_digits_are_those_that_int_reads(product):
    """``str.isdigit`` takes ``²`` as well; ``isdecimal`` does not."""
    assert [relative(path) for path in product if ".isdigit()" in path.read_text(encoding="utf-8")] == []
