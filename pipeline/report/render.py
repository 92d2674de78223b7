"""``python -m pipeline.report RUN``: everything about a run in one HTML file that needs nothing else; also a stage.

Written from the run's own files, whatever state it is in: what is missing is said, what failed is said first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.publish import publish_text
from pipeline.errors import ConfigError
from pipeline.node.job import Job
from pipeline.report import chart, page
from pipeline.report.card import card
from pipeline.report.curves import level_of, training_section
from pipeline.report.facts import Facts, gather
from pipeline.report.family import seeds_page
from pipeline.report.gpus import gpu_section, incident_section
from pipeline.report.learnt import context_in_words, dataset, gain_of
from pipeline.report.page import Html, document, note, table, tag
from pipeline.report.scores import beside_baselines, inference_section, score_section
from pipeline.report.sections import (
    badge,
    data_section,
    origin_section,
    plan_section,
    published_section,
    stage_section,
    verdict,
)
from pipeline.report.times import time_section
from pipeline.run.family import runs_of
from pipeline.run.files import to_write
from pipeline.run.rundir import RunDir
from pipeline.words import duration, is_number, moment, number, percent, with_error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, or the folder of runs of --seeds pretrain=")
    parser.add_argument("--out", type=to_write, help="the file to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    runs = runs_of(arguments.run)
    facts = [gather(run, held=run.is_held()) for run in runs if len(runs) == 1 or run.path.name.startswith("seed-")]
    if not facts:
        raise ConfigError(f"{arguments.run}: no run and no family of seeds; bench scaling shows its own")
    if len(runs) > 1:
        text = seeds_page(arguments.run.resolve().name, [(each, overall(each)) for each in facts], time.time())
    else:
        text = render(facts[0])
    out = arguments.out or to_write(str(RunDir(arguments.run).report), "--out FILE elsewhere")
    publish_text(out, text)
    print(out)
    return 0


def run(job: Job) -> dict[str, Any]:
    """Stage ``report``: write ``RUN/report.html`` and the model's card. While it runs, no other stage does."""
    facts = gather(job.run, held=False)
    publish_text(job.run.report, render(facts))
    if "export" in facts.results:
        publish_text(job.run.stage("export").path / "model" / "README.md", card(facts))
    return {"report": job.run.report.name, "stages_done": sum(row["state"] == "done" for row in facts.rows)}


def render(facts: Facts) -> str:
    body = [
        score_section(facts),
        training_section(facts.phases, lambda name: remark(facts, name)),
        inference_section(facts),
        incident_section(facts),
        time_section(facts),
        gpu_section(facts),
        stage_section(facts),
        data_section(facts),
        plan_section(facts),
        published_section(facts),
        origin_section(facts),
    ]
    title = f"{facts.name}: BERT training report"
    return document(title, page.STYLE + chart.STYLE, head(facts), page.contents(body), *body)


# -------------------------------------------------------------------- head


def head(facts: Facts) -> Html:
    """Name, circumstances, the result in a sentence, and what is wrong, if anything."""
    recipe, profile = facts.recipe, facts.profile
    world = profile.ranks(facts.nodes)
    where = f"{facts.nodes} node{'s' if facts.nodes > 1 else ''}, {world} rank{'s' if world > 1 else ''}"
    submitted = [event.get("time") for event in facts.events if event.get("event") == "submitted"]
    line = [
        f"Recipe {recipe.name}",
        f"cluster {profile.name} ({where})",
        f"submitted {moment(submitted[0])}" if submitted else "time of submission not recorded",
        f"report of {moment(time.time())}",
    ]
    return tag(
        "header",
        tag("p", "BERT training report", class_="kind"),
        tag("h1", facts.name, " ", badge(overall(facts))),
        tag("p", *[part for words in line for part in (" · ", tag("span", words))][1:], class_="note facts"),
        *troubles(facts),
        tag("p", result_sentence(facts), class_="lead"),
        tiles(facts),
        phase_table(facts),
        score_list(facts),
    )


def overall(facts: Facts) -> str:
    """One state for the whole run."""
    states = {row["state"] for row in facts.rows}
    return next((s for s in ("failed", "running", "waiting", "cancelled") if s in states), "") or (
        "done" if states <= {"done"} else "not finished"
    )


def troubles(facts: Facts) -> list[Html]:
    """A box for every stage that failed or was stopped, with its verdict, and what therefore has not run."""
    boxes = []
    for row in facts.rows:
        if row["state"] in ("failed", "cancelled"):
            what = (
                f"{row['name']} {'failed' if row['state'] == 'failed' else 'was stopped'} in attempt {row['attempts']}"
            )
            boxes.append(tag("p", tag("strong", what), tag("br"), verdict(row), class_=f"trouble {row['state']}"))
    missing = [row["name"] for row in facts.rows if row["state"] in ("todo", "waiting")]
    if missing:
        boxes.append(note(f"Not done yet: {', '.join(missing)}."))
    return boxes


def result_sentence(facts: Facts) -> str:
    """What pretraining came to."""
    phase = facts.evaluated
    if phase is None:
        return "The model has not been evaluated yet."
    figures = facts.figures(phase)
    level, name = level_of(figures)
    words = f"MLM loss {figures['eval_mlm_loss']:.3f} nats after {number(figures['step'])} steps of {phase.name}"
    return f"{context_in_words(figures)} Held-out {words}{f'; {name} {level:.3f}' if is_number(level) else ''}."


def tiles(facts: Facts) -> Html | None:
    """The figures that are asked for first, each beside what it would be without context."""
    phase = facts.evaluated
    if phase is None:
        return None
    figures = facts.figures(phase)
    gain, error, control = gain_of(figures)
    level, name = level_of(figures)
    margin = f"{name}: {level:.3f}" if is_number(level) else f"{name} not known"
    tiles = [
        (
            "Better than word counts at [MASK]",
            with_error(gain, error),
            f"nats; words around shuffled: {control:.2f}" if is_number(control) else "nats per hidden word",
        ),
        ("Held-out MLM loss", with_error(figures.get("eval_mlm_loss"), figures.get("eval_mlm_loss_se"), 3), margin),
        beside("Accuracy at [MASK]", figures, "eval_mask_accuracy", "unigram_mask_accuracy", "most frequent word"),
        ("Real tokens per second", number(phase.median("tokens_per_s")), f"median of {phase.name}"),
        ("Time in all", duration(facts.account.chain.wall_s) if facts.account else "–", "from submission to end"),
    ]
    if "eval_nsp_accuracy" in figures:
        tiles.insert(3, beside("NSP accuracy", figures, "eval_nsp_accuracy", "nsp_majority", "more frequent answer"))
    return tag(
        "dl",
        *[tag("div", tag("dt", name), tag("dd", value), tag("dd", more, class_="more")) for name, value, more in tiles],
        class_="tiles",
    )


def beside(title: str, figures: Mapping[str, Any], key: str, baseline: str, name: str) -> tuple[str, str, str]:
    """A tile of a share beside that of always saying the same."""
    level = figures.get(baseline)
    share, error = figures.get(key), figures.get(f"{key}_se")
    value = (
        f"{with_error(100 * share, 100 * error, 1)}\N{NO-BREAK SPACE}%"
        if is_number(share) and is_number(error)
        else percent(share)
    )
    return title, value, f"{name}: {percent(level)}" if is_number(level) else "held out"


def phase_table(facts: Facts) -> Html | None:
    """Held-out figures of every phase: each was evaluated on samples of its own length."""
    rows = []
    for phase in facts.phases:
        if phase.evaluations:
            figures = facts.figures(phase)
            gain, error, control = gain_of(figures)
            rows.append((phase.name, number(phase.config.seq_len), number(figures["step"]), with_error(gain, error),
                         f"{control:.2f}" if is_number(control) else "–", percent(figures.get("eval_mask_accuracy")),
                         percent(figures["eval_nsp_accuracy"]) if "eval_nsp_accuracy" in figures else "–"))  # fmt: skip
    head = ("Phase", "Tokens", "Steps", "Better than word counts at [MASK], nats", "Shuffled", "Accuracy there", "NSP")
    return table(head, rows, numeric=range(1, 7)) if len(rows) > 1 else None


def score_list(facts: Facts) -> Html | None:
    """The scores, by the names of the data sets, beside what they have to beat."""
    lines = [
        tag("li", tag("strong", dataset(result)), ": ", beside_baselines(facts, task))
        for task, result in facts.scores.items()
    ]
    return tag("ul", *lines, class_="scores") if lines else None


def remark(facts: Facts, name: str) -> str:
    if facts.chain.is_current(name):
        return ""
    return f"The configuration has changed since; what follows was made with the older one, and {name} will run again."
