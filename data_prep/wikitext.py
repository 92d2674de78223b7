"""Wikitext to plain prose: one pass with an explicit stack over brackets and tags, then one over the lines.

Templates, tables, references, formulas, galleries, files, categories, headings and list items are dropped (BERT
was trained on "only the text passages", not lists, tables and headers: Devlin et al. 2019, section 3.1); links
give their label. Time is linear in the input, whatever the markup.
"""

import html
import re
from collections.abc import Mapping

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

_FIRST_ARGUMENT = (
    "nowrap nobr small big abbr quote blockquote cquote quotation mvar var em vanchor polytonic script unicode "
    "sic sup sub nihongo smallcaps sc tooltip formatnum"
)
# Templates that stand for words inside a sentence; all others are dropped. {1} is the first plain argument.
_TEMPLATES = {
    **dict.fromkeys(_FIRST_ARGUMENT.split(), "{1}"),
    **dict.fromkeys(["lang", "transl", "transliteration", "langx", "rtl-lang"], "{2}"),
    **dict.fromkeys(["c.", "circa", "ca."], "c. {1}"),
    **dict.fromkeys(["as of", "asof"], "as of {1}"),
    **dict.fromkeys(["frac", "fraction", "sfrac"], "{1}/{2}"),
    **dict.fromkeys(["convert", "cvt"], "{1} {2}"),
    **dict.fromkeys(["ndash", "spaced ndash", "snd", "spnd", "--"], " – "),
    **dict.fromkeys(["mdash", "em dash", "emdash", "---"], "—"),
    **{"'": "'", "'s": "'s", "ad": "AD {1}", "bce": "{1} BCE", "okina": "ʻ", "nbsp": " "},
}
MAX_OPEN = 1000  # brackets open at once; MediaWiki gives up at 40 nested templates
_RANGE = {"to", "-", "–", "and", "or", "by", "x", "×", "to(-)"}

_DROPPED_TAGS = (
    "ref|references|math|chem|ce|gallery|timeline|score|syntaxhighlight|source|pre|hiero|imagemap|graph|mapframe|"
    "maplink|templatestyles|indicator|inputbox|categorytree|charinsert|style|script|nowiki"
)
_TEXT = r"[^\[\]{}<>|\n:]*+"
_TOKEN = re.compile(
    rf"""
    \[\[(?:{_TEXT}\|)?+(?P<label>{_TEXT})\]\]          # the common link, done at once
  | (?P<open_link> \[\[ )
  | (?P<close_link> \]\](?!\](?!\])) )
  | (?P<open_braces> \{{{{2,}}+ )
  | (?P<close_braces> \}}{{2,}}+ )
  | (?P<open_table> \n[ \t:]*+\{{\| | <table(?=[\s>])[^<>]*+> )   # a table mark starts its line
  | (?P<close_table> \n[ \t:]*+\|\}}(?!\}}(?!\}})) | </table\s*+> )
  | (?P<comment> <!-- )
  | <(?P<raw> {_DROPPED_TAGS} )(?=[\s/>])[^<>]*+>
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLOSING = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in _DROPPED_TAGS.split("|")}

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
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
_ELISION = re.compile(r"\b(\w|[Qq]u)'''([^'\n]++)''(?!')")  # l'''avion'': an apostrophe and italics
_MAGIC_WORD = re.compile(r"__[^\W\d_]{3,30}__")
_AFTER_OPEN = re.compile(r"\([ ,;:]++")
_BEFORE_CLOSE = re.compile(r"(?<![ ,;:])[ ,;:]++\)")
_LONE_COMMAS = re.compile(r" (?=[,.](?: |$))|,(?= ,)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\ufeff]")


def clean(wikitext: str, namespaces: Mapping[str, int] = NAMESPACES) -> str:
    """Prose of a page: paragraphs separated by one newline, no markup.

    `namespaces` maps lower-case namespace names of the wiki to their numbers (6 file, 14 category). An unclosed
    bracket or tag costs only itself.
    """
    text = _Scanner("\n" + wikitext, namespaces).run()
    return _paragraphs(_without_inline_markup(text))


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

    def run(self) -> str:
        text, out, search, position = self.text, self.out, _TOKEN.search, 0
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
                case "open_table":
                    self.push("|", 1)
                case "close_table":
                    self.close_table()
                case "comment":
                    close = text.find("-->", end)
                    position = len(text) if close < 0 else close + 3
                case _:
                    position = self.raw_tag(match)
        out.append(text[position:])
        return "".join(out)

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
                words = _template(self.out, mark)
                del self.out[mark:]
                if words:
                    self.out.append(words)

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

    def raw_tag(self, match: re.Match[str]) -> int:
        """Skip a tag with its content and return where to go on; a tag that never closes is skipped alone.

        The last closing tag found is remembered per name, so that no stretch of text is searched twice.
        """
        name, end, length = match["raw"].lower(), match.end(), len(self.text)
        if match.group().endswith("/>"):
            return end
        if self.next_close.get(name, 0) < end:
            found = _CLOSING[name].search(self.text, end)
            self.next_close[name] = found.start() if found else length + 1
        close = self.next_close[name]
        if close > length or (name == "ref" and self.text.find("<ref>", end, close) >= 0):
            return end
        if name == "nowiki":
            self.out.append(_REMAINS.sub("", self.text[end:close]))
        return self.text.index(">", close) + 1


def _short(out: list[str], mark: int) -> str:
    """The text since `mark`, or nothing when it is too long to be one link or phrase (this bounds the work)."""
    if len(out) - mark > 200 or sum(map(len, out[mark:])) > 4000:
        return ""
    return "".join(out[mark:])


def _template(out: list[str], mark: int) -> str:
    """The words that a template stands for."""
    if mark == len(out):
        return ""
    name = out[mark].partition("|")[0].strip().lower()
    form = _TEMPLATES.get(name) or _TEMPLATES.get(name.partition(":")[0])
    if form is None:
        return ""
    parts = _short(out, mark).replace("formatnum:", "formatnum|", 1).split("|")
    plain = [part.strip() for part in parts[1:] if not re.match(r"\s*[a-z]\w*\s*=", part)]
    plain = [part[2:].strip() if part.startswith(("1=", "2=")) else part for part in plain]
    if len(plain) > 3 and plain[1] in _RANGE:
        plain[:3] = [f"{plain[0]} {plain[1].strip('()')} {plain[2]}"]
    try:
        return form.format("", *plain)
    except IndexError:  # an argument is missing
        return ""


def _link(out: list[str], mark: int, namespaces: Mapping[str, int]) -> str | None:
    """What a link leaves in the text: its label, nothing for files and categories, None for no link at all."""
    first = out[mark] if mark < len(out) else ""
    prefix, colon, _ = first.partition(":")
    number = namespaces.get(prefix.strip().replace("_", " ").lower(), 0) if colon else 0
    if number in (6, 14, -2) or (colon and _LANGUAGE.fullmatch(prefix)):
        return ""
    content = _short(out, mark)
    target, bar, label = content.partition("|")
    if not content or "\n" in target:
        return None  # brackets that do not belong together
    if bar and label.strip():
        return label
    if number:
        return ""
    target = target.strip().lstrip(":")
    prefix, colon, rest = target.partition(":")
    return (rest if colon and len(prefix) < 2 else target).replace("_", " ")


def _without_inline_markup(text: str) -> str:
    """Tags, external links, quotes, entities and switches out of text that has no brackets any more."""
    if "<" in text:
        text = _BLOCK_TAG.sub("\n", text)
        text = _BREAK_TAG.sub(" ", text)
        text = _ANY_TAG.sub("", text)
    if "//" in text or "mailto:" in text:
        text = _EXTERNAL.sub(lambda match: match[1] or match[2] or "", text)
        text = _BARE_URL.sub("", text)
    if "'''" in text:
        text = _ELISION.sub(r"\1'\2", text)
    text = text.replace("'''''", "").replace("'''", "").replace("''", "")
    if "&" in text:
        for _ in range(2):  # "&amp;nbsp;" was meant as a blank
            text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if "__" in text:
        text = _MAGIC_WORD.sub(lambda match: "" if match[0].isupper() else match[0], text)
    return _REMAINS.sub(" ", text)  # a blank, so that no new mark comes together


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
    return " ".join(line.split())


def _paragraphs(text: str) -> str:
    """Join the lines of each paragraph; headings, list items, table rows and lines without a letter go."""
    paragraphs: list[str] = []
    current: list[str] = []
    for line in [*_CONTROL.sub("", text).split("\n"), ""]:
        line = " ".join(line.split())
        first = line[:1]
        if first == ":":
            line = line.lstrip(":*#; ")
            first = line[:1]
        if not line or first in "*#;|!" or (first == "=" and line[-1] == "=") or line.startswith("----"):
            paragraph = _punctuation(" ".join(current))
            if any(map(str.isalpha, paragraph)):
                paragraphs.append(paragraph)
            current.clear()
        else:
            current.append(line)
    return "\n".join(paragraphs)
