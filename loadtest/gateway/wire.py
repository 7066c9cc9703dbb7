"""HTTP/1.1 as bytes, for requests that no HTTP library would send, and for what is answered to them."""

import re
from collections.abc import Iterable, Mapping

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


def request(
    target: bytes,
    body: bytes = b"",
    method: bytes = b"POST",
    headers: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] = (),
    length: bytes | None = b"",
    media_type: bytes | None = b"application/json",
) -> bytes:
    """A request after which the server closes the connection.

    Args:
        length: Content-Length; the body's own if empty, not sent if None.
    """
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: gateway", b"Connection: close"]
    if media_type is not None:
        lines.append(b"Content-Type: " + media_type)
    if length is not None:
        lines.append(b"Content-Length: " + (length or str(len(body)).encode()))
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines += [name + b": " + value for name, value in pairs]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def statuses(answer: bytes) -> list[int]:
    """The statuses of the responses in what a connection brought; a part that is no response is 0.

    Where a response ends is found by its length or its chunks, so that text within a body is not taken for another.
    """
    found: list[int] = []
    while answer:
        status = _STATUS.match(answer)
        head, blank, rest = answer.partition(b"\r\n\r\n")
        if not status or not blank:
            return [*found, 0]
        found.append(int(status[1]))
        fields = head.lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", fields)
        if found[-1] < 200 or found[-1] in (204, 304):
            answer = rest
        elif length:
            answer = rest[int(length[1]) :]
        elif b"\r\ntransfer-encoding: chunked" in fields:
            answer = _after_chunks(rest)
        else:
            return found  # until the connection closes
    return found


def _after_chunks(rest: bytes) -> bytes:
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size.partition(b";")[0] or b"0", 16)
        rest = rest[count + 2 :]
        if not count:
            break
    return rest
