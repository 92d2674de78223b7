"""What `make demo` and the README promise: the whole chain on real text, a model that has learnt context, a report."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pipeline.config import load_recipe
from pipeline.pretrain.data import MaskedSamples, PretrainingData
from pipeline.pretrain.evaluate import WordShares, heldout
from pipeline.run.rundir import RunDir
from support.running import ROOT, call, digests, states

PAGES = [ROOT / "README.md"]
PAGES += [
    ROOT / f"docs/{page}.md" for page in ("cluster", "recipes", "errors", "from_nvidia", "from_trainer", "how_long")
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
MADE_ALREADY = {"make demo"}  # its run is the one that test_demo.py made
CLUSTER = "devcluster"  # the tour on a real Slurm: tests/cluster does the same and more

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


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
        "samples_32",
        "samples_128",
        "samples_512",
        "phase1",
        "phase2",
        "phase3",
        "export",
        "squad",
        "mrpc-scratch",
        "mrpc",
        "sst2-scratch",
        "sst2",
        "inference",
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
    assert len((demo / "stages" / "vocab" / "vocab.txt").read_text(encoding="utf-8").splitlines()) == 1024


def test_the_model_learns_context_and_loses_it_with_the_order(demo):
    for phase in ("phase1", "phase2"):
        result = (RunDir(demo).stage(phase).done or {})["result"]
        gain, error = result["eval_mask_gain"], result["eval_mask_gain_se"]
        assert gain >= 1.5, (phase, result)
        assert gain - 3 * error >= 1.3, (phase, result)
        assert result["shuffled_mask_gain"] <= gain / 2, (phase, result)
        assert result["eval_mlm_loss"] < result["context_free_loss"] < result["unigram_loss"]
    assert "The model uses context" in (demo / "report.html").read_text(encoding="utf-8")


def test_the_scores_are_of_stand_ins_and_say_so(demo):
    scores = {
        task: json.loads((demo / "stages" / task / "scores.json").read_text()) for task in ("squad", "mrpc", "sst2")
    }
    assert scores["sst2"]["scores"]["accuracy"] >= scores["sst2"]["baselines"]["majority"]["accuracy"] + 5
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
    assert {("phase1", 2000), ("phase2", 700), ("phase3", 30)} <= set(digests(demo))


def losses_by_transformers(folder: Path, batches: list[MaskedSamples], seq_len: int) -> np.ndarray:
    """Of each predicted word, by transformers on padded rows."""
    model = transformers.BertForPreTraining.from_pretrained(folder).eval()
    losses = []
    for found in batches:
        row = np.repeat(np.arange(len(found.lengths)), found.lengths)
        place = np.arange(len(found.tokens)) - np.repeat(np.cumsum(found.lengths) - found.lengths, found.lengths)
        ids, segments, mask = (torch.zeros(len(found.lengths), seq_len, dtype=torch.int64) for _ in range(3))
        ids[row, place] = torch.from_numpy(found.tokens)
        segments[row, place] = torch.from_numpy((place >= found.b_start[row]).astype(np.int64))
        mask[row, place] = 1
        with torch.no_grad():
            logits = model(input_ids=ids, token_type_ids=segments, attention_mask=mask).prediction_logits
        chosen = logits[row[found.positions], place[found.positions]]
        losses.append(torch.nn.functional.cross_entropy(chosen, torch.from_numpy(found.labels), reduction="none"))
    return torch.cat(losses).double().numpy()


def test_transformers_finds_the_same_held_out_figures(demo, tmp_path):
    """From shards and weights, those of phase 2; and that the last model knows the context of 128 tokens."""
    recipe, folder = load_recipe("tiny"), demo / "stages" / "samples_128"
    once = dataclasses.replace(recipe.train, masking="static", masked_lm_prob=0.15)
    train, test = (PretrainingData(folder, split, recipe.phases["phase2"], once) for split in ("train", "test"))
    batches, shares = heldout(test, 1024, 32), WordShares.of(train)
    labels = np.concatenate([part.labels for part in batches])
    seen = np.concatenate([part.tokens[part.positions] for part in batches])
    hidden, of_counts = seen == shares.mask_id, -shares.log[labels]
    done = call("export", demo / "stages" / "phase2", tmp_path / "model", "--vocab", demo / "stages/vocab/vocab.txt")
    assert done.returncode == 0, done.stderr
    losses = losses_by_transformers(tmp_path / "model", batches, 128)
    result = (RunDir(demo).stage("phase2").done or {})["result"]
    assert losses.mean() == pytest.approx(result["eval_mlm_loss"], abs=0.02)  # bf16 there, fp32 here
    assert losses[hidden].mean() == pytest.approx(result["eval_mask_loss"], abs=0.02)
    assert losses[~hidden & (seen == labels)].mean() == pytest.approx(result["eval_kept_loss"], abs=0.02)
    assert of_counts.mean() == pytest.approx(result["unigram_loss"])
    assert (of_counts - losses)[hidden].mean() == pytest.approx(result["eval_mask_gain"], abs=0.02)
    assert (of_counts - losses_by_transformers(demo / "model", batches, 128))[hidden].mean() >= 1.5


@pytest.mark.chaos
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("seed", [42, 7, 1])
def test_every_seed_and_precision_learns(demo, tmp_path, seed, precision):
    settings = [f"train.seed={seed}", f"train.precision={precision}"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = call("submit", "--recipe", "tiny", "--cluster", "local", "--run", tmp_path / "run", *words,
                "--stages", "extract,shard,vocab,samples_32,samples_128,phase1,phase2")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = (RunDir(tmp_path / "run").stage("phase2").done or {})["result"]
    assert result["eval_mask_gain"] >= 1.5, result
    assert result["shuffled_mask_gain"] <= result["eval_mask_gain"] / 2, result


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


def test_the_commands_of_the_readme(demo):
    """Every line of its blocks and the pages' runs, in order, as it stands there; last, for it changes runs/demo."""
    assert "make demo" in COMMANDS
    assert len(COMMANDS) >= 7
    (ROOT / "runs/my-bert.pt").unlink(missing_ok=True)
    for name in ("my-bert", "my-sentiment", "large", "scripts", "mine", "further"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    for command in COMMANDS:
        if command in MADE_ALREADY or CLUSTER in command:
            continue
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_files_and_options_named_in_the_readme_exist():
    for path in re.findall(r"`((?:pipeline|slurm|data_prep|tests|docs)/[\w/.]*\w)`", TEXT):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m ([\w.]+)", TEXT)):
        done = subprocess.run([ROOT / ".venv/bin/python", "-m", module, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, module
