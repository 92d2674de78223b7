"""The part of the report on time: a stacked bar for the chain and for each phase, and a table of the same seconds."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.facts import Facts
from pipeline.report.page import Html, join, note, section, svg, table, tag
from pipeline.run.account import PARTS, Account, RunAccount
from pipeline.words import duration, is_number, number, percent

WIDTH, HEIGHT = 940, 22


def time_section(facts: Facts) -> Html:
    times = facts.account
    if times is None:
        return section("Where the time went", note("Nothing has run yet."))
    accounts = {"The chain": times.chain}
    accounts |= {name: times.stages[name] for name in (p.name for p in facts.phases) if name in times.stages}
    bars = [bar(name, account, f"time-{index}") for index, (name, account) in enumerate(accounts.items())]
    drawn = tag("div", *bars, class_="bars")
    return section("Where the time went", drawn, parts_table(accounts), *remarks(times), trained(facts))


def bar(name: str, account: Account, key: str) -> Html:
    """One account as a bar of full width."""
    goodput = f"goodput {percent(account.goodput)}" if account.goodput is not None else "nothing ran"
    words = tag("p", tag("strong", name), " ", tag("span", f"{duration(account.wall_s)} · {goodput}"))
    pieces, x = [], 0.0
    for part, seconds in account.parts.items():
        width = WIDTH * seconds / account.wall_s if account.wall_s > 0 else 0.0
        if width >= 0.5:
            hover = tag("title", f"{PARTS[part]}: {duration(seconds)}, {percent(seconds / account.wall_s)}")
            drawn_width = max(0.5, width - 1.5)  # a gap of the page's colour before the next
            pieces.append(tag("rect", hover, x=round(x, 1), y=0, width=round(drawn_width, 1), height=HEIGHT,
                              class_=f"part-{part}"))  # fmt: skip
        x += width
    in_words = ", ".join(f"{PARTS[part]} {duration(s)}" for part, s in account.parts.items() if s > 0)
    drawing = svg(key, f"Time of {name}", in_words, *pieces, width=WIDTH, height=HEIGHT, preserveAspectRatio="none")
    return join(words, drawing)


def parts_table(accounts: Mapping[str, Account]) -> Html:
    """Time and share of every part that took any, one column for each account."""
    rows = []
    for part, words in PARTS.items():
        if any(account.parts[part] > 0 for account in accounts.values()):
            swatch = tag("svg", tag("rect", width=10, height=10, class_=f"part-{part}"), viewBox="0 0 10 10",
                         class_="swatch", aria_hidden="true")  # fmt: skip
            cells = [
                f"{duration(a.parts[part])} · {percent(a.parts[part] / (a.wall_s or 1.0))}" for a in accounts.values()
            ]
            rows.append((join(swatch, words), *cells))
    return table(("", *accounts), rows, numeric=range(1, len(accounts) + 1), class_="parts")


def remarks(times: RunAccount) -> list[Html]:
    path = " → ".join(times.path)
    beside = len(times.stages) > len(times.path)
    return [
        note("Goodput = computing and communication of steps that count ÷ time in which processes ran."),
        note(f"The chain is its critical path, {path}{'; what ran beside it cost no time' if beside else ''}."),
    ]


def trained(facts: Facts) -> Html | None:
    """Time to train and final loss as the field publishes them, the held-out loss beside it."""
    took = {name: seconds for name in (*(p.name for p in facts.phases), *facts.tuning)
            if (seconds := facts.training_s(name))}  # fmt: skip
    if not took:
        return None
    words = ", ".join(f"{name} {duration(seconds)}" for name, seconds in took.items())
    last = facts.phases[-1]
    loss, held = last.last("loss"), last.last("eval_mlm_loss")
    losses = f" Final training loss {number(loss)}: that of the last step's whole batch" if is_number(loss) else ""
    losses += f"; held-out masked loss {number(held)}" if losses and is_number(held) else ""
    return note(
        f"Time to train, of steps alone, without start-up, evaluation and checkpoints: {words}."
        f"{losses}{'.' * bool(losses)}"
    )
