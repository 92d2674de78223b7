"""Fixtures that every test may use: fetched real text, fetched checkpoints; and which tests run where."""

import functools
import importlib.util
import inspect
import json
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

from support.running import submit

# The same examples each time where a change is judged; new ones at every developer's desk. No deadline: a busy
# machine is no defect.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("desk", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")

# One computing thread here and in all that tests start, as a rank has: another number of threads gives other bits, on
# some processors in the smallest product. It must be said before torch is imported, which asks once; a command that a
# test calls in this process may say otherwise (see `pytest_runtest_setup`).
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

# Ctrl-C works in what tests start, also where they run in the background of a script, whose children ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
DATA = TESTS.parent / "data"
STARTERS = {"subprocess", "Popen", "Background", "multiprocessing", "fork"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="also run the long proofs (or set CHAOS=1)")


@pytest.hookimpl(tryfirst=True)  # before the marks are chosen by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_unit(item):
            item.add_marker("unit")
    if not (config.getoption("--chaos") or os.environ.get("CHAOS") == "1"):
        for item in items:
            if item.get_closest_marker("chaos"):
                item.add_marker(pytest.mark.skip(reason="a long proof: run it with --chaos or make chaos"))


def _is_unit(item: pytest.Item) -> bool:
    """Whether make unit runs a test: beside the code that it holds, not marked, with nothing fetched or started."""
    beside = item.path.relative_to(Path(__file__).parent).parts[0] in ("data_prep", "pipeline", "slurm", item.path.name)
    marked = any(item.get_closest_marker(mark) for mark in ("slow", "chaos", "cluster", "gpu"))
    fetches = {"sample_dir", "carriers"} & set(item.fixturenames)  # directly or through other fixtures
    return beside and not marked and not fetches and not _starts_processes(item)


def _starts_processes(item: pytest.Item) -> bool:
    """Whether the test, a fixture of it or a function of ours that they name names what starts a process."""
    fixtures = [each.func for definitions in item._fixtureinfo.name2fixturedefs.values() for each in definitions]
    left, seen = [item.function, *fixtures], set()
    while left:
        function = left.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen or not code.co_filename.startswith(str(TESTS)):
            continue
        seen.add(code)
        codes = [code, *(each for each in code.co_consts if inspect.iscode(each))]
        names = {name for each in codes for name in each.co_names}
        if names & STARTERS:
            return True
        left += [function.__globals__[name] for name in names if name in function.__globals__]
    return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    if item.get_closest_marker("gpu"):
        missing = _no_cuda()
        if missing:
            pytest.skip(missing)


@functools.cache
def _no_cuda() -> str:
    """Why there is no GPU to test on; torch is imported only when a test marked gpu is about to run."""
    if importlib.util.find_spec("torch") is None:
        return "needs a CUDA device: torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device: torch sees none on this machine"


def _fetched(name: str) -> Path:
    from data_prep.sample_text.fetch import fetch
    from data_prep.sample_text.packages import NotReachable

    try:
        fetch(DATA, tests=name == "carriers", say=lambda line: None)
    except NotReachable as error:
        pytest.skip(f"data/{name} cannot be fetched: {error}")
    return DATA / name


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """data/sample: the text and labelled sets of the tiny recipe, fetched when missing."""
    return _fetched("sample")


@pytest.fixture(scope="session")
def carriers() -> Path:
    """data/carriers: checkpoints, the official SQuAD script and more dumps, fetched when missing."""
    return _fetched("carriers")


@pytest.fixture(scope="session")
def small_data(sample_dir: Path, carriers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred real paragraphs and some dozens of examples of each task."""
    folder = tmp_path_factory.mktemp("data")
    for name, source, lines in (
        ("boolq.jsonl", "boolq.jsonl", 600),
        ("pairs.tsv", "pairs-dev.tsv", 60),
        ("sentiment.tsv", "sentiment-dev.tsv", 60),
    ):
        text = (sample_dir / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(text[:lines]), encoding="utf-8")
    squad = json.loads((sample_dir / "qa-eval.json").read_text(encoding="utf-8"))
    squad["data"][0]["paragraphs"] = squad["data"][0]["paragraphs"][:12]
    (folder / "qa.json").write_text(json.dumps(squad), encoding="utf-8")
    name = "enwiki-table-markup.xml.bz2"
    (folder / name).write_bytes((carriers / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def small_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small chain, run once without any disturbance."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = submit(run, small_data)
    assert done.returncode == 0, done.stdout + done.stderr
    return run
