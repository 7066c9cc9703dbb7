"""Uses the gateway through LiteLLM's library, as an application or another gateway would.

Run by test_litellm_client.py in a process of its own: ``python litellm_session.py BASE_URL MODEL`` prints one JSON
object. Connections to anywhere but the gateway fail, and are told.
"""

import asyncio
import json
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

BASE_URL, MODEL = sys.argv[1:]
GATEWAY = urlsplit(BASE_URL).port
elsewhere: list[str] = []
_connect = socket.socket.connect
_getaddrinfo = socket.getaddrinfo


def connect(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and address[1] != GATEWAY:
        elsewhere.append(str(address[0]))
        raise ConnectionRefusedError(f"the session talks to its gateway only, not to {address}")
    _connect(self, address)


def getaddrinfo(host: Any, port: Any, *arguments: Any, **settings: Any) -> Any:
    if port != GATEWAY:
        elsewhere.append(str(host))
        raise socket.gaierror(f"the session talks to its gateway only, not to {host}")
    return _getaddrinfo(host, port, *arguments, **settings)


socket.socket.connect = connect  # type: ignore[method-assign, assignment]
socket.getaddrinfo = getaddrinfo

import litellm  # noqa: E402

litellm.suppress_debug_info = True  # else it prints beside our object


def usage(answer: Any) -> list[int]:
    return [answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens]


QUESTION = [{"role": "user", "content": "What are the symptoms of asthma?"}]
common: dict[str, Any] = {
    "model": f"openai/{MODEL}",
    "api_base": BASE_URL,
    "api_key": "unused",
    "num_retries": 0,
    "temperature": 0,
}

plain = litellm.completion(messages=QUESTION, **common)
seen: dict[str, Any] = {
    "answer": plain.choices[0].message.content,
    "finish_reason": plain.choices[0].finish_reason,
    "usage": usage(plain),
}
chunks = list(litellm.completion(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **common))
whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
seen["streamed"], seen["stream_usage"] = whole.choices[0].message.content, usage(whole)
seen["chunks"] = len(chunks)


async def concurrently() -> list[str]:
    async def streamed() -> str:
        stream = await litellm.acompletion(messages=QUESTION, stream=True, **common)
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    answers = await asyncio.gather(streamed(), litellm.acompletion(messages=QUESTION, **common))
    return [answers[0], answers[1].choices[0].message.content]


seen["async"] = asyncio.run(concurrently())

scored = litellm.completion(messages=QUESTION, logprobs=True, top_logprobs=2, max_tokens=5, **common)
seen["logprobs"] = [len(token["top_logprobs"]) for token in scored.choices[0].logprobs["content"]]
schema = {"type": "object", "properties": {"urgent": {"type": "boolean"}}, "required": ["urgent"],
          "additionalProperties": False}  # fmt: skip
formatted = litellm.completion(
    messages=QUESTION,
    response_format={"type": "json_schema", "json_schema": {"name": "fact", "schema": schema, "strict": True}},
    **common,
)
seen["json"] = formatted.choices[0].message.content

text = {**common, "model": f"text-completion-openai/{MODEL}", "prompt": "Asthma is", "max_tokens": 6}
completion = litellm.text_completion(**text)
seen["completion"] = completion.choices[0].text
seen["completion_streamed"] = "".join(c.choices[0].text or "" for c in litellm.text_completion(stream=True, **text))

REFUSED: dict[str, dict[str, Any]] = {
    "no such model": {"model": "openai/no-such-model"},
    "stream of no such model": {"model": "openai/no-such-model", "stream": True},
    "too long": {"messages": [{"role": "user", "content": "word " * 3000}]},
    "wrong type": {"extra_body": {"max_tokens": "many"}},
}
seen["errors"] = {}
for name, request in REFUSED.items():
    try:
        litellm.completion(**{**common, "messages": QUESTION, **request})
        seen["errors"][name] = None
    except Exception as e:
        seen["errors"][name] = [type(e).__name__, getattr(e, "status_code", None)]
seen["elsewhere"] = elsewhere
print(json.dumps(seen))
