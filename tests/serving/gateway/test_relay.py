"""The life of a request, with engines that answer, fail, break off and keep silent."""

import asyncio
import json
import socket
from typing import Any

import pytest
from aiohttp import web

from tests.serving.gateway.doubles import CHAT, DONE, USAGE_EVENT, Engine, answers, chunk, gateway_for
from tests.waiting import eventually


async def resets(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Sends the head of a stream, as vLLM does before its first token, and dies."""
    response = await engine.begin(request)
    assert request.transport is not None
    request.transport.abort()
    return response


async def breaks(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await engine.begin(request)
    await response.write(chunk("a"))
    await asyncio.sleep(0.05)
    assert request.transport is not None
    request.transport.abort()
    return response


async def fails(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=500, text="Traceback: the patient said")


async def hangs(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits that long")


async def stalls(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await engine.begin(request)
    await response.write(chunk("a"))
    await asyncio.sleep(30)
    return response


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("behaviour", [resets, fails], ids=["reset", "500"])
def test_until_the_first_byte_another_replica_answers(behaviour: Any, stream: bool) -> None:
    async def test() -> None:
        async with (
            Engine(behaviour).running() as bad,
            Engine().running() as good,
            gateway_for(bad, good) as client,
        ):
            for _ in range(4):  # whichever replica is first in turn
                async with client.post(stream) as response:
                    assert response.status == 200
                    text = await response.text()
                    assert text.endswith("data: [DONE]\n\n") if stream else json.loads(text)["choices"]
            assert bad.received
            assert await client.metric("retries_total", model="m") == len(bad.received)

    run(test())


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    async def test() -> None:
        async with (
            Engine(breaks).running() as bad,
            Engine(breaks).running() as other,
            gateway_for(bad, other) as client,
            client.post(True) as response,
        ):
            events = (await response.read()).split(b"\n\n")
            assert events[0] + b"\n\n" == chunk("a")
            assert json.loads(events[1][6:])["error"]["code"] == "engine_unavailable"
            assert len(bad.received) + len(other.received) == 1
            assert await client.metric("broken_streams_total") == 1

    run(test())


def test_what_a_failing_engine_says_is_not_passed_on() -> None:
    async def test() -> None:
        async with Engine(fails).running() as bad, gateway_for(bad) as client, client.post() as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert "patient" not in await response.text()

    run(test())


def test_an_engine_that_never_begins_is_given_up_with_504() -> None:
    async def test() -> None:
        model = {"timeouts": {"first_byte": 0.2}}
        async with Engine(hangs).running() as engine, gateway_for(engine, model=model) as client:
            async with client.post() as response:
                assert response.status == 504
                assert (await response.json())["error"]["code"] == "engine_timeout"
            assert await eventually(lambda: engine.aborted == 1)
            assert client.gateway.pool.models["m"].replicas[0].outstanding == 0

    run(test())


def test_an_engine_that_stalls_is_given_up_with_an_error_event() -> None:
    async def test() -> None:
        model = {"timeouts": {"stall": 0.2}}
        async with Engine(stalls).running() as engine, gateway_for(engine, model=model) as client:
            async with client.post(True) as response:
                events = (await response.read()).split(b"\n\n")
            assert json.loads(events[1][6:])["error"]["code"] == "engine_timeout"
            assert await eventually(lambda: engine.aborted == 1)

    run(test())


def test_a_silent_stream_is_kept_open_and_can_still_be_answered_by_another_replica() -> None:
    async def slowly_resets(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await asyncio.sleep(1.2)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def test() -> None:
        async with Engine(slowly_resets).running() as bad, Engine().running() as good:
            good_at = {"url": good.url, "draining": True}
            model = {"engines": [{"url": bad.url}, good_at]}
            async with gateway_for(model=model, keep_alive_comments=0.3) as client, client.post(True) as response:
                first = await response.content.readany()
                assert first == b": keep-alive\n\n"
                settings = client.gateway.pool.settings.model_dump()
                settings["models"]["m"]["engines"][1]["draining"] = False
                await client.gateway.reload(type(client.gateway.pool.settings).model_validate(settings))
                rest = await response.read()
                assert rest.replace(first, b"") == chunk("a") + chunk("b") + DONE

    run(test())


def test_usage_is_counted_and_told_only_to_those_who_asked() -> None:
    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine) as client:
            async with client.post(True) as response:
                assert await response.read() == chunk("a") + chunk("b") + DONE
            async with client.post(True, stream_options={"include_usage": True}) as response:
                assert USAGE_EVENT in await response.read()
            async with client.post() as response:
                assert (await response.json())["usage"]["total_tokens"] == 5
            assert await client.metric("tokens_total", kind="prompt") == 9
            assert await client.metric("tokens_total", kind="completion") == 6
            assert await client.metric("time_to_first_token_seconds_count") == 3

    run(test())


def test_a_request_keeps_its_id_and_the_engine_gets_one_of_its_own() -> None:
    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine) as client:
            for given, kept in (("abc-1", True), ("a b", False), ("x" * 200, False), ("<script>", False)):
                async with client.post(headers={"X-Request-Id": given}) as response:
                    assert (response.headers["X-Request-Id"] == given) is kept
            async with client.post(headers={"X-Request-Id": "abc-1"}) as response:
                await response.read()
            assert len(set(engine.ids)) == 5
            assert engine.ids[0].startswith("abc-1-")

    run(test())


def test_a_client_that_leaves_frees_the_engine_in_every_phase() -> None:
    async def test() -> None:
        model = {"max_concurrency": 1, "timeouts": {"connect": 10}}
        async with Engine(hangs).running() as engine, gateway_for(engine, model=model) as client:

            async def leaves(stream: bool, phase: str) -> asyncio.Task[Any]:
                async def ask() -> None:
                    async with client.post(stream) as response:
                        await response.read()

                task = asyncio.create_task(ask())
                running = client.gateway.pool.requests
                assert await eventually(lambda: any(request.phase == phase for request in running))
                return task

            waiting = await leaves(False, "waiting")
            queued = await leaves(True, "queued")
            queued.cancel()
            assert await eventually(lambda: client.gateway.running == 1)
            waiting.cancel()
            assert await eventually(lambda: engine.aborted == 1)
            engine.behaviour = stalls
            streaming = await leaves(True, "streaming")
            streaming.cancel()
            assert await eventually(lambda: engine.aborted == 2)
            for phase in ("waiting", "queued", "streaming"):
                assert await client.metric("cancellations_total", phase=phase) == 1
            assert client.gateway.pool.models["m"].replicas[0].outstanding == 0
            assert await client.metric("requests_total", code="499") == 3

    run(test())


def test_a_client_that_leaves_ends_a_connection_that_is_being_made() -> None:
    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine, model={"timeouts": {"connect": 10}}) as client:
            replica = client.gateway.pool.models["m"].replicas[0]
            with socket.socket() as full:  # connections beyond its backlog wait for ever
                full.bind(("127.0.0.1", 0))
                full.listen(0)
                fillers = [socket.socket() for _ in range(4)]
                for filler in fillers:
                    filler.setblocking(False)
                    filler.connect_ex(full.getsockname())
                replica._urls[CHAT] = replica.url(CHAT).with_port(full.getsockname()[1])
                task = asyncio.create_task(client.post().__aenter__())
                assert await eventually(lambda: any(r.phase == "connecting" for r in client.gateway.pool.requests))
                task.cancel()
                assert await eventually(lambda: client.gateway.running == 0)
                for filler in fillers:
                    filler.close()
            assert await client.metric("cancellations_total", phase="connecting") == 1
            assert replica.outstanding == 0

    run(test())


def test_a_reload_under_a_stream_ends_nothing() -> None:
    async def slow(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        for _ in range(10):
            await response.write(chunk("a"))
            await asyncio.sleep(0.05)
        await response.write(DONE)
        return response

    async def test() -> None:
        async with Engine(slow).running() as old, Engine().running() as new, gateway_for(old) as client:
            async with client.post(True) as response:
                await response.content.readany()
                content = client.gateway.pool.settings.model_dump()
                content["models"]["m"]["engines"] = [{"url": new.url}]
                content["aliases"] = {"both": {"m": 1.0}, "one": "m"}
                await client.gateway.reload(type(client.gateway.pool.settings).model_validate(content))
                for name in ("m", "both", "one"):
                    async with client.post(model=name) as other:
                        assert other.status == 200
                assert (await response.read()).endswith(DONE)
            assert [body["model"] for body in new.received] == ["m"] * 3

    run(test())


def test_a_split_shares_requests_between_models() -> None:
    async def test() -> None:
        async with Engine().running() as a, Engine().running() as b:
            models = {"a": {"engines": [{"url": a.url}]}, "b": {"engines": [{"url": b.url}]}}
            async with gateway_for(a) as client:
                content = client.gateway.pool.settings.model_dump() | {"aliases": {"x": {"a": 0.75, "b": 0.25}}}
                content["models"] = models
                await client.gateway.reload(type(client.gateway.pool.settings).model_validate(content))
                a.received.clear()
                for _ in range(120):
                    async with client.post(model="x") as response:
                        assert response.status == 200
                assert 70 <= len(a.received) <= 108
                assert len(a.received) + len(b.received) == 120

    run(test())


def test_at_the_end_of_the_drain_streams_are_told() -> None:
    async def test() -> None:
        async with Engine(stalls).running() as engine, gateway_for(engine) as client, client.post(True) as response:
            await response.content.readany()
            await client.gateway.drain(0.1)
            assert json.loads((await response.read())[6:])["error"]["code"] == "shutting_down"
            assert await eventually(lambda: engine.aborted == 1)

    run(test())


def test_retries_have_a_budget() -> None:
    async def test() -> None:
        async with (
            Engine(fails).running() as a,
            Engine(fails).running() as b,
            gateway_for(a, b, retries={"attempts": 5, "budget": 0.0}) as client,
        ):
            for _ in range(40):
                async with client.post() as response:
                    assert response.status == 503
            assert await client.metric("retries_total") <= 12

    run(test())


def test_the_gateway_refuses_other_media_types_and_encodings() -> None:
    async def test() -> None:
        async with Engine(answers).running() as engine, gateway_for(engine) as client:
            for headers in (
                {"Content-Type": "text/plain"},
                {"Content-Type": "application/json; charset=utf-16"},
                {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            ):
                async with client.session.post(client.root + CHAT, data=b"{}", headers=headers) as response:
                    assert response.status == 415
            for seconds in ("-1", "nan", "soon", "1e9"):
                async with client.post(headers={"X-Request-Timeout": seconds}) as response:
                    assert response.status == 400
            assert not engine.received

    run(test())


def test_clients_of_the_sdk_see_the_error_of_a_broken_stream() -> None:
    async def test() -> None:
        import openai

        async with Engine(breaks).running() as engine, gateway_for(engine) as client:
            sdk = openai.AsyncOpenAI(base_url=client.root + "/v1", api_key="none", max_retries=0)
            stream = await sdk.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            with pytest.raises(openai.APIError):
                async for _ in stream:
                    pass
            await sdk.close()

    run(test())


def test_a_gateway_without_a_live_engine_says_503_and_recovers_by_itself() -> None:
    async def test() -> None:
        engine = Engine()
        async with engine.running():
            port = int(engine.url.rsplit(":", 1)[1])
        async with gateway_for(engine) as client:
            async with client.post() as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
            app = web.Application()
            app.router.add_post(CHAT, engine._chat)
            app.router.add_get("/health", engine._health)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            assert await eventually(lambda: client.gateway.pool.models["m"].available)
            async with client.post() as response:
                assert response.status == 200
            await runner.cleanup()

    run(test())


def test_a_request_that_makes_engines_fail_is_not_sent_to_all_and_takes_none_out() -> None:
    async def test() -> None:
        async with (
            Engine(fails).running() as a,
            Engine(fails).running() as b,
            Engine(fails).running() as c,
            gateway_for(a, b, c) as client,
        ):
            for _ in range(3):
                async with client.post() as response:
                    assert response.status == 503
            assert len(a.received) + len(b.received) + len(c.received) == 6
            assert all(replica.available for replica in client.gateway.pool.models["m"].replicas)

    run(test())


def test_a_refusal_within_a_stream_is_a_refusal() -> None:
    async def refuses(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(b'data: {"error": {"message": "the prompt is empty", "code": 400}}\n\ndata: [DONE]\n\n')
        return response

    async def test() -> None:
        async with Engine(refuses).running() as engine, gateway_for(engine) as client, client.post(True) as response:
            assert response.status == 400
            assert "prompt is empty" in await response.text()
            assert len(engine.received) == 1

    run(test())


def test_what_came_with_an_error_is_passed_on_and_a_comment_is_no_answer() -> None:
    async def errs(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(chunk("a") + b'data: {"error": {"message": "x", "code": 500}}\n\n')
        return response

    async def pings(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(b": ping\n\n")
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def test() -> None:
        async with Engine(errs).running() as engine, gateway_for(engine) as client, client.post(True) as response:
            assert (await response.read()).startswith(chunk("a") + b'data: {"error"')
        async with (
            Engine(pings).running() as bad,
            Engine().running() as good,
            gateway_for(bad, good) as client,
        ):
            for _ in range(3):
                async with client.post(True) as response:
                    assert await response.read() == chunk("a") + chunk("b") + DONE
            assert bad.received

    run(test())


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_a_replica_that_refuses_everything_is_no_black_hole(status: int) -> None:
    async def refuses(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "the model does not exist"}}, status=status)

    async def test() -> None:
        async with (
            Engine(refuses).running() as bad,
            Engine().running() as good,
            gateway_for(bad, good, retries={"budget": 1.0}) as client,
        ):
            for _ in range(20):
                async with client.post() as response:
                    assert response.status == 200
            assert bad.received

    run(test())


def test_a_busy_engine_is_not_taken_out_and_its_own_retry_after_is_told() -> None:
    async def full(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "37"})

    async def test() -> None:
        async with Engine(full).running() as engine, gateway_for(engine) as client:
            for _ in range(5):
                async with client.post() as response:
                    assert response.status == 503
                    assert response.headers["Retry-After"] == "37"
            assert len(engine.received) == 5
            engine.behaviour = answers
            async with client.post() as response:
                assert response.status == 200

    run(test())


def test_a_requests_own_limit_of_time_holds_to_the_end() -> None:
    async def test() -> None:
        async with Engine(hangs).running() as engine, gateway_for(engine) as client:
            async with client.post(headers={"X-Request-Timeout": "0.3"}) as response:
                assert response.status == 504
            engine.behaviour = stalls
            async with client.post(True, headers={"X-Request-Timeout": "0.3"}) as response:
                events = (await response.read()).split(b"\n\n")
                assert json.loads(events[1][6:])["error"]["code"] == "deadline_exceeded"
            assert await eventually(lambda: engine.aborted >= 1)
            assert client.gateway.pool.models["m"].replicas[0].available

    run(test())


def test_a_prompt_that_cannot_fit_takes_no_place() -> None:
    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine) as client:
            client.gateway.pool.models["m"].replicas[0].max_model_len = 100
            async with client.post(messages=[{"role": "user", "content": "x " * 5000}]) as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == "context_length_exceeded"
            assert not engine.received

    run(test())
