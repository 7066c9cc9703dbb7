"""The gateway as processes: a supervisor and its workers, restarted, killed and replaced under load."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from serving.gateway.workers import WorkerFailed, Workers
from tests.serving.gateway.doubles import CHAT, DONE, USAGE_EVENT, Engine, chunk

pytestmark = pytest.mark.timeout(180)


async def slow_stream(engine: Engine, request: Any, body: dict[str, Any]) -> Any:
    """A stream of almost a second."""
    response = await engine.begin(request)
    for _ in range(8):
        await response.write(chunk("a"))
        await asyncio.sleep(0.1)
    for piece in (USAGE_EVENT, DONE):
        await response.write(piece)
    return response


class Gateway:
    """A supervisor process, and the lines it has said."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.root = process, f"http://127.0.0.1:{port}"
        self.said: list[str] = []
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(line.decode())

    async def says(self, text: str, times: int = 1, limit: float = 60.0) -> None:
        async with asyncio.timeout(limit):
            while sum(text in line for line in self.said) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def workers(self) -> set[int]:
        """Process ids of the supervisor's children."""
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    async def ask(self, session: aiohttp.ClientSession, stream: bool = False) -> str:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        async with session.post(self.root + CHAT, json=body) as response:
            assert response.status == 200, await response.text()
            return await response.text()


def write_settings(path: Path, engine: Engine, **more: Any) -> None:
    content = {
        "models": {"m": {"engines": [{"url": engine.url}]}},
        "probes": {"interval": 0.2, "canary_interval": 0},
        "drain": 3,
        **more,
    }
    path.write_text(json.dumps(content))


@asynccontextmanager
async def gateway(config: Path, workers: int, *arguments: str) -> AsyncIterator[Gateway]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        command = ["--fd", str(fd), "--config", str(config), "--workers", str(workers), *arguments]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serving.gateway.supervisor", *command, pass_fds=(fd,),
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(config.parent)},
        )  # fmt: skip
        port = listener.getsockname()[1]
    running = Gateway(process, port)
    try:
        await running.says("ready: http://")
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await running.reader


def gone(pids: set[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():  # dead, and not yet asked for by its parent
                return False
    return True


async def until_gone(pids: set[int]) -> None:
    async with asyncio.timeout(30):
        while not gone(pids):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_reload_and_rolling_restart_under_load_fail_no_request(tmp_path: Path) -> None:
    async def main() -> None:
        config = tmp_path / "gateway.json"
        failures: list[str] = []
        done = 0
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(Engine().running())
            streaming = await stack.enter_async_context(Engine(slow_stream).running())
            write_settings(config, engine)
            running = await stack.enter_async_context(gateway(config, 2))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            before = running.workers()
            rolled = False
            idle = await stack.enter_async_context(aiohttp.ClientSession())
            await running.ask(idle)
            (connection,) = (c for kept in idle.connector._conns.values() for c, _ in kept)  # type: ignore[union-attr]

            async def load(stream: bool) -> None:
                nonlocal done
                while not rolled:
                    try:
                        text = await running.ask(session, stream)
                        assert not stream or text.endswith("data: [DONE]\n\n"), text
                        done += 1
                    except (aiohttp.ClientError, AssertionError) as e:
                        failures.append(repr(e))
                    await asyncio.sleep(0.1)

            loads = asyncio.gather(*(load(i % 5 == 0) for i in range(20)))
            await asyncio.sleep(0.3)
            write_settings(config, streaming)
            running.process.send_signal(signal.SIGHUP)
            await running.says("has new settings", 2)
            await asyncio.sleep(0.3)
            running.process.send_signal(signal.SIGUSR2)
            await running.says("the workers have been replaced")
            rolled = True
            await loads
            assert not failures
            assert done > 50
            assert streaming.received
            assert len(running.workers()) == 2
            assert not before & running.workers()
            assert connection.is_connected()
            await running.ask(idle)
            await session.close()
            await idle.close()
            running.process.terminate()
            assert await running.process.wait() == 0

    uvloop.run(main())


def test_stop_lets_streams_finish_and_refuses_what_is_new(tmp_path: Path) -> None:
    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine(slow_stream).running() as engine, aiohttp.ClientSession() as session:
            write_settings(config, engine)
            async with gateway(config, 1) as running:
                workers = running.workers()
                stream = asyncio.create_task(running.ask(session, stream=True))
                await asyncio.sleep(0.3)
                running.process.terminate()
                assert (await stream).endswith("data: [DONE]\n\n")
                async with asyncio.timeout(30):
                    assert await running.process.wait() == 0
                assert gone(workers)
                with pytest.raises(aiohttp.ClientConnectorError):
                    await running.ask(session)

    uvloop.run(main())


def test_drain_has_an_end_and_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    async def endless(engine: Engine, request: Any, body: dict[str, Any]) -> Any:
        response = await engine.begin(request)
        while True:
            await response.write(chunk("a"))
            await asyncio.sleep(0.05)

    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine(endless).running() as engine, aiohttp.ClientSession() as session:
            write_settings(config, engine, drain=0.5)
            async with gateway(config, 1) as running:
                stream = asyncio.create_task(running.ask(session, stream=True))
                await asyncio.sleep(0.3)
                running.process.terminate()
                assert '"shutting_down"' in await stream
                assert await running.process.wait() == 0
            write_settings(config, engine, drain=60)
            async with gateway(config, 1) as running:
                workers = running.workers()
                stream = asyncio.create_task(running.ask(session, stream=True))
                await asyncio.sleep(0.3)
                running.process.terminate()
                await running.says("stopping")
                running.process.terminate()
                with pytest.raises(aiohttp.ClientError):
                    await stream
                async with asyncio.timeout(30):
                    await running.process.wait()
                assert gone(workers)

    uvloop.run(main())


def test_a_replaced_worker_is_not_in_a_hurry_until_all_stop(tmp_path: Path) -> None:
    endless = asyncio.Event()

    async def answer(engine: Engine, request: Any, body: dict[str, Any]) -> Any:
        if not endless.is_set():
            return await slow_stream(engine, request, body)
        response = await engine.begin(request)
        while True:
            await response.write(chunk("a"))
            await asyncio.sleep(0.05)

    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine(answer).running() as engine, aiohttp.ClientSession() as session:
            write_settings(config, engine, drain=0.2)
            async with gateway(config, 1) as running:
                stream = asyncio.create_task(running.ask(session, stream=True))
                await asyncio.sleep(0.1)
                running.process.send_signal(signal.SIGUSR2)
                assert (await stream).endswith("data: [DONE]\n\n")
                await running.says("the workers have been replaced")
                endless.set()
                before = running.workers()
                stream = asyncio.create_task(running.ask(session, stream=True))
                await asyncio.sleep(0.1)
                running.process.send_signal(signal.SIGUSR2)
                await running.says("the workers have been replaced", 2)
                (new,) = running.workers() - before
                os.kill(new, signal.SIGKILL)
                await running.says("is back")
                assert not stream.done()
                began = time.monotonic()
                running.process.terminate()
                assert '"shutting_down"' in await stream
                assert await running.process.wait() == 0
                assert time.monotonic() - began < 20

    uvloop.run(main())


def test_a_reloaded_drain_is_kept_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.workers.MARGIN", 0.1)

    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine(slow_stream).running() as engine, aiohttp.ClientSession() as session:
            write_settings(config, engine, drain=0.1)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                said: list[str] = []
                workers = Workers(listener, config, 1, said.append)
                await workers.start()
                root = f"http://127.0.0.1:{listener.getsockname()[1]}"
                write_settings(config, engine, drain=8)
                workers.reload()
                await asyncio.sleep(0.3)
                body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
                async with session.post(root + CHAT, json=body) as response:
                    stop = asyncio.create_task(workers.stop())
                    assert (await response.text()).endswith("data: [DONE]\n\n")
                await session.close()
                await stop
                assert said == []

    uvloop.run(main())


def test_processes_are_small_and_may_be_killed(tmp_path: Path) -> None:
    """A worker is replaced; a supervisor takes its workers with it."""

    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine().running() as engine:
            write_settings(config, engine)
            async with gateway(config, 2) as running:
                before = running.workers()
                victim = min(before)
                assert resident(running.process.pid) + resident(victim) < 100
                assert not any(name in mapped(victim) for name in ("/torch/", "/numpy/", "/vllm/"))
                assert "pydantic" not in mapped(running.process.pid)
                os.kill(victim, signal.SIGKILL)
                await running.says("is back")
                after = running.workers()
                assert len(after) == 2
                assert after & before == before - {victim}
                async with aiohttp.ClientSession() as session:
                    await running.ask(session)
                    async with asyncio.timeout(30):  # it is counted after its last byte
                        while await counted(session, running) != ["1.0"]:  # noqa: ASYNC110
                            await asyncio.sleep(0.02)
                    for worker in after:
                        os.kill(worker, signal.SIGKILL)
                    await running.says("is back", 3)
                    assert await counted(session, running) == ["1.0"]
                after = running.workers()
                running.process.kill()
                await until_gone(after)

    uvloop.run(main())


def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep a gateway from starting, and not from running on."""

    async def main() -> None:
        config = tmp_path / "gateway.json"
        async with Engine().running() as engine, aiohttp.ClientSession() as session:
            write_settings(config, engine)
            async with gateway(config, 1) as running:
                write_settings(config, engine, prot=1)
                running.process.send_signal(signal.SIGHUP)
                await running.says("the old ones stay")
                await running.ask(session)
                async with session.get(running.root + "/metrics") as response:
                    assert 'medassist_config_reloads_total{outcome="refused"} 1.0' in await response.text()
                running.process.send_signal(signal.SIGUSR2)  # a new worker cannot start
                await running.says("have not been replaced stay")
                await running.ask(session)
        said: list[str] = []
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "medassist-metrics-left").mkdir()  # by a supervisor that was killed an hour ago
        os.utime(tmp_path / "medassist-metrics-left", (time.time() - 3600,) * 2)
        os.mkfifo(tmp_path / "medassist-metrics-pipe")  # somebody's who wants us to wait for ever
        with socket.create_server(("127.0.0.1", 0)) as listener:
            workers = Workers(listener, config, 2, said.append)
            with pytest.raises(WorkerFailed, match="exit code 2 before it was ready"):
                await workers.start()
            began = time.monotonic()
            await workers.stop()
            assert time.monotonic() - began < 10
        assert [name for name in os.listdir(tmp_path) if name.startswith("medassist-metrics-")] == [
            "medassist-metrics-pipe"
        ]

    uvloop.run(main())


async def counted(session: aiohttp.ClientSession, running: Gateway) -> list[str]:
    """The numbers of answered requests."""
    async with session.get(running.root + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return [line.rsplit(" ")[-1] for line in lines if line.startswith("medassist_requests_total{")]


def resident(pid: int) -> float:
    """MiB of a process's memory that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def mapped(pid: int) -> str:
    """The files that a process has loaded."""
    return Path(f"/proc/{pid}/maps").read_text()
