"""What stood out in a run, in words, from its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.words import is_number, number, visible

Event = Mapping[str, Any]


def incidents(events: Iterable[Event]) -> list[str]:
    """One line each, in order of first mention; what is said again about one rank or GPU is said once, with a count.

    Names and lines come from other machines: control characters in them are shown, not obeyed.
    """
    lines: dict[tuple[Any, ...], list[Event]] = {}
    for event in events:
        keys = SAME.get(str(event.get("event")))
        if keys is not None:
            lines.setdefault((event["event"], *(str(event.get(key)) for key in keys)), []).append(event)
    return [visible(SAID[key[0]](same)) for key, same in lines.items()]


def short_host(name: Any) -> str:
    """A host without its domain: what a node is called in squeue, whatever gethostname says."""
    return str(name).split(".", maxsplit=1)[0]


def _slow(events: list[Event]) -> str:
    first = events[0]
    steps = f"steps {_span(events)}" if len(events) > 1 else f"step {number(first.get('step'))}"
    worst = max((event["ratio"] for event in events if is_number(event.get("ratio"))), default=None)
    often = len(events) > 1
    took = f"took {'at worst ' if often else ''}{number(worst, 2)} times as long as the others"
    slowness = took if worst is not None else "was slow"
    more = f", in {len(events)} reports" if often else ""
    host = short_host(first.get("host", "?"))
    return f"{first.get('stage', '?')}, {steps}: rank {first.get('rank', '?')} on {host} {slowness}{more}"


def _span(events: list[Event]) -> str:
    steps = [event["step"] for event in events if is_number(event.get("step"))]
    return f"{number(min(steps))} to {number(max(steps))}" if steps else "not known"


def _rolled_back(events: list[Event]) -> str:
    (event, *_) = events
    back = f"back from step {number(event.get('step'))} to {number(event.get('to_step'))}"
    return f"{event.get('stage', '?')}, attempt {event.get('attempt', '?')}: {back}: {event.get('line', '?')}"


def _gpu(events: list[Event]) -> str:
    (event, *_) = events  # its line names node and GPU
    unfit = " (unfit: the attempt was ended)" if any(event.get("verdict") == "fatal" for event in events) else ""
    return f"{event.get('stage', '?')}, attempt {event.get('attempt', '?')}: {event.get('line', '?')}{unfit}"


def _lost(events: list[Event]) -> str:
    return ", ".join(f"{event.get('stage', '?')}, attempt {event.get('attempt', '?')}" for event in events) + (
        f": node {events[0].get('node', '?')} was lost"
    )


SAME = {
    "lost_node": ("node",),
    "slow_rank": ("stage", "rank", "host"),
    "rolled_back": ("stage", "attempt", "step", "line"),
    "gpu_health": ("stage", "node", "gpu", "line"),
}
SAID = {"slow_rank": _slow, "rolled_back": _rolled_back, "gpu_health": _gpu, "lost_node": _lost}
