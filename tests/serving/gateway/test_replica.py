"""A replica's states, as a server that fails on purpose brings them about."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from serving.gateway import breaker, replica
from serving.gateway.settings import EngineAt, Probes
from tests.serving.gateway.faulty_engine import FaultyEngine, running
from tests.serving.gateway.watched import QUICK, Watched, run, watching
from tests.waiting import eventually

NO_CANARY = Probes(interval=0.03, timeout=5, canary_interval=0)


def test_engine_is_met_and_its_end_and_return_are_noticed() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        engine.models = [{"id": "/models/thing", "max_model_len": 512}]
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), adapters=())
            it = watched.replica
            assert (it.state, it.available) == ("starting", False)
            async with watching(watched):
                assert (it.state, it.available, it.reason) == ("ready", True, "")
                assert (it.served_name, it.max_model_len) == ("/models/thing", 512)
                assert (it.name_there("demo"), it.name_there("tuned")) == ("/models/thing", "tuned")
                assert str(it.url("/v1/completions")) == f"{engine.url}/v1/completions"
                assert engine.headers["Accept-Encoding"] == "identity"
                assert engine.asked["/v1/completions"] == 1  # the canary came before the first request
                assert watched.metric("replica_up") == 1

                await engine.stop()
                changes = watched.changes
                assert await eventually(lambda: it.state == "down")
                assert it.reason == "connection refused"
                assert watched.changes > changes
                assert watched.metric("replica_up") == 0
                assert watched.metric("replica_state", state="down") == 1
                assert watched.metric("replica_state", state="ready") == 0
                assert watched.metric("replica_failures_total", reason="probe") == 1

                await asyncio.sleep(0.1)
                engine.models = [{"id": "renamed"}]
                await engine.start()
                assert await eventually(lambda: it.available)
                assert it.served_name == "renamed"
                assert engine.asked["/v1/completions"] == 2
                assert it.session.closed is False
            assert it.session.closed
            assert watched.metric("replica_up") == 0
            states = [line.removeprefix(f"demo[0] {engine.url}: ") for line in watched.reports]
            assert states == ["ready", "down: connection refused", "ready"]

    run(work())


def test_engine_that_was_never_there_is_starting() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            await engine.stop()
            watched = Watched(EngineAt(url=engine.url))
            async with watching(watched):
                assert watched.replica.state == "starting"
                assert watched.reports == [f"demo[0] {engine.url}: starting: connection refused"]
                await engine.start()
                assert await eventually(lambda: watched.replica.available)

    run(work())


def test_late_looks_count_twice_and_a_503_at_once() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.03, timeout=0.3))
            it = watched.replica
            async with watching(watched):
                assert await eventually(lambda: it.available)
                engine.delay["/health"] = 0.5
                seen = engine.asked["/health"]
                assert await eventually(lambda: it.state == "down")
                assert it.reason == "no answer in time"
                assert engine.asked["/health"] - seen >= 2
                # It was late and is the same as before: it gets requests before another canary has come back.
                engine.delay["/v1/completions"] = 10
                engine.delay["/health"] = 0
                assert await eventually(lambda: it.available)
                engine.delay["/v1/completions"] = 0

                engine.status["/health"] = 503
                assert await eventually(lambda: it.state == "down")
                assert it.reason == "answers 503 to /health"
                engine.status["/health"] = 200
                assert await eventually(lambda: it.available)

    run(work())


def test_request_that_cannot_connect_takes_it_down_at_once() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=9))
            it = watched.replica
            async with watching(watched):
                await engine.stop()
                it.failed("connect")
                assert (it.state, it.available) == ("down", False)
                assert await eventually(lambda: it.reason == "connection refused")  # looked at now, not in 5 s
                await engine.start()
                assert await eventually(lambda: it.available)
                assert watched.metric("replica_failures_total", reason="connect") == 1

    run(work())


def test_breaker_opens_after_failures_in_a_row_and_lets_one_request_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.4)

    async def work() -> None:
        engine = FaultyEngine()
        engine.status["/metrics"] = 404  # nothing changes but by the breaker
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=9))
            it = watched.replica
            async with watching(watched):
                it.outstanding = 3
                it.failed("5xx")
                it.failed("reset")
                it.succeeded()
                it.failed("5xx")
                it.failed("stall")
                assert it.available
                changes = watched.changes
                it.failed("5xx")
                assert (it.state, it.available, it.retry_after) == ("ready", False, 1)
                assert watched.metric("replica_up") == 0
                assert await eventually(lambda: engine.asked["/health"] == 2)
                assert not it.available  # though its health is well
                it.outstanding = 1  # two of those from before have ended
                assert await eventually(lambda: watched.changes == changes + 2)  # it tells that it may be tried
                assert it.available
                it.outstanding += 1
                assert not it.available  # that one has to answer first
                it.outstanding -= 1  # it was cancelled, and told nothing
                assert it.available
                it.outstanding += 1
                it.failed("timeout")
                started = time.monotonic()
                it.outstanding -= 1
                assert await eventually(lambda: it.available)
                assert time.monotonic() - started > 0.7  # twice as long as before
                it.outstanding += 1
                it.succeeded()
                assert it.available
                it.failed("5xx")
                assert it.available  # counted anew

    run(work())


def test_server_without_health_metrics_and_completions_serves() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        engine.status = {"/health": 404, "/metrics": 404, "/v1/completions": 404}
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url + "/v1", served_name="given"))
            it = watched.replica
            async with watching(watched):
                assert (it.state, it.served_name) == ("ready", "given")
                assert await eventually(lambda: engine.asked["/v1/models"] > 4)
                assert engine.asked["/health"] == 1
                assert engine.asked["/metrics"] == 1
                assert engine.asked["/v1/completions"] == 1
                assert any("cannot be checked" in line for line in watched.reports)
                assert watched.metric("canaries_total", outcome="unsupported") == 1
                engine.status["/v1/models"] = 502
                assert await eventually(lambda: it.state == "down")

    run(work())


def test_engine_without_the_model_is_refused_until_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "RECHECK", 0.1)

    async def work() -> None:
        engine = FaultyEngine()
        engine.models = [{"id": "a"}, {"id": "b"}]
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url))
            it = watched.replica
            async with watching(watched):
                assert it.state == "refused"
                assert "set served_name to one of: 'a', 'b'" in it.reason
                at = EngineAt(url=engine.url, served_name="b")
                it.update(at, watched.model, QUICK)
                assert await eventually(lambda: it.available)
                assert it.served_name == "b"
                it.update(at, watched.model.model_copy(update={"adapters": ("tuned",)}), QUICK)
                assert it.available  # until it has been asked
                assert await eventually(lambda: it.state == "refused")
                assert "no adapter 'tuned'" in it.reason
                engine.models.append({"id": "tuned", "parent": "b"})
                assert await eventually(lambda: it.available)

    run(work())


@pytest.mark.parametrize("reason", ["refused", "missing"])
def test_request_that_finds_the_model_missing_has_it_asked_for(reason: str) -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=9))
            it = watched.replica
            async with watching(watched):
                engine.models = [{"id": "a"}, {"id": "b"}]
                it.failed(reason)
                assert await eventually(lambda: it.state == "refused")

    run(work())


def test_busy_and_doubtful_failures_open_no_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.2)

    async def work() -> None:
        engine = FaultyEngine()
        engine.status["/metrics"] = 404
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=9))
            it = watched.replica
            async with watching(watched):
                for _ in range(30):
                    it.failed("busy")
                assert await eventually(lambda: engine.asked["/health"] == 2)
                for _ in range(19):
                    it.failed("500")
                assert it.available
                it.failed("500")
                assert not it.available
                assert await eventually(lambda: it.available)
                it.outstanding += 1
                it.failed("500")  # the one that was let through tells nothing
                it.outstanding -= 1
                assert it.available

                it.succeeded()
                for _ in range(3):  # answers that begin and break off
                    assert it.available
                    it.began()
                    it.failed("reset")
                assert not it.available
                it.began()
                assert it.available
                it.failed("reset")
                assert not it.available

    run(work())


def test_load_is_what_the_engine_tells_less_what_is_ours() -> None:
    async def work() -> None:
        engine = FaultyEngine()
        engine.load = (5, 2, 0.25)
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), Probes(interval=0.1, canary_interval=0))
            it = watched.replica
            async with watching(watched):
                it.outstanding = 3
                assert await eventually(lambda: it.foreign == 4)
                assert (it.running, it.waiting, it.cache_usage) == (5, 2, 0.25)
                assert await eventually(lambda: watched.metric("engine_cache_usage") == 0.25)
                it.outstanding = 9
                assert await eventually(lambda: it.foreign == 0)

                # With nothing to do it is asked for its metrics less often than for its health.
                engine.load, it.outstanding = (0, 0, 0.0), 0
                assert await eventually(lambda: it.running == 0)
                before = engine.asked.copy()
                assert await eventually(lambda: engine.asked["/health"] > before["/health"] + 10)
                assert 1 <= engine.asked["/metrics"] - before["/metrics"] <= 5

                engine.load, it.outstanding = (7, 0, 0.0), 1
                assert await eventually(lambda: it.running == 7)
                engine.status["/metrics"] = 500
                assert await eventually(lambda: it.running == it.foreign == 0)  # told too long ago
                assert it.available

    run(work())


def test_status_file_decides_before_the_socket_does(tmp_path: Path) -> None:
    async def work() -> None:
        engine, path = FaultyEngine(), tmp_path / "demo.json"

        def write(state: str, reason: str = "", ready_in: float | None = None) -> None:
            ready_at = time.time() + ready_in if ready_in is not None else None
            path.with_suffix(".new").write_text(json.dumps({"state": state, "reason": reason, "ready_at": ready_at}))
            path.with_suffix(".new").replace(path)

        async with running(engine):
            watched = Watched(EngineAt(url=engine.url, status_file=path))
            it = watched.replica
            async with watching(watched):
                assert (it.state, it.reason) == ("starting", "not started yet")
                write("verifying", "comparing with its fingerprint", 41.5)
                assert await eventually(lambda: it.reason == "comparing with its fingerprint")
                assert (it.state, it.retry_after) == ("starting", 42)
                assert not engine.asked
                write("ready")
                assert await eventually(lambda: it.available)
                assert engine.asked["/v1/completions"] == 0  # verified already
                write("restarting", "ended (exit code 0)", 600)
                assert await eventually(lambda: it.state == "down")
                assert (it.reason, it.retry_after) == ("ended (exit code 0)", replica.LONGEST_RETRY)
                write("refused", "it does not compute what was trained")
                assert await eventually(lambda: it.state == "refused")
                write("draining")
                assert await eventually(lambda: it.state == "draining")
                write("ready")
                assert await eventually(lambda: it.available)

    run(work())


def test_draining_and_the_way_back_by_new_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "first")

    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url, api_key_env="ENGINE_KEY"), NO_CANARY)
            it = watched.replica
            async with watching(watched):
                assert it.available
                assert engine.headers["Authorization"] == "Bearer first"
                it.update(EngineAt(url=engine.url, draining=True, api_key_env="ENGINE_KEY"), watched.model, NO_CANARY)
                assert (it.state, it.available) == ("draining", False)
                monkeypatch.setenv("OTHER_KEY", "second")
                it.update(EngineAt(url=engine.url, api_key_env="OTHER_KEY"), watched.model, NO_CANARY)
                assert it.available
                assert await eventually(lambda: engine.headers["Authorization"] == "Bearer second")
                with pytest.raises(ValueError, match="NO_KEY is not set"):
                    it.update(EngineAt(url=engine.url, api_key_env="NO_KEY"), watched.model, NO_CANARY)
                assert it.settings.api_key_env == "OTHER_KEY"

    run(work())


def test_retry_after_is_what_was_left_of_the_last_outage_then_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine):
            watched = Watched(EngineAt(url=engine.url), NO_CANARY)
            it = watched.replica
            skipped = 0.0
            async with watching(watched):
                monkeypatch.setattr(replica, "_now", lambda: asyncio.get_running_loop().time() + skipped)
                await engine.stop()
                assert await eventually(lambda: it.state == "down")
                assert it.retry_after == 1
                skipped += 18
                assert it.retry_after == 10  # (18 s + a moment) / 2
                await engine.start()
                assert await eventually(lambda: it.available)
                await engine.stop()
                assert await eventually(lambda: it.state == "down")
                assert 18 <= it.retry_after <= 19
                skipped += 14
                assert 4 <= it.retry_after <= 5
                skipped += 600
                assert it.retry_after == replica.LONGEST_RETRY

    run(work())


def test_unix_socket(short_path: Path) -> None:
    async def work() -> None:
        engine, path = FaultyEngine(), short_path / "engine.sock"
        watched = Watched(EngineAt(url=f"unix:{path}"))
        it = watched.replica
        async with watching(watched):
            assert (it.state, it.reason) == ("starting", "its socket does not exist")
            await engine.start(path)
            assert await eventually(lambda: it.available)
            async with it.session.get(it.url("/health")) as response:
                assert response.status == 200
            await engine.stop()
            assert await eventually(lambda: it.state == "down")

    run(work())


def test_url_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="must be like http"):
        Watched(EngineAt.model_construct(url="ftp://host", served_name=None, api_key_env=None, status_file=None))
