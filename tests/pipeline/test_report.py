"""The report: one safe, self-contained page about a run in any state."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.chain import Chain
from pipeline.config import load_profile, load_recipe
from pipeline.curves import loss_chart, small_charts
from pipeline.errors import ConfigError
from pipeline.facts import gather
from pipeline.report import render
from pipeline.rundir import Attempt, RunDir, append_jsonl

UNIGRAM = 6.553
VOID = {"meta", "br"}
RESULTS = {
    "extract": {
        "inputs": [
            {
                "name": "enwiki-sample.xml.bz2",
                "bytes": 1_695_871,
                "sha256": "cd" * 32,
                "counts": {
                    "articles": 1154,
                    "documents": 1050,
                    "pages": 1300,
                    "text_bytes": 2_600_000,
                    "words": 411_255,
                },
                "skipped": {"no prose": 90, "too long": 14},
            },
            {
                "name": "books",
                "files": 11,
                "counts": {"articles": 50, "documents": 50, "text_bytes": 4_700_000, "words": 853_949},
                "skipped": {},
            },
        ],
        "counts": {"articles": 1204, "documents": 1100, "pages": 1300, "text_bytes": 7_300_000, "words": 1_265_204},
        "skipped": {"no prose": 90, "too long": 14},
        "examples": {"no prose": ["List of anthropologists", "A<b>"], "too long": []},
    },
    "shard": {
        "documents_in": 1100,
        "skipped": {"no text": 0},
        "train": {"documents": 1067, "sentences": 24310, "words": 501234, "bytes": 3_040_000, "shards": 8},
        "test": {"documents": 33, "sentences": 802, "words": 15678, "bytes": 98_000, "shards": 2},
    },
    "vocab": {"vocab_size": 8192, "asked": 8192, "sha256": "ab" * 32},
    "samples_128": {
        "seq_len": 128,
        "vocab_sha256": "ab" * 32,
        "train": {
            "rows": 6120,
            "tokens": 720345,
            "bytes": 1_600_000,
            "unknown_tokens": 51,
            "random_next": 3672,
            "padding": 0.1565,
        },
        "test": {
            "rows": 112,
            "tokens": 12345,
            "bytes": 27_000,
            "unknown_tokens": 0,
            "random_next": 56,
            "padding": 0.0636,
        },
    },
    "samples_512": {
        "train": {
            "rows": 1702,
            "tokens": 698111,
            "bytes": 1_500_000,
            "unknown_tokens": 51,
            "random_next": 900,
            "padding": 0.5942,
        },
        "test": {
            "rows": 30,
            "tokens": 12222,
            "bytes": 25_000,
            "unknown_tokens": 0,
            "random_next": 15,
            "padding": 0.3634,
        },
    },
    "export": {"model": "model", "parameters": 5_530_000, "step_of": "step 30 of phase2", "vocab_size": 8192},
}
SCORES = {
    "squad": ("extractive QA stand-in", {"exact_match": 11.25, "f1": 19.75}, 400),
    "mrpc": ("sentence-pair stand-in", {"accuracy": 62.0, "f1": 76.5, "mean": 69.25}, 500),
    "sst2": ("sentiment stand-in", {"accuracy": 71.4, "f1": 70.1}, 872),
}


# The figures below belong to these values, whatever the tiny recipe becomes.
TINY = (
    "phase1.steps=400",
    "phase1.global_batch=64",
    "phase1.micro_batch=32",
    "phase1.learning_rate=1e-2",
    "phase2.steps=30",
    "phase2.global_batch=16",
    "phase2.micro_batch=4",
    "phase2.learning_rate=2e-3",
)


def begin(path: Path, recipe: str = "tiny", profile: str = "local", *settings: str) -> Chain:
    path.mkdir(parents=True, exist_ok=True)
    values = {
        "format": 1,
        "recipe": dataclasses.asdict(load_recipe(recipe, [*(TINY if recipe == "tiny" else ()), *settings])),
        "profile": dataclasses.asdict(load_profile(profile)),
        "nodes": 1,
        "corpora": {"enwiki-sample.xml.bz2": {"bytes": 1_234_567, "digest": "0123456789abcdef"}},
        "data_dir": "../data",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "073b38b1",
    }
    (path / "run.json").write_text(json.dumps(values))
    run = RunDir(path)
    append_jsonl(path / "events.jsonl", {"time": 1.7e9, "event": "submitted", "recipe": recipe, "cluster": profile})
    return Chain.of(run)


def start(chain: Chain, name: str) -> Attempt:
    folder = chain.run.stage(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "stage.json").write_text(json.dumps(chain.record(name)))
    attempt = folder.new_attempt("launch")
    chain.run.event("started", stage=name, attempt=attempt.number, world_size=2)
    return attempt


def finish(chain: Chain, name: str, result: dict[str, object], duration_s: float = 12.5) -> None:
    record = {**chain.record(name), "finished": 1.7e9, "duration_s": duration_s, "result": result}
    chain.run.stage(name).path.mkdir(parents=True, exist_ok=True)
    chain.run.stage(name).mark_done(record)


def train(attempt: Attempt, phase: str, first: int, last: int, resumed: dict | None, total: int) -> None:
    """The metric lines that the training loop writes, every 5 steps, evaluated every 25."""
    (attempt.path / "attempt.json").write_text(json.dumps({"resumed_from": resumed}))
    head = {"stage": phase, "attempt": attempt.number}
    for step in range(first, last + 1):
        share = step / total
        mlm = 4.9 + 4.1 * math.exp(-4 * share) + 0.15 * math.sin(step * 1.7) * math.cos(step)
        line = {**head, "step": step, "time": time.time() + step}
        if step % 5 == 0:
            rate = 0.01 * min(share / 0.1, (1 - share) / 0.9)
            figures = {"loss": mlm + 0.66, "mlm_loss": mlm, "nsp_loss": 0.66, "learning_rate": rate, "grad_norm": 1.1}
            speed = 61 + 3 * math.sin(step) - (25 if step < first + 5 else 0)
            append_jsonl(
                attempt.metrics,
                {**line, **figures, "sequences_per_s": speed, "tokens_per_s": 117 * speed, "step_s": 64 / speed},
            )
        if step % 25 == 0 or step == total:
            held = {
                "eval_mlm_loss": 5.05 + 3.9 * math.exp(-4 * share),
                "eval_mlm_accuracy": 0.24 * share,
                "eval_nsp_accuracy": 0.5 + 0.18 * share,
            }
            append_jsonl(attempt.metrics, {**line, **held, "unigram_loss": UNIGRAM})


def finished_run(path: Path) -> Chain:
    chain = begin(path)
    for name in ("extract", "shard", "vocab", "samples_128", "samples_512"):
        start(chain, name)
        finish(chain, name, RESULTS[name])
    train(start(chain, "phase1"), "phase1", 1, 187, None, 400)
    train(start(chain, "phase1"), "phase1", 176, 400, {"attempt": 1, "step": 175}, 400)
    finish(chain, "phase1", {"checkpoint": "attempts/0002/step-00000400", "step": 400, "samples": 25600}, 222.0)
    train(start(chain, "phase2"), "phase2", 1, 30, None, 30)
    finish(chain, "phase2", {"checkpoint": "attempts/0001/step-00000030", "step": 30, "samples": 480}, 41.0)
    start(chain, "export")
    finish(chain, "export", RESULTS["export"])
    for task, (dataset, scores, examples) in SCORES.items():
        start(chain, task)
        record = {"task": task, "dataset": dataset, "scores": scores, "examples": examples, "train_examples": 2000}
        record |= {"seed": 1, "epochs": 2, "unit": "percent", "seeds": [{"seed": 1, "scores": scores}]}
        record |= {"mean": scores, "deviation": dict.fromkeys(scores)}
        (chain.run.stage(task).path / "scores.json").write_text(json.dumps(record))
        finish(chain, task, record)
    return chain


class Page(HTMLParser):
    """Balanced tags, the text of the page, and everything that would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(chain: Chain, *, held: bool = False) -> Page:
    html = render(gather(chain.run, held=held))
    page = Page(html)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    attributes = {key for _, attrs in page.tags for key in attrs}
    assert not attributes & {"src", "href", "xlink:href", "style"}
    assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Page:
    return page_of(finished_run(tmp_path_factory.mktemp("runs") / "demo"))


def test_the_result_stands_at_the_top(finished):
    top = finished.text[: finished.text.index("Phase 1")]
    assert "BERT training report demo done" in top
    assert "Recipe tiny · cluster local (1 node, 2 ranks)" in top
    held = 5.05 + 3.9 * math.exp(-4)
    assert f"Held-out MLM loss {held:.3f} nats after 30 steps of phase2" in top
    assert f"{UNIGRAM - held:.3f} below the unigram loss of 6.553: the model uses context" in top
    assert "sentiment stand-in : accuracy 71.40 %, F1 70.10 %" in top


def test_a_loss_above_the_unigram_loss_is_no_success(tmp_path):
    chain = begin(tmp_path / "run")
    train(start(chain, "phase1"), "phase1", 1, 25, None, 400)
    text = page_of(chain).text
    held = 5.05 + 3.9 * math.exp(-0.25)
    assert f"{held:.3f} {held - UNIGRAM:.3f} above unigram" in text
    assert "the model has learnt no more than word counts" in text


def test_every_stage_has_its_row(finished):
    for name in [*RESULTS, "phase1", "phase2", *SCORES]:
        assert f" {name} done " in finished.text
    assert "phase1 done 2 3 min 42 s" in finished.text


def test_curves_have_the_unigram_line_and_the_attempts(finished):
    levels = [attrs for tag, attrs in finished.tags if tag == "path" and attrs.get("class") == "level"]
    marks = [attrs for tag, attrs in finished.tags if tag == "path" and attrs.get("class") == "mark"]
    assert len(levels) == 2 * 2 * 2  # in the legend and in the plot, wide and narrow, of both phases
    assert "unigram loss 6.553" in finished.text
    assert len(marks) == 6  # the second attempt of phase 1 in its six charts
    assert "attempt 2: 175" in finished.text
    for title in ("Held-out accuracy", "Learning rate", "Sequences per second", "Real tokens per second"):
        assert finished.text.count(title) >= 2 * 2  # caption and SVG title


def test_all_charts_of_a_phase_end_at_the_last_logged_step(tmp_path):
    chain = begin(tmp_path / "run")
    train(start(chain, "phase1"), "phase1", 1, 60, None, 400)
    phase = gather(chain.run, held=False).phases[0]
    assert {chart.until for chart in (loss_chart(phase), *small_charts(phase).values())} == {60.0}


def test_attempts_say_what_was_redone(finished):
    row = finished.text[finished.text.index("Steps redone") :]
    assert re.search(r"1 \S+ \S+ UTC \S+ 0 185 3 min 0\d s 10 killed: it left no verdict", row)
    assert re.search(r"2 \S+ \S+ UTC \S+ 175 400 6 min \d\d s – reached the last step", row)


def test_counts_add_up_in_words(finished):
    for words in (
        "1,204 articles in = 1,100 documents out + 104 skipped (90 no prose, 14 too long).",
        "enwiki-sample.xml.bz2 1,154 1,050 90 no prose, 14 too long 411,255 2.6 MB",
        "books 50 50 none 853,949 4.7 MB",
        "Skipped, for example: no prose: List of anthropologists, A<b>.",
        "held out 33 802 15,678 2 98 kB",
        "samples_128 training 6,120 720,345 51 60.0 % 15.7 % 1.6 MB",
        "vocab done 1 12.5 s 8,192 entries",
        "samples_512 done 1 12.5 s 1,702 training samples, 30 held out",
    ):
        assert words in finished.text


def test_counts_that_do_not_add_up_are_called_out(tmp_path):
    chain = begin(tmp_path / "run")
    start(chain, "extract")
    finish(chain, "extract", {"counts": {"articles": 1204, "documents": 1000}, "skipped": {"no prose": 104}})
    said = "1,204 articles in ≠ 1,000 documents out + 104 skipped (104 no prose): the counts do not add up."
    assert said in page_of(chain).text


def test_a_stand_in_never_bears_the_name_of_the_benchmark(finished):
    assert not re.search(r"SQuAD|MRPC|SST-2", finished.text)
    assert "Nothing in this report is comparable with NVIDIA's published results" in finished.text


def test_the_plan_is_that_of_the_ranks_that_started(tmp_path):
    chain = begin(tmp_path / "run")
    chain.run.event("started", stage="phase1", attempt=1, world_size=3)
    text = page_of(chain).text
    assert "phase1 3 64 32 1 32 400 25,600 66.7 %" in text  # two micro-batches of 32 for three ranks
    assert "phase2 (planned) 2 16 4 2 8 30 480 100.0 %" in text


def test_what_is_needed_to_repeat_the_run_is_there(finished):
    for words in (
        "073b38b1",
        "torch 2.13.0",
        "phase1.learning_rate 0.01",
        "enwiki-sample.xml.bz2 1.23 MB 1 0123456789abcdef",
    ):
        assert words in finished.text


def test_an_empty_run_has_a_report(tmp_path):
    text = page_of(begin(tmp_path / "run")).text
    for sentence in (
        "The model has not been evaluated yet.",
        "This phase has not started.",
        "extract is not done",
        "No fine-tuning task has been scored yet.",
        "Not done yet: extract, shard, vocab",
    ):
        assert sentence in text


def failed_run(path: Path, line: str) -> Chain:
    chain = begin(path)
    for name in ("extract", "shard", "vocab", "samples_128", "samples_512"):
        start(chain, name)
        finish(chain, name, RESULTS[name])
    attempt = start(chain, "phase1")
    train(attempt, "phase1", 1, 60, None, 400)
    attempt.judge(5, line, 1)
    return chain


def test_a_failure_is_said_first_with_its_verdict(tmp_path):
    page = page_of(failed_run(tmp_path / "run", "step 61, rank 1: loss is not finite\nlower the learning rate"))
    top = page.text[: page.text.index("Phase 1")]
    assert "run failed" in top
    assert "phase1 failed in attempt 1 exit 5: step 61, rank 1: loss is not finite lower the learning rate" in top
    assert "Not done yet: phase2, export, squad, mrpc, sst2." in top


def test_a_failure_is_said_also_while_the_report_stage_holds_the_run(tmp_path):
    chain = failed_run(tmp_path / "run", "boom")
    with chain.run.held():
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.worker", str(chain.run.path), "report"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exit 5: boom" in Page(chain.run.report.read_text()).text
    assert (chain.run.stage("report").done or {})["result"] == {"report": "report.html", "stages_done": 5}


def test_a_stage_whose_processes_were_killed_has_failed(tmp_path):
    chain = begin(tmp_path / "run")
    start(chain, "extract")
    chain.run.event("failed", stage="extract", code=76, line="killed")
    assert "extract failed in attempt 1 exit 76: killed" in page_of(chain).text


def test_running_is_not_failed(tmp_path):
    chain = begin(tmp_path / "run")
    train(start(chain, "extract"), "extract", 1, 2, None, 2)
    text = page_of(chain, held=True).text
    assert "extract running" in text
    assert "failed" not in text


HOSTILE = "<script>alert(1)</script>\"'>&\x1b[31m\u202eevil"


def test_hostile_texts_are_shown_not_obeyed(tmp_path):
    chain = failed_run(tmp_path / "a <b> & c", HOSTILE)
    settings = json.loads((chain.run.path / "run.json").read_text())
    settings["corpora"][HOSTILE] = {"bytes": 1, "digest": HOSTILE}
    settings["versions"][HOSTILE] = HOSTILE
    (chain.run.path / "run.json").write_text(json.dumps(settings))
    attempt = start(chain, "phase1")
    (attempt.path / "owner.json").write_text(json.dumps({"host": HOSTILE, "time": HOSTILE}))
    attempt.judge(5, HOSTILE, 0)
    page = page_of(chain)
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert r"\x1b[31m\u202eevil" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", "".join(page.words))


def test_hostile_scores_and_results_are_shown_not_obeyed(tmp_path):
    chain = begin(tmp_path / "run")
    for name in chain.stages:
        if name != "report":
            start(chain, name)
            result = {HOSTILE: HOSTILE, "train": {HOSTILE: [1]}, "skipped": {HOSTILE: 3}, "vocab_size": HOSTILE}
            result |= {"inputs": [HOSTILE, {"name": HOSTILE, "counts": HOSTILE, "skipped": {HOSTILE: 1}}]}
            result |= {"counts": {"articles": 1, "documents": 2}, "examples": {HOSTILE: [HOSTILE], "x": HOSTILE}}
            finish(chain, name, result)
    record = {"task": "sst2", "dataset": HOSTILE, "scores": {HOSTILE: HOSTILE}, "examples": HOSTILE, "seeds": [HOSTILE]}
    (chain.run.stage("sst2").path / "scores.json").write_text(json.dumps(record))
    page_of(chain)


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b'{"loss": 1.0}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"step": null, "loss": 2}\n',
        b'{"step": 1, "loss": "x", "learning_rate": null}\n{"step": 2, "eval_mlm_loss": null}\n',
        b'{"step": 1, "loss": NaN, "mlm_loss": Infinity}\n{"step": 2, "eval_mlm_loss": 1' + b"0" * 400 + b"}\n",
        b'{"step": 1' + b"0" * 400 + b', "loss": 1}\n',
    ],
)
def test_damaged_metrics_cost_curves_and_nothing_else(tmp_path, line):
    chain = begin(tmp_path / "run")
    start(chain, "phase1").metrics.write_bytes(line)
    assert "Batch plan" in page_of(chain).text


def test_damaged_events_and_marks_cost_nothing_else(tmp_path):
    chain = finished_run(tmp_path / "run")
    (chain.run.path / "events.jsonl").write_text("{\n[]\n")
    (chain.run.stage("shard").path / "done.json").write_text("{")
    (chain.run.stage("sst2").path / "scores.json").write_text("[]")
    (chain.run.stage("phase1").attempts[0].path / "owner.json").write_text("{}")
    text = page_of(chain).text
    assert "time of submission not recorded" in text
    assert "sentiment stand-in : accuracy" not in text
    assert "documents 1,067" not in text


def test_results_of_an_older_configuration_are_not_shown_as_current(tmp_path):
    finished_run(tmp_path / "run")
    text = page_of(begin(tmp_path / "run", "tiny", "local", "phase2.learning_rate=0.1")).text
    assert "what follows was made with the older one, and phase2 will run again" in text
    assert "phase1 will run again" not in text
    assert "phase.learning_rate was 0.002, is 0.1" in text
    assert "stand-in: accuracy" not in text


def test_several_seeds_show_mean_and_deviation(tmp_path):
    chain = begin(tmp_path / "run")
    start(chain, "sst2")
    record = {"dataset": "reviews", "scores": {"accuracy": 75.0}, "mean": {"accuracy": 72.5}, "examples": 900}
    record |= {"deviation": {"accuracy": 3.54}, "seeds": [{"seed": 1}, {"seed": 7}]}
    for name in chain.stages:
        finish(chain, name, {})
    (chain.run.stage("sst2").path / "scores.json").write_text(json.dumps(record))
    text = page_of(chain).text
    assert "reviews accuracy 72.50 ± 3.54 % 900 not known 1, 7" in text


def large_run(path: Path, examples: int = 10570, *settings: str) -> Chain:
    chain = begin(path, "bert_large", "dgx_a100_80g", "phase1.micro_batch=256", "phase2.micro_batch=32", *settings)
    for name, steps in (("phase1", 7038), ("phase2", 1563)):
        attempt = start(chain, name)
        steps = getattr(gather(chain.run, held=False).recipe, name).steps
        for step in range(1, steps + 1, 3):
            figures = {
                "loss": 1.25,
                "mlm_loss": 1.2,
                "nsp_loss": 0.05,
                "learning_rate": 1e-3,
                "sequences_per_s": 4600.5,
            }
            line = {"step": step, "time": 1.0, **figures, "tokens_per_s": 500_000.0}
            with attempt.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        append_jsonl(attempt.metrics, {**line, "step": steps})
    for name in chain.stages:
        finish(chain, name, {})
    record = {"dataset": "SQuAD v1.1", "scores": {"f1": 90.1, "exact_match": 83.0}, "examples": examples}
    (chain.run.stage("squad").path / "scores.json").write_text(json.dumps(record))
    return chain


def test_a_large_run_stands_beside_the_published_rows(tmp_path):
    chain = large_run(tmp_path / "run")
    text = page_of(chain).text
    assert "Final training loss, nats 1.25 1.265 ± 0.023 over 5 seeds; 1.2437 (fp16), 1.2465 (tf32)" in text
    assert "phase1, sequences/s (median) 4,600 4,591 and 4,553 1 × DGX A100 80GB, fp16" in text
    assert "SQuAD v1.1, f1 in percent 90.1 (1 seed) 90.68 ± 0.160 over 10 seeds, best 90.96" in text
    assert "SQuAD v1.1, exact match in percent 83 (1 seed) 83.96 ± 0.266 over 10 seeds" in text
    assert len(render(gather(chain.run, held=False))) < 200_000


def test_what_is_not_comparable_is_not_compared(tmp_path):
    text = page_of(large_run(tmp_path / "run", 500, "phase1.steps=90")).text
    assert "The training loss is not comparable: phase1 ran 90 steps" in text
    assert "SQuAD v1.1: not comparable, it was scored on 500 examples" in text
    assert "1.2437" not in text
    assert "90.68" not in text


def test_the_command_writes_and_refuses(tmp_path):
    chain = begin(tmp_path / "run")
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; sys.path.insert(0, ''); from pipeline.errors import run_command; "
    )
    code += "from pipeline.report import main; code = main(); assert not {'torch', 'h5py'} & set(sys.modules); "
    code += "raise SystemExit(code)"
    out = tmp_path / "mail.html"
    command = [sys.executable, "-c", code, "report", str(chain.run.path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert not chain.run.report.exists()
    Page(out.read_text())
    with pytest.raises(ConfigError, match="not a run"):
        gather(RunDir(tmp_path), held=False)
