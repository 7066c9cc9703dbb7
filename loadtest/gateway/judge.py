"""What an engine may be sent: the judgement of :mod:`loadtest.gateway.upstream` on each request that reaches it.

Written apart from the gateway's own checks, from vLLM's advisories and OpenAI's reference, so that a hole in those does
not hide itself. Limits are the gateway's defaults.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

PROBES = ("/health", "/metrics", "/v1/models", "/version", "/ping", "/load", "/state")
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/tokenize",
    "/v1/tokenize",
)  # fmt: skip
DEPTH = 64
SMUGGLED = "smuggled"  # in the text of requests that are hidden in others
# Fields that vLLM reads and that a stranger must not set.
FORBIDDEN = (
    "chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "media_io_kwargs", "prompt_embeds",
    "mm_payload", "multi_modal_data", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "logits_processors",
    "best_of", "use_beam_search", "priority", "request_id", "session_id", "prompt_logprobs", "logprob_token_ids",
    "guided_json", "guided_regex", "guided_grammar", "guided_choice", "guided_decoding_backend", "structured_outputs",
    "add_special_tokens", "allowed_token_ids", "bad_words", "data_parallel_rank",
    "lora_request", "lora_path", "api_key", "base_url", "extra_body", "extra_args", "previous_response_id",
    "background", "__class__", "__proto__",
)  # fmt: skip
# Bounds, both included.
NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 100),
}  # fmt: skip
INTEGERS: Mapping[str, tuple[float, float]] = {
    "n": (1, 8), "max_tokens": (0, 2**31), "max_completion_tokens": (0, 2**31), "max_output_tokens": (0, 2**31),
    "min_tokens": (0, 2**31), "top_k": (-1, 2**31), "seed": (-(2**63), 2**63 - 1), "top_logprobs": (0, 20),
    "dimensions": (1, 2**31),
}  # fmt: skip
FLAGS = ("stream", "echo", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "parallel_tool_calls")
_CONTROL = re.compile(r"<\|[a-z_]+\|>|<(?:image|video|audio)>|<start_of_turn>|\[INST\]", re.IGNORECASE)


def violation(method: str, path: str, raw: bytes, model: str) -> str | None:
    """What is wrong with a request that an engine of ``model`` got; None if nothing is. ``path`` is as it was sent."""
    if method in ("GET", "HEAD"):
        return None if path in PROBES else f"{method} of a route that is no probe"
    if method != "POST" or path not in ROUTES:
        return f"{method} of a route that is not public"
    if SMUGGLED.encode() in raw:
        return "a smuggled request"
    if depth(raw) > DEPTH:
        return "JSON nested too deeply"
    try:
        body: Any = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return "not JSON"
    if not isinstance(body, dict):
        return "not a JSON object"
    if body.get("model") != model:
        return "another model's name"
    return _fields(body) or _content(body) or _schemas(body)


def depth(raw: bytes) -> int:
    """How deeply arrays and objects are nested in JSON text; brackets in strings do not count."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw, flags=re.DOTALL)
    deepest = now = 0
    for bracket in re.findall(rb"[\[{]|[\]}]", outside):
        now += 1 if bracket in b"[{" else -1
        deepest = max(deepest, now)
    return deepest


def _fields(body: dict[str, Any]) -> str | None:
    for name in FORBIDDEN:
        if name in body:
            return f"the field {name}"
    for bounds, kinds in ((NUMBERS, (int, float)), (INTEGERS, (int,))):
        for name, (low, high) in bounds.items():
            value = body.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds):
                return f"{name} of the wrong type"
            if not math.isfinite(value) or not low <= value <= high:
                return f"{name} out of range"
    for name in FLAGS:
        if not isinstance(body.get(name), bool | None):
            return f"{name} of the wrong type"
    logprobs = body.get("logprobs")
    if isinstance(logprobs, int) and not isinstance(logprobs, bool) and not 0 <= logprobs <= 20:
        return "logprobs out of range"
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if len(stops) > 16 or not all(isinstance(s, str) for s in stops):
        return "stop"
    bias = body.get("logit_bias")
    if bias is not None and not (isinstance(bias, dict) and all(_token(k) and _finite(v) for k, v in bias.items())):
        return "logit_bias"
    ids = body.get("stop_token_ids")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < 2**31 for i in ids)):
        return "stop_token_ids"
    return None


def _token(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _content(body: dict[str, Any]) -> str | None:
    messages = body.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            return "messages that are no list of objects"
        for message in messages:
            if not isinstance(message.get("role"), str):
                return "a message without a role"
            if fault := _text(message.get("content")):
                return fault
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        for part in prompt:
            for token in part if isinstance(part, list) else (part,):
                whole = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
                if not (whole or isinstance(token, str)):
                    return "a prompt of something else than text or token ids"
    elif not isinstance(prompt, str | None):
        return "prompt of the wrong type"
    return None


def _text(content: Any) -> str | None:
    """What is wrong with a message's content: text, or a list of parts that are text."""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, dict):
            if part.get("type") not in ("text", "refusal", "input_text", "output_text", "tool_use", "tool_result"):
                return "a part of a message that is no text"
            if part["type"].startswith("tool_"):
                continue
            part = part.get("text", part.get("refusal"))
            if part is None:
                return "a part without its text"
        if not isinstance(part, str | None):
            return "content of the wrong type"
        if part and _CONTROL.search(part):
            return "a control token in a message"
    return None


def _schemas(body: dict[str, Any]) -> str | None:
    tools = body.get("tools")
    if tools is not None and (not isinstance(tools, list) or len(tools) > 64):
        return "tools"
    schemas = [tool for tool in tools or [] if isinstance(tool, dict)]
    form = body.get("response_format")
    if form is not None and not isinstance(form, dict):
        return "response_format of the wrong type"
    if form:
        if form.get("type") not in ("text", "json_object", "json_schema"):
            return "response_format of an unknown type"
        schemas.append(form)
    for schema in schemas:
        text = orjson.dumps(schema)
        # Around the schema itself there are at most three levels and a few names.
        if len(text) > 16_384 + 4096 or depth(text) > 16 + 4:
            return "a schema too large or too deep"
    return None
