"""Articles become prose; what is no prose goes, and no XML does harm."""

import io
import time

import pytest

from training.prepare.jats import clean, prose
from training.prepare.xml_stream import articles

ARTICLE = b"""<?xml version="1.0" encoding="UTF-8"?>
<article xmlns:mml="http://www.w3.org/1998/Math/MathML" article-type="research-article">
<front><journal-meta><journal-title>Heart</journal-title></journal-meta>
<article-meta><title-group><article-title>Statins &amp; <italic>risk</italic> in adults</article-title></title-group>
<contrib-group><contrib><name><surname>Smith</surname></name></contrib></contrib-group>
<abstract><sec><title>Background</title>
<p>Statins lower risk<sup><xref ref-type="bibr">1</xref></sup>.</p></sec></abstract>
<abstract abstract-type="graphical"><p>A picture.</p></abstract></article-meta></front>
<body><sec id="s1"><label>1</label><title>Methods</title>
<p>Adults (<italic>n</italic> = 95) were followed (<xref ref-type="bibr" rid="b1">Smith 2001</xref>;
 <xref ref-type="bibr" rid="b2">Lee 2002</xref>), see <xref ref-type="fig">Fig. 1</xref>, as before
 [<xref ref-type="bibr">3</xref>&#x2013;<xref ref-type="bibr">5</xref>] , with
 <inline-formula><alternatives><tex-math>\\documentclass{x}</tex-math>
<mml:math><mml:mi>p</mml:mi><mml:mo>&lt;</mml:mo>
<mml:mn>0.05</mml:mn></mml:math></alternatives></inline-formula>.</p>
<disp-formula><tex-math>E=mc^2</tex-math></disp-formula>
<fig><caption><p>A figure.</p></caption></fig>
<table-wrap><table><tbody><tr><td>12</td></tr></tbody></table></table-wrap>
<list><list-item><p>First point&nbsp;here</p></list-item><list-item><p>Second point</p></list-item></list>
<sec><title>Results</title><p>Before <!-- a comment -->and after.<fn><p>A note.</p></fn></p></sec></sec></body>
<back><ref-list><ref><mixed-citation>Smith J. Old paper.</mixed-citation></ref></ref-list></back>
<sub-article><body><p>A reply.</p></body></sub-article></article>"""

PUBMED = b"""<PubmedArticle><MedlineCitation><PMID>1</PMID><Article><ArticleTitle>A trial of <i>x</i>.</ArticleTitle>
<Abstract><AbstractText Label="BACKGROUND">Why it was done.</AbstractText><AbstractText Label="RESULTS">It worked
(P &lt; .01).</AbstractText><CopyrightInformation>Copyright</CopyrightInformation></Abstract>
<AuthorList><Author><LastName>Smith</LastName></Author></AuthorList></Article></MedlineCitation></PubmedArticle>"""


def test_article_becomes_titles_and_paragraphs() -> None:
    assert prose(ARTICLE).split("\n\n") == [
        "Statins & risk in adults",
        "Background",
        "Statins lower risk.",
        "Methods",
        "Adults (n = 95) were followed, see Fig. 1, as before, with p< 0.05.",
        "First point here",
        "Second point",
        "Results",
        "Before and after.",
    ]


def test_pubmed_abstract_keeps_title_and_labels() -> None:
    assert prose(PUBMED).split("\n\n") == [
        "A trial of x.", "Background", "Why it was done.", "Results", "It worked (P < .01).",
    ]  # fmt: skip


def test_record_without_abstract_has_no_text() -> None:
    assert prose(b"<PubmedArticle><MedlineCitation><Article><ArticleTitle>T</ArticleTitle></Article></MedlineCitation>"
                 b"</PubmedArticle>") == ""  # fmt: skip


def test_column_with_a_piece_of_an_article() -> None:
    assert prose(b"<sec><title>T</title><p xlink:href='x'>One <bold>two</bold></p></sec>") == "T\n\nOne two"


def paragraph(inner: str) -> str:
    """The text of a paragraph, the same in a JATS article and in PubMed's abstract."""
    inner = inner.replace("<c>", '<xref ref-type="bibr" rid="x">').replace("</c>", "</xref>")
    spaces = "xmlns:mml='http://www.w3.org/1998/Math/MathML'"
    jats = prose(f"<article {spaces}><body><p>{inner}</p></body></article>".encode())
    pubmed = prose(
        f"<PubmedArticle {spaces}><MedlineCitation><Article><ArticleTitle>T</ArticleTitle><Abstract><AbstractText>"
        f"{inner}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>".encode()
    )
    assert pubmed == f"T\n\n{jats}"
    return jats


@pytest.mark.parametrize(
    "text",
    [
        "Median age was 45 [32-58] years; OR 2 [1, 3]; CD4 count 350 [200-500].",
        "as shown [12, 14-16] before (Fig. 2A), and (Tables 1 and 2)",
        "of 95 (10) and (1, 2) stay, as do [0.5, 1.5], f() and (see also)",
    ],
)
def test_brackets_that_are_written_out_stay(text: str) -> None:
    assert paragraph(text) == text


@pytest.mark.parametrize(
    ("inner", "left"),
    [
        ("age 45 [32-58] [<c>7</c>, <c>8</c>] years (<c>1</c>)", "age 45 [32-58] years"),
        ("as shown [<c>3</c>&#x2013;<c>5</c>, <c>9</c>] before", "as shown before"),
        ("in mice (<c>1</c>; <c>2</c>, reviewed in <c>3</c>) .", "in mice."),
        ("in mice ([<c>1</c>]), in rats (e.g., ref. <c>2</c>).", "in mice, in rats."),
        ("known (<c>A</c>; 12 [3-5] of 40)", "known (12 [3-5] of 40)"),
        ("known (Lee, 2001; <c>A</c>)", "known (Lee, 2001)"),
        ("by <c>1</c> and <c>2</c>, <c>3</c>, others", "by, others"),
        ("falls <c>1</c> and rises<c>2</c> again", "falls and rises again"),
        ("falls<sup><c>1</c>,<c>2</c></sup> and rises <sup>[<c>3</c>]</sup>.", "falls and rises."),
        ("falls<c><sup>1</sup></c><sup>,</sup><c><sup>2</sup></c>.", "falls."),
        ("a note<fn><p>Not 5.</p></fn> (<inline-graphic/>) here", "a note here"),
    ],
)
def test_citations_go_with_the_brackets_they_leave_empty(inner: str, left: str) -> None:
    assert paragraph(inner) == left


@pytest.mark.parametrize(
    ("inner", "left"),
    [
        ("10<sup>6</sup> cells/m<sup>2</sup>", "10^6 cells/m^2"),
        (
            "10<sup>-3</sup> M, 10<sup>&#x2212;9</sup> M, 10<italic><sup> 12 </sup></italic>",
            "10^-3 M, 10^\u22129 M, 10^12",
        ),
        ("10<sup>6&#x2013;8</sup>, 5 [2, 3] \u00d7 10<sup>9</sup>/L", "10^6\u20138, 5 [2, 3] \u00d7 10^9/L"),
        ("<sup>131</sup>I and [<sup>18</sup>F]FDG, <sup>99m</sup>Tc", "131I and [18F]FDG, 99mTc"),
        ("Ca<sup>2+</sup>, 5<sup>th</sup>, CO<sub>2</sub>, H<sub>2</sub>O", "Ca2+, 5th, CO2, H2O"),
        ("1.5 m<sup>2</sup><sup><c>4</c></sup> and 10<sup>6</sup> [<c>5</c>]", "1.5 m^2 and 10^6"),
        ("<mml:math><mml:msup><mml:mn>10</mml:mn> <mml:mn>6</mml:mn></mml:msup></mml:math> cells", "10^6 cells"),
        ("<mml:math><mml:mfrac><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:mfrac></mml:math> mg", "1/2 mg"),
    ],
)
def test_exponents_stay_exponents(inner: str, left: str) -> None:
    assert paragraph(inner) == left


@pytest.mark.parametrize(
    ("attributes", "kept"),
    [(f'ref-type="{kind}"', True) for kind in ("fig", "table", "sec", "supplementary-material", "disp-formula", "app")]
    + [(f'ref-type="{kind}"', False) for kind in ("bibr", "fn", "table-fn", "aff", "corresp", "author-notes")]
    + [(f'rid="{rid}"', False) for rid in ("B1", "CR12", "ref3", "R7", "bib0040 bib0045", "pone.0001-ref7")]
    + [(f'rid="{rid}"', True) for rid in ("F2", "fig2", "T1", "S3", "Sec2", "")],
)
def test_what_is_referred_to_decides_whether_the_reference_is_text(attributes: str, kept: bool) -> None:
    found = paragraph(f"As shown in <xref {attributes}>Figure 2</xref>, it fell.")
    assert found == ("As shown in Figure 2, it fell." if kept else "As shown in, it fell.")


def test_cleaning_takes_time_in_proportion() -> None:
    start = time.process_time()
    for piece in ("(", "[,", ", ", "\0 ", "\0,", "(\0", "\x01", "1\x01\x02", "1\x01-1 "):
        clean("a" + piece * 100_000)
    assert time.process_time() - start < 10


BOMB = b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 99 + b'">' + b"".join(
    b'<!ENTITY b%d "%s">' % (n, (b"&b%d;" % (n - 1) if n else b"&b;") * 20) for n in range(9)
) + b"]><article><body><p>&b8;</p></body></article>"  # fmt: skip


@pytest.mark.parametrize(
    "attack",
    [
        BOMB,
        b'<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><article><body><p>&f;</p></body></article>',
        b"<article>" + b"<sec>" * 5000 + b"</sec>" * 5000 + b"</article>",
        b"<article><p>not closed</article>",
        b"<article><p>\xff\xfe</p></article>",
    ],
)
def test_hostile_and_broken_xml_is_refused_at_once(attack: bytes) -> None:
    start = time.process_time()
    for cut in articles(io.BytesIO(attack), 2**20):
        assert cut is not None
        with pytest.raises(ValueError, match="XML"):
            prose(cut)
    with pytest.raises(ValueError, match="XML"):
        prose(attack)
    assert time.process_time() - start < 20


class Trickle(io.BytesIO):
    """Gives a few bytes at a time, so that tags fall on every border."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(7)


@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_articles_are_cut_out_whole(stream: type[io.BytesIO]) -> None:
    one, two = b"<article>" + b"a" * 40 + b"</article>", b"<article x='1'><sub-article/>b</article>"
    content = b"<set><article-id/>" + one + b"  " + two + PUBMED + b"</set>"
    assert list(articles(stream(content), 10**6)) == [one, two, PUBMED]


@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_article_that_is_too_long_is_none_and_the_next_is_found(stream: type[io.BytesIO]) -> None:
    content = b"<article>" + b"a" * 5000 + b"</article>" + b"<article>b</article>"
    assert list(articles(stream(content), 300)) == [None, b"<article>b</article>"]


def test_broken_off_and_foreign_files_come_as_one_piece_to_be_counted() -> None:
    assert list(articles(io.BytesIO(b"<article>a</article><article>br"), 99)) == [
        b"<article>a</article>",
        b"<article>br",
    ]
    assert len(list(articles(io.BytesIO(b"no XML at all"), 99))) == 1
    assert list(articles(io.BytesIO(b""), 99)) == []
