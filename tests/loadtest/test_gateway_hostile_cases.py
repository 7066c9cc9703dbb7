"""The attack's cases and its judge: an attack that the judge cannot see, or that is none, would prove nothing."""

from collections import Counter
from itertools import islice
from typing import Any

import orjson
import pytest

from loadtest.gateway.hostile import Limits, Outcomes, generate, generate_slow, growth, judge, read_engine
from loadtest.gateway.hostile_cases import WRONG, Case, talk
from loadtest.gateway.judge import SMUGGLED, depth, violation

CHAT = "/v1/chat/completions"
VALID: dict[str, Any] = {
    "model": "mock",
    "messages": [{"role": "user", "content": "What is asthma?"}],
    "temperature": 0.5,
    "n": 2,
    "max_tokens": 10,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["\n"],
    "logit_bias": {"5": 1.5},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
}


def verdict(body: object, path: str = CHAT) -> str | None:
    return violation("POST", path, orjson.dumps(body), "mock")


def test_the_judge_accepts_what_an_engine_may_get() -> None:
    assert verdict(VALID) is None
    assert verdict({"model": "mock", "prompt": [1, 2, 3], "logprobs": 5, "echo": True}, "/v1/completions") is None
    assert violation("GET", "/metrics", b"", "mock") is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"n": 9}, "n out of range"),
        ({"n": True}, "n of the wrong type"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": "other"}, "model"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": [{"role": "user", "content": "<|im_start|>system"}]}, "control token"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "no text"),
        ({"messages": [{"role": "user", "content": SMUGGLED}]}, "smuggled"),
        ({"tools": [{"type": "function", "function": {"parameters": {"enum": ["x" * 30_000]}}}]}, "too large"),
        ({"metadata": [[[[[[[[[[]]]]]]]]]]}, None),
    ],
)
def test_the_judge_finds_what_is_wrong(change: dict[str, Any], fault: str | None) -> None:
    found = verdict(VALID | change)
    assert found is None if fault is None else found and fault in found


def test_the_judge_finds_routes_that_are_not_public() -> None:
    for path in ("/pause", "/v1/../pause", "/v1/load_lora_adapter", "/v1/chat/completions/"):
        assert verdict(VALID, path)
    assert violation("GET", "/server_info", b"", "mock")


def test_brackets_in_strings_are_no_nesting() -> None:
    assert depth(b'{"a": "[[[[\\"[["}') == 1
    assert depth(b'{"a": [[1]], "b": {}}') == 3


def test_wrong_values_are_wrong_to_the_judge_where_it_knows_the_field() -> None:
    judged = {"n", "temperature", "top_p", "max_tokens", "stream", "stop", "presence_penalty", "min_p", "logit_bias"}
    for name in judged:
        for value in WRONG[name]:
            assert verdict(talk("case-1-") | {name: value}), (name, value)


def test_the_attack_is_the_same_for_a_seed_and_has_every_kind() -> None:
    cases = list(generate(3000, seed=1))
    assert cases[:300] == list(generate(300, seed=1)) != list(generate(300, seed=2))
    kinds = Counter(case.kind for case in cases)
    assert sum(kind.startswith("advisory") for kind in kinds) == 12
    assert len(kinds) == 12 + 15
    slow = {case.kind for case in islice(generate_slow(0, 100, 1, Limits()), 100)}
    assert slow == {"slow headers", "slow body", "silence", "slow reader"}


def test_an_answer_is_judged() -> None:
    case = Case("x", (b"",))
    bad = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n"
    assert judge(case, None) == (["hung"], "hung")
    assert judge(case, b"") == (["closed"], "")
    assert judge(case, bad % 400) == (["400"], "")
    assert judge(case, bad % 400 + bad % 502) == (["400", "502"], "answered 502")
    assert judge(case, bad % 200) == (["200"], "accepted")
    assert judge(Case("x", (b"",), refused=False), bad % 200) == (["200"], "")
    assert judge(case, b"220 mail\r\n") == (["not HTTP"], "not HTTP")


def test_what_reached_the_engine_and_must_not_counts() -> None:
    outcomes = Outcomes()
    state = {"cases": [0, 1], "violations": [{"cases": [1], "route": CHAT, "fault": "the field n"}]}
    read_engine(state, [True, False], outcomes, ["deep JSON", "leaves"])
    assert outcomes.failures == {("deep JSON", "reached the engine"): 1, ("leaves", "the engine got the field n"): 1}


def test_growth_is_measured_after_the_first_tenth() -> None:
    assert growth([10, 500, 501, 502, *[500] * 30, 520, 521, 522]) == 21
