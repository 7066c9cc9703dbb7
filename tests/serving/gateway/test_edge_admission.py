"""What the HTTP server asks before it takes a request's body, and the header lines that every answer gets."""

import asyncio
import socket
import time
from typing import Any

import pytest

from serving.gateway.edge import create_server
from serving.gateway.exchange import ADMIN_LISTENER
from serving.gateway.web import Web
from tests.serving.gateway.raw_client import QUICK, Edge, refusal, request, run


def admit(scope: Any) -> bool:
    """Bodies with the header ``X-Let: yes`` are read."""
    scope["asked"] = True
    return (b"x-let", b"yes") in scope["headers"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_nobody_reads_is_dropped_as_it_comes(chunked: bool) -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        piece = bytes(10_000)
        if chunked:
            client.send(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        else:
            client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(10):
            client.send(b"2710\r\n" + piece + b"\r\n" if chunked else piece)
            await client.writer.drain()
            await asyncio.sleep(0.01)
            assert edge.server.buffered == 0
        client.send(b"0\r\n\r\n" if chunked else b"")
        assert (await client.response())[2] == b"/echo"  # no body to send back
        client.send(request("/echo", "X-Let: yes", body=b"kept"))
        assert (await client.response())[2] == b"kept"
        client.send(request("/echo", body=b"a") + request("/echo", "X-Let: yes", body=b"b"))
        assert [(await client.response())[2] for _ in range(2)] == [b"/echo", b"b"]
        assert edge.app.bodies == [b"", b"kept", b"", b"b"]
        assert edge.server.buffered == 0

    run(test, QUICK.model_copy(update={"body_timeout": 10.0}), admit=admit)


def test_such_a_body_is_under_the_same_limits() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n40000\r\n" + bytes(0x40000) + b"\r\n")
        await refusal(client, 413)
        client = await edge.connect()
        client.send(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc")
        await refusal(client, 408)
        client = await edge.connect()
        client.send(b"POST / HTTP/1.1\r\nContent-Length: 200001\r\n\r\n")
        await refusal(client, 413)
        assert edge.refused == ["body_size", "body_timeout", "body_size"]
        assert edge.server.buffered == 0

    run(test, admit=admit)


def test_a_client_that_waits_for_leave_to_send_gets_the_answer_instead() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
        status, headers, body = await client.response()
        assert (status, headers["connection"], body) == (200, "close", b"/echo")
        client.send(bytes(1000))  # it may have begun; that must not reset the connection before it has read
        assert await client.closed()
        client = await edge.connect()
        client.send(b"POST /echo HTTP/1.1\r\nX-Let: yes\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert (await client.response())[2] == b"ok"
        # With the body at once, and behind another request.
        client.send(
            request("/echo", "X-Let: yes", body=b"first")
            + request("/echo", "Expect: 100-continue", body=b"second")
            + request("/last")
        )
        assert [(await client.response())[2] for _ in range(3)] == [b"first", b"/echo", b"/last"]
        client = await edge.connect()
        client.send(request("/echo", "Expect: 100-continue", body=b"x" * 5000))
        assert (await client.response())[2] == b"/echo"
        assert await client.closed()
        assert edge.refused == []

    run(test, admit=admit)


SAFE = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def test_every_answer_is_safe_in_a_browser() -> None:
    async def test(edge: Edge) -> None:
        edge.app.finish.set()
        for what, status in (
            (request("/"), 200),
            (request("/stream"), 200),
            (request("/crash"), 500),
            (b"garbage\r\n\r\n", 400),
            (request("/", "Content-Length: 300000"), 413),
            (b"GET / HTTP/1.1\r\nA: " + b"b" * 9000 + b"\r\n\r\n", 431),
        ):
            client = await edge.connect()
            client.send(what)
            got, headers, _ = await client.response()
            assert got == status
            assert SAFE.items() <= headers.items()
            assert not {"server", "strict-transport-security", "vary"} & set(headers)
            assert not [name for name in headers if name.startswith("access-control")]

    run(test)


def test_the_applications_own_word_on_storing_stays() -> None:
    async def test(edge: Edge) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"Cache-Control", b"max-age=60"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body"})

        edge.server.app = app
        client = await edge.connect()
        client.send(request("/"))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.lower().count(b"cache-control") == 1
        assert b"max-age=60" in head
        assert b"nosniff" in head

    run(test)


def test_header_lines_cost_next_to_nothing() -> None:
    web = Web(["https://a.example"])
    began = time.process_time()
    for _ in range(10_000):
        web.fields(b"", "/v1/chat/completions", False)
        web.fields(b"https://a.example", "/v1/chat/completions", True)
    assert (time.process_time() - began) / 20_000 < 10e-6  # 0.3 microseconds on an idle machine


def test_marks_of_the_listener() -> None:
    async def test(edge: Edge) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            said = b"admin" if scope.get(ADMIN_LISTENER) else b"main"
            headers = [(b"content-length", b"%d" % len(said))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": said})

        first, second = create_server(app, QUICK), create_server(app, QUICK)
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        copies = [listener.dup() for listener in listeners]
        await first.start(listeners[:1], listeners[1:])
        clients = []
        for listener in copies:
            clients.append(await Edge(first, edge.app, [], listener.getsockname()[1]).connect())

        async def told() -> list[bytes]:
            for client in clients:
                client.send(request("/"))
            return [(await client.response())[2] for client in clients]

        assert await told() == [b"main", b"admin"]
        adopting = []

        def give(fd: int, used: bool, admin: bool) -> bool:
            taken = socket.socket(fileno=socket.dup(fd))
            adopting.append(asyncio.create_task(second.adopt(taken, used, admin)))
            return True

        await second.start(copies[:1], copies[1:])
        first.retire(give)
        await asyncio.wait_for(first.drained(), 3)
        assert len(adopting) == 2
        assert await told() == [b"main", b"admin"]  # from the other process
        await first.stop()
        await second.stop()

    run(test)
