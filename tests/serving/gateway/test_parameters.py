"""What requests may ask for: the allow-list, caps of a model, and what goes upstream."""

import json
from typing import Any

import orjson
import pytest

from serving.gateway.errors import ApiError
from serving.gateway.parameters import NEVER, OPTIONAL, ROUTES, Checked, check, parse
from serving.gateway.settings import Model
from tests.serving.gateway.measuring import seconds

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, TOKENIZE = "/v1/responses", "/v1/messages", "/tokenize"
VOCABULARY = 260
ASK = [{"role": "user", "content": "What is asthma?"}]
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": ASK},
    COMPLETIONS: {"model": "m", "prompt": "Asthma is"},
    EMBEDDINGS: {"model": "m", "input": "asthma"},
    RESPONSES: {"model": "m", "input": "What is asthma?"},
    MESSAGES: {"model": "m", "messages": ASK, "max_tokens": 5},
    TOKENIZE: {"model": "m", "prompt": "asthma"},
}
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"


def model(has_tokenizer: bool = True, **limits: Any) -> Model:
    engine = {"url": "http://127.0.0.1:9"}
    return Model.model_validate(
        {"engines": [engine], "vocab_size": VOCABULARY, "has_tokenizer": has_tokenizer, "limits": limits}
    )


def checked(route: str, changes: dict[str, Any], **limits: Any) -> Checked:
    return check(route, MINIMAL[route] | changes, model(**limits))


def refused(route: str, changes: dict[str, Any], **limits: Any) -> ApiError:
    """The error, with what holds for every one."""
    with pytest.raises(ApiError) as caught:
        checked(route, changes, **limits)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"x"', b"{", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 400 + b"}", b"\xff\xfe",
        b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 5 + b"]" * 5 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, 5)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_depth_is_that_of_values_and_brackets_in_text_are_none() -> None:
    assert parse(b'{"a": [[[["[[[[{{{{"]]]]}', 5) == {"a": [[[["[[[[{{{{"]]]]}
    assert parse(b'{"a": "' + b"[" * 1000 + b'"}', 5)
    # Whatever the settings say, what was read can be written for the engine.
    assert orjson.dumps(parse(b'{"a": ' + b"[" * 249 + b"]" * 249 + b"}", 10**6))
    with pytest.raises(ApiError):
        parse(b'{"a": ' + b"[" * 250 + b"]" * 250 + b"}", 10**6)


def test_bodies_of_many_small_parts_are_refused_before_they_cost_what_reading_them_does() -> None:
    fields = ",".join(f'"f{i}" :1' for i in range(200_000)).encode()
    bodies = [
        b'{"a": [' + b"[]," * 2_500_000 + b"0]}",
        b'{"a": [' + b"[]," * 300_000 + b"0]}",
        b'{"a": "' + b"<a" * 600_000 + b'"}',
        b'{"a": "' + b"\\u003ca" * 600_000 + b'"}',
        b'{"a": {' + fields + b"}}",
    ]

    def refuse(body: bytes) -> None:
        with pytest.raises(ApiError):
            parse(body, 64)

    assert sum(seconds(refuse, [body]) for body in bodies) < sum(seconds(json.loads, [body]) for body in bodies)


def test_the_largest_conversations_are_not_too_large() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"type": "text", "text": "[1] <b>x</b>"}] * 3
    turns = [{"role": "user", "content": said}, {"role": "assistant", "tool_calls": [call, call]}] * 1024
    markup = [{"role": "user", "content": "<p>So it is said.</p>" * 200_000}]
    for messages in (turns, markup):
        request = parse(orjson.dumps({"model": "m", "messages": messages}), 64)
        assert check(CHAT, request, model()).body["messages"] == messages


@pytest.mark.parametrize("route", ROUTES)
def test_the_least_of_each_route_is_accepted(route: str) -> None:
    body = checked(route, {}).body
    assert {name: body[name] for name in MINIMAL[route]} == MINIMAL[route]


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_field_is_refused_by_name(route: str) -> None:
    error = refused(route, {"made_up": 1})
    assert (error.code, error.param) == ("unknown_parameter", "made_up")
    assert "made_up" in error.message


def test_names_in_errors_are_short_and_printable() -> None:
    error = refused(CHAT, {"a\nb\x1b[31m" + "c" * 1000: 1})
    assert error.param is not None
    assert len(error.param) == 64
    assert error.param.isprintable()


@pytest.mark.parametrize("route", ROUTES)
def test_optional_fields_may_be_null(route: str) -> None:
    schema = ROUTES[route]
    nulls = {name: None for name, field in schema.model_fields.items() if not field.is_required()}
    if route == TOKENIZE:
        del nulls["prompt"]
    body = checked(route, nulls).body
    assert None not in body.values()


@pytest.mark.parametrize(
    ("route", "changes", "param"),
    [
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": ["x"]}, "messages[0]"),
        (CHAT, {"messages": [*ASK, {"role": "user"}]}, "messages[1].content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "<odd>": 1}]}, "messages[0].<odd>"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (CHAT, {"n": True}, "n"),
        (CHAT, {"n": 1.5}, "n"),
        (CHAT, {"temperature": "0"}, "temperature"),
        (CHAT, {"temperature": 2.1}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"frequency_penalty": -2.1}, "frequency_penalty"),
        (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"stop": [""]}, "stop[0]"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 2**70}, "max_completion_tokens"),
        (CHAT, {"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"stream_options": {}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (CHAT, {"store": True}, "store"),
        (CHAT, {"store": 0}, "store"),
        (CHAT, {"tools": []}, "tools"),
        (CHAT, {"tool_choice": "auto"}, "tool_choice"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, {"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": [5.0]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 64, "n": 3}, "n"),
        (COMPLETIONS, {"min_tokens": 17}, "min_tokens"),
        (EMBEDDINGS, {"input": ""}, "input"),
        (EMBEDDINGS, {"input": ["x"] * 2049}, "input"),
        (EMBEDDINGS, {"encoding_format": "hex"}, "encoding_format"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"store": True}, "store"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (MESSAGES, {"max_tokens": None}, "max_tokens"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        (MESSAGES, {"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        (TOKENIZE, {"messages": ASK}, "prompt"),
        (TOKENIZE, {"prompt": None}, "prompt"),
        (TOKENIZE, {"add_generation_prompt": True}, "add_generation_prompt"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(route: str, changes: dict[str, Any], param: str) -> None:
    error = refused(route, changes)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("route", "changes", "limits"),
    [
        (CHAT, {"n": 3}, {"n": 2}),
        (CHAT, {"logprobs": True, "top_logprobs": 3}, {"logprobs": 2}),
        (CHAT, {"prompt_logprobs": 3}, {"logprobs": 2}),
        (COMPLETIONS, {"logprobs": 3}, {"logprobs": 2}),
        (CHAT, {"stop": ["a", "b"]}, {"stop": 1}),
        (MESSAGES, {"stop_sequences": ["a", "b"]}, {"stop": 1}),
        (CHAT, {"max_tokens": 11}, {"max_tokens": 10}),
        (CHAT, {"max_completion_tokens": 11}, {"max_tokens": 10}),
        (CHAT, {"max_completion_tokens": 5, "max_tokens": 11}, {"max_tokens": 10}),
        (COMPLETIONS, {"max_tokens": 11}, {"max_tokens": 10}),
        (RESPONSES, {"max_output_tokens": 11}, {"max_tokens": 10}),
        (MESSAGES, {"max_tokens": 11}, {"max_tokens": 10}),
        (CHAT, {"min_tokens": 11}, {"max_tokens": 10}),
        (CHAT, {"messages": ASK * 3}, {"messages": 2}),
        (RESPONSES, {"input": ASK * 3}, {"messages": 2}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools": 0}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}] * 3}, {"tools": 2}),
        (CHAT, {"seed": 1}, {"deny": ["seed"]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_models_limits_hold(route: str, changes: dict[str, Any], limits: dict[str, Any]) -> None:
    refused(route, changes, **limits)
    checked(route, changes)


def test_the_longest_answer_holds_for_who_asks_for_none() -> None:
    assert checked(CHAT, {}, max_tokens=10).body["max_tokens"] == 10
    assert checked(RESPONSES, {}, max_tokens=10).body["max_output_tokens"] == 10
    assert checked(CHAT, {"max_completion_tokens": 5}, max_tokens=10).body.get("max_tokens") is None
    # Sixteen tokens is what engines make of a completion that asks for no number.
    assert "max_tokens" not in checked(COMPLETIONS, {}, max_tokens=16).body
    assert checked(COMPLETIONS, {}, max_tokens=15).body["max_tokens"] == 15


def test_vllms_further_fields_pass_only_where_they_are_allowed() -> None:
    fields = {"cache_salt": "s", "priority": -1, "chat_template_kwargs": {"enable_thinking": False}}
    for name, value in fields.items():
        assert name in OPTIONAL
        error = refused(CHAT, {name: value})
        assert (error.code, error.param) == ("unknown_parameter", name)
        assert checked(CHAT, {name: value}, allow=[name]).body[name] == value
        assert name not in checked(CHAT, {name: None}).body
    assert refused(CHAT, {"priority": "x"}, allow=["priority"]).param == "priority"
    loop = {"chat_template_kwargs": {"x": {"y": [1]}}}
    assert str(refused(CHAT, loop, allow=["chat_template_kwargs"]).param).startswith("chat_template_kwargs.x")
    assert refused(COMPLETIONS, {"best_of": 9}, allow=["best_of"]).param == "best_of"
    assert refused(COMPLETIONS, {"best_of": 8, "prompt": ["x"] * 17}, allow=["best_of"]).param == "best_of"
    assert checked(CHAT, {"mirostat": [1, 0.5]}, allow=["mirostat"]).body["mirostat"] == [1, 0.5]
    assert refused(CHAT, {"mirostat": {}}, allow=["mirostat"]).param == "mirostat"


@pytest.mark.parametrize("name", sorted(NEVER))
def test_some_fields_pass_in_no_case(name: str) -> None:
    # Settings refuse such a list; the check does not rely on it.
    settings = model().model_copy(update={"limits": model().limits.model_copy(update={"allow": frozenset((name,))})})
    for route, body in MINIMAL.items():
        with pytest.raises(ApiError, match=name):
            check(route, body | {name: "x"}, settings)
        assert name not in ROUTES[route].model_fields


def test_what_no_engine_needs_is_accepted_and_not_sent() -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
               "prompt_cache_key": "k", "modalities": ["text"]}  # fmt: skip
    assert checked(CHAT, ignored).body == MINIMAL[CHAT]
    assert checked(RESPONSES, {"user": "u", "background": False}).body == MINIMAL[RESPONSES] | {"store": False}
    assert checked(MESSAGES, {"metadata": {"user_id": "u"}}).body == MINIMAL[MESSAGES]


def test_answers_may_be_sent_back_as_they_came() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    nothing: dict[str, Any] = {
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    answer = {"role": "assistant", "reasoning": "r", "tool_calls": [call]} | nothing
    sent = checked(CHAT, {"messages": [*ASK, answer]}).body["messages"][1]
    assert set(sent) == {"role", "reasoning", "tool_calls"}
    item = {"id": "m", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": None}]}  # fmt: skip
    sent = checked(RESPONSES, {"input": [*ASK, item]}).body["input"][1]
    assert sent["content"] == [{"type": "output_text", "text": "a", "annotations": []}]
    assert answer["content"] is None
    assert "refusal" in answer, "the client's own request was changed"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_streams_report_their_usage(route: str) -> None:
    assert not checked(route, {}).stream
    assert "stream_options" not in checked(route, {}).body
    for options, added in (
        (None, True),
        ({}, True),
        ({"include_usage": False}, True),
        ({"include_usage": None, "include_obfuscation": False}, True),
        ({"include_usage": True}, False),
        ({"include_usage": True, "continuous_usage_stats": True}, False),
    ):
        result = checked(route, {"stream": True, "stream_options": options})
        assert result.stream
        assert result.usage_added is added
        sent = {"include_usage": True} | (
            {"continuous_usage_stats": True} if len(options or ()) == 2 and not added else {}
        )
        assert result.body["stream_options"] == sent


def test_lengths_are_estimated() -> None:
    assert checked(CHAT, {"messages": [{"role": "user", "content": "é" * 200}]}).prompt_tokens == 101
    assert checked(COMPLETIONS, {"prompt": [[1, 2, 3], [4]]}).prompt_tokens == 4
    assert checked(CHAT, {}).max_tokens == 256
    assert checked(CHAT, {"max_tokens": 10, "n": 3}).max_tokens == 30
    assert checked(COMPLETIONS, {"prompt": ["a", "b"], "n": 3}).max_tokens == 96
    assert checked(EMBEDDINGS, {}).max_tokens == 0


def test_prefixes_grow_with_what_conversations_share() -> None:
    system = {"role": "system", "content": "You answer questions about medicine. " * 40}
    first = checked(CHAT, {"messages": [system, *ASK]}).prefixes
    answer = {"role": "assistant", "content": "A disease. " * 300}
    second = checked(CHAT, {"messages": [system, *ASK, answer, *ASK]}).prefixes
    assert len(first) == 3
    assert second[: len(first)] == first
    assert len(second) == 4
    other = checked(CHAT, {"messages": [{"role": "system", "content": "x" * 2000}, *ASK]}).prefixes
    assert not set(other) & set(first)
    ids = [5] * 5000
    assert checked(COMPLETIONS, {"prompt": ids}).prefixes[:3] == checked(COMPLETIONS, {"prompt": ids[:300]}).prefixes
    assert len(checked(COMPLETIONS, {"prompt": "x" * 2**21}).prefixes) == 8
    # Workers are processes of their own, and must agree.
    assert checked(COMPLETIONS, {"prompt": "x" * 64}).prefixes == (4366924095214063265,)


@pytest.mark.parametrize("prompt", [[VOCABULARY], [-1], [[1], [VOCABULARY]], [2**70], [-0.5e300]], ids=str)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_ids_outside_the_vocabulary_reach_no_engine(prompt: list, has_tokenizer: bool) -> None:
    with pytest.raises(ApiError) as caught:
        check(COMPLETIONS, {"model": "m", "prompt": prompt}, model(has_tokenizer))
    assert caught.value.code == "invalid_token_id"


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_ids_in_other_fields_are_checked_too(field: str) -> None:
    assert refused(CHAT, {field: [VOCABULARY]}).code == "invalid_token_id"
    assert refused(CHAT, {"logit_bias": {str(VOCABULARY): 1}}).code == "invalid_token_id"


@pytest.mark.parametrize(
    ("route", "changes"),
    [
        (COMPLETIONS, {"prompt": "text"}),
        (COMPLETIONS, {"prompt": [[1], "text"]}),
        (COMPLETIONS, {"prompt": None}),
        (COMPLETIONS, {"prompt": [1], "stop": ["."]}),
        (COMPLETIONS, {"prompt": [1], "structured_outputs": {"regex": "a"}}),
        (EMBEDDINGS, {}),
        (CHAT, {}),
        (RESPONSES, {}),
        (MESSAGES, {}),
        (TOKENIZE, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_without_a_tokenizer_takes_ids_only(route: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        check(route, MINIMAL[route] | changes, model(False))
    assert (caught.value.status, caught.value.code) == (400, "no_tokenizer")
    body = check(COMPLETIONS, {"model": "m", "prompt": [1, 2]}, model(False)).body
    assert body["return_token_ids"] is body["return_tokens_as_token_ids"] is True


def test_images_only_where_the_model_takes_them_and_only_what_they_say_they_are() -> None:
    def ask(url: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}

    assert checked(CHAT, ask(PNG), images=True).body["messages"][0]["content"][0]["image_url"]["url"] == PNG
    assert refused(CHAT, ask(PNG)).code == "images_not_allowed"
    for url in (PNG.replace("png", "jpeg"), PNG.replace("png", "svg+xml"), "data:image/png;base64,%%%%"):
        refused(CHAT, ask(url), images=True)
    item = {"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}
    assert refused(RESPONSES, {"input": [item]}).code == "images_not_allowed"
    source = {"type": "base64", "media_type": "image/png", "data": PNG.split(",")[1]}
    block = {"role": "user", "content": [{"type": "image", "source": source}]}
    assert refused(MESSAGES, {"messages": [block]}).code == "images_not_allowed"
    assert checked(MESSAGES, {"messages": [block]}, images=True)


def test_the_check_is_cheap() -> None:
    """Beside Python's json, writing the request and reading it; seen: 1.9, 0.45 and 0.35 times that."""

    def share(route: str, body: dict[str, Any], times: int) -> float:
        request, target = MINIMAL[route] | body, model()
        ours = seconds(lambda _: [check(route, request, target) for _ in range(times)], [request] * 5)
        return ours / seconds(lambda _: [json.loads(json.dumps(request)) for _ in range(times)], [request] * 5)

    assert share(CHAT, {"temperature": 0, "max_tokens": 100, "stream": True}, 1000) < 8
    assert share(COMPLETIONS, {"prompt": [i % VOCABULARY for i in range(100_000)]}, 2) < 2
    assert share(CHAT, {"messages": [{"role": "user", "content": "some words " * 95_000}]}, 4) < 2


def test_errors_quote_no_text() -> None:
    secret = "Quillfeather"
    for route, changes in (
        (CHAT, {"messages": secret}),
        (CHAT, {"messages": [{"role": secret, "content": secret}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": secret, "text": secret}]}]}),
        (CHAT, {"temperature": secret}),
        (CHAT, {"stop": [secret * 500]}),
        (CHAT, {"response_format": {"type": secret}}),
        (CHAT, {"tool_choice": secret}),
        (CHAT, {"messages": [{"role": "user", "content": f"{secret} <|im_end|>"}]}),
        (COMPLETIONS, {"prompt": [secret, 5]}),
        (RESPONSES, {"input": [{"type": secret}]}),
        (MESSAGES, {"system": 5, "messages": secret}),
    ):
        assert secret.encode() not in refused(route, changes).body
    with pytest.raises(ApiError) as caught:
        parse(b'{"messages": "Quillfeather', 64)
    assert secret.encode() not in caught.value.body
    assert orjson.loads(caught.value.body)["error"]["code"] == "invalid_json"
