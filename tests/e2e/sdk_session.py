"""Uses the gateway as an application would, through whichever major version of the OpenAI SDK is importable.

Run by test_openai_sdk.py in a process of its own: ``python sdk_session.py BASE_URL MODEL NARROW_URL`` prints one JSON
object. The gateway at ``NARROW_URL`` takes one request at a time.
"""

import asyncio
import json
import sys
import threading
import time

import openai
from openai import AsyncOpenAI, OpenAI

BASE_URL, MODEL, NARROW_URL = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What are the symptoms of asthma?"}]
SCHEMA = {
    "type": "object",
    "properties": {"topic": {"type": "string"}, "urgent": {"type": "boolean"}, "score": {"type": "integer"}},
    "required": ["topic", "urgent", "score"],
    "additionalProperties": False,
}

client = OpenAI(base_url=BASE_URL, api_key="unused")
create = client.chat.completions.create
seen: dict[str, object] = {"version": openai.__version__, "models": [m.id for m in client.models.list()]}

plain = create(model=MODEL, messages=QUESTION, temperature=0)
seen["answer"] = plain.choices[0].message.content
seen["finish_reason"] = plain.choices[0].finish_reason
seen["usage_adds_up"] = plain.usage.prompt_tokens + plain.usage.completion_tokens == plain.usage.total_tokens

text, usage, chunks = "", None, 0
for chunk in create(model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}):
    chunks += 1
    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    usage = chunk.usage or usage
seen["streamed"] = text
seen["stream_usage_equal"] = usage.completion_tokens == plain.usage.completion_tokens
seen["chunks"] = chunks

scored = create(model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2, max_tokens=5)
seen["logprobs"] = [[t.logprob, len(t.top_logprobs)] for t in scored.choices[0].logprobs.content]
seen["max_tokens"] = [scored.usage.completion_tokens, scored.choices[0].finish_reason]

stopped = create(model=MODEL, messages=QUESTION, temperature=0, stop=[" and"])
seen["stopped"] = stopped.choices[0].message.content

hot = dict(model=MODEL, messages=QUESTION, temperature=2.0, top_p=1, max_tokens=24, extra_body={"ignore_eos": True})
seen["seeded"] = [create(**hot, seed=s).choices[0].message.content for s in (7, 7, 8)]
seen["n"] = [c.index for c in create(model=MODEL, messages=QUESTION, n=3, max_tokens=8).choices]

formatted = create(
    model=MODEL,
    messages=[{"role": "user", "content": "What is asthma?"}],
    temperature=0,
    max_tokens=200,
    response_format={"type": "json_schema", "json_schema": {"name": "fact", "schema": SCHEMA, "strict": True}},
)
seen["json"] = formatted.choices[0].message.content

completion = client.completions.create(model=MODEL, prompt="Asthma is", max_tokens=6, temperature=0, logprobs=1)
seen["completion"] = [completion.choices[0].text, len(completion.choices[0].logprobs.token_logprobs)]
pieces = client.completions.create(model=MODEL, prompt="Asthma is", max_tokens=6, temperature=0, stream=True)
seen["completion_streamed"] = "".join(p.choices[0].text for p in pieces)

seen["retrieved"] = client.models.retrieve(MODEL).id
named = client.with_options(default_headers={"X-Request-ID": "visit-17"}).chat.completions.with_raw_response
raw = named.create(model=MODEL, messages=QUESTION, max_tokens=2)
own = create(model=MODEL, messages=QUESTION, max_tokens=2)
seen["request_ids"] = [raw.headers["x-request-id"], raw.parse()._request_id, own._request_id]
seen["raw_usage"] = raw.parse().usage.completion_tokens

respond = client.responses.create
response = respond(model=MODEL, input=QUESTION[0]["content"], temperature=0)
seen["response"] = [response.status, response.output_text, response.usage.output_tokens]
seen["response_stored"] = response.model_dump().get("store")
deltas, last = "", None
for event in respond(model=MODEL, input=QUESTION, temperature=0, stream=True):
    deltas += event.delta if event.type == "response.output_text.delta" else ""
    last = event
seen["response_streamed"] = [last.type, deltas, last.response.usage.output_tokens]

REFUSED = {
    "no such model": lambda: create(model="no-such-model", messages=QUESTION),
    "no such card": lambda: client.models.retrieve("no-such-model"),
    "too long": lambda: create(model=MODEL, messages=[{"role": "user", "content": "word " * 3000}]),
    "wrong type": lambda: create(model=MODEL, messages=QUESTION, max_tokens="many"),
    "closed off": lambda: create(model=MODEL, messages=QUESTION, extra_body={"chat_template": "{{ messages }}"}),
    "too large": lambda: create(model=MODEL, messages=[{"role": "user", "content": "word " * 2_000_000}]),
    "too much": lambda: client.completions.create(model=MODEL, prompt="Asthma is", n=1_000_000),
    "stream of no such model": lambda: create(model="no-such-model", messages=QUESTION, stream=True),
    "response of no such model": lambda: respond(model="no-such-model", input="Asthma?"),
}
client.max_retries = 0
seen["errors"] = {}
for name, refused in REFUSED.items():
    try:
        refused()
        seen["errors"][name] = None
    except openai.APIStatusError as e:
        seen["errors"][name] = {
            "class": type(e).__name__,
            "status": e.status_code,
            "code": e.code,
            "param": e.param,
            "retry_after": e.response.headers.get("retry-after"),
            "request_id": bool(e.request_id),
        }

crowded = OpenAI(base_url=NARROW_URL, api_key="unused")
narrow = crowded.chat.completions
busy = narrow.create(**hot | {"max_tokens": 900}, stream=True)
next(iter(busy))
try:
    crowded.with_options(max_retries=0).chat.completions.create(model=MODEL, messages=QUESTION)
except openai.RateLimitError as e:
    seen["limited"] = [e.code, int(e.response.headers["retry-after"])]
threading.Timer(0.2, busy.close).start()
began = time.monotonic()
seen["retried"] = narrow.create(model=MODEL, messages=QUESTION, temperature=0).choices[0].message.content
seen["retried_after"] = time.monotonic() - began


async def concurrently() -> list[str]:
    async with AsyncOpenAI(base_url=BASE_URL, api_key="unused") as aclient:

        async def streamed() -> str:
            stream = await aclient.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

        whole = aclient.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
        answers = await asyncio.gather(streamed(), streamed(), whole)
        return [*answers[:2], answers[2].choices[0].message.content]


seen["async"] = asyncio.run(concurrently())
print(json.dumps(seen))
