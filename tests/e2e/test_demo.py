"""What `make demo` promises: the whole chain on real text, a model that has learnt context, scores and a report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.rundir import RunDir
from running import ROOT, call, digests, states

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def demo(sample_dir: Path) -> Path:
    """runs/demo of this checkout, made by the commands of `make demo`, or found done."""
    done = call("submit", "--recipe", "tiny", "--cluster", "local", "--run", "runs/demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report: runs/demo/report.html" in done.stdout
    return ROOT / "runs" / "demo"


def test_every_stage_is_done(demo):
    found = states(demo)
    assert list(found) == [
        "extract",
        "shard",
        "vocab",
        "samples_128",
        "samples_512",
        "phase1",
        "phase2",
        "export",
        "squad",
        "mrpc",
        "sst2",
        "report",
    ]
    assert set(found.values()) == {"done"}
    assert (RunDir(demo).stage("phase1").attempts[-1].path / "rendezvous.json").exists()  # two gloo ranks


def test_articles_in_are_documents_out_and_skips(demo):
    manifest = json.loads((demo / "stages" / "extract" / "manifest.json").read_text())
    wikipedia = next(entry for entry in manifest["inputs"] if entry["name"] == "enwiki-sample.xml.bz2")
    counts = wikipedia["counts"]
    assert counts["pages"] == counts["articles"] + counts["redirects"] + counts["pages_of_other_namespaces"] == 206
    for entry in manifest["inputs"]:
        made = entry["counts"]["documents"] + sum(entry["skipped"].values())
        assert entry["counts"]["articles"] == made, entry
    assert len((demo / "stages" / "vocab" / "vocab.txt").read_text(encoding="utf-8").splitlines()) == 8192


def test_the_model_has_learnt_context(demo):
    """Held-out MLM loss at least 0.4 nats below the unigram cross-entropy of the same text."""
    for phase in ("phase1", "phase2"):
        result = (RunDir(demo).stage(phase).done or {})["result"]
        assert result["eval_mlm_loss"] <= result["unigram_loss"] - 0.4, (phase, result)


def test_the_scores_are_of_stand_ins_and_say_so(demo):
    scores = {
        task: json.loads((demo / "stages" / task / "scores.json").read_text()) for task in ("squad", "mrpc", "sst2")
    }
    assert scores["sst2"]["scores"]["accuracy"] >= 65
    report = (demo / "report.html").read_text(encoding="utf-8")
    for found in scores.values():
        assert "stand-in" in found["dataset"]
        assert found["dataset"].split("(")[0].strip() in report
        assert not re.search(r"SQuAD|MRPC|SST-2", found["dataset"])


def test_run_again_it_does_nothing_and_says_so(demo):
    again = call("submit", "--recipe", "tiny", "--cluster", "local", "--run", "runs/demo")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "sentiment stand-in" in again.stdout


def test_checkpoints_verify_and_the_last_steps_are_among_them(demo):
    assert {("phase1", 700), ("phase2", 30)} <= set(digests(demo))


def test_transformers_loads_the_model_and_fills_a_mask(demo):
    code = (
        "import sys, torch\nfrom transformers import AutoTokenizer, BertForPreTraining\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = BertForPreTraining.from_pretrained(sys.argv[1]).eval()\n"
        "x = t('the film was directed [MASK] a young man .', return_tensors='pt')\n"
        "with torch.no_grad(): logits = m(**x).prediction_logits\n"
        "place = (x.input_ids[0] == t.mask_token_id).nonzero()[0, 0]\n"
        "print('TOP', t.convert_ids_to_tokens(logits[0, place].topk(20).indices.tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(demo / "model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'by'" in done.stdout  # context, not only word counts


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: the picture is not looked at")
def test_the_report_renders_in_a_browser(demo, tmp_path):
    picture = tmp_path / "report.png"
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={picture}",
            "--window-size=1200,4000",
            (demo / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert picture.stat().st_size > 50_000
