"""Streams cut anywhere are the same streams, and what they tell is found without decoding them."""

import itertools
import json
import random

import pytest

from serving.gateway.stream import Events
from serving.gateway.usage import Usage

CHAT = "/v1/chat/completions"


def event(content: object, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5}})
DONE = b"data: [DONE]\n\n"
TEXTS = ["Asthma", '"usage":{"prompt_tokens":99}', "data: [DONE]\n\n", '\n\ndata: {"error": {}}\n\n', "naïve ☃"]


def relayed(events: Events, data: bytes, cuts: list[int]) -> bytes:
    borders = [0, *sorted(cuts), len(data)]
    out = b"".join(events.feed(data[a:b]) for a, b in itertools.pairwise(borders) if a < b)
    return out + events.rest()


@pytest.mark.parametrize("drop", [True, False])
def test_wherever_a_stream_is_cut_the_same_events_come_out(drop: bool) -> None:
    data = b"".join(map(piece, TEXTS)) + USAGE + DONE
    expected = data.replace(USAGE, b"") if drop else data
    chance = random.Random(3)
    for _ in range(300):
        usage = Usage()
        events = Events(CHAT, drop, usage)
        out = relayed(events, data, chance.sample(range(1, len(data)), chance.randrange(12)))
        assert out == expected
        assert (usage.prompt_tokens, usage.completion_tokens) == (7, 5)
        assert events.finished
        assert not events.failed


def test_text_that_looks_like_protocol_is_only_text() -> None:
    usage = Usage()
    events = Events(CHAT, True, usage)
    data = b"".join(map(piece, TEXTS))
    assert events.feed(data) == data
    assert not events.finished
    assert not events.failed
    assert usage.prompt_tokens is None


def test_an_error_and_all_behind_it_is_held_back() -> None:
    events = Events(CHAT, False, Usage())
    assert events.feed(piece("a") + event({"error": {"message": "a stack trace"}}) + DONE) == piece("a")
    assert events.failed


def test_an_event_that_never_ends_is_not_passed_on_unless_it_is_the_last() -> None:
    cut = Events(CHAT, False, Usage())
    assert cut.feed(piece("a") + piece("b")[:-1]) == piece("a")
    assert cut.rest() == b""
    assert not cut.finished
    whole = Events(CHAT, False, Usage())
    assert whole.feed(b"data: [DONE]\n") == b""
    assert whole.rest().startswith(b"data: [DONE]")
    assert whole.finished


def test_lines_may_end_as_on_windows() -> None:
    usage = Usage()
    events = Events(CHAT, True, usage)
    data = (piece("a") + USAGE + DONE).replace(b"\n", b"\r\n")
    assert events.feed(data) == (piece("a") + DONE).replace(b"\n", b"\r\n")
    assert usage.completion_tokens == 5
    assert events.finished


@pytest.mark.parametrize(
    ("route", "last", "counted"),
    [
        (
            "/v1/responses",
            event({"response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}, "response.completed"),
            (3, 4),
        ),
        ("/v1/messages", event({"usage": {"output_tokens": 9}}, "message_delta") + event({}, "message_stop"), (2, 9)),
    ],
)
def test_other_apis_tell_their_usage_and_their_end(route: str, last: bytes, counted: tuple[int, int]) -> None:
    usage = Usage()
    events = Events(route, False, usage)
    start = event({"message": {"usage": {"input_tokens": 2, "output_tokens": 1}}}, "message_start")
    if route == "/v1/messages":
        events.feed(start)
    assert events.feed(last) == last
    assert events.finished
    assert (usage.prompt_tokens, usage.completion_tokens) == counted


def test_the_usage_of_a_whole_answer_is_the_last_one_in_it() -> None:
    answer = {
        "choices": [{"message": {"content": '"usage":{"prompt_tokens":1,"completion_tokens":1}'}}],
        "usage": {"prompt_tokens": 11, "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens": 6},
        "prompt_logprobs": [{"5": {"decoded_token": "usage"}}],
    }
    usage = Usage()
    usage.read(json.dumps(answer).encode())
    assert (usage.prompt_tokens, usage.completion_tokens) == (11, 6)


def test_an_error_of_the_request_is_told_from_one_of_the_engine() -> None:
    for code, refused in ((400, True), (500, False), ("x", False)):
        events = Events(CHAT, False, Usage())
        error = {"message": "prompt must not be empty", "code": code}
        assert events.feed(event({"error": error}) + DONE) == b""
        assert events.failed
        assert (events.refusal is not None) is refused


def told(text: str, completion: int, index: int = 0, prompt: int = 7) -> bytes:
    """A chunk that tells its answer's usage, as vLLM writes it."""
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    chunk = {
        "id": "x",
        "choices": [{"index": index, "delta": {"content": text}}],
        "usage": usage | {"details": {"a": 1}},
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def silent(text: str, index: int = 0) -> bytes:
    """The same chunk of an engine that was not asked for it."""
    chunk = {"id": "x", "choices": [{"index": index, "delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


@pytest.mark.parametrize("final", [True, False], ids=["usage wanted", "usage not wanted"])
def test_what_chunks_tell_is_counted_and_taken_out_again_to_the_byte(final: bool) -> None:
    data = b"".join(told(text, 1 + i) for i, text in enumerate(TEXTS)) + USAGE + DONE
    expected = b"".join(map(silent, TEXTS)) + (USAGE if final else b"") + DONE
    chance = random.Random(5)
    for _ in range(300):
        usage = Usage()
        events = Events(CHAT, not final, usage, drop_chunk_usage=True)
        assert relayed(events, data, chance.sample(range(1, len(data)), chance.randrange(12))) == expected
        usage.close()
        assert (usage.prompt_tokens, usage.completion_tokens) == (7, 5)


@pytest.mark.parametrize("form", ['{}, "usage": {}', '"usage": {1}, {0}'], ids=["last", "first"])
def test_the_usage_of_other_servers_chunks_is_taken_out_as_well(form: str) -> None:
    choices, usage = (
        '"choices": [{"index": 0, "delta": {"content": "a"}}]',
        '{"completion_tokens": 3, "prompt_tokens": 2}',
    )
    chunk = "data: {" + form.format(choices, usage) + "}\r\n\r\n"
    counted = Usage()
    events = Events(CHAT, True, counted, drop_chunk_usage=True)
    assert events.feed(chunk.encode()).decode() == "data: {" + choices + "}\r\n\r\n"
    counted.close()
    assert (counted.prompt_tokens, counted.completion_tokens) == (2, 3)


@pytest.mark.parametrize("seen", range(len(TEXTS) + 1))
def test_a_stream_that_is_left_counts_to_its_last_chunk(seen: int) -> None:
    usage = Usage()
    events = Events(CHAT, True, usage, drop_chunk_usage=True)
    for i, text in enumerate(TEXTS[:seen]):
        events.feed(told(text, 10 * (i + 1)))
    events.feed(told("cut", 99)[:-1])
    usage.close()
    assert (usage.prompt_tokens, usage.completion_tokens) == ((7, 10 * seen) if seen else (None, None))


def test_the_answers_of_one_stream_are_added_up() -> None:
    whole = Usage(prompts=2, answers=2)
    chunks = [told("a", 1, 0), told("b", 4, 1), told("c", 2, 0), told("d", 5, 3, prompt=9)]
    Events("/v1/completions", True, whole, drop_chunk_usage=True).feed(b"".join(chunks))
    whole.close()
    assert (whole.prompt_tokens, whole.completion_tokens) == (16, 11)
    half = Usage(prompts=2, answers=2)
    Events("/v1/completions", True, half, drop_chunk_usage=True).feed(chunks[0])
    half.close()
    assert (half.prompt_tokens, half.completion_tokens) == (None, 1), "the other prompt's length is not known"
    ended = Usage(answers=4)
    Events(CHAT, True, ended, drop_chunk_usage=True).feed(b"".join(chunks) + USAGE)
    ended.close()
    assert (ended.prompt_tokens, ended.completion_tokens) == (7, 5), "the end's own count goes before"


def test_events_are_counted_where_nothing_else_is_told() -> None:
    usage = Usage()
    events = Events(CHAT, True, usage, drop_chunk_usage=True)
    data = b"".join(map(piece, TEXTS))
    assert events.feed(data) == data
    usage.close()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.events) == (None, None, len(TEXTS))


def test_the_beginning_of_an_anthropic_stream_says_nothing_of_its_answer() -> None:
    usage = Usage()
    events = Events("/v1/messages", False, usage)
    start = event({"message": {"usage": {"input_tokens": 2, "output_tokens": 1}}}, "message_start")
    assert events.feed(start + event({"delta": {"text": "a"}}, "content_block_delta")) != b""
    usage.close()
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, None)
