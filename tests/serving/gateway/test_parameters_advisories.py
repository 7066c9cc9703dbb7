"""Every class of vLLM's advisories, by name: no request of its kind gets past the gateway, whatever the engine."""

from typing import Any

import pytest

from serving.gateway.parameters.control import has_control, has_media
from tests.serving.gateway.test_parameters import (
    ASK,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    checked,
    refused,
)


def _tool(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


def _part(kind: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": kind, **fields}]}]}


ADVISORIES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "CVE-2026-34756 unbounded n": [
        (CHAT, {"n": 10**6}),
        (CHAT, {"n": 9}),
        (COMPLETIONS, {"n": 2**63}),
        (COMPLETIONS, {"n": 8, "prompt": ["x"] * 17}),
        (COMPLETIONS, {"prompt": ["x"] * 1000}),
    ],
    "CVE-2024-8939 best_of and beams": [
        (COMPLETIONS, {"best_of": 10**6}),
        (COMPLETIONS, {"use_beam_search": True}),
        (CHAT, {"length_penalty": 2.0}),
    ],
    "CVE-2026-115911 GHSA-69j4 templates by request": [
        (route, {field: value})
        for route in (CHAT, RESPONSES, TOKENIZE, MESSAGES)
        for field, value in (("chat_template", "{% for i in range(10**9) %}{% endfor %}"),
                             ("chat_template_kwargs", {"x": 1}), ("documents", [{"text": "x"}]))
    ],
    "GHSA-vrq3-r879-7m65 tool schemas that crash": [
        (CHAT, _tool({"type": "strnig"})),
        (CHAT, _tool({"properties": {"a": {"pattern": "["}}})),
        (CHAT, _tool({"properties": {"a": {"type": {}}}})),
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": {"pattern": "("}}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": 3}}]}),
        (TOKENIZE, {"prompt": None, "messages": ASK} | _tool({"type": "x"})),
    ],
    "GHSA-hf3c-wxg2-49q9 CVE-2025-48942 CVE-2025-48943 grammar bombs": [
        (CHAT, _schema({"type": "array", "maxItems": 10**9})),
        (CHAT, _schema({"pattern": "(a+)+$"})),
        (COMPLETIONS, _schema({"pattern": "((a{999}){999}){999}"})),
        (CHAT, _schema({"description": "x" * 20_000})),
        (CHAT, _schema({"type": "invalid"})),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"maxLength": 10**9}}}}),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": {"maxLength": 10**9}}}}),
        (CHAT, {"structured_outputs": {"regex": "("}}),
        (CHAT, {"guided_regex": "("}),
        (CHAT, {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}),
    ],
    "CVE-2026-44222 control and vision tokens in text": [
        (CHAT, {"messages": [{"role": "user", "content": "x <|im_end|> y"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<|im_", "end|>")]}]}),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "1", "content": "<|image_pad|>"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": "<image>"}]}),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "reasoning": "</s>"}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '"\\u003c|im_end|\\u003e"'}}]}]}),
        (CHAT, _tool({"properties": {"<|user|>": {}}})),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "description": "[IMG]"}}]}),
        (COMPLETIONS, {"prompt": "x <|image_pad|>"}),
        (COMPLETIONS, {"prompt": ["x", "<video>"]}),
        (EMBEDDINGS, {"input": ["<image>"]}),
        (TOKENIZE, {"prompt": "<image>"}),
        (TOKENIZE, {"prompt": None, "messages": [{"role": "user", "content": "<|user|>"}]}),
        (RESPONSES, {"input": "<|user|>"}),
        (RESPONSES, {"instructions": "<|user|>"}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": "<|user|>"}]}),
        (MESSAGES, {"system": [{"type": "text", "text": "[/INST]"}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "<|user|>"}]}]}]}),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": {"<|user|>": 1}}}]}]}),
        # Thoughts are lifted out of the text; so are calls.
        *((MESSAGES, {"messages": [{"role": "assistant", "content": [
            {"type": "text", "text": "<|im_start"}, between, {"type": "text", "text": "|>"}]}]})
          for between in ({"type": "thinking", "thinking": "so > that"},
                          {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "<b>"}})),
        (CHAT, {"messages": [{"role": "assistant", "content": [
            {"type": "text", "text": "<|im_"}, {"type": "refusal", "refusal": "<no>"},
            {"type": "text", "text": "end|>"}]}]}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "description": "<|user|>", "schema": {}}}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "s", "description": "[IMG]", "schema": {}}}}),
    ],
    "CVE-2026-22773 CVE-2026-22778 media decoders": [
        (CHAT, _part("image_url", image_url={"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="})),
        (CHAT, _part("input_audio", input_audio={"data": "x", "format": "wav"})),
        (CHAT, _part("audio_url", audio_url={"url": "data:audio/wav;base64,x"})),
        (CHAT, _part("video_url", video_url={"url": "data:video/mp4;base64,x"})),
        (CHAT, _part("file", file={"file_data": "x"})),
        (CHAT, _part("image_embeds", image_embeds="x")),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]}),
    ],
    "CVE-2025-62164 deserialisation": [
        (COMPLETIONS, {"prompt_embeds": "gASVDAAAAAAAAAA="}),
        *((CHAT, {field: {"a": 1}}) for field in ("kv_transfer_params", "ec_transfer_params", "vllm_xargs",
                                                  "mm_processor_kwargs", "media_io_kwargs", "logits_processors")),
        (CHAT, {"mm_payload": "tensors"}),
    ],
    "CVE-2025-46570 prefix cache by time": [(CHAT, {"cache_salt": "another tenant's"})],
    "length bombs": [
        (CHAT, {"min_tokens": 2**40}),
        (CHAT, {"prompt_logprobs": 1000}),
        (CHAT, {"logprobs": True, "top_logprobs": -1}),
        (CHAT, {"stop": ["x"] * 1000}),
        (CHAT, {"bad_words": ["x"] * 1000}),
        (CHAT, {"logprob_token_ids": [1]}),
    ],
    "identity": [(CHAT, {field: "x"}) for field in ("priority", "request_id", "session_id")],
}  # fmt: skip


@pytest.mark.parametrize("name", ADVISORIES)
def test_advisory(name: str) -> None:
    for route, changes in ADVISORIES[name]:
        error = refused(route, changes)
        assert error.param, (route, changes)


@pytest.mark.parametrize("field", ["allowed_token_ids", "bad_words"])
def test_nothing_narrows_what_a_grammar_allows(field: str) -> None:
    """vLLM fails when no token is left that both allow."""
    narrow = {field: [5] if field == "allowed_token_ids" else ["{"]}
    tools = _tool({"type": "object"})
    assert checked(CHAT, narrow | tools | {"tool_choice": "auto"})
    assert checked(CHAT, narrow | {"response_format": {"type": "text"}})
    for grammar in (
        {"response_format": {"type": "json_object"}},
        _schema({"type": "object"}),
        tools | {"tool_choice": "required"},
        tools | {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"structured_outputs": {"choice": ["yes"]}},
    ):
        assert refused(CHAT, narrow | grammar, allow=["structured_outputs"]).param == field, grammar
    # Routes that have the fields only because the settings say so.
    forced = {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}}
    assert refused(MESSAGES, narrow | forced, allow=[field]).param == field
    form = {"text": {"format": {"type": "json_object"}}}
    assert refused(RESPONSES, narrow | form, allow=[field]).param == field


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data/", "https://example.org/a.png", "file:///etc/passwd", "ftp://x/a.png",
     " data:image/png;base64,iVBORw0KGgo=", "data:text/html;base64,PGh0bWw+", "data:image/svg+xml;base64,PHN2Zz4=",
     "data:image/png;url=http://x;base64,iVBORw0KGgo="],
)  # fmt: skip
def test_remote_media_are_refused_even_where_images_are_allowed(url: str) -> None:
    """CVE-2025-6242: server-side request forgery by media URLs."""
    error = refused(CHAT, _part("image_url", image_url={"url": url}), images=True)
    assert error.param == "messages[0].content[0].image_url.url"
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    assert refused(RESPONSES, {"input": [item]}, images=True).param == "input[0].content[0].image_url"


def test_penalties_can_be_denied_for_an_engine_that_they_crash() -> None:
    """CVE-2026-44223: penalties with speculative decoding."""
    denied = {"deny": ["frequency_penalty", "presence_penalty", "repetition_penalty"]}
    assert refused(CHAT, {"presence_penalty": 0.5}, **denied).param == "presence_penalty"
    assert checked(CHAT, {"presence_penalty": None}, **denied)


def test_control_tokens_are_told_from_text() -> None:
    tokens = ["<|im_start|>", "<|endoftext|>", "<\uff5cbegin of sentence\uff5c>", "<\uff5cUser\uff5c>",
              "<|tool_call>", "<turn|>", "<s>",
              "[THINK]", "[/THINK]", "[gMASK]", "<sop>", "[BOS]", "[EOS]", "<EOS>", "</S>", "[CLS]", "[SEP]", "[MASK]",
              "<begin_of_text>", "<fim_prefix>", "<mask>", "</s>", "<bos>", "<eos>", "<start_of_turn>",
              "[INST]", "[/INST]", "<<SYS>>", "<|user|>"]  # fmt: skip
    media = ["<image>", "<IMG_CONTEXT>", "<video>", "<audio>", "<|image_pad|>", "<|vision_start|>", "<|image_1|>",
             "<image1>", "<image_2>", "<ds_image>", "<global-img>", "<fake_token_around_image>", "<row_1_col_12>",
             "<start_of_image>", "<image_soft_token>", "[IMG]", "[IMG_BREAK]", "<|AUDIO|>"]  # fmt: skip
    text = ["a < b | c > d", "<b>bold</b>", "<strong>", "<img src='x'>", "x[i] <= y", "[1]", "[important]", "a<|b",
            "f <| x", "<http://x|y>", "p < 0.05", "<-- here -->", "[image of a rash]",
            "<end_of_life care>", "<mask on>", "[MASKED]", "[SEPSIS]", "<row_1>", "<fim>", "<page 1>",
            "[Think]"]  # fmt: skip
    assert [t for t in tokens + media if not has_control(f"so {t} it")] == []
    assert [t for t in media if not has_media(f"so {t} it")] == []
    assert [t for t in tokens if has_media(t)] == []
    assert [t for t in text if has_control(t)] == []


def test_control_tokens_pass_where_they_are_meant_but_media_never() -> None:
    prompt = {"prompt": "<|user|>x<|assistant|>"}
    assert checked(COMPLETIONS, prompt).body["prompt"] == prompt["prompt"]
    assert checked(TOKENIZE, prompt)
    assert checked(CHAT, {"stop": ["<|im_end|>"]})
    said = [{"role": "user", "content": "what is <|im_end|>?"}]
    assert checked(CHAT, {"messages": said}, control_tokens=True)
    said = [{"role": "user", "content": "what is <|image_pad|>?"}]
    assert refused(CHAT, {"messages": said}, control_tokens=True).code == "control_token"
