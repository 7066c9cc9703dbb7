"""TLS at the HTTP server: what is spoken, what is refused, and certificates that change."""

import asyncio
import hashlib
import shutil
import socket
import ssl
from pathlib import Path

import pytest

from serving.gateway.edge import create_server
from serving.gateway.operations import Tls
from serving.gateway.tls import Certificates, create_context, keep_fresh
from tests.serving.gateway.certificates import Authority
from tests.serving.gateway.raw_client import QUICK, Client, Edge, refusal, request, run
from tests.waiting import eventually


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> Tls:
    certificate, key = authority.issue("server")
    return Tls(certificate=certificate, key=key)


def test_requests(authority: Authority, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        scopes = []
        inner = edge.server.app

        async def app(scope: object, receive: object, send: object) -> None:
            scopes.append(scope["scheme"])  # type: ignore[index]
            await inner(scope, receive, send)  # type: ignore[arg-type]

        edge.server.app = app  # type: ignore[assignment]
        context = authority.context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        client = await edge.connect(context)
        spoken = client.writer.get_extra_info("ssl_object")
        assert (spoken.version(), spoken.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
        client.send(b"".join(request(f"/{i}") for i in range(5)))
        assert [(await client.response())[2] for _ in range(5)] == [b"/%d" % i for i in range(5)]
        client.send(request("/echo", body=b"ab"))
        _, headers, body = await client.response()
        assert body == b"ab"
        assert headers["strict-transport-security"].startswith("max-age=")
        assert scopes == ["https"] * 6
        older = authority.context()
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        client = await edge.connect(older)
        assert "GCM" in client.writer.get_extra_info("cipher")[0]
        client.send(request("/old"))
        assert (await client.response())[2] == b"/old"

    run(test, certificates=Certificates(files))


def test_large_bodies_both_ways_and_a_slow_reader(authority: Authority, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        body = bytes(range(256)) * 700
        client = await edge.connect(authority.context())
        for _ in range(3):
            client.send(request("/echo", body=body))
            answer = (await client.response(20))[2]
            assert hashlib.sha256(answer).digest() == hashlib.sha256(body).digest()
        client.send(request("/flood"))
        await asyncio.sleep(0.2)
        (connection,) = edge.server.connections
        assert connection.transport.get_write_buffer_size() < 4 * 2**20
        await client.reader.readuntil(b"\r\n\r\n")
        for _ in range(1024):
            piece = await asyncio.wait_for(client.reader.readexactly(len(b"10000\r\n") + 65536 + 2), 20)
            assert piece.strip(bytes(1)) == b"10000\r\n" + bytes(65536) + b"\r\n"

    run(test, QUICK.model_copy(update={"send_timeout": 10.0}), certificates=Certificates(files))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (request("/", "Authorization: Bearer secret"), "malformed"),
        (b"\x16\x03\x01\x00\x05garbage and more of it", "tls"),
    ],
)
def test_what_speaks_no_tls(what: bytes, reason: str, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect()
        client.send(what)
        if reason == "malformed":
            assert "speaks TLS: use https://" in (await refusal(client, 400))["message"]
        else:
            assert await client.closed() is False  # an alert says why
        assert edge.app.seen == []
        assert edge.refused == [reason]

    run(test, certificates=Certificates(files))


def test_old_versions_are_refused(authority: Authority, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await edge.connect(old)
        weak = authority.context()
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers("AES128-SHA:ECDHE-ECDSA-AES128-SHA")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await edge.connect(weak)

    run(test, certificates=Certificates(files))


def test_a_handshake_that_never_ends_counts_and_is_ended(files: Tls) -> None:
    async def test(edge: Edge) -> None:
        hello = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
        first = hello.read()
        silent, started, slow = [await edge.connect() for _ in range(3)]
        started.send(first)
        assert await eventually(lambda: len(edge.server.connections) == 3)

        async def trickle() -> None:
            for byte in first:
                slow.send(bytes([byte]))
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        assert await silent.closed()
        await started.closed()
        await slow.closed()
        assert await eventually(lambda: not edge.server.connections)
        trickling.cancel()

    run(test, QUICK.model_copy(update={"header_timeout": 1.5}), certificates=Certificates(files))


def test_clients_with_certificates(authority: Authority, files: Tls, tmp_path: Path) -> None:
    ours, stranger = authority.issue("client"), Authority(tmp_path, "stranger").issue("client")

    async def test(edge: Edge) -> None:
        async def ask(context: ssl.SSLContext) -> None:
            client = await edge.connect(context)
            client.send(request("/"))
            await client.response()  # with TLS 1.3 it is here that a client learns it

        for context in (authority.context(), authority.context(stranger)):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await ask(context)
        client = await edge.connect(authority.context(ours))
        client.send(request("/known"))
        assert (await client.response())[2] == b"/known"
        assert edge.app.seen == ["/known"]
        assert edge.refused == ["tls", "tls"]

    run(test, certificates=Certificates(files.model_copy(update={"client_ca": authority.file})))


def test_refusals_are_read_though_the_client_goes_on_sending(authority: Authority, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        client = await edge.connect(authority.context())
        client.send(request("/echo", body=bytes(400_000)))
        assert (await refusal(client, 413))["code"] == "request_too_large"
        client = await edge.connect(authority.context())
        client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc")
        assert (await refusal(client, 408))["code"] == "request_timeout"
        client = await edge.connect(authority.context())
        assert await client.closed()  # without a request

    run(test, certificates=Certificates(files))


def test_a_client_that_leaves_ends_its_request(authority: Authority, files: Tls) -> None:
    async def test(edge: Edge) -> None:
        for leave in ("close", "abort"):
            edge.app.lost.clear()
            client = await edge.connect(authority.context())
            client.send(request("/stream"))
            await client.reader.readuntil(b"first")
            client.writer.close() if leave == "close" else client.writer.transport.abort()
            async with asyncio.timeout(3):
                await edge.app.lost.wait()
        assert await eventually(lambda: not edge.server.connections)
        assert edge.app.disconnects == 2

    run(test, certificates=Certificates(files))


def test_new_certificates_are_used_and_bad_ones_are_not(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    files = Tls(certificate=folder / "chain.pem", key=folder / "key.pem")

    def install(name: str) -> None:
        for source, target in zip(authority.issue(name), (files.certificate, files.key), strict=True):
            assert target is not None
            shutil.copy(source, target)

    install("first")
    certificates = Certificates(files)
    said: list[str] = []

    async def test(edge: Edge) -> None:
        async def says(text: str) -> bool:
            return await eventually(lambda: any(text in line for line in said))

        async def served() -> tuple[Client, str]:
            client = await edge.connect(authority.context())
            ((((_, name),),),) = (client.writer.get_extra_info("peercert")["subject"],)
            client.send(request("/"))
            assert (await client.response())[0] == 200
            return client, name

        asked = asyncio.Event()
        fresh = asyncio.create_task(keep_fresh(certificates, said.append, asked, interval=0.03))
        old, name = await served()
        assert name == "first"
        install("second")
        assert await says("has a new TLS certificate")
        assert (await served())[1] == "second"
        old.send(request("/still"))
        assert (await old.response())[2] == b"/still"
        said.clear()
        assert files.key is not None
        files.key.write_text("half a key")
        assert await says("the old ones stay: tls.certificate and tls.key")
        await asyncio.sleep(0.1)
        assert len(said) == 1  # told once
        assert (await served())[1] == "second"
        files.key.unlink()
        assert await says("cannot be read (No such file")
        assert (await served())[1] == "second"
        said.clear()
        fresh.cancel()
        fresh = asyncio.create_task(keep_fresh(certificates, said.append, asked, interval=60))
        install("third")
        asked.set()  # as a SIGHUP does
        assert await says("has a new")
        assert (await served())[1] == "third"
        fresh.cancel()

    run(test, QUICK.model_copy(update={"keep_alive": 30.0}), certificates=certificates)


def test_files_that_cannot_be_used_are_named(authority: Authority, files: Tls, tmp_path: Path) -> None:
    other, encrypted = authority.issue("other"), authority.issue("encrypted", b"password")
    text = tmp_path / "text.pem"
    text.write_text("nothing")
    for change, words in (
        ({"key": other[1]}, "are no pair"),
        ({"certificate": text}, "are no pair"),
        ({"certificate": encrypted[0], "key": encrypted[1]}, "is encrypted: give a key without a passphrase"),
        ({"certificate": tmp_path / "none"}, "tls.certificate: .*none cannot be read"),
        ({"client_ca": text}, "tls.client_ca: .* holds no certificates"),
    ):
        with pytest.raises(ValueError, match=words):
            create_context(files.model_copy(update=change))


def test_a_replaced_process_ends_connections_only_where_they_ask_or_are_idle_for_long(
    authority: Authority, files: Tls
) -> None:
    """The keys of a connection are in one process: no other can take it over."""

    async def test(edge: Edge) -> None:
        busy, idle, streaming = [await edge.connect(authority.context()) for _ in range(3)]
        for client in (busy, idle):
            client.send(request("/"))
            await client.response()
        streaming.send(request("/stream"))
        await streaming.reader.readuntil(b"first")
        other = create_server(edge.app, QUICK, certificates=edge.server.certificates)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await other.start([listener])
        edge.server.retire(lambda fd, used, admin: pytest.fail("a TLS connection was given away"))
        await asyncio.sleep(0.3)
        busy.send(request("/last"))
        _, headers, body = await busy.response()
        assert (body, headers["connection"]) == (b"/last", "close")
        assert await busy.closed()
        assert len(edge.server.connections) == 2  # the idle one may be used still
        assert await idle.closed(6)
        edge.app.finish.set()
        await streaming.reader.readuntil(b"last")
        await asyncio.wait_for(edge.server.drained(), 3)
        await other.stop()

    run(test, QUICK.model_copy(update={"keep_alive": 2.0}), certificates=Certificates(files))
