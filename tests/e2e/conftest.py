"""A small corpus, and the small chain run once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from running import submit


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
