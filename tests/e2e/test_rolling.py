"""Changes while requests run: not one of them may fail. A server of its own for each test."""

import asyncio
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.e2e.server import CHECKPOINT, Server
from tests.waiting import until

pytestmark = pytest.mark.engine

MODEL = CHECKPOINT.name


@dataclass
class Load:
    """Clients that each ask again when they have their answer, over connections that stay open."""

    server: Server
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    stopped: bool = False

    async def run(self, clients: int) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            await asyncio.gather(*(self._ask(session, stream=number % 2 == 1) for number in range(clients)))

    async def _ask(self, session: aiohttp.ClientSession, stream: bool) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "What is asthma?"}], "max_tokens": 8,
                "stream": stream}  # fmt: skip
        while not self.stopped:
            try:
                async with session.post(f"{self.server.base_url}/chat/completions", json=body) as response:
                    answer = (await response.read()).rstrip()
                whole = answer.endswith(b"data: [DONE]") if stream else b'"choices"' in answer
                if response.status != 200 or not whole or b'"error"' in answer:
                    self.failures.append(f"{response.status} {answer[-300:]!r}")
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                self.failures.append(repr(e))
            self.answered += 1
            await asyncio.sleep(0.1)


def restart_everything(server: Server, config: Path, load: Load, alias: str) -> None:
    """Restarts workers and engines; meanwhile the configuration changes, first to one that cannot be used."""
    good = yaml.safe_load(config.read_text())
    config.write_text("models: {}\n")
    server.process.send_signal(signal.SIGHUP)
    assert until(lambda: server.log.count("stays as it was") == 1 + len(good["aliases"])), server.log

    before = server.state
    server.process.send_signal(signal.SIGUSR2)
    config.write_text(yaml.safe_dump(good | {"aliases": good["aliases"] | {alias: MODEL}}))
    assert until(lambda: server.log.count("every engine has been restarted") > len(good["aliases"]), 300), server.log
    assert until(lambda: alias in server.get("/v1/models")[1]), server.log

    after = server.state
    assert len(after["engines"]) == 2
    assert not {e["pid"] for e in before["engines"]} & {e["pid"] for e in after["engines"]}
    assert not {*before["workers"]} & {*after["workers"]}
    answered = load.answered
    assert until(lambda: load.answered > answered + 20), "no requests any more"


def fail_to_restart(server: Server, checkpoint: Path) -> None:
    """With weights that are not those that were trained."""
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = server.state
    server.process.send_signal(signal.SIGUSR2)
    assert until(lambda: "what has not been exchanged stays as it was" in server.log), server.log
    assert "model.safetensors is not the file that was trained" in server.log
    assert server.state["engines"] == before["engines"]
    weights.write_bytes(whole)


def check(directory: Path, clients: int, times: int, *arguments: str) -> None:
    config = directory / "gateway.yaml"
    checkpoint = Path(shutil.copytree(CHECKPOINT, directory / MODEL))
    model = {"checkpoint": str(checkpoint), "replicas": 2}
    config.write_text(yaml.safe_dump({"models": {MODEL: model}, "aliases": {}}))
    server = Server(None, directory / "logs", "--config", str(config), *arguments)
    load = Load(server)

    async def restart_under_load() -> None:
        asking = asyncio.ensure_future(load.run(clients))
        try:
            await asyncio.to_thread(fail_to_restart, server, checkpoint)
            for number in range(times):
                await asyncio.to_thread(restart_everything, server, config, load, f"alias-{number}")
        finally:
            load.stopped = True
            await asking

    try:
        server.wait_ready()
        assert until(lambda: all(engine["state"] == "ready" for engine in server.state["engines"])), server.log
        asyncio.run(restart_under_load())
        assert load.failures == [], f"{len(load.failures)} of {load.answered} failed\n{server.log}"
        assert server.stop() == 0, server.log
    finally:
        server.stop()


@pytest.mark.slow
def test_restarting_everything_fails_no_request(tmp_path: Path) -> None:
    check(tmp_path, 4, 1)


@pytest.mark.slow
def test_restarting_everything_again_and_again_under_load_fails_no_request(tmp_path: Path) -> None:
    check(tmp_path, 24, 3, "--workers", "2")
