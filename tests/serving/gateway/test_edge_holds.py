"""What the HTTP server holds for its clients: how many connections, how much memory, and for how long."""

import asyncio
import socket
import struct
import tracemalloc

import pytest

from tests.serving.gateway.raw_client import QUICK, Edge, refusal, request, run


def test_too_many_connections() -> None:
    async def test(edge: Edge) -> None:
        clients = [await edge.connect() for _ in range(QUICK.max_connections + 1)]
        await asyncio.sleep(0.02)
        clients[-1].send(request("/"))
        status, headers, _ = await clients[-1].response()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        clients[0].send(request("/"))
        assert (await clients[0].response())[0] == 200
        clients[0].writer.close()
        clients[-1].writer.close()
        await asyncio.sleep(0.05)
        client = await edge.connect()
        client.send(request("/"))
        assert (await client.response())[0] == 200

    run(test)


def test_the_longest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.connection.SPARE_AFTER", 0.1)

    async def test(edge: Edge) -> None:
        clients = [await edge.connect() for _ in range(QUICK.max_connections)]
        for client in clients:
            client.send(request("/"))
            await client.response()
        await asyncio.sleep(0.12)
        streaming, used, oldest, *others = clients
        streaming.send(request("/stream"))
        used.send(request("/"))
        await used.response()
        new = [await edge.connect() for _ in range(2)]
        for client in new:
            client.send(request("/new"))
            assert (await client.response())[2] == b"/new"
        assert await oldest.closed()
        assert await others[0].closed()
        for client in (used, *others[1:]):
            client.send(request("/"))
            assert (await client.response())[0] == 200
        last = await edge.connect()  # none is idle long enough
        last.send(request("/"))
        assert (await last.response())[0] == 503
        edge.app.finish.set()
        assert (await streaming.response())[2] == b"firstlast"
        assert edge.refused == ["connections"]

    run(test, QUICK.model_copy(update={"keep_alive": 30.0}))


def test_a_client_that_does_not_read_is_ended() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/flood"))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(3):
            await edge.app.lost.wait()
        assert edge.refused == ["send_timeout"]
        await asyncio.sleep(0.05)
        assert not edge.server.connections
        assert not edge.server.running

    run(test)


@pytest.mark.parametrize("seen_by", ["the sweep", "the next answer"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_requests_behind_another_is_missed(seen_by: str, reset: bool) -> None:
    """Its connection is not read from while they wait, so nothing tells that it has left."""

    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(request("/stream") + request("/echo", body=b"x" * 1000) + request("/third"))
        await client.reader.readuntil(b"first")
        assert edge.server.buffered == 1000
        if reset:
            linger = struct.pack("ii", 1, 0)
            client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.writer.close()
        await client.writer.wait_closed()
        if seen_by == "the sweep":
            async with asyncio.timeout(1):
                await edge.app.lost.wait()
        edge.app.finish.set()
        await asyncio.sleep(0.05)
        assert edge.app.seen == ["/stream"]
        assert edge.server.buffered == 0
        assert not edge.server.connections
        assert not edge.server.running

    run(test)


def test_memory_of_bodies_that_arrive_is_bounded() -> None:
    async def test(edge: Edge) -> None:
        edge.server.max_buffered = 100_000
        part = request("/echo", body=bytes(90_000))[:-1]
        clients = [await edge.connect(), await edge.connect()]
        clients[0].send(part)
        await asyncio.sleep(0.05)
        clients[1].send(part)
        await refusal(clients[1], 503)
        clients[0].send(b"\0")
        assert (await clients[0].response())[0] == 200
        assert edge.server.buffered == 0

    run(test)


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_its_size() -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunks, size = b"2\r\nab\r\n" * 50_000, 100_000
        tracemalloc.start()
        try:
            client.send(chunks)
            async with asyncio.timeout(5):
                while edge.server.buffered < size:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert tracemalloc.get_traced_memory()[0] < 2 * size
        finally:
            tracemalloc.stop()
        client.send(b"0\r\n\r\n")
        assert (await client.response())[2] == b"ab" * 50_000

    run(test, QUICK.model_copy(update={"body_timeout": 10.0}))
