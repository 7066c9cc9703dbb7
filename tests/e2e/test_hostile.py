"""Hostile requests: hundreds at a gateway before a double that writes down what reaches it, some at a real engine."""

import asyncio
import random
from pathlib import Path

import pytest

from loadtest.gateway import hostile
from loadtest.gateway.hostile_advisories import advisory
from loadtest.gateway.processes import gateway
from tests.e2e.server import Server

pytestmark = pytest.mark.engine


def test_nothing_hostile_is_answered_with_500_hangs_or_reaches_the_engine(tmp_path: Path) -> None:
    outcomes, _ = hostile.run(600, seed=6, folder=tmp_path, slow_at_once=40)
    assert not outcomes.failures, (outcomes.failures, outcomes.examples)
    assert outcomes.counts.total() > 600


def test_a_real_engine_survives_every_kind_of_advisory(server: Server, tmp_path: Path) -> None:
    chosen = random.Random(6)
    cases = [advisory(chosen, f"case-{number}-") for number in range(120)]
    pid, restarts = server.engine["pid"], server.log.count("starting again")
    answered = server.engine_metric("request_success_total")

    async def attack(port: int) -> list[tuple[list[str], str]]:
        return [hostile.judge(case, await hostile.send(port, case, 20)) for case in cases]

    engine = f"{hostile.MODEL}=unix:{server.engine['socket']}"
    with gateway(tmp_path, "--engine", engine) as target:
        found = asyncio.run(attack(int(target.url.rpartition(":")[2])))
    for case, (words, fault) in zip(cases, found, strict=True):
        assert (words, fault) == (["400"], ""), case
    # Two canaries at most: the other gateway's, and this one's.
    assert server.engine_metric("request_success_total") - answered <= 2
    assert server.post("/v1/completions", {"model": server.model, "prompt": "x", "max_tokens": 1})[0] == 200
    assert (server.engine["pid"], server.log.count("starting again")) == (pid, restarts)
