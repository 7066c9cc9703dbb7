"""The benchmark's meters against values worked out by hand."""

import json
from dataclasses import replace

import pytest

from loadtest.report import (
    ENGINE,
    GATEWAY,
    Result,
    Round,
    Stream,
    make_round,
    markdown,
    percentile,
    read_stream,
    reading,
    reasons,
    summarize,
)


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
DONE = b"data: [DONE]\n\n"
ANSWER = ROLE + delta("Iron") + delta(" is") + delta(" low") + USAGE + DONE


def test_percentile_is_the_nearest_rank() -> None:
    values = [40.0, 10.0, 30.0, 20.0]
    assert [percentile(values, p) for p in (0, 25, 26, 50, 75, 99, 100)] == [10, 10, 20, 20, 30, 40, 40]


def test_percentile_99_of_a_hundred_values_leaves_one_out() -> None:
    assert percentile([float(v) for v in range(1, 101)], 99) == 99


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_ttft_ends_with_the_read_of_the_first_content_and_tpot_with_the_last_read() -> None:
    reads = [ROLE, delta("Iron"), delta(" is"), delta(" low") + USAGE + DONE]
    stream = read_stream(reads, [10.1, 10.5, 10.75, 11.5], sent=10.0, max_tokens=3)
    assert stream.ttft == pytest.approx(0.5)
    assert stream.tpot == pytest.approx((11.5 - 10.5) / 2)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 64, len(ANSWER)])
def test_events_are_counted_wherever_the_reads_are_cut(size: int) -> None:
    reads = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    stream = read_stream(reads, [float(i) for i in range(len(reads))], sent=0.0, max_tokens=3)
    assert (stream.chunks, stream.tokens) == (6, 3)


@pytest.mark.parametrize("after", range(-2, 3))
def test_first_content_cut_in_two_arrives_with_the_read_that_holds_its_first_character(after: int) -> None:
    character = ANSWER.index(b"Iron")
    cut = character + after
    stream = read_stream([ANSWER[:cut], ANSWER[cut:]], [1.0, 2.0], sent=0.0, max_tokens=3)
    assert stream.ttft == (1.0 if character < cut else 2.0)


def test_the_word_data_in_a_text_is_no_event() -> None:
    body = ROLE + delta("data: \ndata: x") + USAGE + DONE
    assert read_stream([body], [1.0], sent=0.0, max_tokens=3).chunks == 4


def test_keep_alive_comments_are_no_events() -> None:
    body = b": wait\n\n" + ROLE + b": wait\n\n" + delta("a") + USAGE + b": wait\n\n" + DONE
    assert read_stream([body], [1.0], sent=0.0, max_tokens=3).chunks == 4


def test_content_without_spaces_in_the_json_and_with_carriage_returns_is_read_too() -> None:
    body = ANSWER.replace(b": [{", b":[{").replace(b'content": ', b'content":').replace(b"\n", b"\r\n")
    stream = read_stream([ROLE, body], [1.0, 2.0], sent=0.0, max_tokens=3)
    assert (stream.chunks, stream.ttft) == (7, 2.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "before .DONE."),
        (ROLE + delta("a") + USAGE, "before .DONE."),
        (ROLE + delta("a") + DONE, "include_usage"),
        (ROLE + delta("a") + event(error={"message": "engine died"}) + DONE, "engine died"),
        (ROLE + USAGE + DONE, "no event with content"),
        (ANSWER.replace(b'"completion_tokens": 3', b'"completion_tokens": 2'), "2 tokens instead of 3"),
    ],
)
def test_a_stream_that_is_no_whole_answer_is_a_failure(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_stream([body], [1.0], sent=0.0, max_tokens=3)


def played(target: str, tokens: int, seconds: float, gateway_cpu: float = 0.0, client_cpu: float = 0.0) -> Round:
    """A round of two streams with 5 chunks each."""
    streams = [Stream(chunks=5, tokens=tokens // 2, ttft=0.1, tpot=0.01)] * 2
    return make_round(target, streams, seconds, gateway_cpu=gateway_cpu, engine_cpu=1.0, client_cpu=client_cpu)


def test_a_round_sums_the_answers_and_counts_the_failures_by_reason() -> None:
    answers: list[Stream | str] = [
        Stream(4, 10, 0.3, 0.02),
        "HTTP 429",
        Stream(5, 10, 0.1, 0.04),
        Stream(6, 10, 0.2, 0.03),
        "HTTP 429",
    ]
    result = make_round(GATEWAY, answers, 2.0, gateway_cpu=0.5, engine_cpu=1.5, client_cpu=0.25)
    assert (result.requests, result.errors, result.failures) == (5, 2, {"HTTP 429": 2})
    assert (result.tokens, result.chunks, result.tokens_per_second) == (30, 15, 15.0)
    assert (result.ttft_p50, result.ttft_p99, result.tpot_p50) == (0.2, 0.3, 0.03)


def test_a_round_without_any_answer_says_why() -> None:
    with pytest.raises(RuntimeError, match="all 3 requests to the gateway failed: 2 x HTTP 429; 1 x HTTP 503"):
        make_round(GATEWAY, ["HTTP 429", "HTTP 503", "HTTP 429"], 1.0, gateway_cpu=0, engine_cpu=0, client_cpu=0)


def test_reasons_name_the_most_frequent_first() -> None:
    assert reasons({"rare": 1, "common": 9}) == "9 x common; 1 x rare"


# tokens/s: engine 100, 200, 400 and 500; gateway 80, 190, 390 and 600.
ROUNDS = [
    played(ENGINE, 100, 1.0),
    played(GATEWAY, 80, 1.0, gateway_cpu=0.010),
    played(GATEWAY, 380, 2.0, gateway_cpu=0.030),
    played(ENGINE, 400, 2.0, gateway_cpu=9.0),
    played(ENGINE, 400, 1.0),
    played(GATEWAY, 390, 1.0, gateway_cpu=0.020, client_cpu=0.5),
    played(GATEWAY, 600, 1.0, gateway_cpu=0.020),
    played(ENGINE, 500, 1.0),
]


def test_ratios_of_medians_of_totals_and_of_pairs() -> None:
    summary = summarize(ROUNDS)
    assert summary.ratio_of_medians == pytest.approx(((190 + 390) / 2) / ((200 + 400) / 2))
    assert summary.ratio_of_totals == pytest.approx(((80 + 380 + 390 + 600) / 5) / ((100 + 400 + 400 + 500) / 5))
    assert summary.pair_ratios == pytest.approx([0.8, 0.95, 0.975, 1.2])


def test_gateway_cpu_is_that_of_its_own_rounds_per_stream_and_per_chunk() -> None:
    summary = summarize(ROUNDS)
    assert summary.gateway_cpu_ms_per_stream == pytest.approx(80 / 8)
    assert summary.gateway_cpu_ms_per_chunk == pytest.approx(80 / 40)


def test_client_cores_are_those_of_the_busiest_round() -> None:
    assert summarize(ROUNDS).client_cores == pytest.approx(0.5)


def result(rounds: list[Round]) -> Result:
    return Result({"date": "today"}, {"concurrency": 2}, rounds, summarize(rounds))


def test_reading_says_when_the_pairs_do_not_resolve_a_difference() -> None:
    assert "does not resolve a difference" in reading(result(ROUNDS))
    assert "all below 100 %" in reading(result([*ROUNDS[:6], ROUNDS[1], ROUNDS[7]]))


def test_reading_warns_of_a_client_that_was_the_bottleneck() -> None:
    busy = replace(ROUNDS[0], client_cpu=0.9)
    assert "client may have limited" in reading(result([busy, *ROUNDS[1:]]))
    assert "client may have limited" not in reading(result(ROUNDS))


def test_a_report_with_failed_requests_says_that_it_is_no_result() -> None:
    failed = replace(ROUNDS[1], failures={"HTTP 429": 1})
    text = markdown(result([ROUNDS[0], failed, *ROUNDS[2:]]))
    assert "1 failed requests, so these figures are not a result" in text
    assert "round 2: 1 x HTTP 429" in text
