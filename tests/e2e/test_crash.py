"""Two engines that die in turn under 64 streams, and then both. A server of its own."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from loadtest.gateway.crash import ALLOWED, engine_pids, kill_under_streams, until_back
from tests.e2e.server import CHECKPOINT, START_LIMIT, Server

pytestmark = pytest.mark.engine

STREAMS, TOKENS = 64, 200


async def crash(server: Server) -> None:
    back = await until_back(server.root, server.model, 2, START_LIMIT)
    assert back.seconds is not None, server.log
    workers = server.state["workers"]

    for number in range(2):
        pid = engine_pids(server.log_dir)[number]
        outcomes = await kill_under_streams(
            server.root, server.model, STREAMS, TOKENS, partial(os.kill, pid, signal.SIGKILL)
        )
        assert set(outcomes) <= ALLOWED, (outcomes, server.log)
        assert outcomes["had bytes, error event"], f"it died without a stream: {outcomes}"
        assert outcomes["had none, answered"], outcomes
        if number == 0:
            back = await until_back(server.root, server.model, 2, START_LIMIT)
            assert set(back.statuses) == {200}, f"the other did not keep serving: {back}"
            assert back.seconds is not None, f"it did not come back: {server.log}"

    # The second is not back yet when the first dies.
    os.kill(engine_pids(server.log_dir)[0], signal.SIGKILL)
    back = await until_back(server.root, server.model, 2, START_LIMIT)
    assert set(back.statuses) == {200, 503}, back
    assert back.honest, f"a 503 without Retry-After: {back}"
    assert back.seconds is not None, f"they did not come back: {server.log}"
    assert server.state["workers"] == workers, "the gateway was restarted"


@pytest.mark.slow
def test_engines_that_die_in_turn_and_together(tmp_path: Path) -> None:
    server = Server(CHECKPOINT, tmp_path / "logs", "--replicas", "2")
    try:
        server.wait_ready()
        asyncio.run(crash(server))
        assert server.stop() == 0, server.log
    finally:
        server.stop()
