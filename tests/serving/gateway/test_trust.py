"""What canaries bring about in a replica."""

import asyncio
import json
from pathlib import Path

import pytest

from serving.gateway import canary, replica, trust
from serving.gateway.canary import CanaryBaseline
from serving.gateway.settings import EngineAt, Probes
from tests.serving.gateway.faulty_engine import FaultyEngine, running
from tests.serving.gateway.watched import Watched, run, watching
from tests.waiting import eventually


def test_garbage_is_never_served_and_a_replica_that_turns_to_it_is_taken_out() -> None:
    async def work() -> None:
        good, bad = FaultyEngine(), FaultyEngine()
        bad.logprobs = [-9.0, -9.0, -9.0, -9.0]
        async with running(good, bad):
            probes = Probes(interval=0.03, timeout=5, canary_interval=0.1)
            baseline = CanaryBaseline()
            first = Watched(EngineAt(url=good.url), probes, baseline)
            second = Watched(EngineAt(url=bad.url), probes, baseline, "1")
            async with watching(first, second):
                assert first.replica.state == "ready"
                assert second.replica.state == "refused"
                assert "6.5 off those computed by demo[0] on average" in second.replica.reason
                assert not any("ready" in line for line in second.reports)
                assert first.metric("canaries_total", outcome="ok")
                assert second.metric("canaries_total", outcome="deviates")
                bad.logprobs = good.logprobs
                assert await eventually(lambda: second.replica.available)

                good.logprobs = [float("-9")] * 4
                assert await eventually(lambda: first.replica.state == "refused")
                assert "computed formerly" in first.replica.reason
                # Out of order altogether, and back with no answer to its canary: still refused.
                good.status["/v1/completions"] = 503
                await good.stop()
                assert await eventually(lambda: first.replica.state == "down")
                await good.start()
                assert await eventually(lambda: first.replica.state == "refused")
                assert await eventually(lambda: good.asked["/v1/completions"] > 5)
                assert first.replica.state == "refused"
                good.status, good.logprobs = {}, bad.logprobs
                assert await eventually(lambda: first.replica.available)

    run(work())


def test_canary_without_an_answer_holds_up_the_replica_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "PATIENCE", 0.2)

    async def work() -> None:
        engine = FaultyEngine()
        engine.delay["/v1/completions"] = 60
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.03, timeout=0.5))
            it = watched.replica
            async with watching(watched):
                assert (it.state, it.reason) == ("starting", "waits for its canary")
                await engine.stop()
                assert await eventually(lambda: it.reason == "connection refused")

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(canary, "TIMEOUT", 0.1)
                    await engine.start()
                    assert await eventually(lambda: it.available)  # too busy to answer is not wrong
                assert watched.metric("canaries_total", outcome="failed") == 1

    run(work())


def test_engine_that_answers_nothing_but_its_health_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TIMEOUT", 0.1)
    monkeypatch.setattr(trust, "RECHECK", 0.2)

    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.03, timeout=5, canary_interval=0.2))
            it = watched.replica
            async with watching(watched):
                assert it.available
                engine.delay["/v1/completions"] = 60
                asked = engine.asked["/v1/completions"]
                while engine.asked["/v1/completions"] < asked + 6:
                    it.began()  # it is only slow
                    assert it.available
                    await asyncio.sleep(0.02)
                assert await eventually(lambda: it.state == "down")
                assert it.reason == "answers neither requests nor canaries"
                asked = engine.asked["/v1/completions"]
                assert await eventually(lambda: engine.asked["/v1/completions"] > asked + 1)
                assert it.state == "down"
                engine.delay["/v1/completions"] = 0
                assert await eventually(lambda: it.available)

    run(work())


def test_client_that_waited_long_in_vain_brings_the_canary_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "RECHECK", 0.2)

    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url))
            it = watched.replica
            async with watching(watched):
                it.began()
                await asyncio.sleep(0.25)
                it.unanswered(0.1)  # not long
                it.unanswered(0.5)  # others were answered meanwhile
                await asyncio.sleep(0.1)
                assert engine.asked["/v1/completions"] == 1
                it.unanswered(0.3)
                assert await eventually(lambda: engine.asked["/v1/completions"] == 2)
                await asyncio.sleep(0.1)
                assert engine.asked["/v1/completions"] == 2

    run(work())


def test_one_accident_of_a_canary_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "REPEAT", 0.1)

    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.03, timeout=5, canary_interval=0.3))
            it = watched.replica
            async with watching(watched):
                engine.status["/v1/completions"] = 500
                assert await eventually(lambda: watched.metric("canaries_total", outcome="failed"))
                assert it.available
                engine.status = {}
                asked = engine.asked["/v1/completions"]
                assert await eventually(lambda: engine.asked["/v1/completions"] > asked + 1)
                assert it.available
                engine.status["/v1/completions"] = 500
                assert await eventually(lambda: it.state == "refused")
                assert "500" in it.reason

    run(work())


@pytest.mark.parametrize("status", [404, 200])
def test_replica_that_was_compared_cannot_escape_its_canaries(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(trust, "REPEAT", 0.1)

    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.03, timeout=5, canary_interval=0.2))
            it = watched.replica
            async with watching(watched):
                assert it.available
                engine.status["/v1/completions"], engine.tells = status, False
                assert await eventually(lambda: it.state == "refused")
                assert "can no longer be checked" in it.reason
                asked = engine.asked["/v1/completions"]
                assert await eventually(lambda: engine.asked["/v1/completions"] > asked + 2)
                assert it.state == "refused"
                engine.status, engine.tells = {}, True
                assert await eventually(lambda: it.available)

    run(work())


def test_engine_of_serve_may_come_back_with_other_weights(tmp_path: Path) -> None:
    async def work() -> None:
        engine, path = FaultyEngine(), tmp_path / "demo.json"
        path.write_text(json.dumps({"state": "ready", "start_seconds": 18.5}))
        async with running(engine):
            probes = Probes(interval=0.03, timeout=5, canary_interval=0.1)
            watched = Watched(EngineAt(url=engine.url, status_file=path), probes)
            it = watched.replica
            async with watching(watched):
                assert await eventually(lambda: it.baseline.numbers)
                await engine.stop()
                for reason in ("reset", "connect"):
                    it.failed(reason)
                    assert it.retry_after == 19  # what a start takes
                assert await eventually(lambda: it.reason == "connection refused")
                engine.logprobs = [-9.0, -9.0, -9.0, -9.0]
                await engine.start()
                asked = engine.asked["/v1/completions"]
                assert await eventually(lambda: engine.asked["/v1/completions"] > asked + 2)
                assert it.available

    run(work())
