"""Readable prose from articles in XML: JATS (PMC) and PubMed's own format.

What is kept: the title, abstracts, section titles, paragraphs, lists, quotations; each is a block, with a blank line
between blocks. What goes: reference lists, figures, tables, displayed formulas, supplements, authors and other
metadata, footnotes, replies to the article, citation markers and the brackets they leave empty. Brackets that were
written out stay, since "45 [32-58] years" looks like a citation and is none. References to figures, tables and sections
stay as text. Of a formula within a line the characters stay and the markup goes, but for "^" before a numeric exponent.

The parser loads no DTD, resolves no entity, opens no file and no connection, and has libxml2's limits on depth and
size. What it refuses raises ``ValueError``; the caller counts it.

Source of the elements: JATS 1.3, archiving and interchange tag set; PubMed's DTD of 2025.
"""

import html.entities
import re
from collections.abc import Iterator
from typing import Any

from lxml import etree

_DROPPED = frozenset((
    "ref-list", "fig", "fig-group", "table-wrap", "table-wrap-group", "table", "graphic", "media",
    "supplementary-material", "disp-formula", "disp-formula-group", "inline-graphic", "inline-media",
    "inline-supplementary-material", "tex-math", "annotation", "annotation-xml", "fn", "fn-group",
    "table-wrap-foot", "sub-article", "response", "chem-struct-wrap", "code", "preformat", "object-id", "label",
    "sec-meta", "author-notes", "permissions", "kwd-group", "contrib-group", "private-char", "glyph-data",
    "index-term",
))  # fmt: skip
# Types of <xref> that stand outside the sentence; the text of others ("Figure 2") is a part of it.
_MARKERS = frozenset(("bibr", "fn", "table-fn", "aff", "corresp", "author-notes"))
# An <xref> without a type to a reference: B1, CR12, ref3, bib0040, pone.0001-ref7.
_REFERENCE = re.compile(r"(?:\S*[._-])?(?:b|br|cr|r|rf|ref|bib|bibr|cit)[._-]?\d", re.I)
# Blocks of their own, as opposed to what runs on within a line.
_BLOCKS = frozenset((
    "p", "title", "subtitle", "article-title", "list-item", "def-item", "term", "def", "disp-quote", "attrib",
    "speech", "verse-line", "statement", "sec", "boxed-text", "list", "def-list", "verse-group", "abstract", "body",
    "term-head", "def-head", "AbstractText", "ArticleTitle",
))  # fmt: skip
_ENTITY = re.compile(rb"&([A-Za-z][A-Za-z0-9]*);")
_XML_ENTITIES = frozenset((b"amp", b"lt", b"gt", b"quot", b"apos"))
# Namespaces that articles cut out of a collection may have had declared further up.
_WRAPPED = (
    b'<wrapped xmlns:xlink="x" xmlns:mml="m" xmlns:xsi="s" xmlns:ali="a" xmlns:oasis="o">',
    b"</wrapped>",
)
_DECLARATION = re.compile(rb"^\s*<\?xml[^>]*\?>")
_PARSER = etree.XMLParser(
    resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False, remove_comments=True, remove_pis=True,
    encoding="utf-8",
)  # fmt: skip

# In the text of a block until it is cleaned; characters that no XML may hold.
_DROP = "\0"  # something was dropped from the line here
_RAISED, _LOWERED = "\x01", "\x02"  # around a superscript
_JOINING = r"[\s,;\u2013\u2014-]|\band\b|\bsee\b|\balso\b|\be\.g\.|\bcf\.|\breviewed in\b|\b[Rr]efs?\b\.?"
_EMPTIED = re.compile(rf"[(\[](?:{_JOINING})*\0(?:{_JOINING}|\0)*[)\]]")
_SUPERSCRIPTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\x01[\s,;()\[\]\u2013\u2014-]*\0[\s,;()\[\]\u2013\u2014\0-]*\x02"), _DROP),
    # 10^6, 10^-3, m^2; not the 131 of 131I, which leads, nor the 2+ of Ca2+.
    (re.compile(r"(?<=[^\W_])\x01\s?([+\u2010-\u2013\u2212-]?\s?\d(?:[\d\s.,/\u2010-\u2013-]*\d)?)\s?\x02"), r"^\1"),
    (re.compile(r"[\x01\x02]"), ""),
)
_DROPS: tuple[tuple[re.Pattern[str], str], ...] = (
    (_EMPTIED, _DROP),
    (_EMPTIED, _DROP),  # ([3])
    (re.compile(rf"\0(?:(?:{_JOINING})*\0)+"), _DROP),
    (re.compile(r"\(\s?\0\s?[,;]\s?"), "("),
    (re.compile(r"\s?[,;]\s?\0\s?(?=[).\]])"), ""),
    (re.compile(r"([,;])\s?\0\s?[,;]"), r"\1"),
    (re.compile(r"\s\0(?=[\s,.;:)\]]|$)"), ""),
    (re.compile(r"\0"), ""),
)
_BLANKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+(?=[,.;:)\]](?!\d))"), ""),  # but not in "P < .01"
)


def prose(article: bytes) -> str:
    """The text of one ``<article>`` (JATS) or ``<PubmedArticle>``, UTF-8; empty where it has none.

    Raises:
        ValueError: not well-formed, or beyond the parser's limits.
    """
    article = _ENTITY.sub(_character, _DECLARATION.sub(b"", article))
    try:
        root = etree.fromstring(_WRAPPED[0] + article + _WRAPPED[1], _PARSER)
    except etree.XMLSyntaxError as e:
        raise ValueError(f"not well-formed XML: {e}") from e
    for element in root.iter():
        if isinstance(element.tag, str) and element.tag.startswith("{"):
            element.tag = element.tag.partition("}")[2]
    parts = _pubmed(root) if root.find("PubmedArticle") is not None else _jats(root)
    return "\n\n".join(block for part in parts for block in _blocks(part))


def _character(match: re.Match[bytes]) -> bytes:
    """A named character of HTML's, which JATS takes from a DTD that is not loaded."""
    if match[1] in _XML_ENTITIES:
        return match[0]
    character = html.entities.html5.get(match[1].decode() + ";")
    return character.encode() if character else match[0]


def _pubmed(root: Any) -> Iterator[Any]:
    article = root.find("PubmedArticle/MedlineCitation/Article")
    if article is None:
        return
    title, sections = article.find("ArticleTitle"), article.findall("Abstract/AbstractText")
    if title is not None and sections:  # a title alone is no document
        yield title
    for section in sections:
        if label := section.get("Label"):
            heading = etree.Element("title")
            heading.text = label.capitalize() if label.isupper() else label
            yield heading
        yield section


def _jats(root: Any) -> Iterator[Any]:
    article = root.find("article")
    top = root if article is None else article
    yield from top.findall("front/article-meta/title-group/article-title")
    for abstract in top.findall("front/article-meta/abstract"):
        if abstract.get("abstract-type") not in ("graphical", "teaser", "toc", "key-points"):
            yield abstract
    body = top.find("body")
    if body is not None:
        yield body
    elif article is None:  # a piece of an article, as some data sets' columns have
        yield root


def _blocks(element: Any) -> Iterator[str]:
    """The blocks below an element, cleaned, in their order."""
    line: list[str] = []
    # Depth is limited by the parser (256 elements), so recursion is safe.
    for piece in _pieces(element):
        if piece is None:
            if block := clean("".join(line)):
                yield block
            line = []
        else:
            line.append(piece)
    if block := clean("".join(line)):
        yield block


def _pieces(element: Any) -> Iterator[str | None]:
    """Text, with None where a block begins or ends."""
    block = element.tag in _BLOCKS
    if block:
        yield None
    if element.tag == "sup":
        yield _RAISED
    if element.text:
        yield element.text
    # Of <msup> the last child is the exponent, and the blanks between its children are layout.
    power = element[-1] if element.tag in ("msup", "msubsup") and len(element) else None
    for child in element:
        if isinstance(child.tag, str):
            if child is power:
                yield _RAISED
            if element.tag == "mfrac" and child is not element[0]:
                yield "/"
            if child.tag in _DROPPED or _is_marker(child):
                # What stands around a figure or a formula does not run together.
                yield " " if child.tag in ("disp-formula", "fig", "table-wrap") else _DROP
            else:
                yield from _pieces(child)
            if child is power:
                yield _LOWERED
        if child.tail and (power is None or child.tail.strip()):
            yield child.tail
    if element.tag == "sup":
        yield _LOWERED
    if block:
        yield None


def _is_marker(element: Any) -> bool:
    if element.tag != "xref":
        return False
    kind = element.get("ref-type")
    return kind in _MARKERS if kind else _REFERENCE.match(element.get("rid", "")) is not None


def clean(text: str) -> str:
    """One block on one line, without the marks that :func:`_pieces` sets and what they leave behind."""
    text = " ".join(text.split())
    if _RAISED in text:
        text = _replaced(text, _SUPERSCRIPTS)
    if _DROP in text:
        text = _replaced(text, _DROPS)
    text = _replaced(text, _BLANKS).strip()
    return text if any(character.isalnum() for character in text) else ""


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
