"""The gateway's processes with TLS, and with a listener for operators, while workers and certificates are replaced."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from typer.testing import CliRunner

from clients.cli import app
from tests.serving.gateway.certificates import Authority
from tests.serving.gateway.doubles import CHAT, Engine
from tests.serving.gateway.test_workers import Gateway, write_settings

pytestmark = pytest.mark.timeout(180)
by_workers = pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])


@asynccontextmanager
async def gateway(config: Path, workers: int, *arguments: str) -> AsyncIterator[tuple[Gateway, str]]:
    """A supervisor with its workers, and the root of its admin listener."""
    with socket.create_server(("127.0.0.1", 0)) as main, socket.create_server(("127.0.0.1", 0)) as admin:
        fds = (main.fileno(), admin.fileno())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serving.gateway.supervisor", "--fd", str(fds[0]), "--admin-fd", str(fds[1]),
            "--config", str(config), "--workers", str(workers), *arguments, pass_fds=fds,
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(config.parent)},
        )  # fmt: skip
        scheme = "https" if "--tls" in arguments else "http"
        running = Gateway(process, main.getsockname()[1])
        running.root = f"{scheme}://localhost:{main.getsockname()[1]}"
        operators = f"{scheme}://localhost:{admin.getsockname()[1]}"
    try:
        await running.says(f"ready: {scheme}://")
        yield running, operators
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await running.reader


async def get(session: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with session.get(url) as response:
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text


@by_workers
def test_operators_have_a_listener_of_their_own(workers: int, tmp_path: Path) -> None:
    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(Engine().running())
            write_settings(config, engine, admin={"port": 0}, home=str(tmp_path / "home"))
            running, operators = await stack.enter_async_context(gateway(config, workers))
            connector = aiohttp.TCPConnector(limit=1)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

            async def check() -> None:
                assert (await get(session, operators + "/metrics"))[0] == 200
                assert (await get(session, operators + "/admin/keys"))[1]["error"]["code"] == "admin_disabled"
                assert (await get(session, operators + "/v1/models"))[0] == 404
                assert (await get(session, operators + "/health"))[0] == 200
                described = (await get(session, operators + "/openapi.json"))[1]["paths"]
                assert {"/metrics", "/admin/keys", "/health"} <= set(described)
                assert not [path for path in described if path.startswith("/v1")]

            await check()
            for path in ("/metrics", "/admin/keys", "/admin"):
                status, answer = await get(session, running.root + path)
                assert (status, answer["error"]["code"]) == (404, "not_found")
            described = (await get(session, running.root + "/openapi.json"))[1]["paths"]
            assert "/v1/chat/completions" in described
            assert not {"/metrics", "/admin/keys"} & set(described)
            await running.ask(session)
            asked = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
            async with session.options(running.root + CHAT, headers=asked) as response:
                assert response.status == 403
            more = {"admin": {"port": 0}, "home": str(tmp_path / "home")}
            write_settings(config, engine, cors={"origins": ["https://app.example.org"]}, **more)
            await running.says("has new settings", times=workers)
            async with session.options(running.root + CHAT, headers=asked) as response:
                assert response.status == 204
            await check()
            (kept,) = (c for key, c in connector._conns.items() if str(key.port) in operators)
            descriptor = id(kept[0][0].transport)
            before = running.workers()
            running.process.send_signal(signal.SIGUSR2)
            await running.says("have been replaced")
            assert not before & running.workers()
            await check()  # over the same connection, which another worker has now
            kept = next(c for key, c in connector._conns.items() if str(key.port) in operators)
            assert id(kept[0][0].transport) == descriptor
            running.process.send_signal(signal.SIGTERM)
            assert await running.process.wait() == 0

    uvloop.run(main())


@by_workers
def test_tls_workers_and_certificates_are_replaced_without_a_failed_request(workers: int, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder = tmp_path / "tls"
    folder.mkdir()

    def install(name: str) -> None:
        for source, target in zip(authority.issue(name), ("chain.pem", "key.pem"), strict=True):
            shutil.copy(source, folder / target)

    install("first")

    async def main() -> None:
        config = tmp_path / "gateway.json"
        done = 0
        failures: list[str] = []
        stop = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(Engine().running())
            tls = {"certificate": str(folder / "chain.pem"), "key": str(folder / "key.pem")}
            more = {"tls": tls, "admin": {"port": 0}, "home": str(tmp_path / "home"), "http": {"keep_alive": 3.0}}
            write_settings(config, engine, **more)
            running, operators = await stack.enter_async_context(gateway(config, workers, "--tls"))

            async def ask_on(stream: bool) -> None:
                nonlocal done
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=authority.context())) as session:
                    while not stop.is_set():
                        try:
                            await running.ask(session, stream)
                            done += 1
                        except (aiohttp.ClientError, AssertionError) as e:
                            failures.append(repr(e))
                        await asyncio.sleep(0.05)

            async def served() -> str:
                """Name of the certificate that a new connection gets."""
                port, context = int(running.root.rpartition(":")[2]), authority.context()
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
                (((_, name),),) = writer.get_extra_info("peercert")["subject"]
                writer.close()
                return str(name)

            asking = [asyncio.create_task(ask_on(stream)) for stream in (False, True, False, True)]
            assert await served() == "first"
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=authority.context())) as session:
                assert (await get(session, operators + "/metrics"))[0] == 200
            install("second")
            await running.says("has a new TLS certificate", times=workers)
            assert await served() == "second"
            (folder / "key.pem").write_text("half")
            await running.says("the new TLS files are not valid, the old ones stay", times=workers)
            assert await served() == "second"
            install("third")
            running.process.send_signal(signal.SIGHUP)
            await running.says("has a new TLS certificate", times=2 * workers)
            before = running.workers()
            running.process.send_signal(signal.SIGUSR2)
            await running.says("have been replaced")
            async with asyncio.timeout(30):
                while before & running.workers():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert await served() == "third"
            stop.set()
            await asyncio.gather(*asking)
            assert failures == []
            assert done > 20
            running.process.send_signal(signal.SIGTERM)
            assert await running.process.wait() == 0

    uvloop.run(main())


def test_the_commands_check_the_files_before_they_serve(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    config = tmp_path / "gateway.json"
    tls = {"certificate": str(certificate), "key": str(key)}
    config.write_text(json.dumps({"models": {"m": {"engines": [{"url": "http://127.0.0.1:9"}]}}, "tls": tls}))
    check = CliRunner().invoke(app, ["gateway", "--config", str(config), "--check"])
    assert check.exit_code == 0, check.output
    key.write_text("nothing")
    for command in ("gateway", "serve"):
        refused = CliRunner().invoke(app, [command, "--config", str(config)])
        assert refused.exit_code != 0
        assert "tls.certificate and tls.key" in refused.output + str(refused.exception)


@pytest.mark.slow
@pytest.mark.parametrize("certified", [False, True], ids=["anybody", "certified clients"])
def test_serve_with_tls_finds_out_that_it_is_ready(certified: bool, tmp_path: Path) -> None:
    async def main() -> None:
        authority = Authority(tmp_path)
        certificate, key = authority.issue("server")
        tls = {"certificate": str(certificate), "key": str(key)}
        if certified:
            tls["client_ca"] = str(authority.file)
        config = tmp_path / "gateway.json"
        async with Engine().running() as engine:
            write_settings(config, engine, tls=tls, port=0, home=str(tmp_path / "home"))
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "clients.cli", "serve", "--config", str(config), stderr=asyncio.subprocess.PIPE
            )
            running = Gateway(process, 0)
            try:
                await running.says("ready: https://")
                (line,) = (line for line in running.said if "ready: https://" in line)
                port = int(line.split("/v1")[0].rpartition(":")[2])
                context = authority.context(authority.issue("client") if certified else None)
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
                    assert (await get(session, f"https://localhost:{port}/ready"))[0] == 200
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
                await running.reader

    asyncio.run(main())
