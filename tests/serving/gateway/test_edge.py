"""The HTTP server: what it refuses, how long it waits, and how it ends connections."""

import asyncio
import os
import random
import re
import socket
import time
from typing import Any

import aiohttp
import pytest

from serving.gateway.connection import LINGER, MAX_HEADERS, MAX_PIPELINED
from serving.gateway.edge import create_server
from tests.serving.gateway.raw_client import QUICK, Edge, refusal, request, run


def test_requests_and_keep_alive() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        for body in (b"a", b"b" * 100_000):
            client.send(request("/echo?q=1", body=body))
            status, headers, answer = await client.response()
            assert (status, answer, "connection" in headers) == (200, body, False)
        client.send(request("/%C3%A4%2F", method="HEAD"))
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\ndate: ")
        client.send(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n")
        client.send(b"2\r\nde\r\n0\r\nTrailer: x\r\n\r\n")
        assert (await client.response())[2] == b"abcde"
        assert edge.app.seen == ["/echo", "/echo", "/ä/", "/echo"]

    run(test)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(b"".join(request(f"/{i}") for i in range(10)) + request("/part")[:10])
        assert [(await client.response())[2] for _ in range(10)] == [b"/%d" % i for i in range(10)]
        client.send(request("/part")[10:])
        assert (await client.response())[2] == b"/part"

    run(test)


def test_garbage_behind_a_running_request_is_answered_behind_it() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/stream") + b"\x00garbage\r\n\r\n")
        await asyncio.sleep(0.05)
        edge.app.finish.set()
        assert (await client.response())[2] == b"firstlast"
        await refusal(client, 400)

    run(test)


def test_http_1_0_gets_no_chunks() -> None:
    async def test(edge: Edge) -> None:
        edge.app.finish.set()
        client = await edge.connect()
        client.send(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer = await client.reader.read()
        assert answer.endswith(b"connection: close\r\n\r\nfirstlast")

    run(test)


def test_expect_continue() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert (await client.response())[2] == b"ok"
        client.send(b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
        await refusal(client, 413)

    run(test)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
def test_an_upgrade_is_an_ordinary_request_with_its_body(framing: bytes) -> None:
    """Java's client offers h2c with its first request; llhttp would take the body for the next request."""

    async def test(edge: Edge) -> None:
        head = b"POST /echo HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"
        for cut in (len(head + framing), len(head) + len(framing) - 2):
            client = await edge.connect()
            client.send((head + framing)[:cut])
            await asyncio.sleep(0.02)
            client.send((head + framing)[cut:] + request("/next"))
            assert (await client.response())[2] == b"abc"
            assert (await client.response())[2] == b"/next"
        client.send(request("/ws", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"))
        assert (await client.response())[2] == b"/ws"

    run(test)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\xff\x01 garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT example.org:443 HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 200001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"30000\r\n" + bytes(0x30000) + b"\r\n1000\r\n"
         + bytes(0x1000), 413),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (MAX_HEADERS + 1) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 9000, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 9000 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 9000, 431),
        (b"\r\n" * 5000, 431),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 300_000, 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"b" * 300_000, 400),
    ],
)  # fmt: skip
def test_what_is_not_a_request_never_reaches_the_application(data: bytes, status: int) -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(data)
        await client.writer.drain()
        await refusal(client, status)
        assert edge.app.seen == []
        assert len(edge.refused) == 1

    run(test)


def test_a_hundred_headers_are_not_too_many() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/", *["A: b"] * (MAX_HEADERS - 1)))
        assert (await client.response())[0] == 200

    run(test)


def test_too_many_pipelined_requests() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/stream") + b"".join(request(f"/{i}") for i in range(MAX_PIPELINED + 5)))
        await asyncio.sleep(0.05)
        edge.app.finish.set()
        statuses = [(await client.response())[0] for _ in range(MAX_PIPELINED + 3)]
        assert statuses == [200] * (MAX_PIPELINED + 2) + [400]
        assert await client.closed()

    run(test)


@pytest.mark.parametrize(
    ("data", "drip", "status"),
    [
        (b"", b"", 0),
        (b"GET / HTTP/1.1\r\nA: ", b"b", 408),
        (b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", b"b", 408),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nb\r\n", 408),
    ],
)
def test_slow_senders_are_ended(data: bytes, drip: bytes, status: int) -> None:
    """Bytes that drip in do not put the end off."""

    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/") if status else b"")  # nor does a request before
        if status:
            await client.response()
        client.send(data)
        began = time.monotonic()

        async def dripping() -> None:
            while True:
                await asyncio.sleep(0.05)
                client.send(drip)

        task = asyncio.create_task(dripping())
        try:
            if status:
                assert (await client.response())[0] == status
            assert await client.closed(LINGER + 1)
        finally:
            task.cancel()
        assert 0.35 < time.monotonic() - began < 10
        assert edge.app.seen == ["/"] * bool(status)

    # A sender that goes on is listened to for a while, to get its answer; the test's ends its side at once.
    run(test)


def test_idle_connections_are_closed_later() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/"))
        await client.response()
        began = time.monotonic()
        await asyncio.sleep(0.6)  # longer than a head may take
        client.send(request("/"))
        await client.response()
        assert await client.closed()
        assert 1.3 < time.monotonic() - began < 10

    run(test)


def test_a_refused_upload_can_be_finished_and_its_answer_read() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/echo", body=bytes(QUICK.max_body + 100_000)))
        await client.writer.drain()
        await refusal(client, 413)
        client.writer.close()
        await asyncio.sleep(0.05)
        assert not edge.server.connections

    run(test)


def test_disconnect_is_told_once_and_not_after_the_end() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/echo", body=b"x"))
        await client.response()
        client.writer.close()
        await asyncio.sleep(0.05)
        assert edge.app.disconnects == 0
        client = await edge.connect()
        client.send(request("/stream"))
        await client.reader.readuntil(b"first")
        client.writer.close()
        await asyncio.sleep(0.05)
        assert edge.app.disconnects == 1
        edge.app.finish.set()
        await asyncio.sleep(0.05)
        assert edge.app.disconnects == 1
        assert not edge.server.running

    run(test)


def test_a_crash_is_a_500_that_logs_no_content(caplog: pytest.LogCaptureFixture) -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/crash", "x-request-id: mine"))
        assert (await client.response())[1]["x-request-id"] == "mine"
        assert "ValueError" in caplog.text
        assert "secret" not in caplog.text
        client = await edge.connect()
        client.send(request("/crash"))
        await refusal(client, 500)

    run(test)


def test_damaged_requests_are_answered_or_refused() -> None:
    """Whatever comes: no exception, no 5xx, nothing that stays open."""
    chunks = b"5;a=b\r\nhello\r\n0\r\nT: v\r\n\r\n"
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    seeds = (
        b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n" + chunks,
        b"POST /c HTTP/1.1\r\n" + upgrade + b"Content-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n",
        b"GET http://x/d?e#f HTTP/1.0\r\n\r\n",
    )
    framing = (b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", upgrade)
    pieces = (*framing, b"\r\n", b"\n", b"\0", b"\xff\xfe", b"%00%zz", b"-1", b"A" * 9000)
    chance = random.Random(6)

    def damaged() -> bytes:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at:at] = chance.choice(pieces)
                case 1:
                    data[at] = chance.randrange(256)
                case 2:
                    del data[at : at + chance.randint(1, 9)]
                case 3:
                    data += chance.choice(seeds)
        return bytes(data)

    async def test(edge: Edge) -> None:
        faults: list[Any] = []
        edge.server.loop.set_exception_handler(lambda loop, context: faults.append(context))

        async def one(data: bytes) -> set[bytes]:
            client = await edge.connect()
            client.send(data)
            async with asyncio.timeout(10):
                answer = await client.reader.read()
            client.writer.close()
            return set(re.findall(rb"HTTP/1.1 (\d+) ", answer))

        statuses: set[bytes] = set()
        for _ in range(4):
            statuses |= set().union(*await asyncio.gather(*(one(damaged()) for _ in range(100))))
        assert {b"200", b"400"} <= statuses <= {b"100", b"200", b"400", b"408", b"413", b"431"}
        assert not faults
        await asyncio.sleep(0.1)
        assert not edge.server.connections
        assert not edge.server.running
        assert edge.server.buffered == 0

    limits = {"header_timeout": 0.15, "body_timeout": 0.15, "keep_alive": 0.15, "max_connections": 200}
    run(test, QUICK.model_copy(update=limits))


def test_draining() -> None:
    async def test(edge: Edge) -> None:
        busy, idle, late = [await edge.connect() for _ in range(3)]
        for client in (idle, late):
            client.send(request("/"))
            await client.response()
        busy.send(request("/stream"))
        await busy.reader.readuntil(b"first")
        edge.server.begin_drain(0.5)
        began = time.monotonic()
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            await edge.connect()
        late.send(request("/late"))
        status, headers, body = await late.response()
        assert (status, headers["connection"], body) == (200, "close", b"/late")
        assert await late.closed()
        assert await idle.closed()
        assert time.monotonic() - began > 0.45
        drained = asyncio.create_task(edge.server.drained())
        await asyncio.sleep(0.3)
        assert not drained.done()
        edge.app.finish.set()
        assert await busy.reader.readuntil(b"0\r\n\r\n") == b"\r\n4\r\nlast\r\n0\r\n\r\n"
        busy.send(request("/again"))  # its response did not say that it was the last
        assert (await busy.response())[1]["connection"] == "close"
        async with asyncio.timeout(3):
            await drained

    run(test)


def test_a_retiring_server_hands_its_connections_over() -> None:
    """A client with pooled connections notices nothing, whenever it sends."""

    async def test(edge: Edge) -> None:
        patient = QUICK.model_copy(update={"keep_alive": 30.0})
        second = create_server(edge.app, patient)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        first = create_server(edge.app, patient)
        await first.start([listener.dup()])
        adopting: list[asyncio.Task[None]] = []

        def give(fd: int, used: bool, admin: bool) -> bool:
            if len(adopting) == 3 and adopting[-1].done() is False:  # no room for more at a time
                return False
            connection = socket.socket(fileno=os.dup(fd))
            adopting.append(edge.server.loop.create_task(second.adopt(connection, used, admin)))
            return True

        done = 0

        async def ask(session: aiohttp.ClientSession) -> None:
            nonlocal done
            for _ in range(30):
                async with session.post(f"http://127.0.0.1:{port}/echo", data=b"x") as response:
                    assert await response.read() == b"x"
                    assert "Connection" not in response.headers
                done += 1
                await asyncio.sleep(0.02)

        async with aiohttp.ClientSession() as session:
            asks = asyncio.gather(*(ask(session) for _ in range(16)))
            streaming = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/stream"))
            await asyncio.sleep(0.3)
            assert len(first.connections) == 17
            first.retire(give)
            await second.start([listener])
            await asks
            assert len(first.connections) == 1
            edge.app.finish.set()
            assert await (await streaming).read() == b"firstlast"
            await first.drained()
            await asyncio.gather(*adopting)  # the last may be under way
            assert len(adopting) == len(second.connections) == 17
        assert done == 16 * 30
        await first.stop()
        await second.stop()

    run(test)
