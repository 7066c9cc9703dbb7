"""The gateway's application: who may ask what, and who answers."""

import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from serving.gateway import admin, relay
from serving.gateway.accounts import Accounts
from serving.gateway.errors import ApiError
from serving.gateway.exchange import ADMIN_LISTENER
from serving.gateway.metrics import Metrics
from serving.gateway.parameters import ROUTES
from serving.gateway.parameters.openapi import SECURITY, responses, security
from serving.gateway.pool import Pool
from serving.gateway.relay import KEY, REFUSAL
from serving.gateway.settings import Settings
from serving.tenants.key import NOBODY, Key

_PUBLIC = frozenset(("/health", "/ready"))
LAST_WORDS = 2.0  # seconds in which requests that are ended may still say so
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Gateway:
    """The ASGI application.

    Relayed requests go straight to their relay: FastAPI's middleware would wrap every piece of every stream.

    Attributes:
        draining: running requests are finished; ``/ready`` says 503.
    """

    def __init__(self, settings: Settings, workers: int = 1, accounts: Path | None = None) -> None:
        """``accounts``: the keeper's folder, see :mod:`serving.tenants.keeper`; None: no key is required."""
        self.metrics = Metrics()
        self.metrics.keeper_folder = accounts
        self.accounts = Accounts(settings, self.metrics, workers, accounts)
        self.pool = Pool(settings, self.metrics, workers, self.accounts)
        self.draining = False
        self._own_listener = settings.admin.port is not None  # /metrics and /admin have one
        self._rest = _create_app(self, settings)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self.pool.requests)

    async def start(self) -> None:
        await self.accounts.start()
        await self.pool.start()

    async def reload(self, settings: Settings) -> None:
        await self.accounts.apply(settings)
        await self.pool.apply(settings)

    async def drain(self, seconds: float) -> None:
        """Lets running requests finish; those that have not by then end with an error."""
        self.draining = True
        await self.pool.idle(seconds)
        for request in tuple(self.pool.requests):
            request.abort("shutdown")
        await self.pool.idle(LAST_WORDS)

    async def stop(self) -> None:
        await self.pool.stop()
        await self.accounts.stop()

    def admit(self, scope: Scope) -> bool:
        """Finds out who asks, and whether they may: sets :data:`KEY` or :data:`REFUSAL` in the scope.

        The edge calls this when a request's head is complete, so that strangers' bodies take no memory.

        Returns:
            Whether the request's body will be read.
        """
        try:
            scope[KEY] = self._authorize(scope)
        except ApiError as e:
            scope[REFUSAL] = e
            return False
        return scope["method"] != "OPTIONS" and (scope["path"] in ROUTES or scope["path"].startswith("/admin/"))

    def _authorize(self, scope: Scope) -> Key:
        path = scope["path"]
        if path in _PUBLIC or scope["method"] == "OPTIONS":
            return NOBODY
        own, separate = _is_operators(path), ADMIN_LISTENER in scope
        if self._own_listener and path != "/openapi.json" and separate != own:
            raise ApiError(404, f"there is no route {path[:100]}", "not_found")
        if separate and path == "/metrics":
            return NOBODY
        key = self.accounts.authenticate(scope["headers"])
        self._check_scope(key, path)
        return key

    def _check_scope(self, key: Key, path: str) -> None:
        own = _is_operators(path)
        if path != "/metrics" and own and not key.admin:
            if not key.id:
                message = "there is no key yet that may: make one with medassist keys create --admin"
                raise ApiError(403, message, "admin_disabled")
            raise ApiError(403, f"this key may not use {path[:100]}: it has no admin scope", "insufficient_scope")
        if path == "/metrics" and key.id and not (key.metrics or key.admin):
            raise ApiError(403, "this key may not read the metrics: it has no metrics scope", "insufficient_scope")

    def _renew(self, scope: Scope) -> None:
        """Between a request's head and its work can be a slow body, or the work of those before it on its
        connection."""
        try:
            scope[KEY] = key = self.accounts.renew(scope[KEY])
            self._check_scope(key, scope["path"])
        except ApiError as e:
            scope[REFUSAL] = e

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if KEY not in scope and REFUSAL not in scope:  # the server in front does not ask
            self.admit(scope)
        elif KEY in scope and scope[KEY].id:
            self._renew(scope)
        relayed = scope["method"] == "POST" and scope["path"] in ROUTES  # the relay answers a refusal of its own
        if not relayed and (refusal := scope.get(REFUSAL)) is not None:
            self.metrics.errors.labels(refusal.code or str(refusal.status)).inc()
            await refusal.response()(scope, receive, _with_id(scope, send))
            return
        if relayed:
            await relay.Request(self.pool, scope["path"], scope, receive, send).answer()
        else:
            await self._rest(scope, receive, _with_id(scope, send))


def _is_operators(path: str) -> bool:
    """Whether it is for those who run the gateway."""
    return path in ("/metrics", "/admin") or path.startswith("/admin/")


def _with_id(scope: Scope, send: Send) -> Send:
    """Adds the request's id to the answer."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    request_id = given if _REQUEST_ID.fullmatch(given) else b"req-" + uuid4().hex.encode()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
        await send(message)

    return sending


def _create_app(gateway: Gateway, settings: Settings) -> FastAPI:
    pool, metrics = gateway.pool, gateway.metrics
    app = FastAPI(
        title="medassist", version=version("medassist"), docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    created = int(time.time())

    for route, model in ROUTES.items():
        app.add_api_route(route, _relayed(model), methods=["POST"], responses=responses(route), response_class=Response)

    def cards(request: Request) -> list[dict[str, Any]]:
        return pool.cards(created, request.scope[KEY])

    @app.get("/v1/models", responses=responses("/v1/models"))
    async def list_models(request: Request) -> JSONResponse:
        """Models, adapters and aliases that the key may use."""
        return JSONResponse({"object": "list", "data": cards(request)})

    @app.get("/v1/models/{model:path}", responses=responses("/v1/models/{model}"))
    async def retrieve_model(model: str, request: Request) -> JSONResponse:
        """One of them."""
        for card in cards(request):
            if card["id"] == model:
                return JSONResponse(card)
        raise ApiError(404, f"there is no model {model[:100]!r}", "model_not_found", "model")

    def told(status: str, request: Request) -> dict[str, Any]:
        """What strangers may know, and for others the state of each model."""
        if ADMIN_LISTENER not in request.scope and not gateway.accounts.knows(request.scope["headers"]):
            return {"status": status}
        return {"status": status, "engines": {name: served.state for name, served in pool.models.items()}}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=responses("/health"))
    async def health(request: Request) -> JSONResponse:
        """The gateway itself is alive; engines may be starting. Whoever has a key, where one is required, is told the
        models' states."""
        return JSONResponse(told("ok", request))

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=responses("/ready"))
    async def ready(request: Request) -> JSONResponse:
        """200 when every model is served and requests are taken, else 503. The models' states are told as above."""
        waiting = [served for served in pool.models.values() if not served.available]
        if waiting or gateway.draining:
            status = "draining" if gateway.draining else "starting"
            seconds = max([min([r.retry_after for r in s.replicas], default=5) for s in waiting], default=5)
            return JSONResponse(told(status, request), 503, {"Retry-After": str(seconds)})
        return JSONResponse(told("ready", request))

    @app.get("/metrics", response_class=Response, responses=responses("/metrics"))
    async def prometheus(request: Request) -> Response:
        """For Prometheus; as OpenMetrics, with exemplars, where that is accepted."""
        text, kind = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": kind})

    app.include_router(admin.create_router(settings))

    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> JSONResponse:
        separate = ADMIN_LISTENER in request.scope if settings.admin.port is not None else None
        return JSONResponse(_document(app, separate))

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # what was given is not repeated
        name = "" if first["type"] == "json_invalid" else ".".join(str(part) for part in first["loc"][1:])[:200]
        what = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{name or 'the body'}: {what}", "invalid_value", name or None).response()

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


def _document(app: FastAPI, separate: bool | None) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own answer to a wrong request: ours is 400.

    Args:
        separate: whether it is that of the admin listener; None: there is none.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["security"] = security(path)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = SECURITY
        app.openapi_schema = document
    if separate is None:
        return app.openapi_schema
    paths = app.openapi_schema["paths"].items()
    there = {path: what for path, what in paths if path in _PUBLIC or _is_operators(path) == separate}
    return {**app.openapi_schema, "paths": there}


def _relayed(model: Any) -> Any:
    """An endpoint for the OpenAPI document and for 405; requests themselves are answered by the relay."""

    async def relayed(body: model) -> None:
        raise AssertionError("a POST to a relayed route got past the relay")

    relayed.__doc__ = model.__doc__
    return relayed
