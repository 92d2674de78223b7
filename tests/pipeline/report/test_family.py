"""The page of a family: each seed, mean, deviation and maximum, the spread drawn, links to the seeds' own reports."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.report.render import main
from support.reporting import Page, begin, finish, start, train
from support.running import TWO_PHASES

SCORES = {0: 71.0, 1: 72.5, 10: 70.25}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Three seeds; the last has trained and is not scored; the run of the data has made them only."""
    begin(tmp_path / "family" / "data", TWO_PHASES, "local")
    for seed, score in SCORES.items():
        chain = begin(tmp_path / "family" / f"seed-{seed}", TWO_PHASES, "local", f"train.seed={seed}")
        train(start(chain, "phase1"), "phase1", 1, 100 + 5 * seed, None, 50)
        finish(chain, "phase1", {"step": 100 + 5 * seed})
        if seed < 10:
            start(chain, "sst2")
            record = {"dataset": "reviews", "scores": {"accuracy": score}}
            (chain.run.stage("sst2").path / "scores.json").write_text(json.dumps(record))
            finish(chain, "sst2", record)
    (tmp_path / "family" / "seed-1" / "report.html").write_text("x")
    return tmp_path / "family"


def report(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    assert main() == 0


def test_seeds_and_their_spread(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(monkeypatch, family)
    text = (family / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)[1:]]
    rows = {re.sub(r"<[^>]*>", "", row[0]): row[2:] for row in cells}
    assert list(rows) == ["seed-0", "seed-1", "seed-10", "mean", "deviation", "maximum"]
    losses = [json.loads(line)["loss"] for seed in SCORES
              for line in (family / f"seed-{seed}/stages/phase1/attempts/0001/metrics.jsonl").read_text().splitlines()
              if json.loads(line)["step"] == 100 + 5 * seed and "loss" in json.loads(line)]  # fmt: skip
    assert len(set(losses)) == 3
    assert [rows[f"seed-{seed}"][0] for seed in SCORES] == [f"{loss:#.4g}" for loss in losses]
    spread = [f"{of(losses):#.4g}" for of in (statistics.fmean, statistics.stdev, max)]
    assert [rows[word][0] for word in ("mean", "deviation", "maximum")] == spread
    assert [row[-1] for row in rows.values()] == ["71.00", "72.50", "–", "71.75", "1.061", "72.50"]
    assert re.findall(r'href="([^"#]*)"', text) == ["seed-1/report.html"]
    assert "Where a seed has no figure yet" in page.text
    assert "reviews accuracy: 2 seeds, mean 71.75, deviation 1.06, from 71 to 72.5." in page.text
    assert "phase1 final loss: 3 seeds" in page.text


def test_a_family_in_any_state_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "data", TWO_PHASES, "local")
    begin(tmp_path / "seed-0", TWO_PHASES, "local")
    report(monkeypatch, tmp_path, "--out", tmp_path / "page.html")
    assert "There are no two seeds with a figure yet." in Page((tmp_path / "page.html").read_text()).text
    (tmp_path / "seed-0").rename(tmp_path / "phase1-fp16-1")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(ConfigError, match="no family of seeds"):
        main()
