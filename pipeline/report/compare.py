"""Runs beside each other, or a run beside its older results: what differs, curves, and which differences are noise."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import PhaseConfig, restore
from pipeline.errors import ConfigError
from pipeline.report import chart, page
from pipeline.report.chart import Chart, Line, Look
from pipeline.report.curves import Phase, Ruler
from pipeline.report.facts import Facts, gather
from pipeline.report.learnt import dataset
from pipeline.report.page import Html, document, note, section, table, tag
from pipeline.report.scores import metric_name
from pipeline.run.chain import Chain
from pipeline.run.files import read_json
from pipeline.run.rundir import RunDir, StageDir
from pipeline.strict_toml import table_of
from pipeline.words import columns, is_number

LOOKS: tuple[Look, ...] = ("main", "second", "third", "fourth", "fifth")
FIGURES = {
    "held-out MLM loss": "eval_mlm_loss",
    "gain at [MASK]": "eval_mask_gain",
    "accuracy at [MASK]": "eval_mask_accuracy",
    "NSP accuracy": "eval_nsp_accuracy",
}
STUDENT = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided 95 % points of Student's t for 0 to 10 degrees of freedom; 2.2 is taken beyond."""


@dataclass(frozen=True)
class Side:
    """One thing to compare. ``values``: all that may differ, by dotted key; empty for an older result.

    ``measures``: of each figure its values, one for each seed.
    """

    name: str
    values: Mapping[str, str]
    phases: Sequence[Phase]
    measures: Mapping[str, Sequence[float]]


def sides_of(paths: Sequence[Path]) -> tuple[list[Side], list[str]]:
    """What ``paths`` are to be compared by, and what is already known to differ; ConfigError for nothing to compare.

    A single run is compared with what lies in its ``old/``.
    """
    all_facts = [gather(run, held=run.is_held()) for run in map(RunDir, paths)]
    if len(all_facts) > 1:
        return [of_run(facts, str(path)) for facts, path in zip(all_facts, paths, strict=True)], []
    (facts,) = all_facts
    older, changes = of_old(facts.chain)
    if not older:
        raise ConfigError(f"{paths[0]}: nothing to compare: it has no older results (old/); name a second run")
    return [of_run(facts, "now"), *older], changes


def of_run(facts: Facts, name: str) -> Side:
    settings = facts.settings
    corpora = {f"data {name}": str(known.get("digest")) for name, known in settings["corpora"].items()}
    code = {"code commit": str(settings.get("commit")), "code digest": str(settings.get("code", "not recorded"))[:12]}
    versions = {f"code {key}": str(value) for key, value in (settings.get("versions") or {}).items()}
    site = {"site nodes": str(facts.nodes), **flat("site", settings["profile"])}
    values = {**flat("recipe", table_of(facts.recipe)), **corpora, **code, **versions, **site}
    measures = {name: [value] for name, value in phase_measures(facts.phases, FIGURES)}
    for result in facts.scores.values():
        measures |= score_measures(result)
    return Side(name, values, facts.phases, measures)


def of_old(chain: Chain) -> tuple[list[Side], list[str]]:
    """The older results of a run that have figures, the first of every stage as one side, and what changed since."""
    phases: dict[str, list[Phase]] = {}
    measures: dict[str, dict[str, list[float]]] = {}
    changes: list[str] = []
    for path in sorted((chain.run.path / "old").glob("*-*")):
        folder, (name, _, number) = StageDir(path), path.name.rpartition("-")
        record = folder.begun
        if record is None or name not in chain.stages:
            continue
        config, own = record.get("config", {}), []
        if "phase" in config:
            own = [Phase.read(name, restore(PhaseConfig, config["phase"], str(path)), folder)]
        held_out = {measure: [value] for measure, value in phase_measures(own, FIGURES)}
        if figures := {**held_out, **score_measures(read_json(path / "scores.json") or {})}:
            measures.setdefault(number, {}).update(figures)
            phases.setdefault(number, []).extend(own)
            lines = chain.stages[name].changes(record, chain.prints, chain.corpora)
            changes += [f"since old/{path.name}: {line}" for line in lines]
    return [Side(f"old/*-{number}", {}, phases[number], figures) for number, figures in measures.items()], changes


def flat(prefix: str, value: Any) -> dict[str, str]:
    """A nested table by dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    joint = "." if "." in prefix or " " in prefix else " "
    return {k: v for key, item in value.items() for k, v in flat(f"{prefix}{joint}{key}", item).items()}


def phase_measures(phases: Iterable[Phase], figures: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """What phases ended with, of ``figures`` (words and key in the metrics) those that they have."""
    for phase in phases:
        for name, key in figures.items():
            if is_number(value := phase.last(key)):
                yield f"{phase.name} {name}", float(value)


def score_measures(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The metrics of a scores.json by name of the data, in percent, seed by seed."""
    seeds = result.get("seeds") or [result]
    values = [seed.get("scores") or {} for seed in seeds if isinstance(seed, Mapping)]
    names = dict.fromkeys(key for scores in values for key in scores)
    every = {key: [float(s[key]) for s in values if is_number(s.get(key))] for key in names}
    return {f"{dataset(result)} {metric_name(key)}": known for key, known in every.items() if known}


# -------------------------------------------------------------------- what differs, and whether that is more than noise


def differing(sides: Sequence[Side]) -> list[tuple[str, ...]]:
    """Key and value of every side, of what is not the same in all that record their values."""
    known = [side for side in sides if side.values]
    keys = dict.fromkeys(key for side in known for key in side.values)
    rows = [(key, *(side.values.get(key, "–") for side in known)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def is_seed(key: str) -> bool:
    return key.endswith((".seed", ".seeds"))


def pooled(sides: Sequence[Side]) -> list[Side]:
    """The sides, those that differ in seeds and in nothing else as one, which then has a spread."""
    groups: dict[Any, list[Side]] = {}
    for number, side in enumerate(sides):
        alone = not side.values or sum(other.values == side.values for other in sides) > 1  # the same seed: no spread
        rest = tuple((key, value) for key, value in side.values.items() if not is_seed(key))
        groups.setdefault(number if alone else rest, []).append(side)
    return [
        Side(
            " + ".join(side.name for side in group),
            group[0].values,
            group[0].phases,
            {
                name: [value for side in group for value in side.measures.get(name, ())]
                for name in dict.fromkeys(name for side in group for name in side.measures)
            },
        )
        for group in groups.values()
    ]


def scored(groups: Sequence[Side]) -> list[tuple[str, ...]]:
    """Figure, its mean in every group, and how the others differ from the first."""
    names = dict.fromkeys(name for group in groups for name in group.measures)
    rows = []
    for name in names:
        values = [list(group.measures.get(name, ())) for group in groups]
        rows.append((name, *map(spread, values), "; ".join(judged(values[0], other) for other in values[1:] if other)))
    return rows


def spread(values: Sequence[float]) -> str:
    """``71.40 ± 0.52 (3 seeds)``."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.3g} ({len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def judged(first: Sequence[float], other: Sequence[float]) -> str:
    """A difference of means beside the seeds' noise: Student's test for two samples, at 95 %."""
    if not first or not other:
        return "–"
    difference = statistics.fmean(other) - statistics.fmean(first)
    freedom = len(first) + len(other) - 2
    if min(len(first), len(other)) < 2:
        return f"{difference:+.3g} (one seed: noise not known)"
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in (first, other))
    noise = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(other)))
    noise *= STUDENT[freedom] if freedom < len(STUDENT) else 2.2
    return f"{difference:+.3g} ({'beyond' if abs(difference) > noise else 'within'} the seeds' noise of {noise:.2g})"


# -------------------------------------------------------------------- for a terminal and as a page


def in_terminal(sides: Sequence[Side], changes: Sequence[str]) -> list[str]:
    groups, rows = pooled(sides), differing(sides)
    known = [side.name for side in sides if side.values]
    lines = columns([("differs", *known), *rows]) if rows else ["Nothing recorded differs." if not changes else ""]
    return [*(lines if any(lines) else []), *changes, "",
            *columns([("figure", *(group.name for group in groups), "beside the first"), *scored(groups)])]  # fmt: skip


def as_page(sides: Sequence[Side], changes: Sequence[str]) -> str:
    """One HTML file that needs nothing else."""
    groups, rows = pooled(sides), differing(sides)
    known = [side.name for side in sides if side.values]
    same_text = not any(row[0].startswith(("data ", "recipe data.")) for row in rows)
    body = [
        tag("header", tag("p", "BERT trainings beside each other", class_="kind"), tag("h1", "Comparison")),
        section(
            "Figures",
            table(("Figure", *(group.name for group in groups), "Beside the first"), scored(groups)),
            note("Runs that differ in seeds alone are one; ± is their standard deviation, noise at 95 %."),
            None if same_text else note("Text or vocabulary differ: held-out losses are not comparable, scores are."),
        ),
        section("Curves", curves(sides)),
        section(
            "What differs",
            table(("", *known), rows) if rows else note("Nothing that is recorded.") if not changes else None,
            *map(note, changes),
        ),
    ]
    return document("Comparison of BERT trainings", page.STYLE + chart.STYLE, *body)


def curves(sides: Sequence[Side]) -> Html:
    """Held-out loss of every side over one axis, by steps, tokens and hours since the first attempt began."""
    with_curve = [side for side in sides if any(phase.evaluations for phase in side.phases)]
    axes: dict[str, Callable[[Phase], float]] = {"step": lambda _: 1.0, "tokens": lambda p: p.tokens_per_step or 0.0}
    drawn = {
        label: [Ruler.of(label, side.phases, length).points("eval_mlm_loss") for side in with_curve]
        for label, length in axes.items()
    }
    drawn["hours"] = [in_hours(side.phases) for side in with_curve]
    figures = []
    for label, points in drawn.items():
        looks = itertools.cycle(LOOKS)
        lines = [Line(side.name, p, next(looks), dots=True) for side, p in zip(with_curve, points, strict=True)]
        charted = Chart(f"Held-out MLM loss by {label}", label, "nats per masked token", lines)
        drawing = chart.draw(charted, key=f"by-{label.replace(' ', '-')}")
        figures.append(tag("figure", tag("figcaption", charted.title), drawing))
    return tag("div", *figures, class_="charts")


def in_hours(phases: Sequence[Phase]) -> list[tuple[float, float]]:
    began = min((start.began for phase in phases for start in phase.starts if is_number(start.began)), default=None)
    lines = [line for phase in phases for line in phase.evaluations] if began is not None else []
    known = [line for line in lines if is_number(line.get("time")) and is_number(line.get("eval_mlm_loss"))]
    return sorted(((line["time"] - (began or 0.0)) / 3600, float(line["eval_mlm_loss"])) for line in known)
