"""Wikitext to plain prose: one pass with an explicit stack over brackets and tags, then one over the lines.

Tables, references, galleries, files, categories, headings and list items that are no sentence are dropped (BERT was
trained on "only the text passages", not lists, tables and headers: Devlin et al. 2019, section 3.1); links give their
label. What is seen in a sentence and cannot be put in words (a formula, a template that `templates.toml` does not
know) takes the sentence with it: a missing sentence is better than a false one. Time is linear in the input.
"""

import html
import re
from collections import Counter
from collections.abc import Callable, Mapping

from data_prep import templates
from data_prep.prose import MARK, paragraphs
from data_prep.sentences import LANGUAGES

_OLD_FILE_NAMES = (  # aliases that no export lists
    "image bild bilde billede afbeelding imagen immagine imagem fichier grafika plik kuva изображение файл "
    "зображення datei ficheiro archivo fájl soubor dosya ファイル 画像 檔案 文件 图像"
)
# Names that hold in every wiki.
NAMESPACES: dict[str, int] = {
    "media": -2,
    "special": -1,
    "talk": 1,
    "user": 2,
    "wikipedia": 4,
    "wp": 4,
    "project": 4,
    "file": 6,
    "mediawiki": 8,
    "template": 10,
    "help": 12,
    "category": 14,
    "portal": 100,
    "book": 108,
    "draft": 118,
    "module": 828,
    **dict.fromkeys(_OLD_FILE_NAMES.split(), 6),
}

MAX_OPEN = 1000  # brackets open at once; MediaWiki gives up at 40 nested templates

_SHOWN_TAGS = ["math", "chem", "ce", "hiero", "score"]  # a reader sees something of them in the sentence
_DROPPED_TAGS = (
    "ref|references|gallery|timeline|syntaxhighlight|source|pre|imagemap|graph|mapframe|maplink|templatestyles|"
    "indicator|inputbox|categorytree|charinsert|style|script|nowiki|" + "|".join(_SHOWN_TAGS)
)
_TEXT = r"[^\[\]{}<>|\n:]*+"
# Every branch begins with a literal (the groups that name them stand behind), so that the search can skip over prose.
_BRANCHES = rf"""
    \[\[(?:(?:{_TEXT}\|)?+(?P<label>{_TEXT})\]\]          # the common link, done at once
      | (?P<open_link>) )
  | \]\](?!\](?!\]))(?P<close_link>)
  | \{{\{{++(?P<open_braces>)
  | \}}\}}++(?P<close_braces>)
  | \n[ \t:]*+(?:\{{\|(?P<open_table>) | \|\}}(?!\}}(?!\}}))(?P<close_table>) )    # a table mark starts its line
  | <(?:table(?=[\s>])[^<>]*+>(?P<open_html>) | /table\s*+>(?P<close_html>) | !--(?P<comment>)
      | (?P<raw> {_DROPPED_TAGS} )(?=[\s/>])[^<>]*+> )
"""
_FLAGS = re.VERBOSE | re.IGNORECASE
_TOKEN = re.compile(_BRANCHES, _FLAGS)
_TOKEN_WITH_VARIANTS = re.compile(_BRANCHES + r"| -\{(?!\{)(?P<open_variants>) | \}-(?P<close_variants>)", _FLAGS)
_CLOSING = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in _DROPPED_TAGS.split("|")}
_OPENING = {name: re.compile(rf"<{name}(?=[\s>])[^<>]*+(?<!/)>", re.IGNORECASE) for name in _DROPPED_TAGS.split("|")}

_RAISED_TAG = re.compile(r"<(su[pb])\b[^<>]*+>([^<>\n]*+)</su[pb]\s*+>", re.IGNORECASE)

_OTHER_WIKIS = frozenset(["simple", "roa", "map", "fiu", "bat", "be"])  # first parts of language codes of no language
_REMAINS = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}")
_BLOCK_TAG = re.compile(r"</?(?:p|div|blockquote|li|ul|ol|dl|dd|dt|center|hr|h[1-6]|poem)\b[^<>]*+>", re.IGNORECASE)
_BREAK_TAG = re.compile(r"<br\b[^<>]*+>", re.IGNORECASE)
_ANY_TAG = re.compile(r"</?[a-z][^<>]*+>", re.IGNORECASE)
_EXTERNAL = re.compile(
    r"\[(?:(?:https?|ftps?|ircs?|news|gopher|git|svn|telnet|mms):)?//[^\s\[\]<>]*+[^\S\n]*+([^\[\]\n]*+)\]"
    r"|\[mailto:[^\s\[\]<>]*+[^\S\n]*+([^\[\]\n]*+)\]",
    re.IGNORECASE,
)
_BARE_URL = re.compile(r"(?:https?|ftp)://[^\s\[\]<>\"]*+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_MARKS = ("\ue000", "\ue001")  # what `MARK` is made of
_ELISION = re.compile(r"'''(?:(?<=\b\w''')|(?<=\b[Qq]u'''))([^'\n]++)''(?!')")  # l'''avion'': an apostrophe, italics
_MAGIC_WORD = re.compile(r"__[^\W\d_]{3,30}__")


def clean(wikitext: str, namespaces: Mapping[str, int] = NAMESPACES, lost: Counter[str] | None = None) -> str:
    """Prose of a page: paragraphs separated by one newline, no markup.

    `namespaces` maps lower-case namespace names of the wiki to their numbers (6 file, 14 category). An unclosed
    bracket or tag costs only itself. `lost` counts the sentences left out, by the template or tag in them.
    """
    if "\ue000" in wikitext or "\ue001" in wikitext:
        wikitext = wikitext.translate(dict.fromkeys(map(ord, _MARKS)))
    scanner = _Scanner("\n" + wikitext, namespaces)
    text = _without_inline_markup(scanner.run(), scanner.mark)
    return paragraphs(text, scanner.unknown, Counter() if lost is None else lost)


class _Scanner:
    """Drops templates, tables, comments and raw tags, and replaces links, in one pass.

    `out` holds the pieces kept so far. An opening bracket notes how long `out` was; its closing one cuts it back
    to there. Strength decides broken nesting: the end of a template closes open tables and links inside it.
    """

    def __init__(self, text: str, namespaces: Mapping[str, int]) -> None:
        self.text = text
        self.namespaces = namespaces
        self.out: list[str] = []
        self.stack: list[tuple[str, int, int]] = []  # (kind, length of out, braces)
        self.open_braces = 0
        self.next_close: dict[str, int] = {}
        self.next_open: dict[str, int] = {}
        self.unknown: list[str] = []  # names of what was marked

    def run(self) -> str:
        text, out, position = self.text, self.out, 0
        search = (_TOKEN_WITH_VARIANTS if "-{" in text else _TOKEN).search
        while match := search(text, position):
            start, end = match.span()
            if start > position:
                out.append(text[position:start])
            position = end
            match match.lastgroup:
                case "label":
                    out.append(match["label"])
                case "open_link":
                    self.push("[", 2)
                case "close_link":
                    self.close_link()
                case "open_braces":
                    self.push_braces(end - start)
                case "close_braces":
                    self.close_templates(end - start)
                case "open_table" | "open_html":
                    self.push("|", 1)
                case "close_table" | "close_html":
                    self.close_table()
                case "comment":
                    position = self.comment(end)
                case "open_variants":
                    self.push("-", 2)
                case "close_variants":
                    self.close_variants()
                case _:
                    position = self.raw_tag(match)
        out.append(text[position:])
        return "".join(out)

    def mark(self, name: str) -> str:
        """What stands in the text for something that has no words, until its sentence is known."""
        self.unknown.append(name)
        return f"\ue000{len(self.unknown) - 1}\ue001"

    def push(self, kind: str, size: int) -> None:
        if len(self.stack) < MAX_OPEN:
            self.stack.append((kind, len(self.out), size))
            self.open_braces += kind == "{"

    def push_braces(self, count: int) -> None:
        """`{{` is a template, an odd run ends with the `{{{` of a parameter."""
        count = min(count, MAX_OPEN)
        for size in [2] * (count // 2 - count % 2) + [3] * (count % 2):
            self.push("{", size)

    def close_templates(self, count: int) -> None:
        while count >= 2 and self.open_braces:
            kind, mark, size = self.stack.pop()
            if kind == "{":
                self.open_braces -= 1
                count -= min(size, count)
                parts = self.template(mark, size)
                if parts and not self.open_braces and templates.ends_table(parts):
                    self.close_table()

    def template(self, mark: int, size: int) -> list[str]:
        """Put words, or a mark, in the place of the template that began at `mark`; return its name and arguments."""
        parts = _parts(self.out, mark)
        del self.out[mark:]
        words = "" if not parts else parts[1] if size == 3 and len(parts) > 1 else templates.render(parts)
        if words is None:
            name = " ".join(parts[0].split())[:40]
            words = self.mark(name if not name.startswith("#") else name.partition(":")[0])
        if words:
            self.out.append(words)
        return parts

    def close_variants(self) -> None:
        if self.stack and self.stack[-1][0] == "-":
            _, mark, _ = self.stack.pop()
            words = _variant(_short(self.out, mark))
            del self.out[mark:]
            self.out.append(words)
        else:
            self.out.append("}-")

    def close_table(self) -> None:
        while self.stack and self.stack[-1][0] != "{":
            kind, mark, _ = self.stack.pop()
            if kind == "|":
                del self.out[mark:]
                self.out.append("\n")
                return

    def close_link(self) -> None:
        if self.stack and self.stack[-1][0] == "[":
            _, mark, _ = self.stack.pop()
            words = _link(self.out, mark, self.namespaces)
            if words is not None:
                del self.out[mark:]
                self.out.append(words)

    def comment(self, end: int) -> int:
        """Where a comment whose mark ends at `end` is over; one that never closes is its mark alone."""
        if self.next_close.get("!--", 0) < end:
            close = self.text.find("-->", end)
            self.next_close["!--"] = len(self.text) + 1 if close < 0 else close
        close = self.next_close["!--"]
        return end if close > len(self.text) else close + 3

    def raw_tag(self, match: re.Match[str]) -> int:
        """Skip a tag with its content and return where to go on; a tag that never closes is skipped alone.

        The next tags found are remembered per name, so that no stretch of text is searched twice.
        """
        name, end, length = match["raw"].lower(), match.end(), len(self.text)
        if match.group().endswith("/>"):
            return end
        for known, pattern in ((self.next_close, _CLOSING[name]), (self.next_open, _OPENING[name])):
            if known.get(name, 0) < end:
                place = pattern.search(self.text, end)
                known[name] = place.start() if place else length + 1
        close = self.next_close[name]
        if close > length or self.next_open[name] < close:  # this one has no end of its own
            return end
        if name == "nowiki":
            self.out.append(_REMAINS.sub("", self.text[end:close]))
        elif name in _SHOWN_TAGS:
            self.out.append(self.mark(f"<{name}>"))
        return self.text.index(">", close) + 1


def _short(out: list[str], mark: int) -> str:
    """The text since `mark`, or nothing when it is too long to be one link or phrase (this bounds the work)."""
    if len(out) - mark > 200 or sum(map(len, out[mark:])) > 4000:
        return ""
    return "".join(out[mark:])


def _parts(out: list[str], mark: int) -> list[str]:
    """Name and arguments of the template whose text came since `mark`; of a long one only the name."""
    if mark == len(out):
        return []
    return (_short(out, mark) or out[mark].partition("|")[0]).split("|")


_VARIANT = re.compile(r"(?:^|;)\s*[a-z]{2,3}(?:-[a-z]+)*\s*:([^;]*)")


def _variant(content: str) -> str:
    """What LanguageConverter's ``-{flags|rules}-`` shows: the text, or the first of its variants.

    The flags H, T, D, N, - and + alone stand for rules that are not shown where they are.
    """
    flags, bar, rules = content.partition("|")
    if not bar:
        flags, rules = "", content
    is_text = not set("HTDN-+") & set(flags) or "A" in flags or "S" in flags
    if not is_text:
        return ""
    variant = None if "R" in flags else _VARIANT.match(rules)
    return variant[1].strip() if variant else rules


def _link(out: list[str], mark: int, namespaces: Mapping[str, int]) -> str | None:
    """What a link leaves in the text: its label, nothing for files and categories, None for no link at all."""
    first = out[mark] if mark < len(out) else ""
    prefix, colon, _ = first.partition(":")
    number = namespaces.get(prefix.strip().replace("_", " ").lower(), 0) if colon else 0
    if number in (6, 14, -2):
        return ""
    if colon and (code := prefix.partition("-")[0]).islower() and (code in LANGUAGES or code in _OTHER_WIKIS):
        return ""
    content = _short(out, mark)
    target, bar, label = content.partition("|")
    if not content or "\n" in target:
        return None  # brackets that do not belong together
    if bar and label.strip():
        return " ".join(label.split()) if "\n" in label else label
    if number:
        return ""
    target = target.strip().lstrip(":")
    prefix, colon, rest = target.partition(":")
    return (rest if colon and len(prefix) < 2 else target).replace("_", " ")


def _without_inline_markup(text: str, mark: Callable[[str], str]) -> str:
    """Tags, external links, quotes, entities and switches out of text that has no brackets any more."""
    if "<" in text:
        text = _RAISED_TAG.sub(lambda match: _moved(match, mark), text)
        text = _BLOCK_TAG.sub("\n", text)
        text = _BREAK_TAG.sub(" ", text)
        text = _ANY_TAG.sub("", text)
    if "//" in text or "mailto:" in text:
        text = _EXTERNAL.sub(lambda match: match[1] or match[2] or "", text)
        if "://" in text:
            text = _BARE_URL.sub("", text)
    if "'''" in text:
        text = _ELISION.sub(r"'\1", text)
    text = text.replace("'''''", "").replace("'''", "").replace("''", "")
    if "&" in text:
        for _ in range(2):  # "&amp;nbsp;" was meant as a blank
            text = _ENTITY.sub(_character, text)
    if "__" in text:
        text = _MAGIC_WORD.sub(lambda match: "" if match[0].isupper() else match[0], text)
    return _REMAINS.sub(" ", text)  # a blank, so that no new mark comes together


def _character(entity: re.Match[str]) -> str:
    character = html.unescape(entity[0])
    return "" if character in _MARKS else character  # one that an article spells is no mark of ours


def _moved(match: re.Match[str], mark: Callable[[str], str]) -> str:
    """``10<sup>5</sup>`` is no 105: digits become raised or lowered ones, other content has no words."""
    tag, content = match[1].lower(), _ENTITY.sub(_character, match[2]).replace("''", "").strip()
    if not content or MARK.fullmatch(content) or content.startswith("["):  # a note
        return content
    words = (templates.raised if tag == "sup" else templates.lowered)(content)
    return mark(f"<{tag}>") if words is None else words
