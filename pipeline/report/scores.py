"""The parts of the report on what the model can do: scores of the tasks, seed by seed, and the speed of inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.chart import strips
from pipeline.report.curves import tuning_charts
from pipeline.report.facts import Facts
from pipeline.report.learnt import dataset, worth_in_words
from pipeline.report.page import Html, folded, join, note, section, table, tag
from pipeline.words import is_number, number, spoken

BASELINES = {"majority": "most frequent class", "bag_of_words": "bag of words"}


def metric_name(key: str) -> str:
    return "F1" if key == "f1" else spoken(key)


def shown_scores(scores: Mapping[str, Any]) -> str:
    """``accuracy 71.2, F1 70.4`` of a scores.json: means over the seeds where there are several."""
    several = len(scores.get("seeds") or []) > 1
    values = scores.get("mean") if several else scores["scores"]
    spread = (scores.get("deviation") or {}) if several else {}
    parts = [f"{metric_name(key)} {with_deviation(value, spread.get(key))}" for key, value in (values or {}).items()]
    return ", ".join(f"{part}\N{NO-BREAK SPACE}%" for part in parts) or "not scored"


def with_deviation(value: Any, deviation: Any) -> str:
    text = f"{value:.2f}" if is_number(value) else number(value)
    return f"{text} ± {deviation:.2f}" if is_number(deviation) else text


def seeds_of(scores: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each of several seeds has scored."""
    return [seed for seed in scores.get("seeds") or [] if isinstance(seed, Mapping)]


def baseline(scores: Mapping[str, Any], name: str) -> str:
    """The score of something that is no model, in the metric that ranks; a dash where there is none."""
    value = ((scores.get("baselines") or {}).get(name) or {}).get(scores.get("ranked_by"))
    return f"{metric_name(str(scores['ranked_by']))} {value:.2f}\N{NO-BREAK SPACE}%" if is_number(value) else "–"


def beside_baselines(facts: Facts, task: str) -> str:
    """A task's scores in a line, with what they have to beat."""
    scores = facts.scores[task]
    known = [(words, baseline(scores, name)) for name, words in BASELINES.items()]
    if task in facts.scratch:
        known.append(("without pretraining", shown_scores(facts.scratch[task])))
    beat = "; ".join(f"{words} {value}" for words, value in known if value != "–")
    return shown_scores(scores) + (f" ({beat})" if beat else "")


def score_section(facts: Facts) -> Html:
    curves = tuning_charts(facts.tuning)
    if not facts.scores:
        return section("Scores", note("No fine-tuning task has been scored yet."), curves)
    rows = [
        (
            dataset(result),
            shown_scores(result),
            *(baseline(result, name) for name in BASELINES),
            shown_scores(facts.scratch[task]) if task in facts.scratch else "–",
            number(result.get("examples")),
            number(result.get("train_examples")),
            ", ".join(number(seed.get("seed")) for seed in seeds_of(result) or [result]),
            number(result.get("epochs")),
        )
        for task, result in facts.scores.items()
    ]
    head = (
        "Data set",
        "Score",
        *map(str.capitalize, BASELINES.values()),
        "Without pretraining",
        "Evaluated on",
        "Trained on",
        "Seeds",
        "Epochs",
    )
    several = any(len(result.get("seeds") or []) > 1 for result in facts.scores.values())
    more = " With several seeds: mean ± standard deviation (n − 1)." if several else " One seed: no deviation."
    remark = note("Scores on held-out examples." + more)
    worth = [note(worth_in_words(facts.scores[task], scratch)) for task, scratch in facts.scratch.items()
             if task in facts.scores]  # fmt: skip
    return section("Scores", table(head, rows, numeric=(5, 6, 7, 8)), remark, *worth, seed_table(facts), curves)


def seed_table(facts: Facts) -> Html | None:
    """Every seed's score where a task was trained with several: the best alone would flatter."""
    rows = []
    for result in facts.scores.values():
        seeds = seeds_of(result)
        means: Any = result.get("mean")
        for name, mean in means.items() if len(seeds) > 1 and isinstance(means, Mapping) else ():
            scores = [(seed.get("seed"), (seed.get("scores") or {}).get(name)) for seed in seeds]
            known = [(seed, value) for seed, value in scores if is_number(value)]
            if not known:
                continue
            each = ", ".join(f"{number(seed)}: {value:.2f}" for seed, value in known)
            best_seed, best = max(known, key=lambda pair: pair[1])
            text = with_deviation(mean, (result.get("deviation") or {}).get(name))
            rows.append((dataset(result), metric_name(name), each, text, f"{best:.2f} (seed {number(best_seed)})"))
    head = ("Data set", "Metric", "Seed by seed, %", "Mean, %", "Best, %")
    return join(table(head, rows, numeric=(3, 4)), seed_spread(facts)) if rows else None


def seed_spread(facts: Facts) -> Html | None:
    """The seeds of each task as dots, in the metric that ranks them."""
    drawn = []
    for result in facts.scores.values():
        key = str(result.get("ranked_by"))
        scores = [(seed.get("scores") or {}).get(key) for seed in seeds_of(result)]
        drawn.append((f"{dataset(result)}, {metric_name(key)}", [float(value) for value in scores if is_number(value)]))
    title = "Spread over seeds"
    if not any(len(values) > 1 for _, values in drawn):
        return None
    return tag("figure", tag("figcaption", title), strips(title, drawn, "score, %", key="spread"))


def inference_section(facts: Facts) -> Html | None:
    """How fast the fine-tuned models answer, beside transformers on the same machine; None when it was not measured."""
    result = facts.results.get("inference") or {}
    measured = result.get("rows")
    rows = [row for row in (measured if isinstance(measured, list) else []) if isinstance(row, Mapping)]
    if not rows:
        return None
    threads = result.get("threads")
    where = f"On {result.get('device')}" + (
        f" with {number(threads)} thread{'s' * (threads != 1)}" if is_number(threads) else ""
    )
    remark = note(
        f"{where}; latency of a whole batch. Forward: the model alone; end to end: from text to answer. "
        f"Real lengths are those of text, full ones all of the longest."
    )
    return section("Inference", pivot(rows), remark, folded("All measurements", measurements(rows)))


def pivot(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    """A line for each thing measured, with the ratio of the first engine to transformers before both rates."""
    rates: dict[str, dict[str, Any]] = {}
    for row in rows:
        what = (
            f"{row.get('task')}, {number(row.get('seq_len'))} tokens, {spoken(str(row.get('part')))}, batch "
            f"{number(row.get('batch'))}, {row.get('lengths', 'unknown')} lengths, {row.get('precision')}"
        )
        rates.setdefault(what, {})[str(row.get("engine"))] = row.get("sequences_per_s")
    lines = []
    for what, by_engine in rates.items():
        ours, theirs = by_engine.get("pipeline"), by_engine.get("transformers")
        ratio = f"{ours / theirs:.2f} ×" if is_number(ours) and is_number(theirs) and theirs > 0 else "–"
        lines.append((what, ratio, *(number(rate) if is_number(rate) else "–" for rate in (ours, theirs))))
    head = ("Sequences/s", "Ratio", "This code", "transformers")
    return table(head, lines, numeric=(1, 2, 3), class_="pivot")


def measurements(rows: Sequence[Mapping[str, Any]]) -> Html:
    cells = []
    for row in rows:
        latency = row["latency_ms"] if isinstance(row.get("latency_ms"), Mapping) else {}
        cells.append(
            (
                f"{row.get('task')}, {number(row.get('seq_len'))} tokens",
                number(row.get("batch")),
                str(row.get("engine")),
                spoken(str(row.get("part"))),
                str(row.get("lengths", "–")),
                str(row.get("precision")),
                number(row.get("sequences_per_s")),
                *(number(latency.get(key), 3) for key in ("p50", "p90", "p95", "p99")),
            )
        )
    head = ("Task", "Batch", "Engine", "Part", "Lengths", "Precision", "Sequences/s", "p50, ms", "p90", "p95", "p99")
    return table(head, cells, numeric=(1, 6, 7, 8, 9, 10))
