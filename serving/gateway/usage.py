"""Tokens of an answer, as the engine tells them: in whole answers, at the end of streams, or with every chunk.

In JSON a quotation mark inside a string is written ``\\"``, so ``"usage":`` can only be a key. Answers of OpenAI's
older routes hold what a client or a model wrote in strings alone: there it is the engine's. Those of
``/v1/responses`` and ``/v1/messages`` hold objects of theirs, too (the request's tools, the arguments of calls): they
are decoded, and only the place counts where the engine tells the usage.
"""

import re
from typing import Any

import orjson

from serving.tenants.record import MOST_TOKENS

_OBJECT = rb"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"  # details lie in objects of their own
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_COUNT = re.compile(rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens)"\s*:\s*(\d+)(?![\d.eE])')
_INDEX = re.compile(rb'"choices"\s*:\s*\[\s*\{\s*"index"\s*:\s*(\d{1,9})\b')
# vLLM's own form first: it is looked for in every chunk of every stream.
_MEMBER_START = b',"usage":{'
_MEMBER = re.compile(rb',"usage":' + _OBJECT)
_ANY_MEMBER = re.compile(rb'\s*,\s*"usage"\s*:\s*' + _OBJECT + rb'|"usage"\s*:\s*' + _OBJECT + rb"\s*,\s*")
_USAGE_OBJECT = re.compile(_OBJECT)
_NAMES = (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens"))
_DIGITS = len(str(MOST_TOKENS))
_DECODED = frozenset(("/v1/responses", "/v1/messages"))
_EMPTY = re.compile(rb'"choices"\s*:\s*\[\]')
_BORDER = re.compile(rb"\r?\n\r?\n|\r\r")


class Usage:
    """Tokens of prompt and answer; None where the engine did not say.

    Args:
        prompts, answers: of the request; ``answers`` to each prompt. Chunks tell the usage of one answer each.

    Attributes:
        prompt_tokens, completion_tokens: of all prompts and answers together.
        events: of a stream that told no usage. About as many as tokens, where the engine tells nothing else.

    A count that cannot be is one that was not told.
    """

    __slots__ = ("_answers", "_chunks", "_completions", "_latest", "_prompts", "completion_tokens", "events",
                 "prompt_tokens")  # fmt: skip

    def __init__(self, prompts: int = 1, answers: int = 1) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.events = 0
        self._chunks, self._answers = prompts, answers
        self._latest = b""  # a piece of the stream whose usage nobody has needed yet
        self._prompts: dict[int, int] = {}
        self._completions: dict[int, int] = {}

    def read_answer(self, route: str, whole: bytes) -> None:
        """Takes over what a whole answer says."""
        if route in _DECODED:
            self._take(*_counts_in(_decoded(whole).get("usage")))
        else:
            self.read(whole)

    def read_event(self, name: bytes, event: bytes) -> None:
        """Takes over what an event says whose name ``name`` is, on routes whose events have names.

        Args:
            name: one of those that tell the usage, without what is before its dot.
            event: its lines after that name.
        """
        content = _decoded(event.partition(b"\ndata:")[2])
        if name == b"message_start":  # says nothing of the answer yet
            message = content.get("message")
            self._take(_counts_in(message.get("usage"))[0] if isinstance(message, dict) else None, None)
        elif name == b"message_delta":
            self._take(*_counts_in(content.get("usage")))
        elif isinstance(response := content.get("response"), dict):
            self._take(*_counts_in(response.get("usage")))

    def read(self, data: bytes) -> None:
        """Takes over what the last usage object in ``data`` says, a whole answer or events of OpenAI's older routes."""
        self._latest = b""
        at = data.rfind(b'"usage"')
        while at >= 0:
            if found := _USAGE.match(data, at):
                self._take(*_counts(data, found.end()))
                return
            at = data.rfind(b'"usage"', 0, at)

    def _take(self, prompt: int | None, completion: int | None) -> None:
        if prompt is not None:
            self.prompt_tokens = prompt
        if completion is not None:
            self.completion_tokens = completion

    def read_chunks(self, data: bytes) -> None:
        """The same of whole events of a stream, each of which tells what one answer has come to."""
        if self._chunks == self._answers == 1:
            self._latest = data
            return
        start = 0
        for border in _BORDER.finditer(data):
            index, usage = _INDEX.search(data, start, border.start()), _USAGE.search(data, start, border.start())
            start = border.end()
            if index is None or usage is None:
                continue
            answer = int(index[1])
            prompt, completion = _counts(data, usage.end())
            if prompt is not None:
                self._prompts[answer // self._answers] = prompt
            if completion is not None:
                self._completions[answer] = completion

    def close(self) -> None:
        """The answer has ended, or was left: what chunks told last counts, unless the end told more."""
        if self._latest:
            self.read(self._latest)
        elif self._completions and self.completion_tokens is None:
            self.completion_tokens = sum(self._completions.values())
            if len(self._prompts) == self._chunks:
                self.prompt_tokens = sum(self._prompts.values())


def tells_usage(data: bytes) -> bool:
    """Whether there is a usage object."""
    return b'"usage"' in data and _USAGE.search(data) is not None


def is_last(data: bytes) -> bool:
    """Whether one of these events only tells the usage of all answers."""
    return b"[]" in data and _EMPTY.search(data) is not None


def without_chunk_usage(data: bytes) -> bytes:
    """Events without the usage in them; all other bytes as they were. None may be the last that tells it."""
    # One event that ends with its usage, as vLLM sends them: found without a pattern, as this is done for every token.
    at = data.find(_MEMBER_START)
    if at >= 0 and data.find(b"}", at) == len(data) - 4 and data.endswith(b"}}\n\n"):
        return data[:at] + b"}\n\n"
    data = _MEMBER.sub(b"", data)
    return _ANY_MEMBER.sub(b"", data) if tells_usage(data) else data


def without_usage(data: bytes, chunks: bool, last: bool) -> bytes:
    """Events without what the client did not ask for.

    Args:
        chunks: take the usage out of events that hold more.
        last: leave out events that only tell the usage.
    """
    kept, start = b"", 0
    for border in _BORDER.finditer(data):
        event = data[start : border.end()]
        start = border.end()
        if tells_usage(event):
            if not is_last(event):
                event = without_chunk_usage(event) if chunks else event
            elif last:
                continue
        kept += event
    return kept + data[start:]


def _counts(data: bytes, start: int) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer in a usage object whose content begins there. Details are under other names."""
    prompt = completion = None
    found = _USAGE_OBJECT.match(data, start - 1)
    if found is not None:
        for name, count in _COUNT.findall(data, start, found.end()):
            told = int(count) if len(count) <= _DIGITS else MOST_TOKENS + 1
            if told > MOST_TOKENS:
                continue
            if name in (b"prompt_tokens", b"input_tokens"):
                prompt = told
            else:
                completion = told
    return prompt, completion


def _counts_in(usage: Any) -> tuple[int | None, int | None]:
    """The same of an object that is decoded, or of what stands in its place."""
    if not isinstance(usage, dict):
        return None, None
    counts = (usage.get(new, usage.get(old)) for new, old in _NAMES)
    prompt, completion = (count if type(count) is int and 0 <= count <= MOST_TOKENS else None for count in counts)
    return prompt, completion


def _decoded(data: bytes) -> dict[str, Any]:
    """The object in ``data``; an empty one if there is none."""
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def usage_event(data: bytes) -> bytes:
    """The event with which OpenAI's streams end, where the usage was asked for, made of the last event in ``data`` that
    tells it; empty if there is none."""
    start, last = 0, b""
    for border in _BORDER.finditer(data):
        event, start = data[start : border.start()], border.end()
        if tells_usage(event):
            last = event
    content = _decoded(last.partition(b"data:")[2])
    return b"data: " + orjson.dumps(content | {"choices": []}) + b"\n\n" if content else b""
