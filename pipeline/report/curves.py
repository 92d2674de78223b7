"""The part of the report on one pretraining phase: its figures in a sentence, its curves, its attempts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import PhaseConfig
from pipeline.report.chart import Chart, Line, Look, Point, draw
from pipeline.report.page import Html, note, section, table, tag
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
        """From the stage's folder; a damaged metrics file becomes a ``fault``, not an exception."""
        lines: Metrics = []
        fault = ""
        try:
            lines = [line for line in folder.metrics() if is_number(line["step"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fault = f"metrics.jsonl of {name} cannot be read ({type(error).__name__}: {error}), so there are no curves."
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
        lines = self.evaluations if key.startswith("eval") or key == "unigram_loss" else self.steps
        return lines[-1].get(key) if lines else None

    @property
    def reached(self) -> float:
        """The last step that anything was logged for."""
        return float(max((line["step"] for line in [*self.steps, *self.evaluations]), default=0))

    def median(self, key: str) -> float | None:
        values = [line[key] for line in self.steps if is_number(line.get(key))]
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


def phase_section(phase: Phase, remark: str) -> Html:
    """Heading, sentence, charts and attempts of a phase; ``remark`` is said first (an older configuration)."""
    config = phase.config
    title = f"Phase {phase.name.removeprefix('phase')}: {config.seq_len} tokens, {config.global_batch:,} samples a step"
    said = [note(remark)] if remark else []
    if phase.fault:
        said.append(note(phase.fault))
    elif not phase.steps and not phase.evaluations:
        said.append(note("No step has been logged yet." if phase.starts else "This phase has not started."))
    else:
        said += [tag("p", summary(phase)), charts(phase)]
    if len(phase.starts) > 1:
        said.append(attempts_table(phase.starts, config.steps))
    return section(title, *said)


def summary(phase: Phase) -> str:
    """The phase in one or two sentences."""
    parts = []
    if (step := phase.last("step")) is not None:
        text = f"{number(step)} of {phase.config.steps:,} steps, {number(step * phase.config.global_batch)} samples. "
        loss, mlm, nsp = (phase.last(key) for key in ("loss", "mlm_loss", "nsp_loss"))
        text += f"Last training loss {number(loss)}"
        parts.append(
            text + (f" (MLM {number(mlm)} + NSP {number(nsp)})." if is_number(mlm) and is_number(nsp) else ".")
        )
    if is_number(phase.last("eval_mlm_loss")):
        parts.append(
            f"Held-out MLM loss {number(phase.last('eval_mlm_loss'))}, MLM accuracy "
            f"{percent(phase.last('eval_mlm_accuracy'))}, NSP accuracy {percent(phase.last('eval_nsp_accuracy'))}."
        )
    rates = [phase.median("sequences_per_s"), phase.median("tokens_per_s")]
    if None not in rates:
        parts.append(f"Median {number(rates[0])} sequences/s, {number(rates[1])} real tokens/s.")
    return " ".join(parts)


def charts(phase: Phase) -> Html:
    """The loss over the whole width, twice (for wide and for narrow pages), and four smaller charts."""
    loss = loss_chart(phase)
    wide = tag("div", draw(loss, key=f"{phase.name}-loss", width=940, height=340), class_="wide")
    narrow = tag("div", draw(loss, key=f"{phase.name}-loss-narrow", height=320), class_="narrow")
    hint = tag("span", " Only context leads below the dashed line." if phase.last("eval_mask_loss") else "")
    figures = [tag("figure", tag("figcaption", loss.title, hint), wide, narrow, class_="whole")]
    for key, chart in small_charts(phase).items():
        figures.append(tag("figure", tag("figcaption", chart.title), draw(chart, key=f"{phase.name}-{key}")))
    return tag("div", *figures, class_="charts")


def loss_chart(phase: Phase) -> Chart:
    """Training and held-out MLM loss with the best loss without context as the level to beat."""
    mlm = "mlm_loss" if any("mlm_loss" in line for line in phase.steps) else "loss"
    level, name = level_of(phase.evaluations[-1] if phase.evaluations else {})
    levels = [(phase.reached, level)] if is_number(level) else []
    lines = [
        Line("training MLM loss" if mlm == "mlm_loss" else "training loss", _points(phase.steps, mlm), "thin"),
        Line(_with_last("held-out MLM loss", phase, "eval_mlm_loss"), _points(phase.evaluations, "eval_mlm_loss"),
             "main", dots=True),
        Line(f"{name} {number(level, 4)}", levels, "level"),
    ]  # fmt: skip
    return Chart("Loss", "step", "nats per masked token", lines, _marks(phase), until=phase.reached)


def level_of(figures: Mapping[str, Any]) -> tuple[Any, str]:
    """What the total loss has to beat, and its name: the best loss without context, in old runs the word counts'."""
    known = is_number(figures.get("context_free_loss"))
    return (figures["context_free_loss"], "best without context") if known else (
        figures.get("unigram_loss"), "unigram loss")  # fmt: skip


def small_charts(phase: Phase) -> dict[str, Chart]:
    """Loss where a word is hidden, accuracies, learning rate and the two throughputs, by a short key."""
    looks: dict[str, Look] = {"MLM": "main", "NSP": "second"}
    accuracies = [
        Line(f"{name} {percent(phase.last(key))}", _points(phase.evaluations, key, 100.0), looks[name], dots=True)
        for name, key in (("MLM", "eval_mlm_accuracy"), ("NSP", "eval_nsp_accuracy"))
    ]
    counts = _points(phase.evaluations, "unigram_mask_loss")[-1:]
    hidden = [
        Line("held-out loss at [MASK]", _points(phase.evaluations, "eval_mask_loss"), "main", dots=True),
        Line("word counts there", counts, "level"),
    ]
    rates = {
        key: Line(f"{label}, median {number(phase.median(key))}", _points(phase.steps, key), "fine")
        for key, label in (("sequences_per_s", "sequences/s"), ("tokens_per_s", "tokens/s without padding"))
    }
    common: dict[str, Any] = {"marks": _marks(phase), "from_zero": True, "until": phase.reached}
    peak = max((y for _, y in _points(phase.steps, "learning_rate")), default=0.0)
    rate = Line(f"learning rate, highest logged {number(peak)}", _points(phase.steps, "learning_rate"), "main")
    at_mask = Chart("Loss at [MASK]", "step", "nats", hidden, **{**common, "from_zero": False})
    return {
        **({"hidden": at_mask} if counts else {}),
        "accuracy": Chart("Held-out accuracy", "step", "%", accuracies, **common),
        "learning-rate": Chart("Learning rate", "step", "", [rate], **common),
        "sequences": Chart("Sequences per second", "step", "1/s", [rates["sequences_per_s"]], **common),
        "tokens": Chart("Real tokens per second", "step", "1/s", [rates["tokens_per_s"]], **common),
    }


def tuning_charts(tuning: Mapping[str, Mapping[str, Metrics]]) -> Html | None:
    """The training loss of every fine-tuning task, a line for each seed."""
    figures = []
    for task, stages in tuning.items():
        several = len(stages) > 1
        lines = [Line(name, _points(steps, "loss"), "thin" if several else "main") for name, steps in stages.items()]
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


def _with_last(name: str, phase: Phase, key: str) -> str:
    value = phase.last(key)
    return f"{name} {value:.3f}" if is_number(value) else name


def _marks(phase: Phase) -> list[tuple[float, str]]:
    """Where the attempts after the first began."""
    return [
        (float(start.from_step), f"attempt {start.number}")
        for start in phase.starts[1:]
        if is_number(start.from_step) and start.from_step is not None
    ]


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
