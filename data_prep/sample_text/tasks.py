"""Small labelled sets in the SQuAD, MRPC and SST-2 file formats, made from other question and review sets.

They are stand-ins: same formats, other examples, so their scores are not comparable with published ones.
"""

import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Iterable
from typing import Any

QA_TRAIN, QA_EVAL = 1200, 250
PAIRS_TRAIN, PAIRS_DEV = 2000, 500
DATASETS = {
    "qa": "QuAC, Disfl-QA and NarrativeQA spans",
    "pairs": "BoolQ question and passage match",
    "sentiment": "Rotten Tomatoes snippets",
}

Row = dict[str, Any]


def rows(jsonl: bytes) -> list[Row]:
    """Objects of a JSON-lines file."""
    return [json.loads(line) for line in jsonl.decode("utf-8").splitlines() if line.strip()]


def bucket(text: str, buckets: int) -> int:
    """A stable bucket number of a text: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


def boolq_passage(row: Row) -> tuple[str, str]:
    """Title and text of a BoolQ row, with LaTeX quotes turned into plain ones."""
    title, separator, text = row["passage"].partition(" -- ")
    if not separator:
        title, text = "", row["passage"]
    return title.strip(), _plain_quotes(text)


def quac_passage(row: Row) -> str:
    """The section of a QuAC row without its answer marker."""
    return str(row["passage"]).replace("CANNOTANSWER", "").strip()


def _plain_quotes(text: str) -> str:
    return " ".join(text.replace("``", '"').replace("''", '"').split())


def _detokenised(text: str) -> str:
    """Undo the blanks that a tokeniser left around punctuation."""
    text = re.sub(r"(\w) ' (s|t|re|ve|ll|d|m)\b", r"\1'\2", " ".join(text.split()))
    text = re.sub(r"(\d) , (\d{3})\b", r"\1,\2", text)
    text = re.sub(r"(\w) - (\w)", r"\1-\2", text)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def _quac_spans(answers: str, passage: str) -> list[str]:
    """Split run-together answers greedily into the longest pieces that stand literally in the passage."""
    words, spans, start = answers.split(" "), [], 0
    while start < len(words):
        if words[start] == "CANNOTANSWER":
            return []
        end = start
        while end < len(words) and " ".join(words[start : end + 1]).rstrip(",") in passage:
            end += 1
        if end > start:
            spans.append(" ".join(words[start:end]).rstrip(","))
        start = max(end, start + 1)
    return [span for span in dict.fromkeys(spans) if len(span) >= 2]


def _span_questions(quac: list[Row], disfl_qa: list[Row], narrative: list[Row]) -> Iterable[tuple[str, str, list[str]]]:
    """(context, question, literal answers) of the three sets."""
    for row in disfl_qa:
        answer = _detokenised(row["answer"])
        yield _detokenised(row["passage"]), _detokenised(row["question"]), [answer]
    for row in narrative:
        passage = " ".join(row["passage"].split())
        found = []
        for answer in row["answer"]:
            match = re.search(rf"\b{re.escape(answer.strip(' .'))}\b", passage, re.IGNORECASE)
            if answer.strip(" .") and match:
                found.append(match.group())
        yield passage, row["question"].strip(), found
    for row in quac:
        passage = quac_passage(row)
        answers = re.split(r"possible answers for question\d+:\n", row["answer"])[1:]
        questions = re.findall(r"question\d+: (.*)", row["question"])
        for question, spans in zip(questions, answers, strict=False):
            yield passage, question.strip(), _quac_spans(spans.strip().rstrip(","), passage)


def question_answering(quac: list[Row], disfl_qa: list[Row], narrative: list[Row]) -> tuple[Row, Row, set[str]]:
    """SQuAD v1.1 objects (train, eval) of the shortest contexts, and the contexts used in eval.

    No context stands in both parts; answers of over 30 words or found more than three times are left out.
    """
    usable = []
    for context, question, answers in _span_questions(quac, disfl_qa, narrative):
        good = [a for a in answers if a and len(a.split()) <= 30 and 0 < context.count(a) <= 3]
        if good and question:
            usable.append((len(context.split()), context, question, good))
    usable.sort(key=lambda item: item[:3])
    parts: dict[bool, list[tuple[int, str, str, list[str]]]] = {True: [], False: []}
    for item in usable:
        part = parts[bucket(item[1], 6) == 0]
        if len(part) < (QA_EVAL if part is parts[True] else QA_TRAIN):
            part.append(item)
    train = [(words, context, question, answers[:1]) for words, context, question, answers in parts[False]]
    return _squad(train), _squad(parts[True]), {item[1] for item in parts[True]}


def _squad(examples: list[tuple[int, str, str, list[str]]]) -> Row:
    paragraphs: dict[str, list[Row]] = {}
    for _, context, question, answers in examples:
        spans = [{"answer_start": context.index(a), "text": a} for a in answers]
        name = hashlib.sha256(f"{context}\n{question}".encode()).hexdigest()[:24]
        listed = paragraphs.setdefault(context, [])
        if all(entry["id"] != name for entry in listed):
            listed.append({"id": name, "question": question, "answers": spans})
    data = [{"context": context, "qas": entries} for context, entries in paragraphs.items()]
    return {"version": "1.1", "data": [{"title": DATASETS["qa"], "paragraphs": data}]}


def pairs(boolq: list[Row]) -> tuple[str, str, set[str]]:
    """MRPC-format TSV text (train, dev) and the passages used in dev.

    A row asks whether the passage is the one the question was written about; half the rows carry the passage
    of another question. Short passages only, so that a sequence of 128 holds nearly all of them.
    """
    questions: dict[str, str] = {}
    for row in boolq:
        questions.setdefault(boolq_passage(row)[1], row["question"].strip())
    chosen = sorted(passage for passage in questions if 20 <= len(passage.split()) <= 80)
    dev = [p for p in chosen if bucket(p, 5) == 0][:PAIRS_DEV]
    train = [p for p in chosen if bucket(p, 5) != 0][:PAIRS_TRAIN]
    return _mrpc(train, questions), _mrpc(dev, questions), set(dev)


def _mrpc(passages: list[str], questions: dict[str, str]) -> str:
    passages = sorted(passages, key=lambda text: bucket(text, 1 << 62))  # mixes topics and labels
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for number, passage in enumerate(passages):
        other = passages[(number + 2) % len(passages)] if number % 2 else passage
        lines.append(f"{1 - number % 2}\t{2 * number}\t{2 * number + 1}\t{_cell(questions[passage])}?\t{_cell(other)}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text of a TSV cell: one line, no tab, and no quote that a CSV reader could trip over."""
    return " ".join(text.replace('"', "'").split())


def reviews(table: bytes) -> list[tuple[str, str, str]]:
    """(text, label, source) rows of the film-review table."""
    csv.field_size_limit(1 << 24)
    read = csv.reader(io.StringIO(table.decode("utf-8"), newline=""))
    return [(text, label, source) for text, label, source in read][1:]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def sentiment(rated: list[tuple[str, str, str]], snippets: bytes) -> tuple[str, str]:
    """SST-2-format TSV text: (train, dev); dev snippets are none of the train ones."""
    train = [(text, label) for text, label, source in rated if source == "rotten_tomatoes"]
    known = {_letters(text) for text, _ in train}
    dev = []
    for line in snippets.decode("utf-8").splitlines():
        _, rating, text = html.unescape(line).split("\t", 2)
        if _letters(text) not in known and float(rating) != 0:
            known.add(_letters(text))
            dev.append((text.lower().replace("''", '"'), "1" if float(rating) > 0 else "0"))
    return _sst2(train), _sst2(dev)


def _sst2(examples: list[tuple[str, str]]) -> str:
    return "\n".join(["sentence\tlabel", *(f"{_cell(text)}\t{label}" for text, label in examples)]) + "\n"
