"""The gateway's application."""

import time
from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serving.engine import Engine
from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.relay import Gate, Relay

RELAYED = ("/v1/chat/completions", "/v1/completions")


class Gateway:
    """The ASGI application for these engines. ``gate`` is told when to stop taking requests.

    Relayed requests go straight to their relay: FastAPI's middleware would wrap every chunk of every stream.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        metrics = Metrics()
        self.gate = Gate(engines)
        self._relays = {route: Relay(route, self.gate, metrics) for route in RELAYED}
        self._rest = _create_app(engines, self.gate, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay = self._relays.get(scope["path"]) if scope["type"] == "http" else None
        if relay is not None and scope["method"] == "POST":
            await relay(scope, receive, send)
        else:
            await self._rest(scope, receive, send)


def _create_app(engines: Sequence[Engine], gate: Gate, metrics: Metrics) -> FastAPI:
    app = FastAPI(title="medassist", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    created = int(time.time())

    @app.post(RELAYED[0])
    @app.post(RELAYED[1])
    async def relayed() -> None:
        """Answered by :class:`Gateway`; named here so that other methods get 405."""
        raise AssertionError("a POST to a relayed route got past the relay")

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model_card(name) for name in gate.engines]})

    @app.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> JSONResponse:
        if model not in gate.engines:
            raise ApiError(404, f"there is no model {model[:100]!r}", "model_not_found", "model")
        return JSONResponse(_model_card(model))

    def _model_card(name: str) -> dict[str, object]:
        base = gate.engines[name].model
        parent = base if base != name else None  # an adapter's
        card = {"id": name, "object": "model", "created": created, "owned_by": "medassist"}
        return card | {"root": base, "parent": parent}

    @app.get("/health")
    async def health() -> JSONResponse:
        """The gateway itself is alive; engines may be starting."""
        return JSONResponse({"status": "ok", "engines": {e.model: e.state for e in engines}})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 when every engine serves and requests are taken, else 503."""
        waiting = [e for e in engines if e.state != "ready"]
        if waiting or gate.draining:
            status = "draining" if gate.draining else "starting"
            headers = {"Retry-After": str(max([e.retry_after for e in waiting], default=5))}
            return JSONResponse({"status": status, "engines": {e.model: e.state for e in engines}}, 503, headers)
        return JSONResponse({"status": "ready", "engines": {e.model: e.state for e in engines}})

    @app.get("/metrics")
    async def prometheus() -> Response:
        for engine in engines:
            metrics.engine_ready.labels(engine.model).set(engine.state == "ready")
            metrics.engine_restarts.labels(engine.model).set(engine.restarts)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return ApiError(404, f"there is no route {request.url.path[:100]}", "not_found").response()
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not allowed on {request.url.path[:100]}" + (
                f"; use {allowed}" if allowed else ""
            )
            return ApiError(405, message, "method_not_allowed").response(error.headers)
        return ApiError(error.status_code, str(error.detail)).response(error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error", "internal_error").response()

    return app
