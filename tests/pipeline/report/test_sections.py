"""The report's panels on time, GPUs and incidents."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.report.curves import tuning_charts
from pipeline.report.facts import gather
from pipeline.report.gpus import MOST_LINES, band, few_lines
from pipeline.report.page import STYLE
from pipeline.report.render import render
from pipeline.report.sections import made
from pipeline.run import gpu_samples
from pipeline.run.account import PARTS
from pipeline.run.chain import Chain
from pipeline.run.rundir import Attempt, StageDir
from support.reporting import HOSTILE, begin, finish, finished_run, page_of, start, train

BEGAN = 1_000_000.0


def part_of(text: str, heading: str, until: str) -> str:
    text = text[text.rindex(heading) :]
    return text[: text.index(until)]


# -------------------------------------------------------------------- time


def timed_run(path: Path) -> Chain:
    """Two attempts of phase 1: 20 s of start-up, ten steps of 10 s, four of them done again after a wait of 50 s."""
    chain = begin(path)
    (chain.run.path / "events.jsonl").write_text(json.dumps({"event": "submitted", "time": BEGAN - 10}) + "\n")
    for began, first, last in ((BEGAN, 1, 10), (BEGAN + 170, 7, 10)):
        attempt = start(chain, "phase1")
        origin = {"resumed_from": {"step": first - 1}} if first > 1 else {"resumed_from": None}
        (attempt.path / "attempt.json").write_text(json.dumps(origin))
        (attempt.path / "owner.json").write_text(json.dumps({"host": "node1", "time": began}))
        with attempt.metrics.open("w") as file:
            for index, step in enumerate(range(first, last + 1)):
                since = began + 20 + 10 * index
                spent = {"compute": 6, "communication": 2, "data": 1, "checkpoint": 1}
                line = {"step": step, "loss": 7.0, "since": since, "time": since + 10, "spent_s": spent}
                file.write(json.dumps(line) + "\n")
    return chain


def test_the_time_section_shows_every_second_once(tmp_path):
    page = page_of(timed_run(tmp_path / "run"))
    text = part_of(page.text, "Where the time went", "Goodput =")
    # 10 s + 50 s waiting, 2 x 20 s start-up, 14 steps of 10 s of which 4 are done again: 240 s
    for words in (
        "phase1 4 min 00 s · goodput 44.4 %",  # 80 of 180 s
        "computing 1 min 00 s · 25.0 %",
        "communication 20.0 s · 8.3 %",
        "waiting for data 10.0 s · 4.2 %",
        "start-up 40.0 s · 16.7 %",
        "steps done again 40.0 s · 16.7 %",
        "waiting to start 1 min 00 s · 25.0 %",
    ):
        assert words in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "stopped" not in text
    assert "The chain is its critical path, phase1." in page.text


def test_the_bars_are_as_long_as_their_seconds(tmp_path):
    html = render(gather(timed_run(tmp_path / "run").run, held=False))
    bars = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg[^>]*><title id=\"time-.*?</svg>", html)]
    assert len(bars) == 2
    for svg in bars:
        rects = {rect.attrib["class"].removeprefix("part-"): rect for rect in svg.iter("rect")}
        assert set(rects) <= set(PARTS)
        assert float(rects["compute"].attrib["width"]) == pytest.approx(940 * 60 / 240 - 1.5, abs=0.1)
        ends = [float(rect.attrib["x"]) + float(rect.attrib["width"]) for rect in rects.values()]
        assert max(ends) == pytest.approx(940 - 1.5, abs=0.2)


def test_a_run_that_has_not_begun_says_so(tmp_path):
    text = page_of(begin(tmp_path / "run")).text
    assert "Nothing has run yet." in text
    assert "No GPU was sampled" in text
    assert "What stood out" not in text


# -------------------------------------------------------------------- GPUs


def sample(attempt: Attempt, node: str, gpus: int, seconds: int, began: float = BEGAN, **more: object) -> None:
    """GPU i of a node at 300 + i watts, one line a second; ``more`` for GPU 1."""
    stage, folder = attempt.path.parents[1], attempt.path.parents[3] / "gpu"
    folder.mkdir(exist_ok=True)
    which = {"stage": stage.name, "begun": gpu_samples.begun_at(StageDir(stage)), "attempt": attempt.number}
    with (folder / f"{node.replace('/', '')[:40]}.jsonl").open("a") as file:
        for second in range(seconds + 1):
            for gpu in range(gpus):
                line = {"time": began + second, "node": node, "gpu": gpu, "uuid": f"GPU-{gpu}", "name": "Example 80GB"}
                line |= which
                line |= {"utilization_pct": 90 + gpu, "memory_used_mb": 40_000, "power_w": 300 + gpu}
                line |= {"energy_j": 5e6 + second * (300 + gpu), "temperature_c": 60, "sm_clock_mhz": 1410}
                line |= {"throttle": ["software power cap"] if second % 2 else [], "xid": []}
                file.write(json.dumps({**line, **(more if gpu == 1 else {})}) + "\n")


def test_energy_use_and_throttling_add_up(tmp_path):
    chain = begin(tmp_path / "run")
    attempt = start(chain, "phase1")
    train(attempt, "phase1", 1, 100, None, 400)
    sample(attempt, "node1.cluster", 4, 600, throttle=["hardware thermal slowdown"], temperature_c=88, xid=[79])
    text = page_of(chain).text.replace("\N{NO-BREAK SPACE}", " ")
    kwh = 600 * (300 + 301 + 302 + 303) / 3.6e6
    assert "4 × Example 80GB on 1 node, sampled for 10 min 00 s." in text
    assert f"phase1 4 0.667 {kwh:.3g} {kwh / (100 * 64) * 1e6:.3g} 302" in text
    assert re.search(r"software power cap 37\.4 % 3 of 4 node1 GPU 0 \(49\.9 %\)", text)
    assert "hardware thermal slowdown 25.0 % 1 of 4 node1 GPU 1 (100.0 %)" in text
    assert "node1 GPU 1: Xid 79 (601 times)." in part_of(text, "What stood out", "Where the time went")
    for title in ("GPU utilisation", "GPU memory used", "GPU power", "GPU temperature"):
        assert title in text


def test_energy_without_a_counter_comes_from_power_and_a_new_driver_counts_anew(tmp_path):
    chain = begin(tmp_path / "run")
    attempt = start(chain, "phase1")
    sample(attempt, "node1", 2, 60, energy_j=None)
    path = chain.run.path / "gpu/node1.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["gpu"] == 0 and line["time"] >= BEGAN + 30:
            line["energy_j"] = 300.0 * (line["time"] - BEGAN - 30)  # the driver was loaded again
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_samples.read(chain.run, ["phase1"])
    assert found is not None
    assert found.gpus[0].energy_j["phase1"] == pytest.approx(300 * 59)  # one second is not known
    assert found.gpus[1].energy_j["phase1"] == pytest.approx(301 * 60)


def test_the_gpu_of_a_slow_rank_is_named_beside_the_others(tmp_path):
    chain = begin(tmp_path / "run", "bert_base", "dgx_a100_80g", "phase1.micro_batch=256", "phase2.micro_batch=64")
    attempt = start(chain, "phase1")
    sample(attempt, "node1", 8, 30)
    sample(attempt, "node2.site", 8, 30, sm_clock_mhz=1180, temperature_c=84, throttle=["hardware thermal slowdown"])
    chain.run.event("slow_rank", stage="phase1", attempt=1, step=120, rank=9, host="node2.site", ratio=1.62)
    line = "node2: GPU 1 (GPU-1): hardware thermal slowdown"
    chain.run.event("gpu_health", stage="phase1", attempt=1, node="node2", gpu=1, uuid="x", verdict="warn", line=line)
    page = page_of(chain)
    text = part_of(page.text.replace("\N{NO-BREAK SPACE}", " "), "What stood out", "Where the time went")
    assert "phase1, step 120: rank 9 on node2 took 1.6 times as long as the others" in text
    assert (
        "Rank 9 computes on node2 GPU 1: clock 1,180 MHz (median of all 1,410 MHz), temperature 84 °C (median of all "
        "60 °C), power 301 W (median of all 304 W), utilisation 91 % (median of all 94 %), "
        "hardware thermal slowdown in 100.0 % of its samples." in text
    )
    assert "phase1, attempt 1: node2: GPU 1 (GPU-1): hardware thermal slowdown" in text
    assert "--exclude=NODE" in text
    assert page.text.count("node2 GPU 1") >= 4  # in the legends, too
    assert "median of 16 GPUs" in page.text  # more than eight: a band


def test_up_to_eight_gpus_have_a_line_each_and_more_a_band():
    series = {f"node1 GPU {i}": [(0.5, float(i)), (1.5, float(10 * i))] for i in range(MOST_LINES)}
    lines = few_lines(series, {"node1 GPU 3"})
    assert [line.legend for line in lines] == ["each GPU", *[""] * 6, "node1 GPU 3"]
    assert lines[-1].look == "second"
    series["node2 GPU 0"] = [(1.5, 500.0)]
    highest, median, lowest, flagged = band(series, {"node1 GPU 3"})
    assert highest.points == [(0.5, 7.0), (1.5, 500.0)]
    assert median.points == [(0.5, 3.5), (1.5, 40.0)]
    assert lowest.points == [(0.5, 0.0), (1.5, 0.0)]
    assert flagged.points == series["node1 GPU 3"]


@pytest.mark.parametrize("where", ["the run", "each stage", "each attempt"])
def test_attempts_are_laid_end_to_end(tmp_path, where):
    chain = begin(tmp_path / "run")
    sample(start(chain, "phase1"), "node1", 1, 100)
    sample(start(chain, "phase1"), "node2", 1, 60, began=BEGAN + 90_000)
    for number, path in enumerate(sorted((chain.run.path / "gpu").iterdir()), start=1):
        stage = chain.run.stage("phase1").path  # up to version 0.1 each attempt had a folder, then each stage
        folder = {"each stage": stage / "gpu", "each attempt": stage / f"attempts/{number:04d}/gpu"}.get(where)
        if folder:
            folder.mkdir(exist_ok=True)
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            drop = ("stage", "begun", "attempt") if where == "each attempt" else ("stage", "begun")
            lines = [{key: line[key] for key in line if key not in drop} for line in lines]
            (folder / path.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            path.unlink()
    found = gpu_samples.read(chain.run, ["extract", "phase1"])
    assert found is not None
    assert [(span.attempt, span.offset) for span in found.spans] == [(1, 0.0), (2, 100.0)]
    assert found.length_s == 160
    first, second = (sorted(gpu.series("power_w")) for gpu in found.gpus)
    assert (first[0], first[-1], second[0], second[-1]) == (0, 100, 100, 159)


def test_samples_of_a_stage_that_was_made_again_are_not_its_own(tmp_path):
    chain = begin(tmp_path / "run")
    sample(start(chain, "phase1"), "node1", 1, 100)
    chain.run.stage("phase1").move_aside()
    again = start(chain, "phase1")
    sample(again, "node1", 1, 60, began=BEGAN + 1000)
    sample(start(chain, "phase2"), "node1", 1, 60, began=BEGAN + 2000)
    found = gpu_samples.read(chain.run, ["phase1"])
    assert found is not None
    assert [(span.attempt, span.began - BEGAN) for span in found.spans] == [(1, 1000)]
    assert (found.gpus[0].samples, found.unread) == (61, 0)


def test_stages_that_are_at_work_on_a_node_together_have_their_energy_each(tmp_path):
    chain = begin(tmp_path / "run")
    for name in ("phase1", "phase2"):
        sample(start(chain, name), "node1", 1, 60)
    path = chain.run.path / "gpu/node1.jsonl"
    lines = sorted(path.read_text().splitlines(), key=lambda line: json.loads(line)["time"])
    path.write_text("\n".join(lines) + "\n")
    found = gpu_samples.read(chain.run, ["phase1", "phase2"])
    assert found is not None
    assert dict(found.gpus[0].energy_j) == pytest.approx({"phase1": 300 * 60, "phase2": 300 * 60})


@pytest.mark.slow
def test_much_is_read_in_strides_that_meet_every_gpu(tmp_path):
    chain = begin(tmp_path / "run")
    attempt = start(chain, "phase1")
    sample(attempt, "node1", 8, 3000)
    size = (chain.run.path / "gpu/node1.jsonl").stat().st_size
    whole, part = (gpu_samples.read(chain.run, ["phase1"], most_bytes=limit) for limit in (size, size // 10))
    assert whole is not None
    assert part is not None
    assert (whole.stride, part.stride) == (1, 11)
    assert len(part.gpus) == 8
    for gpu, same in zip(whole.gpus, part.gpus, strict=True):
        assert same.energy_j["phase1"] == pytest.approx(gpu.energy_j["phase1"], rel=0.01)
        assert same.samples == pytest.approx(gpu.samples / 11, rel=0.01)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json\n",
        b"[1]\n",
        b'{"time": "x"}\n{"gpu": 1}\n',
        b'{"time": 1, "gpu": 0, "attempt": 1, "xid": "x", "throttle": 7, "power_w": "hot", "energy_j": null}\n',
        b'{"time": 1'
        + b"0" * 400
        + b', "gpu": 0}\n{"time": 5, "gpu": 0, "attempt": 1}\n\xff\n{"time": 6, "gpu": 0, "ut',
    ],
)
def test_damaged_samples_cost_themselves_only(tmp_path, content):
    chain = finished_run(tmp_path / "run")
    folder = chain.run.stage("phase1").path / "gpu"
    folder.mkdir()
    (folder / "node1.jsonl").write_bytes(content)
    page_of(chain)


def test_hostile_names_are_shown_not_obeyed(tmp_path):
    chain = begin(tmp_path / "run")
    attempt = start(chain, "phase1")
    sample(attempt, HOSTILE, 2, 20, name=HOSTILE, throttle=[HOSTILE], xid=[1])
    facts = {"stage": HOSTILE, "attempt": HOSTILE, "step": HOSTILE, "line": HOSTILE, "node": HOSTILE, "gpu": HOSTILE}
    for name in ("slow_rank", "rolled_back", "gpu_health"):
        chain.run.event(name, **facts, rank=1, host=HOSTILE, ratio=math.nan)
        chain.run.event(name)
    page = page_of(chain)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", "".join(page.words))


# -------------------------------------------------------------------- inference


def test_inference_stands_beside_transformers(tmp_path):
    text = page_of(finished_run(tmp_path / "run")).text
    assert "On Example CPU with 2 threads; latency of a whole batch" in text
    assert "384 tokens, forward, batch 32, real lengths, bf16 1.53 × 61.5 40.25" in text
    assert "384 tokens, end to end, batch 32, real lengths, bf16 – 48 –" in text
    assert "squad, 384 tokens 32 pipeline forward real bf16 61.5 520 537 553 not known" in text
    assert "squad, 384 tokens 32 transformers forward real bf16 40.25" in text


def test_every_part_of_the_time_has_its_colour() -> None:
    for part in PARTS:
        assert f".part-{part} {{ fill: var(--{part.replace('_', '-')}); }}" in STYLE
        assert STYLE.count(f"--{part.replace('_', '-')}: #") == 2, part  # light and dark


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out_from_their_ground(scheme) -> None:
    """At least 4.5 : 1 for texts and 3 : 1 for what is drawn (WCAG 2.2, 1.4.3 and 1.4.11)."""
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", STYLE.split("@media")[scheme]))
    texts = [(text, ground, 4.5) for text in ("ink", "quiet", "main") for ground in ("page", "panel")]
    texts += [(kind, f"{kind}-page", 4.5) for kind in ("good", "bad", "busy")]
    texts += [("ink", f"{kind}-page", 4.5) for kind in ("bad", "busy")]
    for text, ground, least in [*texts, *((line, "page", 3.0) for line in ("thin", "second", "level"))]:
        low, high = sorted(map(luminance, (colours[text], colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= least, (text, ground)


# -------------------------------------------------------------------- data


def test_a_note_on_unknown_tokens_of_samples_or_task_data_is_on_the_page(tmp_path):
    chain = begin(tmp_path / "run")
    finish(chain, "samples_128", {"train": {"rows": 3}, "notes": ["train text: 2 of 100 tokens (2.0%) are [UNK]"]})
    finish(chain, "sst2", {"notes": ["dev.tsv: 3 of 100 tokens (3.0%) are [UNK]"]})
    finish(chain, "mrpc", {"notes": ["dev.tsv: 3 of 100 tokens (3.0%) are [UNK]"]})
    finish(chain, "vocab", {"vocab_size": 100, "notes": 3})
    text = part_of(page_of(chain).text, "Padding spared", "Batch plan")
    assert "train text: 2 of 100 tokens (2.0%) are [UNK]" in text
    assert text.count("dev.tsv: 3 of 100 tokens (3.0%) are [UNK]") == 1


def test_every_seed_of_a_task_is_a_line_of_its_chart() -> None:
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    drawn = str(tuning_charts({"squad": {"squad-1": lines, "squad-2": lines}, "mrpc": {"mrpc": lines}}))
    assert [drawn.count(f"<figcaption>Training loss of {task}<") for task in ("squad", "mrpc")] == [1, 1]
    assert all(name in drawn for name in ("squad-1", "squad-2"))
    assert tuning_charts({}) is None


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: widths are not measured")
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_has_to_be_scrolled_sideways(tmp_path, width):
    """The page's own script measures what is wider than the place it has."""
    measure = (
        "<script>document.title = 'wide:' + [...document.querySelectorAll('.scroll, html')].filter("
        "e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 30)).join('|') + ':end'</script>"
    )
    page = tmp_path / "page.html"
    written = render(gather(finished_run(tmp_path / "run").run, held=False))
    page.write_text(written.replace("</body>", f"{measure}</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", page.as_uri()]
    shown = subprocess.run(["chromium", *words], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>wide::end</title>" in shown.stdout


def test_a_task_without_pretraining_is_told_by_its_scores(tmp_path):
    chain = begin(tmp_path / "run", "tiny", "local")
    start(chain, "mrpc-scratch")
    finish(chain, "mrpc-scratch", {"task": "mrpc", "dataset": "pairs", "scores": {"accuracy": 50.4}, "steps": 63})
    assert made(gather(chain.run, held=False), "mrpc-scratch") == "pairs: accuracy 50.40\N{NO-BREAK SPACE}%"
