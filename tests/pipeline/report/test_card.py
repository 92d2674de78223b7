"""The model's card: made by the stage ``report`` from what the page says, read by Hugging Face's hub and by people."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import yaml

from pipeline.report.card import card
from pipeline.report.facts import gather
from pipeline.report.render import run
from support.reporting import begin, finished_run
from support.toys import VOCAB, write_model


def test_the_stage_replaces_the_card_by_one_with_scores_and_a_snippet_that_runs(tmp_path, monkeypatch, capsys):
    chain = finished_run(tmp_path / "run")
    model = chain.run.stage("export").path / "model"
    write_model(model)
    (model / "README.md").write_text("from the export")
    run(cast(Any, SimpleNamespace(run=chain.run)))
    written = (model / "README.md").read_text()
    _, head, text = written.split("---\n", 2)
    tags = yaml.safe_load(head)
    assert (tags["language"], tags["license"], tags["pipeline_tag"]) == ("en", "other", "fill-mask")
    assert "| phase2 | MLM loss, nats | 5.121 | 5.942 |" in text
    assert "| phase1 | 128 | 64 | 400 | 0.01 |" in text
    assert "* sentiment stand-in: accuracy 71.40\N{NO-BREAK SPACE}%" in text
    assert "most frequent class accuracy 50.07\N{NO-BREAK SPACE}%" in text
    assert "research use (film reviews)" in text
    monkeypatch.chdir(model)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.split()[-1] in VOCAB


def test_what_is_not_there_yet_is_said(tmp_path):
    text = card(gather(begin(tmp_path / "run").run, held=False))
    assert "It has not been evaluated." in text
    assert "None yet." in text
