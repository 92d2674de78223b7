"""The report: one safe, self-contained page about a run in any state."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.report.curves import all_charts, charts
from pipeline.report.facts import Facts, gather
from pipeline.report.render import render
from pipeline.run.chain import Chain
from pipeline.run.files import append_jsonl
from pipeline.run.rundir import RunDir
from support.reporting import (
    HOSTILE,
    RESULTS,
    SCORES,
    Page,
    begin,
    finish,
    finished_run,
    page_of,
    start,
    train,
)
from support.running import TWO_PHASES


@pytest.fixture(scope="module")
def finished_facts(tmp_path_factory) -> Facts:
    return gather(finished_run(tmp_path_factory.mktemp("runs") / "demo").run, held=False)


@pytest.fixture(scope="module")
def finished(finished_facts) -> Page:
    return page_of(finished_facts.chain)


def test_the_result_stands_at_the_top(finished):
    top = finished.text[: finished.text.index("Where the time went")]
    assert "BERT training report demo done" in top
    assert "Recipe tiny · cluster local (1 node, 2 ranks)" in top
    held = 5.05 + 3.9 * math.exp(-4)
    assert f"Held-out MLM loss {held:.3f} nats after 30 steps of phase2" in top
    assert "best without context 5.942." in top
    assert "Of hidden words: where a word is hidden it is 1.20 ± 0.03 nats better than word counts" in top
    assert "Accuracy at [MASK] 21.0 % most frequent word: 4.0 %" in top
    assert "NSP accuracy 68.0 % more frequent answer: 55.0 %" in top
    assert "sentiment stand-in : accuracy 71.40 %, F1 70.10 % (most frequent class accuracy 50.07 %)" in top
    assert re.search("Time to train, of steps alone, [^:]*: phase1 .*, phase2 .* Final training loss", finished.text)


def test_the_control_at_the_end_of_a_phase_decides(tmp_path):
    chain = begin(tmp_path / "run")
    train(start(chain, "phase1"), "phase1", 1, 400, None, 400)
    finish(chain, "phase1", {"step": 400, "shuffled_mask_gain": 0.31, "shuffled_mask_gain_se": 0.03})
    text = page_of(chain).text
    assert "The model uses context: where a word is hidden it is 1.20 ± 0.03 nats better than word counts" in text
    assert "only 0.31 with the words around in random order" in text


@pytest.mark.parametrize(("gain", "said"), [(0.02, "has not learnt to use context"), (None, "not measured")])
def test_copying_is_not_taken_for_context(tmp_path, gain, said):
    chain = begin(tmp_path / "run")
    train(start(chain, "phase1"), "phase1", 1, 400, None, 400, gain=gain)
    text = page_of(chain).text
    assert said in text
    assert "The model uses context" not in text


def test_scores_stand_beside_what_needs_no_model(finished):
    assert "sentiment stand-in accuracy 71.40 %, F1 70.10 % accuracy 50.07 % – –" in finished.text


def test_every_stage_has_its_row(finished):
    for name in [*RESULTS, "phase1", "phase2", *SCORES]:
        assert f" {name} done " in finished.text
    assert "phase1 done 2 3 min 42 s" in finished.text


def test_curves_have_the_level_to_beat_and_the_attempts(finished):
    levels = [attrs for tag, attrs in finished.tags if tag == "path" and attrs.get("class") == "level"]
    marks = [attrs for tag, attrs in finished.tags if tag == "path" and attrs.get("class") == "mark"]
    assert len(levels) == 4 * 2  # in the legend and in the plot: wide, narrow, by tokens and at [MASK]
    assert "best without context 5.942" in finished.text
    assert len(marks) == 9 * 2  # the second attempt of phase 1 and phase 2, in nine charts
    assert "attempt 2: 175" in finished.text
    assert "phase2: 400" in finished.text
    for title in ("Held-out accuracy", "Learning rate", "Gradient norm", "Sequences per second"):
        assert finished.text.count(title) >= 2  # caption and SVG title


def test_phases_follow_each_other_on_one_axis(finished_facts):
    charts = all_charts(finished_facts.phases)
    first, second = finished_facts.phases
    assert charts["loss"].until == 430.0
    assert [x for x, _ in charts["loss"].lines[0].points] == [
        start + line["step"] for start, phase in ((0, first), (400, second)) for line in phase.steps
    ]
    # the stand-in's lines say 117 tokens a sequence, of batches of 64 and 16
    assert charts["tokens"].until == pytest.approx(117 * (400 * 64 + 30 * 16))
    assert {chart.until for key, chart in charts.items() if key != "tokens"} == {430.0}


def test_steps_are_whole(tmp_path):
    chain = begin(tmp_path / "run")
    train(start(chain, "phase1"), "phase1", 1, 2, None, 2)
    append_jsonl(chain.run.stage("phase1").attempts[0].metrics, {"step": 1, "loss": 7.0, "mlm_loss": 6.0})
    append_jsonl(chain.run.stage("phase1").attempts[0].metrics, {"step": 2, "loss": 6.0, "mlm_loss": 5.0})
    drawn = str(charts(gather(chain.run, held=False).phases))
    assert ">1</text>" in drawn
    assert ">0.5</text>" not in drawn


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
    attempt.write_verdict(5, line, 1)
    return chain


def test_a_failure_is_said_first_with_its_verdict(tmp_path):
    page = page_of(failed_run(tmp_path / "run", "step 61, rank 1: loss is not finite\nlower the learning rate"))
    top = page.text[: page.text.index("Phase 1")]
    assert "run failed" in top
    assert "phase1 failed in attempt 1 exit 5: step 61, rank 1: loss is not finite lower the learning rate" in top
    assert "Not done yet: phase2, export, squad, mrpc, sst2" in top


@pytest.mark.slow
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


def test_hostile_texts_are_shown_not_obeyed(tmp_path):
    chain = failed_run(tmp_path / "a <b> & c", HOSTILE)
    settings = json.loads((chain.run.path / "run.json").read_text())
    settings["corpora"][HOSTILE] = {"bytes": 1, "digest": HOSTILE}
    settings["versions"][HOSTILE] = HOSTILE
    (chain.run.path / "run.json").write_text(json.dumps(settings))
    attempt = start(chain, "phase1")
    (attempt.path / "owner.json").write_text(json.dumps({"host": HOSTILE, "time": HOSTILE}))
    attempt.write_verdict(5, HOSTILE, 0)
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
    text = page_of(begin(tmp_path / "run", TWO_PHASES, "local", "phase2.learning_rate=0.1")).text
    assert "what follows was made with the older one, and phase2 will run again" in text
    assert "phase1 will run again" not in text
    assert "phase.learning_rate was 0.002, is 0.1" in text
    assert "stand-in: accuracy" not in text


def test_several_seeds_show_mean_and_deviation(tmp_path):
    chain = begin(tmp_path / "run")
    start(chain, "sst2")
    record = {"dataset": "reviews", "scores": {"accuracy": 75.0}, "mean": {"accuracy": 72.5}, "examples": 900}
    seeds = [{"seed": 1, "scores": {"accuracy": 70.0}}, {"seed": 7, "scores": {"accuracy": 75.0}}]
    record |= {"deviation": {"accuracy": 3.54}, "seeds": seeds, "ranked_by": "accuracy"}
    for name in chain.stages:
        finish(chain, name, {})
    (chain.run.stage("sst2").path / "scores.json").write_text(json.dumps(record))
    text = page_of(chain).text
    assert "reviews accuracy 72.50 ± 3.54 % – – – 900 not known 1, 7" in text
    assert "reviews accuracy 1: 70.00, 7: 75.00 72.50 ± 3.54 75.00 (seed 7)" in text
    assert "reviews, accuracy: 2 seeds, mean 72.5, deviation 3.54, from 70 to 75." in text


def large_run(path: Path, examples: int = 10570, *settings: str, world: int = 8) -> Chain:
    chain = begin(path, "bert_large", "dgx_a100_80g", "phase1.micro_batch=256", "phase2.micro_batch=32", *settings)
    for name in sorted({"phase1", "phase2"} & set(chain.stages)):
        attempt = start(chain, name, world)
        steps = gather(chain.run, held=False).recipe.phases[name].steps
        for step in range(1, steps + 1, 3):
            figures = {
                "loss": 1.25,
                "mlm_loss": 1.2,
                "nsp_loss": 0.05,
                "learning_rate": 1e-3,
                "sequences_per_s": 4600.5,
            }
            line = {"step": step, "time": 1e9 + step, **figures, "tokens_per_s": 500_000.0}
            with attempt.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        append_jsonl(attempt.metrics, {**line, "step": steps})
    append_jsonl(start(chain, "squad", world).metrics, {"step": 1, "sequences_per_s": 98.5, "loss": 1.0})
    for name in chain.stages:
        finish(chain, name, {})
    same = {"task": "squad", "seq_len": 384, "batch": 32, "part": "forward", "lengths": "full", "precision": "fp16"}
    rows = [
        {**same, "engine": "pipeline", "sequences_per_s": 700},
        {**same, "engine": "transformers", "sequences_per_s": 423},
    ]
    finish(chain, "inference", {"device": "one A100", "rows": rows})
    record = {"dataset": "SQuAD v1.1", "scores": {"f1": 90.1, "exact_match": 83.0}, "examples": examples}
    record |= {"precision": "fp16", "batch": 256, "micro_batch": 32, "max_seq_len": 384}
    record["seeds"] = [{"seed": seed, "scores": {"f1": 90.1, "exact_match": 83.0}} for seed in range(10)]
    (chain.run.stage("squad").path / "scores.json").write_text(json.dumps(record))
    return chain


def comparison(text: str) -> str:
    """What is set beside the published results, without the table of all that was published."""
    text = text[text.rindex("Beside NVIDIA's published results") :]
    return text[: text.index("Published values")]


def test_a_large_run_stands_beside_the_cells_of_its_definition(tmp_path):
    chain = large_run(tmp_path / "run")
    page = page_of(chain)
    text = comparison(page.text)
    assert "one DGX A100 80GB phase1 8 GPUs, fp16 4,600 4,591 1.002 bf16; run; published: DGX A100 80GB" in text
    assert "SQuAD v1.1, F1 and time squad, f1 fp16 90.1 90.96 0.9905 best of 10 seeds; run;" in text
    assert "SQuAD inference throughput, one A100 80GB squad, fp16 700 312 2.244 one A100; published" in text
    assert "1.2437" not in text  # of 32 nodes
    assert "110.5" not in text  # of one GPU
    assert "423" not in text  # transformers' own rate
    assert len(render(gather(chain.run, held=False))) < 200_000
    assert "squad, inference 312 sequences/s single run 1 × 1 GPUs, DGX A100 80GB, fp16 32 × 1" in page.text


def test_loss_and_hours_are_compared_on_as_many_nodes(tmp_path):
    chain = large_run(tmp_path / "run", world=256)
    for name in ("phase1", "phase2"):
        (chain.run.stage(name).attempts[0].path / "owner.json").write_text(json.dumps({"time": 1e9}))
    text = comparison(page_of(chain).text)
    assert "pretraining, final_loss fp16 1.25 1.244" in text
    assert (
        f"pretraining, time_to_train fp16 {(7035 + 1560) / 3600:.4g} 1.2" in text
    )  # of training alone, a step a second


@pytest.mark.parametrize(
    "settings", ["phase1.steps=90", 'phase2.start="others.safetensors"', 'phases=["phase1"]', "phase1.seq_len=64"]
)
def test_what_is_not_comparable_is_not_compared(tmp_path, settings):
    text = comparison(page_of(large_run(tmp_path / "run", 500, settings, world=256)).text)
    assert "final_loss" not in text
    assert "90.96" not in text
    assert ("phase1 32 nodes" in text) is (settings != "phase1.seq_len=64" and "start" not in settings)


def test_the_command_writes_and_refuses(tmp_path):
    chain = begin(tmp_path / "run")
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; sys.path.insert(0, ''); from pipeline.errors import run_command; "
    )
    code += "from pipeline.report.render import main; code = main(); assert not {'torch', 'h5py'} & set(sys.modules); "
    code += "raise SystemExit(code)"
    out = tmp_path / "mail.html"
    command = [sys.executable, "-c", code, "report", str(chain.run.path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert not chain.run.report.exists()
    Page(out.read_text())
    with pytest.raises(ConfigError, match="not a run"):
        gather(RunDir(tmp_path), held=False)
