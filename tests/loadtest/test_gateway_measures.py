"""The meters of the gateway's benchmarks against values worked out by hand."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from loadtest.gateway.cost import CELLS, OURS, Figures, verdict
from loadtest.gateway.everything import NAME
from loadtest.gateway.memory import KINDS, Sample, kinds, section, slope
from loadtest.gateway.open_loop import Sent, Target, arrivals, quarters, summarize
from loadtest.gateway.processes import MIB
from loadtest.gateway.telling import command_line, how
from loadtest.gateway.wire import chunked, request, statuses

GOAL = Target(first=1.0, total=2.0)
ANSWERED = Sent(due=10.0, began=10.0, first=10.5, end=11.5, status=200, whole=True)


def test_an_answer_is_late_by_the_time_it_was_due_at_not_by_when_it_was_sent() -> None:
    assert ANSWERED.good(GOAL)
    assert not replace(ANSWERED, due=9.4).good(GOAL)  # sent 0.6 s late: the end is 2.1 s after it was due
    assert not replace(ANSWERED, first=11.1).good(GOAL)
    assert not replace(ANSWERED, whole=False).good(GOAL)


def test_a_run_is_summed_up() -> None:
    rejected = Sent(due=1.0, began=1.0, first=1.01, end=1.01, status=429, retry_after=3)
    sent = [
        ANSWERED,
        replace(ANSWERED, end=13.0),  # answered, too late
        rejected,
        replace(rejected, status=503, retry_after=None),
        Sent(due=2.0, began=2.1, end=12.0, status=-1),
        Sent(due=3.0, began=3.0, end=3.0, status=0),
        replace(ANSWERED, whole=False),
    ]
    s = summarize(sent, 10.0, GOAL)
    assert (s.offered, s.goodput, s.answered, s.rejected, s.given_up) == (0.7, 0.1, 0.2, 0.2, 0.1)
    assert (s.failed, s.broken, s.without_retry_after, s.retry_after) == (1, 1, 1, (3, 3, 3))
    assert s.total_p50 == pytest.approx(1.5)
    assert s.reject_p99 == pytest.approx(0.01)
    assert s.late_p99 == pytest.approx(0.1)


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    times = arrivals(50.0, 200.0, seed=3)
    assert times == arrivals(50.0, 200.0, seed=3) != arrivals(50.0, 200.0, seed=4)
    assert 0 < min(times) <= max(times) < 200
    assert len(times) == pytest.approx(10_000, rel=0.05)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.1)  # of an exponential distribution


def test_quarters_are_means() -> None:
    assert quarters([1, 1, 2, 2, 3, 3, 4, 4]) == [1, 2, 3, 4]
    assert quarters([]) == [0, 0, 0, 0]


def test_the_slope_of_memory_leaves_the_first_half_out() -> None:
    samples = [Sample(0, 0, 10, 0), Sample(100, 1, 4000, 0), Sample(200, 2, 5100, 0), Sample(400, 3, 5300, 0)]
    assert slope(samples) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="send more requests"):
        slope(samples[:1])


def test_every_kind_of_request_is_sent_in_its_share() -> None:
    drawn = list(kinds(20_000))
    for kind, share in KINDS.items():
        assert drawn.count(kind) == pytest.approx(200 * share, rel=0.2)


def test_the_verdict_of_cost_looks_at_8_at_once_and_at_memory() -> None:
    figures = Figures({cell: [0.7, 0.5, 5.0] for cell in CELLS}, start=80 * MIB, end=96 * MIB)
    both = {OURS: figures, NAME: replace(figures)}
    kept = [ok for _, ok in verdict(both)]
    assert kept == [True, True, False, True, True, True]
    figures.cpu[CELLS[1]] = [0.9, 0.9, 0.1]
    assert [ok for _, ok in verdict(both)] == [False, True, False, True, True, True]
    both[NAME] = Figures({cell: [2.1] for cell in CELLS}, start=80 * MIB, end=115 * MIB)
    assert [ok for _, ok in verdict(both)][3:] == [False, False, False]


def test_the_verdict_of_cost_is_of_one_machine_where_litellm_tells_its_speed() -> None:
    """LiteLLM takes 10 and 30 there: this one is half as fast with plain requests, and twice with streams."""
    litellm = {cell: [15.0 if cell.stream else 20.0] for cell in CELLS}
    ours = {cell: [0.85 if cell.stream else 1.5] for cell in CELLS}
    figures = {OURS: Figures(ours), NAME: Figures(ours), "LiteLLM": Figures(litellm)}
    found = [said for said, _ in verdict(figures) if "CPU" in said]
    assert [" 0.75 where" in said for said in found] == [True, False, True, False]
    assert [" 1.70 where" in said for said in found] == [False, True, False, True]
    assert [ok for said, ok in verdict(figures) if "CPU" in said] == [True, False, True, True]


def test_memory_has_a_limit_where_every_feature_is_on() -> None:
    def samples(rss: int) -> list[Sample]:
        return [Sample(requests, requests / 100, rss, rss) for requests in range(0, 1001, 100)]

    outcomes = Counter({"ok": 1000})
    assert section(samples(130 * MIB), outcomes)[1]
    assert section(samples(110 * MIB), outcomes, "1,000 ledger")[1]
    text, kept = section(samples(130 * MIB), outcomes, "1,000 ledger")
    assert not kept
    assert "136 MB RSS" in text
    assert "1,000 ledger" in text


def test_statuses_are_found_where_responses_begin_and_nowhere_else() -> None:
    one = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 12\r\n\r\nHTTP/1.1 200"
    two = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"HTTP/1.1 503 no", b"x")
    assert statuses(one) == [400]
    assert statuses(b"HTTP/1.1 100 Continue\r\n\r\n" + one + two) == [100, 400, 200]
    assert statuses(one + b"garbage") == [400, 0]
    assert statuses(b"HTTP/1.1 200 OK\r\n\r\nuntil the end") == [200]


def test_a_request_says_its_length_or_what_it_is_told_to_say() -> None:
    assert b"\r\nContent-Length: 2\r\n" in request(b"/x", b"{}")
    assert b"\r\nContent-Length: 99\r\n" in request(b"/x", b"{}", length=b"99")
    assert b"Content-Length" not in request(b"/x", b"{}", length=None)


def test_a_report_names_no_path_of_its_machine() -> None:
    shown = command_line("loadtest.gateway.cost", ["--litellm", "/some/where/venv/", "--rounds", "5"])
    assert shown == "python -m loadtest.gateway.cost --litellm venv --rounds 5"
    shown = command_line("loadtest.gateway.cost", ["--store", "postgresql://me@there/name", "--redis=redis://there/0"])
    assert shown == "python -m loadtest.gateway.cost --store postgresql:URL --redis=redis:URL"


def test_how_leaves_the_title_and_the_usage_out() -> None:
    assert how("Title.\n\n    usage\n\nHow it is done.\n\nMore.\n") == "How it is done.\n\nMore."
