"""``python -m pipeline.report FAMILY``: the seeds of ``submit --seeds pretrain=`` on one page, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.report import chart, page
from pipeline.report.chart import strips
from pipeline.report.compare import curves, of_run, phase_measures, score_measures
from pipeline.report.facts import Facts
from pipeline.report.page import Html, document, note, section, table, tag
from pipeline.report.sections import badge
from pipeline.words import moment

SPREAD: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean, "deviation": statistics.stdev, "maximum": max,
}  # fmt: skip


def seeds_page(name: str, seeds: Sequence[tuple[Facts, str]], now: float) -> str:
    """One HTML file about a family's seeds, each with its state; it links to their own reports beside it."""
    figures = {facts.name: dict(figures_of(facts)) for facts, _ in seeds}
    names = list(dict.fromkeys(figure for own in figures.values() for figure in own))
    known = {figure: [own[figure] for own in figures.values() if figure in own] for figure in names}
    rows: list[list[object]] = [
        [link(facts), badge(state), *(shown(figures[facts.name].get(figure)) for figure in names)]
        for facts, state in seeds
    ]
    for word, of in SPREAD.items():
        several = (values if len(values) > 1 else [] for values in known.values())
        rows.append([word, "", *(shown(of(values)) if values else "–" for values in several)])
    recipe, profile = seeds[0][0].recipe, seeds[0][0].profile
    line = f"Recipe {recipe.name} · cluster {profile.name} · {len(seeds)} seeds · report of {moment(now)}"
    counts = {len(values) for values in known.values()}
    fewer = "" if counts <= {len(seeds)} else " Where a seed has no figure yet, the spread is that of the others."
    return document(
        f"{name}: seeds of a BERT training",
        page.STYLE + chart.STYLE,
        tag("header", tag("p", "BERT training, seed by seed", class_="kind"), tag("h1", name), note(line)),
        section(
            "Figures",
            table(("Seed", "State", *names), rows, numeric=range(2, 2 + len(names))),
            note(f"Scores in %. Deviation: standard deviation of the seeds (n − 1).{fewer}"),
        ),
        section("Spread over seeds", drawn(known)),
        section("Curves", curves([of_run(facts, facts.name) for facts, _ in seeds])),
    )


def figures_of(facts: Facts) -> Iterator[tuple[str, float]]:
    """Final and held-out loss of each phase that is done, and the scores of the tasks, several seeds as their mean."""
    done = [phase for phase in facts.phases if phase.name in facts.results]
    yield from phase_measures(done, {"final loss": "loss", "held-out MLM loss": "eval_mlm_loss"})
    for record in facts.scores.values():
        for name, values in score_measures(record).items():
            yield name, statistics.fmean(values)


def drawn(known: Mapping[str, Sequence[float]]) -> Html:
    """The figures as dots, those of one unit over one axis; said instead where no two seeds have one."""
    charts: list[Html] = []
    for unit, is_loss in (("nats", True), ("%", False)):
        own = [(name, each) for name, each in known.items() if name.endswith(" loss") == is_loss and len(each) > 1]
        if own:
            charts.append(tag("figure", strips(f"Spread in {unit}", own, unit, key=f"spread-{len(charts)}")))
    return tag("div", *charts, class_="charts") if charts else note("There are no two seeds with a figure yet.")


def link(facts: Facts) -> Html | str:
    run = facts.chain.run
    return tag("a", facts.name, href=f"{facts.name}/{run.report.name}") if run.report.is_file() else facts.name


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}"
