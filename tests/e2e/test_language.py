"""A German and a Bulgarian corpus through the whole chain: letters stay what they are, from the dump to the model."""

from __future__ import annotations

import bz2
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from data_prep import extract, samples, shard, wordpiece
from data_prep.hdf5 import read_shard
from data_prep.manifest import load_verified
from data_prep.wordpiece import Encoder, Vocabulary
from pipeline.config import load_recipe
from pipeline.stage import fingerprints
from pipeline.stages import table
from support.running import SMALL, call, one_line, states, submit

pytestmark = [pytest.mark.slow]

NAMESPACES = {
    -2: "Medium", -1: "Spezial", 0: "", 1: "Diskussion", 2: "Benutzer", 3: "Benutzer Diskussion", 4: "Wikipedia",
    6: "Datei", 7: "Datei Diskussion", 8: "MediaWiki", 10: "Vorlage", 12: "Hilfe", 14: "Kategorie", 100: "Portal",
}  # fmt: skip
SITE = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">\n  <siteinfo>\n'
    "    <sitename>Wikipedia</sitename>\n    <dbname>dewiki</dbname>\n    <generator>MediaWiki 1.43</generator>\n"
    "    <case>first-letter</case>\n    <namespaces>\n"
    + "".join(
        f'      <namespace key="{key}" case="first-letter">{name}</namespace>\n' for key, name in NAMESPACES.items()
    )
    + "    </namespaces>\n  </siteinfo>\n"
)
SENTENCES = (
    "Am 3. Oktober 1990 wurde die Straße über den Fluss für größere Fuhrwerke geöffnet.",
    "Es ist schon spät, und der Bär drückt die Tür der Bar; schön ist das nicht.",
    "Die Masse des Körpers sagt nichts über seine Maße.",
    "Sie drucken die Bücher, z. B. für Schüler, und die Schüler drücken die Knöpfe.",
    "Die Äcker rund um den Ort gehören den Bauern, die süße Äpfel und Nüsse ernten.",
    "Dr. Müller prüfte die Höhe des Turms: Er maß 48 Fuß.",
    "Öl, Übung und Ärger – wer früh übt, ärgert sich später weniger über das Öl.",
    "Im Frühjahr fließt das Wasser schneller, und die Mühlen mahlen das Korn.",
    "Der König schloss das Schloss, weil die Flüchtlinge schon außer Gefahr waren.",
    "Fünf Frösche hüpften über zwölf grüne Blätter in den kühlen Bach.",
)
PAIRS = (("schön", "schon"), ("Bär", "Bar"), ("drücken", "drucken"), ("Maße", "Masse"))
LEFTOVERS = ("Datei", "Kategorie", "Vorlage", "Infobox", "WEITERLEITUNG", "mini|", "[[", "{{", "<ref", "==", "'''")


def page(number: int, title: str, text: str, ns: int = 0, redirect: str = "") -> str:
    mark = f'\n    <redirect title="{redirect}" />' if redirect else ""
    return (
        f"  <page>\n    <title>{title}</title>\n    <ns>{ns}</ns>\n    <id>{number}</id>{mark}\n    <revision>\n"
        f"      <id>{number + 1000}</id>\n      <model>wikitext</model>\n"
        f'      <text bytes="{len(text.encode())}" xml:space="preserve">{escape(text)}</text>\n'
        "    </revision>\n  </page>\n"
    )


def article(title: str, draw: random.Random) -> str:
    def prose() -> str:
        return " ".join(draw.choices(SENTENCES, k=6))

    return (
        f"{{{{Infobox Gemeinde\n| Name = {title}\n| Höhe = 4{draw.randrange(10)}0\n"
        f"| Karte = {{{{Karte|{title}}}}}\n}}}}\n"
        f"[[Datei:Markt in {title}.jpg|mini|hochkant|Der [[Markt]] von {title}]]\n"
        f"'''{title}''' ist eine [[Gemeinde (Deutschland)|Gemeinde]].<ref>{{{{Literatur|Titel=Über {title}}}}}</ref> "
        f"{prose()}\n\n== Geschichte ==\n{prose()} Mehr steht [[Hilfe:Suche|hier]].\n\n"
        f"{{|\n! Jahr !! Einwohner\n|-\n| 1900 || 1.234\n|}}\n{prose()}\n\n[[Kategorie:Ort in Franken]]\n"
        f"[[en:{title}]]\n"
    )


def german_dump(articles: int = 60) -> bytes:
    draw = random.Random(7)
    titles = [f"{draw.choice(('Groß', 'Klein', 'Ober', 'Süd'))}mühl{n}" for n in range(articles)]
    pages = [page(n, title, article(title, draw)) for n, title in enumerate(titles, 1)]
    pages += [
        page(901, "Alt", f"#WEITERLEITUNG [[{titles[0]}]]", redirect=titles[0]),
        page(902, "Älter", f"#weiterleitung [[{titles[1]}]]"),
        page(903, "Diskussion:Alt", "Wo steht das? Öfter lesen.", ns=1),
        page(904, "Vorlage:Karte", "Eine Karte für {{{1}}}.", ns=10),
        page(905, "Kategorie:Ort in Franken", "Alle Orte.", ns=14),
    ]
    return (SITE + "".join(pages) + "</mediawiki>\n").encode()


SETTINGS = (
    "data.wikipedia=['dewiki.xml.bz2']", "data.jsonl=[]", "data.language='de'", "data.lowercase=false",
    "data.strip_accents=false", "data.vocab_size=400", "data.train_shards=2", "phase1.steps=2", "phase2.steps=2",
    "train.checkpoint_every=2",
)  # fmt: skip
STAGES = "extract,shard,vocab,samples_64,samples_128,phase1,phase2,export"


def words_of(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def german_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("german")
    (folder / "dewiki.xml.bz2").write_bytes(bz2.compress(german_dump()))
    for name in ("qa.json", "pairs.tsv", "sentiment.tsv"):
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def german_run(german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cased, accents kept: raw dump to exported model."""
    run = tmp_path_factory.mktemp("runs") / "german"
    done = submit(run, german_data, "--stages", STAGES, *words_of(SETTINGS))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def texts_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for path in folder.glob("documents-*") for line in path.read_text().splitlines()]


def test_the_dumps_own_names_decide_what_is_prose(german_run: Path) -> None:
    texts = texts_of(german_run / "stages" / "extract")
    facts = json.loads((german_run / "stages" / "extract" / "manifest.json").read_text())
    assert facts["counts"] | {"documents": 60, "articles": 60, "pages": 65, "redirects": 2} == facts["counts"]
    assert len(texts) == 60
    assert not [word for word in LEFTOVERS for text in texts if word in text]
    assert all("ist eine Gemeinde." in text and "Mehr steht hier." in text for text in texts)


def test_the_splitter_is_german(german_run: Path) -> None:
    lines = {line for path in (german_run / "stages/shard").glob("*.txt") for line in path.read_text().splitlines()}
    assert SENTENCES[0] in lines, "English rules cut after 'Am 3.'"
    assert "Sie drucken die Bücher, z. B. für Schüler, und die Schüler drücken die Knöpfe." in lines


def same_ids(model: Path, texts: list[str], lowercase: bool) -> None:
    """transformers reads the exported folder and gives the ids that the samples were made of."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(model), Encoder(model / "vocab.txt", lowercase, False)
    ids, offsets = ours.encode(texts)
    for number, text in enumerate(texts):
        assert (
            theirs(text, add_special_tokens=False)["input_ids"] == ids[offsets[number] : offsets[number + 1]].tolist()
        )
    whole = theirs.decode(theirs(PAIRS[0][0])["input_ids"], skip_special_tokens=True)
    assert whole == "schön"


def letters(vocab: Path) -> set[str]:
    return {token.removeprefix("##") for token in Vocabulary.load(vocab).tokens}


def test_umlauts_survive_into_the_model_and_back(german_run: Path) -> None:
    model = german_run / "model"
    assert set("äöüßÄÖÜ") <= letters(german_run / "stages" / "vocab" / "vocab.txt")
    assert (model / "vocab.txt").read_bytes() == (german_run / "stages" / "vocab" / "vocab.txt").read_bytes()
    said = json.loads((model / "tokenizer_config.json").read_text())
    assert (said["do_lower_case"], said["strip_accents"]) == (False, False)
    texts = [*SENTENCES, *texts_of(german_run / "stages" / "extract")[:5], "STRAẞE Österreich öde Ǆ ﬁ"]
    same_ids(model, texts, lowercase=False)
    encoder = Encoder(model / "vocab.txt", False, False)
    assert all(encoder.tokens(one) != encoder.tokens(other) for one, other in PAIRS)
    assert encoder.tokens("Öl") != encoder.tokens("öl")


def test_lower_case_keeps_umlauts_and_redoes_exactly_what_depends_on_it(german_run: Path, german_data: Path) -> None:
    done = submit(german_run, german_data, "--stages", STAGES, *words_of((*SETTINGS, "data.lowercase=true")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[2] for line in done.stdout.splitlines() if line.startswith("  will run")} == {
        *STAGES.split(",")
    } - {"extract", "shard"}
    assert len(list((german_run / "stages" / "shard" / "attempts").iterdir())) == 1
    model = german_run / "model"
    assert set("äöüß") <= letters(model / "vocab.txt")
    assert not set("ÄÖÜ") & letters(model / "vocab.txt")
    said = json.loads((model / "tokenizer_config.json").read_text())
    assert (said["do_lower_case"], said["strip_accents"]) == (True, False)
    same_ids(model, [*SENTENCES, *texts_of(german_run / "stages" / "extract")[:5]], lowercase=True)
    encoder = Encoder(model / "vocab.txt", True, False)
    assert all(encoder.tokens(one) != encoder.tokens(other) for one, other in PAIRS)
    assert encoder.tokens("ÖL") == encoder.tokens("öl")
    shards = load_verified(german_run / "stages" / "samples_64", "train").shards
    assert {read_shard(entry.path).vocab_sha256 for entry in shards} == {Vocabulary.load(model / "vocab.txt").sha256}


@pytest.mark.parametrize("language", ["xq", "german", "dee", "", "de\n"])
def test_an_unknown_language_is_refused(german_data: Path, tmp_path: Path, language: str) -> None:
    rest = [setting for setting in SETTINGS if not setting.startswith("data.language=")]
    words = words_of((*rest, f"data.language={json.dumps(language)}"))
    done = submit(tmp_path / "run", german_data, "--stages", "extract,shard", *words)
    assert done.returncode in (2, 3), done.stderr
    one_line(done, done.returncode, "language")
    if language == "dee":
        assert "'de'" in done.stderr
    assert not (tmp_path / "run" / "stages" / "shard" / "manifest.json").exists()


UNTOUCHED = {"language": {"extract"}, "lowercase": {"extract", "shard"}, "strip_accents": {"extract", "shard"}}


@pytest.mark.parametrize("vocab", [None, "vocab.txt"])
@pytest.mark.parametrize("key", UNTOUCHED)
def test_each_value_makes_exactly_its_dependants_stale(key: str, vocab: str | None) -> None:
    recipe = load_recipe(str(SMALL))
    recipe = replace(recipe, data=replace(recipe.data, vocab=vocab))
    new: Any = {"language": "de", "lowercase": False, "strip_accents": False}[key]
    changed = replace(recipe, data=replace(recipe.data, **{key: new}))
    before, after = (fingerprints(table(given), {}, {}) for given in (recipe, changed))
    assert {name for name in after if before[name] == after[name]} == UNTOUCHED[key]


class QuietJob:
    """A job that nobody listens to."""

    def __init__(self, out: Path) -> None:
        self.out, self.workers = out, 1
        out.mkdir(parents=True)

    def say(self, line: str, share: float | None = None) -> None:
        pass


@pytest.mark.parametrize("lowercase", [False, True])
def test_bulgarian_keeps_its_short_i(carriers: Path, tmp_path: Path, lowercase: bool) -> None:
    """й is и with an accent to Unicode, and another letter to a Bulgarian."""
    dump = carriers / "bgwiki-latest-pages-articles-shortened.xml.bz2"
    extract.run(QuietJob(tmp_path / "article"), wikipedia=[dump], books=[], jsonl=[], max_document_mb=16)
    (text,) = texts_of(tmp_path / "article")
    rows = [json.dumps({"text": paragraph}) for paragraph in text.split("\n")]
    (tmp_path / "bg.jsonl").write_text("\n".join(rows), encoding="utf-8")
    jobs = {name: QuietJob(tmp_path / name) for name in ("extract", "shard", "vocab", "samples")}
    extract.run(jobs["extract"], wikipedia=[dump], books=[], jsonl=[tmp_path / "bg.jsonl"], max_document_mb=16)
    shard.run(
        jobs["shard"], documents=jobs["extract"].out, language="bg", splitter="sentencex", train_shards=1,
        test_shards=1, test_fraction=0, seed=1,
    )  # fmt: skip
    flags = {"lowercase": lowercase, "strip_accents": False}
    wordpiece.run(jobs["vocab"], shards=jobs["shard"].out, vocab_size=600, **flags)
    vocab = jobs["vocab"].out / "vocab.txt"
    facts = samples.run(
        jobs["samples"], shards=jobs["shard"].out, vocab=vocab, seq_len=128, dupe_factor=1, short_seq_prob=0.1, seed=1,
        **flags,
    )  # fmt: skip
    assert facts["train"]["unknown_tokens"] < 0.01 * facts["train"]["text_tokens"]
    assert "й" in letters(vocab)
    encoder = Encoder(vocab, **flags)
    assert encoder.tokens("който") != encoder.tokens("които")
    assert "".join(token.removeprefix("##") for token in encoder.tokens("който")) == "който"
    from transformers import BertTokenizerFast

    theirs = BertTokenizerFast(str(vocab), do_lower_case=lowercase, strip_accents=False)
    ids, _ = encoder.encode([text])
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    pieces = Vocabulary.load(vocab).tokens
    assert any("й" in pieces[number] for number in ids.tolist())


def test_the_states_of_the_german_run_are_told(german_run: Path) -> None:
    assert {name for name, state in states(german_run).items() if state == "done"} == {*STAGES.split(",")}
    assert call("status", german_run).returncode == 0
