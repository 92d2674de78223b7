"""The wikitext cleaner: rules one by one, a real dump against mwparserfromhell, hostile input in linear time."""

import bz2
import re
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import mwparserfromhell
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.wikitext import NAMESPACES, clean

RESIDUE = r"\{\{|\}\}|\[\[|\]\]|\{\||</?[a-zA-Z!]|File:|Category:|==|thumb\||''|&#?\w+;|\(\s*\)|style=|https?://"


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Anarchism''' is a ''philosophy''.", "Anarchism is a philosophy."),
        ("l'''avion'' vole, l'''or'''", "l'avion vole, lor"),
        ("A [[dog]] and [[cat|two cats]]s.", "A dog and two catss."),
        ("[[File:A.jpg|thumb|A [[dog]] {{x|[[y]]}} here]]Text.", "Text."),
        ("Text [[Category:Dogs]][[category : Cats|*]]end [[:Category:Fish]].", "Text end Category:Fish."),
        ("[[de:Hund]][[simple:Dog]][[zh-min-nan:Káu]]Text", "Text"),
        ("[[2001: A Space Odyssey|2001]] and [[Alien: Covenant]]", "2001 and Alien: Covenant"),
        ("One{{cite web|a={{b|{{{c|}}}}}|d}} two.", "One two."),
        ("{{a [[b }} c ]] dog. Ever.", "Ever."),
        ("A\n{| class=x\n|-\n| a || {{b}}\n{|\n| inner\n|}\n| c\n|}\nB", "A\nB"),
        ("A{{Infobox\n|x={|\n|}\n|}}B", "AB"),
        ("<table><tr><td>x<table></table></td></tr></table>Text", "Text"),
        ("A<ref name=x>{{cite}} [[z]]</ref> b<ref name=x /> c<REF>d</Ref>.", "A b c."),
        ("Open <ref name=a>is ignored <ref>in</ref> time.", "Open is ignored time."),
        ("Unclosed <ref> costs only itself.", "Unclosed costs only itself."),
        ("A <!-- [[ {{ --> B <!-- has no end", "A B has no end"),
        ("Use <nowiki>[[no]] ''link</nowiki>.", "Use no link."),
        ("E is <math>mc^2 < 3</math>, said he. Yes.", "Yes."),
        ("<gallery>\nFile:A.jpg|x\n</gallery>Text<br/>more", "Text more"),
        ("See [http://a.b c d] and [https://x.y] and http://z.w/q.", "See c d and and"),
        ("[//a.b proto] [mailto:x@y.z mail]", "proto mail"),
        ("== Head ==\nText\n----\n=== Sub === \nMore", "Text\nMore"),
        ("* item\n# number\n; term\n: indented prose\n| cell\n! head", "indented prose"),
        ("First line\nsame paragraph\n\nnext", "First line same paragraph\nnext"),
        ("a&nbsp;b &amp; c &lt; d&amp;nbsp;e &#8211; f AT&T", "a b & c < d e – f AT&T"),
        ("A ({{IPA|x}}; {{lang-el|y}}) was ({{z}}) here ( , born 1900, ).", "A (y) was here (born 1900)."),
        ("__NOTOC__Text __init__ __KEIN_INHALT__", "Text __init__ __KEIN_INHALT__"),
        ("{{convert|4,000|m|ft|abbr=on}} {{lang|fr|été}} {{nowrap|a b}}", "4,000 m été a b"),
        ("{{convert|5|to|10|km|mi}} {{circa|1850}} {{frac|1|2}}", "5 to 10 km c. 1850 1/2"),
        ("a }} b ]] c {{ d [[ e", "a b c d e"),
        ("...\n123\nWords.", "... 123 Words."),
        ("...\n\n123\n\nWords.", "Words."),
        ("\x00\x1b[31mred\x7f\u200b", "[31mred"),
        ("", ""),
    ],
)
def test_rules(wikitext: str, prose: str) -> None:
    assert clean(wikitext) == prose


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        # numbers and words as MediaWiki shows them
        ("He is {{convert|5|ft|11|in|m}} tall.", "He is 5 ft 11 in tall."),
        ("{{convert|3|to|4+1/2|mi|km}} and {{cvt|2|x|3|e6m2}}", "3 to 4 1/2 mi and 2 × 3 million square metres"),
        ("{{frac|1|1|2}} {{frac|7}} {{sfrac|2|3}} mi", "1 1/2 1/7 2/3 mi"),
        ("10{{e|5}} kg, 10<sup>5</sup> m, {{val|1.5|0.1|u=kg}}, the 19<sup>th</sup>", 
         "10×10⁵ kg, 10⁵ m, 1.5±0.1 kg, the 19th"),
        ("{{chem|H|2|O}}, {{chem|SO|4|2-}}, {{chem2|H2SO4}}, H<sub>2</sub>O, pK<sub>a</sub>",
         "H₂O, SO₄²⁻, H₂SO₄, H₂O, pKa"),
        ("{{As of|2011}}, {{as of|2011|4|lc=y}}", "As of 2011, as of April 2011"),
        ("{{nowrap|text=5 kg}} {{nowrap|1=a=b}} {{quote|text=Named.|author=X}}", "5 kg a=b Named."),
        ("the {{lang-ru|Москва}} of {{HMS|Victory}}, {{ill|Hans Muster|de}}", "the Москва of HMS Victory, Hans Muster"),
        # what has no words takes its sentence, or its part of a parenthesis, and nothing else
        ("One. Two {{unheard of|5}} ft. Three.", "One. Three."),
        ("The U.S. made {{odd|3}} cars. Then Mr. Smith left.", "Then Mr. Smith left."),
        ("It is {{convert|5|furlongs per fortnight}} fast. No.", "No."),
        ("x<sup>n+m</sup> grows. Slowly.", "Slowly."),
        ("Paris ({{IPA-fr|pa}}, born 1900; {{odd}} km; a city) is big.", "Paris (a city) is big."),
        ("Paris ({{IPA-fr|pa}}, born 1900) is big.", "Paris (born 1900) is big."),
        ("A fact.{{odd note}} Another.{{cn}} End.", "A fact. Another. End."),
        ("One.\n{{Odd box\n|a=b}}\nTwo.", "One.\nTwo."),
        ("The diameter is: <math>d</math>, he said. Next one.", "Next one."),
        ("A circle. Its area is\n:<math>A</math>\nwhere r is its radius. It is round.", "A circle. It is round."),
        ("A circle. Its area is:\n\n:<math>A</math>,\n\nwhere r is its radius.\n\nNext.", "A circle.\nNext."),
        # lists: whole sentences stay, names and works do not
        ("* The mill was built in the year of the flood.\n* Mill\n* Smith, J. (1990). The mills of the world.",
         "The mill was built in the year of the flood."),
        ("Text\n# He was the first to see the river.\nmore", "Text\nHe was the first to see the river.\nmore"),
        # variants of a language
        ("A -{zh-hans:简;zh-hant:繁}- B -{plain}- C-{H|zh-cn:x;zh-tw:y}-D -{A|zh-cn:x;zh-tw:y}- -{R|zh:raw}-",
         "A 简 B plain CD x zh:raw"),
        ("-{T|zh-cn:x}-Title -{-|zh-cn:x}-end }- -{ open", "Title end }- open"),
        ("A -{[[dog|zh-hans:犬]]}- {{nowrap|-{zh-hans:a;zh-hant:b}-}}", "A 犬 a"),
        # unclosed or oddly closed
        ("A\n{|\n| x\n{{end}}\nB", "A\nB"),
        ("See [[doi:10.1/x|the label\n]] and [[Talk:X|y]].", "See the label and y."),
        ("One <math>x is open.\n\nTwo <math>y</math> is not. Three.", "One x is open.\nThree."),
        ("One <nowiki>open.\n\nTwo <gallery> too.\n\n<nowiki>[[Three]]</nowiki>.", "One open.\nTwo too.\nThree."),
        ("A <ref name=a>b <ref name=c>note</ref> d.", "A b d."),
        ("A <!-- is open.\n\nB.", "A is open.\nB."),
        ("A\ue0000\ue001 {{odd}} be. Cows.", "Cows."),
        ("A &#xE000;7&#57345; &amp;#xe000;8&#xE001; <sup>&#xE000;9&#xE001;</sup> {{odd}} be. Cows.", "Cows."),
        ("यह एक है। वह {{odd}} है। गाय है।", "यह एक है। गाय है।"),
        ("یہ ہے۔ وہ {{odd}} ہے۔ گائے ہے۔", "یہ ہے۔ گائے ہے۔"),
        ("Նա ասաց։ Բարև {{odd}} այո։ Ինչպես ես։", "Նա ասաց։ Ինչպես ես։"),
    ],
)  # fmt: skip
def test_wrong_is_worse_than_missing(wikitext: str, prose: str) -> None:
    assert clean(wikitext) == prose


def test_lost_sentences_are_counted_by_name() -> None:
    lost = Counter[str]()
    assert clean("A {{Odd thing|1}} b. C {{odd thing}}, {{#if:x|y}}. D <math>x</math>. E.", lost=lost) == "E."
    assert lost == {"Odd thing": 1, "odd thing": 1, "#if": 1, "<math>": 1}


def test_localised_namespaces() -> None:
    german = {**NAMESPACES, "datei": 6, "kategorie": 14}
    text = "[[Datei:A.jpg|mini|Ein Hund]]Text[[Kategorie:Hund]]"
    assert clean(text, german) == "Text"
    assert "Kategorie:Hund" in clean(text)


def articles(dump: Path) -> dict[str, str]:
    found = {}
    with bz2.open(dump) as file:
        for page in ET.parse(file).iterfind("{*}page"):
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                found[page.findtext("{*}title") or ""] = page.findtext("{*}revision/{*}text") or ""
    return found


@pytest.fixture(scope="session")
def wikipedia(sample_dir: Path) -> dict[str, str]:
    return articles(sample_dir / "enwiki-sample.xml.bz2")


def test_real_articles_leave_no_residue(wikipedia: dict[str, str], carriers: Path) -> None:
    tables = articles(carriers / "enwiki-table-markup.xml.bz2")
    for title, wikitext in (wikipedia | tables).items():
        prose = clean(wikitext)
        assert not re.search(RESIDUE, prose), title
        assert not re.search(r"^[\s*#:;|!=]|\s$|\n\n|\s\s", prose, re.M), title


def test_real_articles_keep_their_words_at_speed(wikipedia: dict[str, str]) -> None:
    assert len(wikipedia) == 106
    start = time.process_time()
    words = sum(len(clean(wikitext).split()) for wikitext in wikipedia.values())
    speed = sum(map(len, wikipedia.values())) / 1e6 / (time.process_time() - start)
    assert words >= 410_000
    assert speed > 3, f"{speed:.1f} MB/s"  # 12 on the machine it was written on; a loaded one must not fail


def lead(wikitext: str) -> str:
    """The lead section as mwparserfromhell sees it, without what the product drops as well."""
    code = mwparserfromhell.parse(wikitext.split("\n==", 1)[0])
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in {"ref", "table", "gallery", "math"}):
        code.replace(tag, "") if code.contains(tag) else None
    for link in code.filter_wikilinks():
        if re.match(r"(?i)(file|image|category|[a-z-]{2,12}):", str(link.title)) and code.contains(link):
            code.remove(link)
    for template in code.filter_templates():
        if code.contains(template):
            code.remove(template)
    return str(code.strip_code())


def test_lead_sections_agree_with_an_independent_parser(wikipedia: dict[str, str]) -> None:
    """What we keep, they have; what they have, we keep but for sentences that we counted as lost."""
    known = whole = 0
    for wikitext in wikipedia.values():
        head, lost = wikitext.split("\n==", 1)[0], Counter[str]()
        theirs = Counter(re.findall(r"\w+", re.sub(r"(?m)^[*#;|!].*", "", lead(head))))
        ours = Counter(re.findall(r"\w+", clean(head, lost=lost)))
        common = (ours & theirs).total()
        known += common >= 0.95 * ours.total()
        whole += common >= 0.94 * theirs.total() or bool(lost)
    assert known >= 0.95 * len(wikipedia), f"the words of {known} of {len(wikipedia)} leads are known"
    assert whole >= 0.95 * len(wikipedia), f"{whole} of {len(wikipedia)} leads are whole"


WORDS = """{{ }} {{{ }}} [[ ]] [ ] {| |} | == '' ''' <ref> </ref> <ref <nowiki> </nowiki> <!-- --> <math> </math>
<table> </table> <b> [[File: [[Category: [http://x &amp; &lt; &# __A__ ( ) , ; a bc . {{lang|x|"""
MARKUP = [*WORDS.split(), " ", "\n", "\n\n", "\n{|", "\n|}", "\n=", "\n*", "\n:"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(MARKUP), max_size=60).map("".join) | st.text(max_size=80))
def test_any_soup_gives_prose(soup: str) -> None:
    prose = clean(soup)
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|\n\n|^\s|\s$|[\x00-\x09\x0b-\x1f]", prose)
    assert all(re.search(r"[^\W\d_]", line) for line in prose.split("\n") if prose)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        *[("{{", "}}"), ("[[", "]]"), ("[[a|b", "]]"), ("{{lang|x|y", "}}"), ("\n{|", "\n|}"), ("<ref", ">")],
        *[("<ref>", "</ref>"), ("''", "''"), ("<!--", ""), ("[http://x ", "]"), ("(", ")"), (" ,", ", "), ("&#1", ";")],
        *[
            ("<table>", "</table>"),
            ("[[\n{|", "\n|}]]"),
            ("[[File:", "]]"),
            ("<nowiki>", ""),
            ("(,", ",)"),
            ("\n:*", ""),
        ],
    ],
)
def test_hostile_input_takes_linear_time(opening: str, closing: str) -> None:
    count = 500_000 // (len(opening + closing))
    start = time.process_time()
    clean(opening * count + closing * count)
    assert time.process_time() - start < 5  # quadratic work would take minutes
