"""The part of the report on pretraining: curves over all phases, and each phase in a sentence and its attempts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import PhaseConfig
from pipeline.report.chart import Chart, Line, Look, Point, draw
from pipeline.report.page import Html, join, note, section, table, tag
from pipeline.run.rundir import Attempt, StageDir
from pipeline.words import duration, is_number, moment, number, percent

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """One attempt as its files tell it: the step it continued from and the steps it logged, where known."""

    number: int
    host: str
    began: Any
    ended: Any
    from_step: int | None
    last_step: int | None
    verdict: dict[str, Any] | None


@dataclass(frozen=True)
class Phase:
    """What a phase has measured, over all its attempts."""

    name: str
    config: PhaseConfig
    steps: Metrics  # lines of training steps
    evaluations: Metrics  # lines of held-out evaluations
    starts: list[Start]
    fault: str  # why metrics could not be read; empty when they could

    @classmethod
    def read(cls, name: str, config: PhaseConfig, folder: StageDir) -> Phase:
        """From the stage's folder."""
        lines, fault = metrics_of(name, folder)
        return cls(
            name,
            config,
            [line for line in lines if "loss" in line],
            [line for line in lines if "eval_mlm_loss" in line],
            [_start(attempt) for attempt in folder.attempts],
            fault,
        )

    def last(self, key: str) -> Any:
        """The last value of a metric, from a training step or an evaluation; None when there is none."""
        lines = self.lines_with(key)
        return lines[-1].get(key) if lines else None

    def lines_with(self, key: str) -> Metrics:
        """The lines that hold a metric."""
        return self.evaluations if key.startswith(("eval", "unigram")) else self.steps

    @property
    def reached(self) -> float:
        """The last step that anything was logged for."""
        return float(max((line["step"] for line in [*self.steps, *self.evaluations]), default=0))

    def median(self, key: str) -> float | None:
        return median_of(self.steps, key)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens without padding that a step takes on average, by the two throughputs."""
        tokens, sequences = self.median("tokens_per_s"), self.median("sequences_per_s")
        return self.config.global_batch * tokens / sequences if tokens and sequences else None


def metrics_of(name: str, folder: StageDir) -> tuple[Metrics, str]:
    """A stage's metric lines; a damaged file becomes a fault in words, not an exception."""
    try:
        return [line for line in folder.metrics() if is_number(line["step"])], ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        return [], f"metrics.jsonl of {name} cannot be read ({why}), so there are no curves."


def median_of(lines: Metrics, key: str) -> float | None:
    values = [line[key] for line in lines if is_number(line.get(key))]
    return statistics.median(values) if values else None


def _start(attempt: Attempt) -> Start:
    steps = [line["step"] for line in attempt.lines if is_number(line.get("step"))]
    from_step = attempt.resumed_from
    if from_step is None and steps:
        from_step = steps[0] - 1
    began, ended = attempt.span or (None, None)
    if ended == began:
        ended = None
    host, last_step = str(attempt.owner.get("host", "?")), max(steps, default=None)
    return Start(attempt.number, host, began, ended, from_step, last_step, attempt.verdict)


def training_section(phases: Sequence[Phase], remark: Callable[[str], str]) -> Html:
    """The curves of all phases over one axis, then each phase in a sentence; ``remark`` says what is old about one."""
    return section("Training", charts(phases), *[phase_part(phase, remark(phase.name)) for phase in phases])


def phase_part(phase: Phase, remark: str) -> Html:
    """Heading, sentence and attempts of a phase; ``remark`` is said first (an older configuration)."""
    config = phase.config
    title = f"Phase {phase.name.removeprefix('phase')}: {config.seq_len} tokens, {config.global_batch:,} samples a step"
    parts = [note(remark)] if remark else []
    if phase.fault:
        parts.append(note(phase.fault))
    elif not phase.steps and not phase.evaluations:
        parts.append(note("No step has been logged yet." if phase.starts else "This phase has not started."))
    else:
        parts.append(tag("p", summary(phase)))
    if len(phase.starts) > 1:
        parts.append(attempts_table(phase.starts, config.steps))
    return join(tag("h3", title), *parts)


def summary(phase: Phase) -> str:
    parts = []
    if (step := phase.last("step")) is not None:
        text = f"{number(step)} of {phase.config.steps:,} steps, {number(step * phase.config.global_batch)} samples. "
        loss, mlm, nsp = (phase.last(key) for key in ("loss", "mlm_loss", "nsp_loss"))
        text += f"Last training loss {number(loss)}"
        parts.append(
            text + (f" (MLM {number(mlm)} + NSP {number(nsp)})." if is_number(mlm) and is_number(nsp) else ".")
        )
    if is_number(phase.last("eval_mlm_loss")):
        nsp = phase.last("eval_nsp_accuracy")
        parts.append(
            f"Held-out MLM loss {number(phase.last('eval_mlm_loss'))}, MLM accuracy "
            f"{percent(phase.last('eval_mlm_accuracy'))}{f', NSP accuracy {percent(nsp)}' if is_number(nsp) else ''}."
        )
    rates = [phase.median("sequences_per_s"), phase.median("tokens_per_s")]
    if None not in rates:
        parts.append(f"Median {number(rates[0])} sequences/s, {number(rates[1])} real tokens/s.")
    return " ".join(parts)


@dataclass(frozen=True)
class Ruler:
    """One axis for all phases: of each its name, where it begins and how long a step is; and where the last ends."""

    label: str
    places: Sequence[tuple[Phase, float, float]]
    until: float

    @classmethod
    def of(cls, label: str, phases: Sequence[Phase], length: Callable[[Phase], float]) -> Ruler:
        places, at = [], 0.0
        for phase in phases:
            places.append((phase, at, length(phase)))
            at += phase.reached * length(phase)
        return cls(label, places, at)

    def points(self, key: str, scale: float = 1.0) -> list[Point]:
        """(x, value) of every line that has a number there, be it finite or not."""
        return [
            (start + x * length, y)
            for phase, start, length in self.places
            for x, y in _points(phase.lines_with(key), key, scale)
        ]

    def levels(self, value: Callable[[Mapping[str, Any]], Any]) -> list[Point]:
        """``value`` of each phase's last evaluation, from the phase's beginning to its end."""
        known = [(place, value(place[0].evaluations[-1])) for place in self.places if place[0].evaluations]
        return [
            (start + share * phase.reached * length, float(level))
            for (phase, start, length), level in known
            for share in (0, 1)
            if is_number(level)
        ]

    def chart(self, title: str, unit: str, *lines: Line, from_zero: bool = True) -> Chart:
        """A chart of ``lines``, marked where phases and attempts begin."""
        marks = [(start, phase.name) for phase, start, _ in self.places if start]
        marks += [
            (start + again.from_step * length, f"attempt {again.number}")
            for phase, start, length in self.places
            for again in phase.starts[1:]
            if again.from_step is not None
        ]
        return Chart(title, self.label, unit, lines, marks, from_zero=from_zero, until=self.until)


def charts(phases: Sequence[Phase]) -> Html | None:
    """The loss by steps over the whole width, twice (for wide and for narrow pages), and smaller charts; None yet."""
    begun = [phase for phase in phases if phase.reached > 1]
    if not begun:
        return None
    drawn = all_charts(begun)
    if (loss := drawn.pop("loss", None)) is None:
        return None
    wide = tag("div", draw(loss, key="loss", width=940, height=340), class_="wide")
    narrow = tag("div", draw(loss, key="loss-narrow", height=320), class_="narrow")
    hint = tag("span", " Only context leads below the dashed line." if begun[-1].last("eval_mask_loss") else "")
    figures = [tag("figure", tag("figcaption", loss.title, hint), wide, narrow, class_="whole")]
    for key, chart in drawn.items():
        figures.append(tag("figure", tag("figcaption", chart.title), draw(chart, key=key)))
    return tag("div", *figures, class_="charts")


def all_charts(phases: Sequence[Phase]) -> dict[str, Chart]:
    """All curves of the phases, by a short key; those that nothing was logged for are left out."""
    steps = Ruler.of("step", phases, lambda phase: 1.0)
    tokens = Ruler.of("real tokens", phases, lambda phase: phase.tokens_per_step or 0.0)
    rates = steps.points("learning_rate")
    peak = max(rates, key=lambda point: point[1], default=(0.0, 0.0))
    charts = {
        "loss": loss_chart("Loss", steps),
        "tokens": loss_chart("Loss by tokens", tokens),
        "hidden": steps.chart(
            "Loss at [MASK]",
            "nats",
            Line("held-out loss at [MASK]", steps.points("eval_mask_loss"), "main", dots=True),
            Line("word counts there", steps.levels(lambda line: line.get("unigram_mask_loss")), "level"),
            from_zero=False,
        ),
        "accuracy": steps.chart(
            "Held-out accuracy",
            "%",
            Line(_with_share("MLM", phases, "eval_mlm_accuracy"), steps.points("eval_mlm_accuracy", 100.0), dots=True),
            Line(_with_share("NSP", phases, "eval_nsp_accuracy"), steps.points("eval_nsp_accuracy", 100.0), "second",
                 dots=True),
        ),
        "learning-rate": steps.chart(
            "Learning rate", "", Line(f"highest logged {number(peak[1])} at step {number(int(peak[0]))}", rates)
        ),
        "gradient": steps.chart(
            "Gradient norm", "", Line("before clipping", steps.points("grad_norm"), "fine"),
        ),
        "sequences": steps.chart("Sequences per second", "1/s", _rate(steps, "sequences/s", "sequences_per_s")),
        "tokens-per-s": steps.chart(
            "Real tokens per second", "1/s", _rate(steps, "tokens/s without padding", "tokens_per_s")
        ),
    }  # fmt: skip
    return {key: chart for key, chart in charts.items() if any(len(line.points) > 1 for line in chart.lines)}


def _rate(ruler: Ruler, name: str, key: str) -> Line:
    medians = [number(phase.median(key)) for phase, _, _ in ruler.places if phase.median(key)]
    return Line(f"{name}, median {', '.join(medians)}", ruler.points(key), "fine")


def loss_chart(title: str, ruler: Ruler) -> Chart:
    """Training and held-out MLM loss with the best loss without context as the level to beat."""
    last = ruler.places[-1][0]
    mlm = "mlm_loss" if last.last("mlm_loss") is not None else "loss"
    level, name = level_of(last.evaluations[-1] if last.evaluations else {})
    heldout = last.last("eval_mlm_loss")
    at_the_end = f" {heldout:.3f}" if is_number(heldout) else ""
    return ruler.chart(
        title,
        "nats per masked token",
        Line("training MLM loss" if mlm == "mlm_loss" else "training loss", ruler.points(mlm), "thin"),
        Line(f"held-out MLM loss{at_the_end}", ruler.points("eval_mlm_loss"), "main", dots=True),
        Line(f"{name} {number(level, 4)}", ruler.levels(lambda line: level_of(line)[0]), "level"),
        from_zero=False,
    )


def level_of(figures: Mapping[str, Any]) -> tuple[Any, str]:
    """What the total loss has to beat, and its name: the best loss without context, in old runs the word counts'."""
    known = is_number(figures.get("context_free_loss"))
    return (figures["context_free_loss"], "best without context") if known else (
        figures.get("unigram_loss"), "unigram loss")  # fmt: skip


def tuning_charts(tuning: Mapping[str, Mapping[str, Metrics]]) -> Html | None:
    """The training loss of every fine-tuning task, a line for each seed and one without pretraining."""
    figures = []
    for task, stages in tuning.items():
        scratch = f"{task}-scratch"  # without pretraining
        usual: Look = "thin" if len(stages.keys() - {scratch}) > 1 else "main"
        lines = [
            Line(name, _points(steps, "loss"), "second" if name == scratch else usual) for name, steps in stages.items()
        ]
        chart = Chart(f"Training loss of {task}", "step", "nats", lines, from_zero=True)
        figures.append(tag("figure", tag("figcaption", chart.title), draw(chart, key=f"{task}-tuning")))
    return tag("div", *figures, class_="charts") if figures else None


def _points(lines: Metrics, key: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of every line that has a number there, be it finite or not."""
    return [
        (float(line["step"]), scale * float(line[key]))
        for line in lines
        if is_number(line.get(key)) or isinstance(line.get(key), float)  # NaN too: the chart counts what it leaves out
    ]


def _with_share(name: str, phases: Sequence[Phase], key: str) -> str:
    known = [phase.last(key) for phase in phases if is_number(phase.last(key))]
    return f"{name} {percent(known[-1])}" if known else name


def attempts_table(starts: Sequence[Start], steps: int) -> Html:
    """Every start of the phase: from where, how far, how it ended, and the steps that had to be done again."""
    rows = []
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        again = None
        if after is not None and is_number(start.last_step) and is_number(after.from_step):
            again = max(0, (start.last_step or 0) - (after.from_step or 0))
        if start.verdict:
            end = f"exit {start.verdict.get('code')}: {start.verdict.get('line')}"
        elif start.last_step == steps:
            end = "reached the last step"
        else:
            end = "killed: it left no verdict" if after is not None else "no verdict: at work, or killed"
        took = start.ended - start.began if is_number(start.began) and is_number(start.ended) else None
        rows.append(
            (
                str(start.number),
                moment(start.began),
                start.host,
                "–" if start.from_step is None else number(start.from_step),
                "–" if start.last_step is None else number(start.last_step),
                "–" if took is None else duration(took),
                "–" if again is None else number(again),
                end,
            )
        )
    head = ("Attempt", "Began", "Host", "From step", "To step", "Took", "Steps redone", "How it ended")
    return table(head, rows, numeric=(3, 4, 5, 6), class_="attempts")
