"""Lines of text without markup to paragraphs of prose; what has no words goes with the sentence it stands in."""

import re
from collections import Counter

from data_prep import templates
from data_prep.document import STOPS, WIDE_STOPS

# A template or formula that cannot be put in words leaves its number between these until its sentence is known.
MARK = re.compile("\ue000(\\d+)\ue001")
_AFTER_OPEN = re.compile(r"\([ ,;:]++")
_BEFORE_CLOSE = re.compile(r"(?<![ ,;:])[ ,;:]++\)")
_LONE_COMMAS = re.compile(r" (?=[,.](?: |$))|,(?= ,)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\ufeff]")
_PARENTHESIS = re.compile(r"\(([^()]*)\)")
_NOTE = re.compile("(?<=[" + STOPS + '"”’)])(?:\ue000\\d+\ue001)+(?= |$)')
_BOUNDARY = re.compile(rf"(?<=[{STOPS}])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[\ue000]*[^\Wa-z_])|(?<=[{WIDE_STOPS}])")
_NO_END = re.compile(
    r"(?:\b[^\W\d_]|\.\w|\b(?:[MD]r|Mrs|Ms|St|[JS]r|Lt|Col|Gen|Gov|Sen|Rep|Rev|Hon|Sgt|Capt|Prof|Mt|Ft|No|Nos|Vol|Fig|vs"
    r"|ca|cf|approx|etc|al|Inc|Ltd|Co|Bros|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec))\.$"
)
_ENDED = re.compile(rf"[{STOPS}{WIDE_STOPS}][\"'”’»)\]」]*$")
_SENTENCE = re.compile(r"[\"'“‘«(\[]*(?:[^\Wa-z_]|\ue000)")
_WORK_CITED = re.compile(
    r"\b(?:ISBN|ISSN|OCLC|doi|pp?\.|[Rr]etrieved|Press\b)|\(\d{4}[a-z]?\)|\b\d{4}[).,;]?\s*$"
    r"|[.,] \d{4}[a-z]?[.,:]|: [\w .&]+, \d{4}"
)
MIN_LIST_WORDS = 6


def paragraphs(text: str, unknown: list[str], lost: Counter[str]) -> str:
    """Join the lines of each paragraph; headings, lists but for whole sentences, table rows and marks go."""
    finished: list[str] = []
    current: list[str] = []

    def end() -> None:
        if current:
            finished.append(" ".join(current))
            current.clear()

    for line in _CONTROL.sub("", text).split("\n"):
        line = " ".join(line.split())
        first, formula = line[:1], False
        if first == ":":
            line = line.lstrip(":*#; ")
            first, formula = line[:1], True
        if "\ue000" in line and not any(map(str.isalpha, MARK.sub("", line))):
            formula = formula or "<math>" in (unknown[int(number)] for number in MARK.findall(line))
            line = line if formula else ""  # a template on a line of its own is no part of a sentence
        if not line or first in "*#;|!" or (first == "=" and line[-1] == "=") or line.startswith("----"):
            end()
            if first in ("*", "#") and _is_sentence(item := line.lstrip(":*# ")):
                finished.append(item)
        else:
            current.append(line)
    end()
    if unknown:
        finished = [_without_marks(paragraph, unknown, lost) for paragraph in _with_formulas(finished)]
    return "\n".join(line for line in map(_punctuation, finished) if any(map(str.isalpha, line)))


def _is_sentence(item: str) -> bool:
    """Whether a list item is a whole sentence: begins and ends as one, has some words, and is no work cited."""
    long_enough = item.count(" ") >= MIN_LIST_WORDS - 1 or (not item.isascii() and item[-1:] in WIDE_STOPS)
    return bool(long_enough and _ENDED.search(item) and _SENTENCE.match(item)) and not _WORK_CITED.search(item)


def _with_formulas(paragraphs: list[str]) -> list[str]:
    """Paragraphs with each formula between them put into the sentence it belongs to, before it and after it."""
    joined: list[str] = []
    for paragraph in paragraphs:
        formula = MARK.sub("", paragraph).strip(" .,;:") == ""
        goes_on = joined and joined[-1].endswith(("\ue001", "\ue001,", "\ue001;")) and paragraph[:1].islower()
        if joined and (goes_on or (formula and not _ENDED.search(joined[-1]))):
            joined[-1] += " " + paragraph
        else:
            joined.append(paragraph)
    return joined


def _without_marks(paragraph: str, unknown: list[str], lost: Counter[str]) -> str:
    """A paragraph without its marks: one in a parenthesis costs what is between semicolons, another its sentence."""
    if "\ue000" not in paragraph:
        return paragraph
    paragraph = _NOTE.sub("", paragraph)
    paragraph = _PARENTHESIS.sub(lambda match: _parenthesis(match, unknown, lost), paragraph)
    kept: list[str] = []
    for sentence in _sentences(paragraph) if "\ue000" in paragraph else [paragraph]:
        if names := {unknown[int(number)] for number in MARK.findall(sentence)}:
            lost.update(names)
        else:
            kept.append(sentence)
    return " ".join(kept)


def _parenthesis(match: re.Match[str], unknown: list[str], lost: Counter[str]) -> str:
    if "\ue000" not in match[1]:
        return match[0]
    names = {unknown[int(number)] for number in MARK.findall(match[1])}
    lost.update(names)
    parts = re.split("([;,]) " if all(map(templates.is_spoken, names)) else "(;) ", match[1])
    kept = [(part, mark) for part, mark in zip(parts[::2], [*parts[1::2], ""], strict=True) if "\ue000" not in part]
    return "(" + " ".join(part + mark for part, mark in kept).rstrip(";, ") + ")"


def _sentences(paragraph: str) -> list[str]:
    """Pieces that are a sentence at least: where an end is in doubt there is none."""
    pieces, start = [], 0
    for match in _BOUNDARY.finditer(paragraph):
        if not _NO_END.search(paragraph, max(start, match.start() - 12), match.start()):
            pieces.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*pieces, paragraph[start:]]


def _punctuation(line: str) -> str:
    """Repair what dropped templates, formulas and references leave: empty parentheses, lone commas."""
    if "(" in line:
        line = _AFTER_OPEN.sub("(", line)
        if " )" in line or ",)" in line or ";)" in line or ":)" in line:
            line = _BEFORE_CLOSE.sub(")", line)
        for _ in range(3):  # parentheses inside parentheses
            if "()" in line:
                line = line.replace(" ()", "").replace("()", "")
    if " ," in line or " ." in line:
        line = _LONE_COMMAS.sub("", line)
    return " ".join(line.split()) if "  " in line else line.strip()
