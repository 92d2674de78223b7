"""`bench feed` runs the loop's own parts, and its figures come out of them; the bars are for a machine at rest."""

from __future__ import annotations

import json

import pytest

from pipeline.bench import feed


@pytest.mark.slow
def test_it_measures_what_it_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WORLDS", (2, 64))
    monkeypatch.setattr(feed, "OVERLAP", {4: 0.0, 1: 0.0})
    assert feed.main(["--steps", "2", "--micro-batch", "4", "--gpu-ms", "20", "--json"]) == 1, "a bar that cannot hold"
    figures = json.loads(capsys.readouterr().out)
    assert [row["world"] for row in figures["host"]] == [2, 64]
    assert all(0 < row["step_ms"] + row["micro_batch_ms"] < 1000 for row in figures["host"])
    assert all(row["ratio"] >= 1 for row in figures["overlap"]), "a device is not faster than itself"
    assert any("ranks" in line for line in feed.table(figures["host"], figures["overlap"]))
