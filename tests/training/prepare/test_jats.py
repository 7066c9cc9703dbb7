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
        "Adults (n = 95) were followed, see, as before, with p< 0.05.",
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


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("as shown [12, 14-16] before", "as shown before"),
        ("as shown (Fig. 2A) here (Tables 1 and 2).", "as shown here."),
        ("of 95 (10) and (1, 2) stay", "of 95 (10) and (1, 2) stay"),
        ("in mice (; , see ) .", "in mice."),
        ("(; 2001)", "(2001)"),
        ("[\u2013]", ""),
        ("the range [0.5, 1.5] stays", "the range [0.5, 1.5] stays"),
    ],
)
def test_what_markers_leave_goes_and_figures_stay(text: str, left: str) -> None:
    assert clean(text) == left


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
    assert time.process_time() - start < 2


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
