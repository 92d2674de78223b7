"""The benchmark of data preparation: every stage has a row, and the page is made from the figures."""

import json
from pathlib import Path

import pytest

from pipeline.bench import data
from support.running import call


@pytest.mark.slow
def test_each_stage_is_measured(sample_dir: Path) -> None:
    """In a process of its own: children begin with their parent's memory, and that of the tests is large."""
    done = call("bench", "data", "--data", sample_dir, "--mb", "12", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    stages = {row["stage"]: row for row in figures["stages"]}
    assert list(stages) == ["extract", "shard", "vocab", "samples 128", "samples 512"]
    assert all(row["cpu_s"] > 0 and 0 < row["peak_mb"] < 600 for row in stages.values())
    assert all(stages[name]["two_workers_cpu_s"] > 0 for name in stages if name != "vocab")
    assert stages["samples 128"]["samples"] > stages["samples 512"]["samples"] > 0
    speeds = {row["what"]: row["mb_per_s"] for row in figures["beside"]}
    assert speeds["wikitext.clean"] > 3 * speeds["mwparserfromhell"]  # 13 on an idle machine
    page = "\n".join(data.page(figures))
    assert page.count("| extract |") == page.count("| mwparserfromhell |") == 1
