"""Ten thousand ways to hurt a gateway: requests drawn from a seed, each of a class.

The text of every request names its case (``case-17-``), so that the engine's double can tell which arrived.
"""

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from loadtest.gateway.judge import SMUGGLED
from loadtest.gateway.wire import chunked, request

CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
MODEL = "mock"


@dataclass(frozen=True)
class Case:
    """What is sent on one connection.

    Attributes:
        kind: its class.
        pieces: bytes, sent one after the other, ``pause`` seconds apart.
        refused: an engine must not get it, and its answer must not be a success.
        then: "read" the answer; "finish" the sending side first; "leave" at once; "stare" without ever reading.
    """

    kind: str
    pieces: tuple[bytes, ...]
    refused: bool = True
    pause: float = 0.0
    then: str = "read"


def post(body: dict[str, Any], route: bytes = CHAT) -> tuple[bytes, ...]:
    return (request(route, orjson.dumps(body)),)


def talk(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": f"{name} hello"}], "max_tokens": 2} | fields


def text(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": f"{name} hello", "max_tokens": 2} | fields


def _random_bytes(r: random.Random, name: str) -> Case:
    start = r.choice(
        [b"", b"GET ", b"POST /v1/chat/completions HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01", b"\r\n\r\n"]
    )
    return Case("random bytes", (start + r.randbytes(r.randint(1, 4096)),), then="finish")


def _foreign_protocol(r: random.Random, name: str) -> Case:
    tls = b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03" + r.randbytes(200)
    upgrades = [(b"websocket", {b"Sec-WebSocket-Key": b"dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version": b"13"}),
                (b"h2c", {b"HTTP2-Settings": b"AAMAAABkAAQAAP__"})]  # fmt: skip
    protocol, headers = r.choice(upgrades)
    upgrade = request(
        r.choice([b"/", b"/v1/realtime", b"/v1/models/none", b"/ws"]), b"", b"GET",
        headers | {b"Upgrade": protocol}, None, None,
    ).replace(b"Connection: close", b"Connection: Upgrade")  # fmt: skip
    http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    odd = b"POST /v1/chat/completions HTTP/" + r.choice([b"9.9", b"0.9", b"1", b"2.0", b"x"]) + b"\r\nHost: a\r\n\r\n"
    return Case("foreign protocol", (r.choice([tls, upgrade, http2, odd, b"SSH-2.0-x\r\n"]),), then="finish")


def _truncated(r: random.Random, name: str) -> Case:
    whole = post(talk(name))[0]
    return Case("truncated", (whole[: r.randint(1, len(whole) - 1)],), then=r.choice(["finish", "leave"]))


def _deep_json(r: random.Random, name: str) -> Case:
    deep = r.choice([65, 66, 100, 1000, 10_000, 100_000])
    opening, closing = r.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    nest = opening * deep + b"1" + closing * r.choice([deep, deep, 0])
    place = r.choice(["alone", "content", "tools", "schema", "stop", "metadata", "prompt"])
    if place == "alone":
        return Case("deep JSON", (request(CHAT, nest),))
    route = COMPLETIONS if place == "prompt" else CHAT
    body = text(name, prompt="@") if place == "prompt" else talk(name)
    if place == "content":
        body["messages"][0]["content"] = "@"
    elif place == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": "@"}}
    elif place == "tools":
        function = {"name": "f", "parameters": "@"}
        body["tools"] = [{"type": "function", "function": function}]
    elif place != "prompt":
        body[place] = "@"
    return Case("deep JSON", (request(route, orjson.dumps(body).replace(b'"@"', nest)),))


HUGE = (b"1e400", b"-1e400", b"1e999999", b"9" * 400, b"-" + b"9" * 5000, b"1e308", b"99999999999999999999", b"NaN",
        b"Infinity", b"-Infinity", b"0x7fffffff", b"1e-400e5", b"1_000", b"9" * 200_000)  # fmt: skip
BOUNDED = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "max_tokens",
           "max_completion_tokens")  # fmt: skip


def _huge_numbers(r: random.Random, name: str) -> Case:
    body = orjson.dumps(talk(name, logprobs=True) | {r.choice(BOUNDED): "@"})
    return Case("huge numbers", (request(CHAT, body.replace(b'"@"', r.choice(HUGE))),))


WRONG: dict[str, tuple[Any, ...]] = {
    "model": (7, True, [], {}, ["mock"], "", "../../etc/passwd", "http://169.254.169.254/", "m" * 100_000, "mock\x00"),
    "messages": (7, "hello", {}, [7], ["hello"], [[]], [{}], [{"role": 7, "content": "x"}], True),
    "temperature": ("hot", [], {}, True, -1, 2.5, "0.5"),
    "top_p": ("x", [], {}, True, -0.1, 1.5),
    "n": ("1", 1.5, [], {}, True, 0, -1, 9, 2**31, 2**63),
    "max_tokens": ("1", 1.5, [], {}, True, -1, -(2**63)),
    "stream": ("true", 1, [], {}, "yes"),
    "stream_options": (7, "x", [], {"include_usage": "x"}, {"unknown": 1}),
    "stop": (7, [7], {}, True, [[]], ["x"] * 100),
    "presence_penalty": ("x", [], True, -2.1, 2.1, 100),
    "frequency_penalty": ("x", [], True, -3, 3, 1e9),
    "logit_bias": (7, "x", [], {"x": 1}, {"5": "x"}, {"-1": 1}, {"1": True}),
    "logprobs": ("x", [], {}, 2),
    "top_logprobs": ("x", [], True, -1, 21, 10**6),
    "seed": ("x", [], {}, 1.5, True),
    "response_format": (7, "json", [], {"type": "x"}, {"type": 7}, {}),
    "tools": (7, "x", {}, [7], ["x"], [{"type": "x"}], [{}] * 65),
    "tool_choice": (7, [], "sometimes", {"type": 7}),
    "parallel_tool_calls": ("x", 7, []),
    "user": (7, [], {}),
    "top_k": ("x", 1.5, [], True, -2),
    "min_p": ("x", [], True, -1, 2),
    "repetition_penalty": ("x", [], True, -1),
    "stop_token_ids": (7, "x", ["x"], [1.5], [-1], [True]),
}


def _wrong_types(r: random.Random, name: str) -> Case:
    field = r.choice(list(WRONG))
    return Case("wrong types", post(talk(name) | {field: r.choice(WRONG[field])}))


def _odd_bodies(r: random.Random, name: str) -> Case:
    """Bodies of the other routes."""
    choices: list[tuple[bytes, Any]] = [
        (b"/tokenize", {"model": MODEL}),
        (b"/tokenize", {"model": MODEL, "prompt": [name]}),
        (b"/tokenize", {"model": MODEL, "prompt": name, "chat_template": "{{ 7*7 }}"}),
        (b"/tokenize", {"model": MODEL, "prompt": {"x": name}}),
        (b"/tokenize", {"model": MODEL, "prompt": name, "mm_processor_kwargs": {"a": 1}}),
        (b"/tokenize", {"model": MODEL, "messages": [{"role": "user", "content": name}], "chat_template_kwargs": {}}),
        (COMPLETIONS, text(name, prompt=[-1])), (COMPLETIONS, text(name, prompt=[2**31])),
        (COMPLETIONS, text(name, prompt=[1, 1e30])), (COMPLETIONS, text(name, prompt=[1, name, None])),
        (COMPLETIONS, text(name, prompt={"x": 1})), (COMPLETIONS, text(name, prompt=[[[1]]])),
        (COMPLETIONS, text(name, prompt=[True, False])), (COMPLETIONS, text(name, logprobs=10**6)),
        (COMPLETIONS, text(name, suffix=7)), (COMPLETIONS, text(name, echo="yes")),
        (b"/v1/embeddings", {"model": MODEL}), (b"/v1/embeddings", {"model": MODEL, "input": {"a": name}}),
        (b"/v1/embeddings", {"model": MODEL, "input": name, "encoding_format": "pickle"}),
        (b"/v1/embeddings", {"model": MODEL, "input": name, "dimensions": -1}),
        (b"/v1/embeddings", {"model": MODEL, "input": [[-1]]}),
        (b"/v1/responses", {"model": MODEL}), (b"/v1/responses", {"model": MODEL, "input": 7}),
        (b"/v1/responses", {"model": MODEL, "input": name, "previous_response_id": "resp_1"}),
        (b"/v1/responses", {"model": MODEL, "input": name, "background": True}),
        (b"/v1/responses", {"model": MODEL, "input": name, "chat_template_kwargs": {"a": 1}}),
        (b"/v1/messages", {"model": MODEL}), (b"/v1/messages", {"model": MODEL, "messages": name, "max_tokens": 1}),
        (b"/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": 7}]}),
    ]  # fmt: skip
    route, body = r.choice(choices)
    if r.random() < 0.2:
        body = r.choice([[], 7, "x", None, True, [[name]], {}])
    return Case("odd bodies", (request(route, orjson.dumps(body)),))


def _wrong_encodings(r: random.Random, name: str) -> Case:
    whole = orjson.dumps(talk(name))
    invalid: list[tuple[bytes, bytes | None, dict[bytes, bytes]]] = [
        (whole.replace(b"hello", r.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88"])), _JSON, {}),
        (whole.decode().encode("utf-16"), _JSON, {}),
        (whole.decode().encode("utf-32"), _JSON, {}),
        (whole.replace(b"hello", b"\\ud800"), _JSON, {}),
        (whole.replace(b"hello", b"\\u12"), _JSON, {}),
        (whole.replace(b"hello", b"\x00\x01"), _JSON, {}),
        (gzip.compress(whole, mtime=0), _JSON, {b"Content-Encoding": b"gzip"}),
        (gzip.compress(b"[" * 10**6, mtime=0), _JSON, {b"Content-Encoding": b"gzip"}),
        (r.randbytes(50), _JSON, {b"Content-Encoding": b"br"}),
        (whole, b"text/plain", {}), (whole, b"application/x-www-form-urlencoded", {}), (whole, None, {}),
        (whole, b"multipart/form-data; boundary=x", {}), (whole, b"\xff\xfe", {}),
        (whole + b" trailing", _JSON, {}), (b"\xef\xbb\xbf" + whole, _JSON, {}), (b"", _JSON, {}),
        (b"// a comment\n" + whole, _JSON, {}), (whole.replace(b'"', b"'"), _JSON, {}),
    ]  # fmt: skip
    body, media_type, headers = r.choice(invalid)
    return Case("wrong encodings", (request(CHAT, body, headers=headers, media_type=media_type),))


_JSON = b"application/json"


def _header_flood(r: random.Random, name: str) -> Case:
    body = orjson.dumps(talk(name))
    choice = r.randrange(6)
    if choice == 0:
        whole = request(CHAT, body, headers=[(b"X-H%d" % i, b"v" * 50) for i in range(r.choice([1000, 5000, 50_000]))])
    elif choice == 1:
        whole = request(CHAT, body, headers={b"X-Long": b"v" * r.choice([40_000, 70_000, 2**20])})
    elif choice == 2:
        whole = request(CHAT + b"?" + b"q" * r.choice([40_000, 70_000, 2**20]), body)
    elif choice == 3:
        whole = request(CHAT, body, headers={b"X-" + b"n" * 70_000: b"v"})
    elif choice == 4:
        whole = request(CHAT, body, headers=[(b"Cookie", b"c" * 900)] * 100)
    else:
        odd = r.choice([b"X\x00Y: v", b"X Y: v", b": v", b"X: a\x00b", b"X:\x7f\x01", b"X\xff: v", b"no colon at all"])
        whole = request(CHAT, body).replace(b"Host: gateway", b"Host: gateway\r\n" + odd)
        # What RFC 9110 lets a server accept or refuse; what arrives must be valid in itself.
        return Case("odd headers", (whole,), refused=False)
    return Case("header flood", (whole,))


def _oversized_body(r: random.Random, name: str) -> Case:
    choice = r.randrange(4)
    if choice == 0:
        declared = r.choice([9 * 2**20, 2**31, 2**40, 2**63, 10**30])
        return Case("oversized body", (request(CHAT, b'{"model":', length=str(declared).encode()),), then="finish")
    if choice == 1 and r.random() < 0.2:
        body = orjson.dumps(talk(name, user="u" * (9 * 2**20)))
        return Case("oversized body", (request(CHAT, body),))
    if choice == 2 and r.random() < 0.2:
        head = request(CHAT, headers={b"Transfer-Encoding": b"chunked"}, length=None)
        return Case("oversized body", (head, *[chunked(b" " * 2**20, end=b"")] * 12, b"0\r\n\r\n"))
    length = r.choice([b"-1", b"1e9", b"0x10", b"1,1", b"+5", b"5 5", b"", b"9" * 100])
    return Case("oversized body", (request(CHAT, b"{}", length=length or b" "),), then="finish")


def _chunked_abuse(r: random.Random, name: str) -> Case:
    body = orjson.dumps(talk(name))
    head = request(CHAT, headers={b"Transfer-Encoding": b"chunked"}, length=None)
    sizes = (b"-1", b"fffffffffffffffff", b"zz", b"", b"0x5", b"+5", b"5;" + b"e" * 70_000, b" 5", b"7fffffffffffffff")
    bad = [
        r.choice(sizes) + b"\r\n" + body + b"\r\n0\r\n\r\n",
        chunked(body, end=b""),
        chunked(body, end=b"0\r\n" + b"X-T: v\r\n" * 20_000 + b"\r\n"),
        b"%x\r\n%s" % (len(body) - 5, body) + b"\r\n0\r\n\r\n",
        b"%x\n%s\n0\n\n" % (len(body), body),
        chunked(*[bytes([b]) for b in body[:-5]], end=b"1\r\n"),
    ]
    # Trailers and bare line feeds may be tolerated; then the body is whole and valid.
    return Case("chunked abuse", (head + r.choice(bad),), refused=False, then=r.choice(["read", "finish"]))


def _smuggling(r: random.Random, name: str) -> Case:
    """Two lengths that disagree. What is read must be one valid request or none, and never the one within."""
    route = r.choice([CHAT, CHAT, b"/pause", b"/update_weights", b"/v1/load_lora_adapter", b"/collective_rpc"])
    hidden = request(route, orjson.dumps(talk(SMUGGLED)))
    body = orjson.dumps(talk(name))
    both = [(b"Transfer-Encoding", b"chunked")]
    odd = r.choice([b"xchunked", b"chunked, identity", b"identity, chunked", b"CHUNKED\x0b", b"chunked;q=1"])
    length = b"%d" % len(body)
    cases = [
        request(CHAT, b"0\r\n\r\n" + hidden, headers=both),
        request(CHAT, chunked(body) + hidden, headers=both, length=b"4"),
        request(CHAT, chunked(body) + hidden, headers=[(b"Transfer-Encoding", odd)], length=None),
        request(CHAT, chunked(body) + hidden, headers=[*both, (b"Transfer-Encoding", b"identity")], length=None),
        request(CHAT, body + hidden, headers=[(b"Content-Length", length)]),
        request(CHAT, body + hidden, headers=[(b"Content-Length ", length)], length=None),
        request(CHAT, body + hidden, headers=[(b"X\r\n Content-Length", length)], length=None),
        request(CHAT, body + hidden, length=length),  # after "Connection: close"
        request(CHAT + b" HTTP/1.1\r\nHost: x\r\n\r\nPOST /pause", body),
        request(CHAT, body + hidden, headers={b"X": b"a\nContent-Length: " + length + b"\nY: b"}),
    ]
    then = r.choice(["read", "read", "finish"])
    return Case("request smuggling", (r.choice(cases),), refused=False, then=then)


ENGINE_ROUTES = (
    "pause", "resume", "abort_requests", "update_weights", "init_weight_transfer_engine", "sleep", "wake_up",
    "collective_rpc", "server_info", "reset_prefix_cache", "reset_mm_cache", "start_profile", "stop_profile",
    "scale_elastic_ep", "is_sleeping", "invocations", "pooling", "classify", "score", "rerank", "detokenize",
    "tokenizer_info", "v1/load_lora_adapter", "v1/unload_lora_adapter", "v1/score", "v1/rerank", "v2/rerank",
    "v2/embed", "v1/audio/transcriptions", "v1/realtime", "v1/chat/completions/batch", "v1/messages/count_tokens",
    "v1/responses/resp_1/cancel", "inference/v1/generate", "cohere/v2/chat", "generative_scoring", "load",
    "kv_event_sources", "fault_tolerance/report", "v1/files", "v1/batches", "v1/decisions", "server_info?x=1", "admin",
)  # fmt: skip
DISGUISES: tuple[Callable[[str], str], ...] = (
    lambda p: f"/{p}", lambda p: f"//{p}", lambda p: f"/v1/../{p}", lambda p: f"/v1/%2e%2e/{p}",
    lambda p: f"/v1/chat/completions/../../../{p}", lambda p: f"/v1/models/..%2f..%2f{p}", lambda p: f"/./{p}",
    lambda p: "/" + "".join(f"%{ord(c):02x}" for c in p), lambda p: f"/{p}/", lambda p: f"/{p}%00", lambda p: f"/{p};x",
    lambda p: f"http://engine/{p}", lambda p: f"/{p.upper()}", lambda p: f"/v1/chat/completions%0d%0a{p}",
    lambda p: f"\\{p}", lambda p: f"/v1%2f..%2f{p}", lambda p: f"/{p}#x", lambda p: f"@evil/{p}",
)  # fmt: skip


def _routes(r: random.Random, name: str) -> Case:
    path = r.choice(DISGUISES)(r.choice(ENGINE_ROUTES))
    method = r.choice([b"POST", b"POST", b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"X-Y"])
    return Case("engine routes", (request(path.encode(), orjson.dumps(talk(name)), method),))


def _early_leave(r: random.Random, name: str) -> Case:
    body = talk(name, stream=r.random() < 0.5, max_tokens=1_000_000)
    return Case("leaves", post(body), refused=False, then="leave")


KINDS: dict[Callable[[random.Random, str], Case], int] = {
    _random_bytes: 8, _foreign_protocol: 4, _truncated: 6, _deep_json: 8, _huge_numbers: 8, _wrong_types: 14,
    _odd_bodies: 6, _wrong_encodings: 6, _header_flood: 6, _oversized_body: 4, _chunked_abuse: 5, _smuggling: 6,
    _routes: 9, _early_leave: 2,
}  # fmt: skip


def slow(r: random.Random, name: str, ours: float) -> Case:
    """A client that takes its time; ``ours`` is the longest pause in seconds between two of its bytes."""
    whole = post(talk(name))[0]
    end = whole.index(b"\r\n\r\n") + 4
    kind = r.choice(["slow headers", "slow body", "silence", "slow reader"])
    if kind == "slow headers":
        pieces = tuple(whole[i : i + 1] for i in range(end - 1))
    elif kind == "slow body":
        pieces = (whole[:end], *[whole[i : i + 1] for i in range(end, len(whole) - 1)])
    elif kind == "silence":
        pieces = (whole[: r.choice([0, 20, end, end + 5])],)
    else:
        return Case(kind, post(talk(name, stream=True, max_tokens=1_000_000)), refused=False, then="stare")
    return Case(kind, pieces, pause=ours * r.uniform(0.5, 1))
