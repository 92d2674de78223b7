"""The sections of a report: stages, data, batch plan, published results, where it comes from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from pipeline.batch import BatchPlan
from pipeline.bert.config import LARGE, shape_of
from pipeline.report.facts import Facts
from pipeline.report.learnt import dataset
from pipeline.report.page import Html, folded, join, note, section, table, tag
from pipeline.report.published import cells_of, definitions, is_ratio, of_run, other_model, published
from pipeline.report.scores import shown_scores
from pipeline.strict_toml import table_of
from pipeline.words import duration, is_number, number, percent, size, spoken


def badge(state: str) -> Html:
    return tag("span", state, class_=f"badge {state.replace(' ', '-')}")


def verdict(row: Mapping[str, Any]) -> Html:
    """A reason, line by line."""
    return join(*[part for line in str(row.get("reason", "")).splitlines() for part in (line, tag("br"))][:-1])


def stage_section(facts: Facts) -> Html:
    rows = []
    for row in facts.rows:
        words = made(facts, row["name"]) if row["state"] == "done" else verdict(row)
        took = duration(row["duration_s"]) if "duration_s" in row else "–"
        rows.append((tag("code", row["name"]), badge(row["state"]), number(row["attempts"]), took, words))
    stages = table(("Stage", "State", "Attempts", "Duration", "What it made, or why not"), rows, numeric=(2, 3),
                  class_="stages")  # fmt: skip
    return section("Stages", stages, note("Durations are those of the attempt that finished the stage."))


MADE = {
    "extract": (("counts.documents", "{} documents"), ("counts.words", "{} words")),
    "shard": (("train.sentences", "{} training sentences"), ("test.sentences", "{} held out")),
    "vocab": (("vocab_size", "{} entries"),),
    "samples": (("train.rows", "{} training samples"), ("test.rows", "{} held out")),
    "phase": (("samples", "{} samples"), ("eval_mlm_loss", "held-out MLM loss {}"), ("checkpoint", "{}")),
    "export": (("parameters", "model of {} parameters"),),
    "inference": (("device", "measured on {}"),),
}
"""What the stage table says of a result, by its name without number: dotted keys and how their values are put."""


def made(facts: Facts, name: str) -> str:
    """What a finished stage made, from its result; a fine-tuning task by the name of its data."""
    result = facts.scores.get(name) or facts.results.get(name, {})  # without pretraining, or of one seed: its own
    if isinstance(result.get("scores"), Mapping):
        return f"{dataset(result)}: {shown_scores(result)}"
    parts = MADE.get(name.rstrip("_0123456789"), ())
    words = [put.format(number(value)) for key, put in parts if (value := at(result, key))]
    return ", ".join(words) or in_words(result)


def at(value: Any, dotted: str) -> Any:
    """The value under a dotted key, None where there is none."""
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def in_words(value: Any, name: str = "") -> str:
    """A result as words: ``1,204 documents, 3.1 MB; train: 8 shards``. Digests are cut, nested tables named."""
    if isinstance(value, Mapping):
        plain = {key: item for key, item in value.items() if not isinstance(item, Mapping | list)}
        nested = {key: item for key, item in value.items() if isinstance(item, Mapping) and item}
        parts = [", ".join(in_words(item, str(key)) for key, item in plain.items())]
        parts += [f"{spoken(str(key))}: {in_words(item)}" for key, item in nested.items()]
        return "; ".join(part for part in parts if part)
    if name.endswith("bytes"):
        return f"{spoken(name.removesuffix('bytes'))} {size(value)}".strip()
    if name.endswith("s") and isinstance(value, int) and not isinstance(value, bool):
        return f"{number(value)} {spoken(name)}"
    text = value[:12] + "…" if isinstance(value, str) and len(value) > 32 and value.isalnum() else number(value)
    return f"{spoken(name)} {text}".strip()


def data_section(facts: Facts) -> Html:
    """From articles to samples, each count from the stage that made it."""
    extract, shard = (facts.results.get(name) or {} for name in ("extract", "shard"))
    parts: list[Html | None] = [note("extract is not done, so there are no counts.")]
    if extract:
        parts = [tag("p", accounting(extract)), inputs_table(extract), examples(extract)]
    splits = {name: shard[key] for key, name in SPLITS.items() if isinstance(shard.get(key), Mapping)}
    if splits:
        keys = ("documents", "sentences", "words", "shards")
        rows = [(n, *[number(part.get(k)) for k in keys], size(part.get("bytes"))) for n, part in splits.items()]
        head = ("Text", "Documents", "Sentences", "Words", "Shards", "Size")
        parts.append(table(head, rows, numeric=range(1, 6)))
    parts.append(samples_table(facts))
    notes = [result.get("notes") for result in facts.results.values()]
    lines = [str(line) for each in notes if isinstance(each, list) for line in each]
    parts += map(note, dict.fromkeys(lines))  # the seeds of a task say the same
    return section("Data", *parts)


SPLITS = {"train": "training", "test": "held out"}


def accounting(result: Mapping[str, Any]) -> str:
    """``1,204 articles in = 1,100 documents out + 104 skipped (90 too short, 14 no prose).``"""
    came, went, skipped = (at(result, key) for key in ("counts.articles", "counts.documents", "skipped"))
    if not isinstance(came, int) or not isinstance(went, int) or not isinstance(skipped, Mapping):
        return in_words(result) + "."
    reasons = {reason: count for reason, count in skipped.items() if isinstance(count, int)}
    lost, why = sum(reasons.values()), reasons_in_words(reasons)
    agree = came == went + lost
    return (
        f"{number(came)} articles in {'=' if agree else '≠'} {number(went)} documents out + "
        f"{number(lost)} skipped{f' ({why})' if why else ''}{'.' if agree else ': the counts do not add up.'}"
    )


def reasons_in_words(skipped: Any) -> str:
    counts = skipped.items() if isinstance(skipped, Mapping) else ()
    return ", ".join(f"{number(count)} {spoken(str(reason))}" for reason, count in counts if count)


def inputs_table(result: Mapping[str, Any]) -> Html | None:
    inputs = result.get("inputs")
    rows = [
        (
            str(corpus.get("name")),
            *[number(at(corpus, f"counts.{key}")) for key in ("articles", "documents")],
            reasons_in_words(corpus.get("skipped")) or "none",
            number(at(corpus, "counts.words")),
            size(at(corpus, "counts.text_bytes")),
        )
        for corpus in (inputs if isinstance(inputs, list) else [])
        if isinstance(corpus, Mapping)
    ]
    head = ("Corpus", "Articles", "Documents", "Skipped", "Words", "Text")
    return table(head, rows, numeric=(1, 2, 4, 5)) if rows else None


def examples(result: Mapping[str, Any]) -> Html | None:
    """Some of what was skipped, by name."""
    skipped = result.get("examples")
    lists = {why: titles for why, titles in skipped.items() if titles} if isinstance(skipped, Mapping) else {}
    lines = [f"{why}: {', '.join(map(str, titles))}" for why, titles in lists.items() if isinstance(titles, list)]
    return note(f"Skipped, for example: {'; '.join(lines)}.") if lines else None


def samples_table(facts: Facts) -> Html | None:
    """Samples of each length and split: what the model is trained and tried on."""
    rows = []
    for name, result in facts.results.items():
        for key, split in SPLITS.items() if name.startswith("samples") else ():
            part = result.get(key)
            if isinstance(part, Mapping):
                count, random = part.get("rows"), part.get("random_next")
                share = random / count if is_number(count) and is_number(random) and count else None
                numbers = [number(part.get(k)) for k in ("rows", "tokens", "unknown_tokens")]
                rows.append((tag("code", name), split, *numbers, percent(share), percent(part.get("padding")),
                             size(part.get("bytes"))))  # fmt: skip
    head = ("Samples", "", "Count", "Tokens", "Unknown", "Random next", "Padding spared", "Size")
    return table(head, rows, numeric=range(2, 8)) if rows else None


def plan_section(facts: Facts) -> Html:
    """How each step's global batch was shared: by the ranks that really started, else as planned."""
    rows = []
    for phase in facts.phases:
        worlds = facts.worlds(phase.name)
        for world in worlds or [facts.profile.ranks(facts.nodes)]:
            config = phase.config
            plan = BatchPlan(config.global_batch, config.micro_batch or config.global_batch, world)
            rows.append(
                (
                    phase.name + ("" if worlds else " (planned)"),
                    *map(number, (world, plan.global_batch, plan.micro_batch, plan.accumulation,
                                  plan.largest_rank_batch, config.steps, config.steps * plan.global_batch)),
                    percent(plan.balance),
                )
            )  # fmt: skip
    head_ = (
        "Phase",
        "Ranks",
        "global_batch",
        "micro_batch",
        "accumulation",
        "rank_batch",
        "Steps",
        "Samples",
        "Balance",
    )
    remark = note(
        "global_batch = sum of rank_batch over all ranks, whatever their number; rank_batch = micro_batch × "
        "accumulation of the busiest rank; balance = mean ÷ largest rank_batch."
    )
    return section("Batch plan", table(head_, rows, numeric=range(1, 9)), remark)


def published_section(facts: Facts) -> Html:
    """The published cells that this run has measured with the same definition."""
    parts: list[Html] = [note(other_model(facts.recipe))]
    if shape_of(facts.recipe.model) == LARGE:
        values = list(of_run(facts))
        rows = [
            (table_["title"], f"{cell.line}, {cell.column}", number(cell.ours), number(cell.theirs), number(cell.ratio),
             cell.note)
            for name, table_ in definitions().items()
            for cell in cells_of(name, values)
            if cell.ours is not None and not cell.line.startswith("seed ")
        ]  # fmt: skip
        head_ = ("Table", "Cell", "This run", "NVIDIA published", "Ratio", "On")
        parts = [table(head_, rows, numeric=(2, 3, 4)), note(REAL_LENGTHS)] if rows else [note(NOTHING_EQUAL)]
    return section("Beside NVIDIA's published results", *parts, published_table())


REAL_LENGTHS = (
    "The loss is comparable only on the same text (the published runs used English Wikipedia alone, 90 % of it, "
    "each sample masked once), throughput only with samples as long: the published phase 2 sorted them into bins."
)
NOTHING_EQUAL = (
    "Nothing that this run has measured has the definition of a published value: task, precision, nodes, GPUs of each, "
    "micro-batch and accumulation."
)


def published_table() -> Html:
    """The published values, for whoever compares by hand: no ratios, no single seeds, and none of this run's."""
    rows = []
    for row in published():
        if is_ratio(row) or row["statistic"].startswith("seed") or row["reading"] == "DGX-1 recipe":
            continue
        where = "machine not stated"
        if row["hardware"]:
            where = f"{row['nodes']} × {row['gpus_per_node']} GPUs, {row['hardware']}, {row['precision']}"
        shape = f"{row['micro_batch']} × {row['accumulation'] or 1}" if row["micro_batch"] else "–"
        what = f"{row['measured']}, {spoken(row['metric'])}"
        rows.append((what, f"{row['value']} {row['unit']}", row["statistic"], where, shape))
    head = ("Measured", "Value", "Statistic", "On", "micro_batch × accumulation")
    return folded("Published values", table(head, rows, numeric=(1,)))


def origin_section(facts: Facts) -> Html:
    """What is needed to repeat the run."""
    settings = facts.settings
    commit = str(settings.get("commit") or "not known (no git checkout)")
    changed = facts.chain.run.path / "code.diff"
    if changed.is_file() and changed.stat().st_size:
        commit += ", with local changes (code.diff in the run)"
    versions = {"commit": commit, **(settings.get("versions") or {})}
    corpora = [
        (name, size(known.get("bytes")), number(known.get("files", 1)), known.get("digest", "–"))
        for name, known in (settings.get("corpora") or {}).items()
    ]
    blocks = [folded("Code and versions", table(("What", "Version"), versions.items()))]
    if corpora:
        head_ = ("Name", "Size", "Files", "Digest")
        blocks.append(folded("Corpora and task data", table(head_, corpora, numeric=(1, 2))))
    blocks.append(folded(f"Recipe {facts.recipe.name}", values_table(table_of(facts.recipe))))
    blocks.append(folded(f"Cluster profile {facts.profile.name}", values_table(dataclasses.asdict(facts.profile))))
    return section("Where it comes from", *map(note, code_changes(facts)), *blocks)


def code_changes(facts: Facts) -> list[str]:
    """From which step of which phase on the run was computed by other code than before."""
    submitted = [event for event in facts.events if event.get("event") == "submitted" and event.get("code")]
    lines = []
    for before, after in itertools.pairwise(submitted):
        starts = [(phase.name, start) for phase in facts.phases for start in phase.starts]
        later = [(name, start) for name, start in starts if is_number(start.began) and start.began >= after["time"]]
        if before["code"] != after["code"] and later:
            name, start = later[0]
            codes = f"{str(after['code'])[:12]} instead of {str(before['code'])[:12]}"
            lines.append(f"{name} from step {number(start.from_step)} on: other code than before, {codes}.")
    return lines


def values_table(values: Mapping[str, Any]) -> Html:
    """A nested configuration as dotted keys and values."""
    rows: list[tuple[Html, str]] = []
    for key, value in values.items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, item in items:
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else "–" if item is None else str(item)
            rows.append((tag("code", f"{key}.{inner}" if inner else key), text))
    return table(("Key", "Value"), rows)
