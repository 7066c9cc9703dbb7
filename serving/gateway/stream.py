"""Server-sent events of an engine, relayed without being decoded.

What has to be known of a stream is found by looking for bytes: where an event ends, whether it was the last, whether it
reports an error, and what was used.
"""

import re

import orjson

from serving.gateway.usage import Usage, is_last, tells_usage, usage_event, without_chunk_usage, without_usage

_ERROR = re.compile(rb'(?<![^\n])(?:event: ?error|data: ?\{"error":|data: ?\{"(?:type|object)": ?"error")')
# An engine's own comments keep nobody waiting for an answer, and are not one.
_LEADING_COMMENTS = re.compile(rb"\A(?::[^\n]*\n|\r?\n)+")
KEEP_ALIVE = b": keep-alive\n\n"

# What the last event of a stream holds, by route: a literal to look for first, and the whole pattern.
_DONE = (b"[DONE]", re.compile(rb"(?<![^\n])data: ?\[DONE\]"))
_ENDS = {
    "/v1/chat/completions": _DONE,
    "/v1/completions": _DONE,
    "/v1/responses": (b"response.", re.compile(rb"(?<![^\n])event: ?response\.(?:completed|incomplete|failed)")),
    "/v1/messages": (b"message_stop", re.compile(rb"(?<![^\n])event: ?message_stop")),
}
# Events that tell the usage, where it is told by these alone.
_TELLING = {
    "/v1/responses": re.compile(rb"(?<![^\n])event: ?response\.(completed|incomplete|failed)\b"),
    "/v1/messages": re.compile(rb"(?<![^\n])event: ?(message_start|message_delta)\b"),
}
_BORDER = re.compile(rb"\r?\n\r?\n")


class Events:
    """One stream on its way.

    Args:
        route: whose last event is waited for.
        drop_usage: leave out the event that only tells usage, which the client did not ask for.
        usage: where what was used is put down.
        drop_chunk_usage: take the usage out of all other events, for the same reason. If nothing else told it to a
            client that asked, it gets an event of its own.

    Attributes:
        finished: the last event has come.
        failed: an event reported an error; it and what follows is not passed on, since it can hold anything.
        refusal: status and text of that event, where it says that the request is at fault: vLLM checks some things of a
            request only after the head of its stream.
    """

    __slots__ = (
        "_drop_chunk_usage", "_drop_usage", "_end", "_end_mark", "_rest", "_telling", "_withheld", "failed", "finished",
        "refusal", "usage",
    )  # fmt: skip

    def __init__(self, route: str, drop_usage: bool, usage: Usage, drop_chunk_usage: bool = False) -> None:
        self.usage = usage
        self.finished = self.failed = False
        self.refusal: tuple[int, bytes] | None = None
        self._end_mark, self._end = _ENDS.get(route, _DONE)
        self._drop_usage, self._drop_chunk_usage = drop_usage, drop_chunk_usage
        self._telling = _TELLING.get(route)  # None: events that have choices can tell it of one answer
        self._rest = b""  # of an event whose end has not come
        self._withheld = b""  # events with the usage that the client has asked for and has not got

    def feed(self, data: bytes) -> bytes:
        """Whole events to pass on, of bytes as they came; what is left waits for its end."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
            border = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
            data, self._rest = data[:border], data[border:]
        # Literals first: this is done for every piece of every stream.
        if b"error" in data and (error := _ERROR.search(data)):
            self.failed = True
            self.refusal = _refusal(data[error.start() :])
            data = data[: error.start()]
        if self._end_mark in data and self._end.search(data):
            self.finished = True
        if data.startswith(b":"):
            data = _LEADING_COMMENTS.sub(b"", data)
        if self._telling is None and tells_usage(data):
            data = self._with_usage(data)
        else:
            self.usage.events += data.count(b"\n\n") or data.count(b"\r\n\r\n")
            if self._telling is not None and b'"usage"' in data:
                self._read_named(data)
        return self._with_withheld(data) if self.finished and self._withheld else data

    def rest(self) -> bytes:
        """What came after the last whole event, when nothing more comes; only the last event may lack its end."""
        rest, self._rest = self._rest, b""
        if rest and self._end.search(rest):
            self.finished = True
            self._read_named(rest)
            return self._with_withheld(rest + b"\n\n")
        return b""

    def _read_named(self, data: bytes) -> None:
        if self._telling is not None:
            for name in self._telling.finditer(data):
                border = _BORDER.search(data, name.end())
                self.usage.read_event(name[1], data[name.end() : border.start() if border else len(data)])

    def _with_usage(self, data: bytes) -> bytes:
        if not is_last(data):
            self.usage.read_chunks(data)
            if not self._drop_chunk_usage:
                return data
            if not self._drop_usage:
                self._withheld = data
            return without_chunk_usage(data)
        self.usage.read(data)
        if not (self._drop_usage or self._drop_chunk_usage):
            return data
        kept = without_usage(data, self._drop_chunk_usage, self._drop_usage)
        if not self._drop_usage:
            self._withheld = b"" if tells_usage(kept) else data
        return kept

    def _with_withheld(self, data: bytes) -> bytes:
        end = self._end.search(data) if self._withheld else None
        if end is None:
            return data
        return data[: end.start()] + usage_event(self._withheld) + data[end.start() :]


def _refusal(events: bytes) -> tuple[int, bytes] | None:
    """The first event's error, if it has the code of a client error (below 500)."""
    for line in events.splitlines():
        if line.startswith(b"data:"):
            try:
                code = orjson.loads(line[5:])["error"]["code"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                return None
            refused = isinstance(code, int) and 400 <= code < 500 and code != 429
            return (code, line[5:]) if refused else None
    return None
