"""Uses the gateway as an application would, through whichever major version of the OpenAI SDK is importable.

Run by test_openai_sdk.py in a process of its own: ``python sdk_session.py BASE_URL MODEL`` prints one JSON object.
"""

import asyncio
import json
import sys

import openai
from openai import AsyncOpenAI, OpenAI

BASE_URL, MODEL = sys.argv[1:]
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

try:
    create(model="no-such-model", messages=QUESTION)
except openai.NotFoundError as e:
    seen["not_found"] = e.code
try:
    create(model=MODEL, messages=[{"role": "user", "content": "word " * 3000}])
except openai.BadRequestError as e:
    seen["too_long"] = e.code


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
