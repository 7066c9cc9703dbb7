"""``/admin``: keys, usage and captures over HTTP, for keys with the admin scope (:meth:`Gateway.admit` sees to that).

All of it works on the store, in threads; what that needs is imported with the first request. No secret is ever shown
but that of a key that was just made, in the answer that tells of it.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from serving.gateway.errors import ApiError
from serving.gateway.parameters.openapi import errors
from serving.gateway.relay import KEY
from serving.gateway.settings import Settings
from serving.tenants.key import KeyLimits

if TYPE_CHECKING:
    from serving.tenants.store import Store

T = TypeVar("T")
MAX_WAITING = 8  # calls of the store at once; it is slow or gone when there are more
RETRY_AFTER = 5  # seconds
LONGEST_CAPTURE = 86_400  # seconds
LONGEST_OVERLAP = 366 * 86_400
_NOT_STORED = {"Cache-Control": "no-store"}
_LARGEST = 2**53
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"


def _check_groups(text: str) -> str:
    if wrong := [name for name in text.split(",") if name not in ("month", "day", "tenant", "key", "model")]:
        raise ValueError(f"must be of month, day, tenant, key, model, with commas between, not {wrong[0][:40]!r}")
    return text


Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Text = Annotated[str, Field(max_length=128, pattern=_PRINTABLE)]
Time = Annotated[int, Field(ge=1, le=_LARGEST, description="Seconds since the epoch.")]
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Groups = Annotated[str, Field(max_length=100), AfterValidator(_check_groups)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Limits(_Body):
    """What a key may use; null: as much as there is."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    max_tokens: Count | None = Field(None, description="Longest answer of one request.")
    tokens_per_month: Count | None = Field(None, description="Of a calendar month, in UTC.")


class KeyChanges(_Body):
    """What is not given stays as it is."""

    name: Text = ""
    models: list[Text] | None = Field(None, description="That it may use; null: all.")
    admin: bool = False
    metrics: bool = False
    limits: Limits = Field(Limits(), description="All of them: those that are not given are no more.")
    share: float = Field(1.0, gt=0, le=1e6, description="Of the capacity under overload, relative to other keys.")
    expires: Time | None = None


class NewKey(KeyChanges):
    """A key to be made."""

    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Keys of one share a prefix cache.")


class Rotation(_Body):
    """A key to take another's place."""

    overlap_seconds: float = Field(86_400, ge=0, le=LONGEST_OVERLAP, description="In which both are good.")


class NewCapture(_Body):
    """Bodies to capture."""

    key: Text = Field(description="Id of the key whose requests are captured.")
    recipient: str = Field(pattern="^[0-9a-f]{64}$", description="Public key of who will read them (X25519).")
    reason: str = Field(min_length=1, max_length=1000, pattern=_PRINTABLE)
    seconds: float = Field(3600, ge=1, le=LONGEST_CAPTURE)


class KeyInfo(BaseModel):
    """A key, without its secret."""

    id: str
    tenant: str
    name: str
    models: list[str] | None
    admin: bool
    metrics: bool
    limits: Limits
    share: float
    created: int
    expires: int | None
    revoked: int | None
    origin: str = Field(description="Id of the first of those that each took the place of the one before.")
    state: str = Field(description='"active", "revoked" or "expired".')


class KeyWithSecret(KeyInfo):
    """A key that was just made."""

    secret: str = Field(description="Stored nowhere, and never shown again.")


class KeyList(BaseModel):
    data: list[KeyInfo]


class CaptureInfo(BaseModel):
    """An order to capture one key's bodies."""

    id: str
    key: str
    recipient: str
    reason: str
    created_by: str
    created: int
    expires: int
    ended: int | None
    active: bool


class CaptureList(BaseModel):
    data: list[CaptureInfo]


class UsageInfo(BaseModel):
    """A row of the ledger; what it was not asked to be told apart by is null."""

    month: str | None
    day: str | None
    tenant: str | None
    key: str | None
    name: str | None = Field(description="The key's.")
    model: str | None
    requests: int = Field(description="All, those that failed included.")
    failed: int
    prompt_tokens: int
    completion_tokens: int
    estimated: int = Field(description="Requests whose tokens are the gateway's estimate.")


class UsageList(BaseModel):
    data: list[UsageInfo]


class StoreAccess:
    """The store, opened with the first call, in threads of their own.

    Args:
        settings: of the start; a store is changed by a restart only.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._waiting = 0

    async def call(self, work: "Callable[[Store], T]") -> T:
        """What ``work`` returns.

        Raises:
            ApiError: 503 where the store cannot be used, 404 where a key is not there, 409 where it is captured
                already, 400 where a value is not valid.
        """
        if self._waiting >= MAX_WAITING:
            raise _unavailable("the store is slow, and others wait for it already")
        self._waiting += 1
        try:
            return await asyncio.to_thread(self._run, work)
        finally:
            self._waiting -= 1

    def _run(self, work: "Callable[[Store], T]") -> T:
        from serving.tenants.store import CaptureActive, NoSuchKey, StoreError

        try:
            store = self._open()
        except (ValueError, OSError) as e:
            raise _unavailable(str(e)) from None
        try:
            return work(store)
        except NoSuchKey as e:
            raise ApiError(404, str(e), "key_not_found") from None
        except CaptureActive as e:
            raise ApiError(409, str(e), "capture_active") from None
        except ValueError as e:
            raise ApiError(400, str(e), "invalid_value") from None
        except StoreError as e:
            raise _unavailable(str(e)) from None
        except OSError as e:  # nothing was changed: the audit log comes first
            raise _unavailable(f"the audit log cannot be written ({e.strerror})") from None

    def _open(self) -> "Store":
        from serving.tenants.announcing import announce_in
        from serving.tenants.store import Store

        settings = self._settings
        with self._opening:
            if self._store is None:
                home = settings.home_folder
                self._store = Store(settings.store.resolve(home), announce_in(home, settings.audit.retention_days))
        self._store.check()
        return self._store


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, "store_unavailable", None, RETRY_AFTER)


def _who(request: Request) -> str:
    key: str = request.scope[KEY].id
    return key


def create_router(settings: Settings) -> APIRouter:
    """The routes."""
    router, store = APIRouter(prefix="/admin", tags=["admin"]), StoreAccess(settings)

    def answers(model: Any, status: int = 200, *more: int) -> dict[str, Any]:
        documented = {status: {"model": model}, **errors(400, 401, 403, 405, 408, 413, 431, 500, 503, *more)}
        return {"status_code": status, "responses": documented}

    @router.post("/keys", **answers(KeyWithSecret, 201))
    async def create_key(body: NewKey, request: Request) -> Response:
        """Makes a key. Its secret is in the answer, and nowhere else."""
        values = {**body.model_dump(), "limits": _limits(body.limits)}
        key, secret = await store.call(lambda s: s.create_key(**values, by=_who(request)))
        return JSONResponse({**key.as_json(), "secret": secret}, 201, _NOT_STORED)

    @router.get("/keys", **answers(KeyList))
    async def list_keys(tenant: Annotated[str | None, Query(max_length=64, pattern=_PRINTABLE)] = None) -> Response:
        """All keys, those that are revoked or expired included."""
        keys = await store.call(lambda s: s.keys())
        return JSONResponse({"data": [key.as_json() for key in keys if tenant in (None, key.tenant)]})

    @router.get("/keys/{key_id}", **answers(KeyInfo, 200, 404))
    async def show_key(key_id: Id) -> Response:
        """One of them."""
        return JSONResponse((await store.call(lambda s: s.key(key_id))).as_json())

    @router.patch("/keys/{key_id}", **answers(KeyInfo, 200, 404))
    async def change_key(key_id: Id, body: KeyChanges, request: Request) -> Response:
        """Changes what a key may do. It is in force within seconds."""
        changes = {name: getattr(body, name) for name in body.model_fields_set}
        if "limits" in changes:
            changes["limits"] = _limits(body.limits)
        key = await store.call(lambda s: s.update_key(key_id, changes, by=_who(request)))
        return JSONResponse(key.as_json())

    @router.post("/keys/{key_id}/revoke", **answers(KeyInfo, 200, 404))
    async def revoke_key(key_id: Id, request: Request) -> Response:
        """Ends a key for good. Every gateway refuses it within five seconds."""
        return JSONResponse((await store.call(lambda s: s.revoke(key_id, by=_who(request)))).as_json())

    @router.post("/keys/{key_id}/rotate", **answers(KeyWithSecret, 201, 404))
    async def rotate_key(key_id: Id, request: Request, body: Rotation | None = None) -> Response:
        """Makes a key that takes another's place; the old one expires after the overlap."""
        overlap = (body or Rotation()).overlap_seconds
        key, secret = await store.call(lambda s: s.rotate(key_id, overlap, by=_who(request)))
        return JSONResponse({**key.as_json(), "secret": secret}, 201, _NOT_STORED)

    documented = answers(UsageList)
    documented["responses"][200]["content"] = {"text/csv": {"schema": {"type": "string"}}}

    @router.get("/usage", **documented)
    async def usage(
        request: Request,
        since: Annotated[date | None, Query(description="First day, in UTC.")] = None,
        until: Annotated[date | None, Query(description="Last day, in UTC.")] = None,
        key: Annotated[str | None, Query(max_length=64, pattern=_PRINTABLE)] = None,
        tenant: Annotated[str | None, Query(max_length=64, pattern=_PRINTABLE)] = None,
        model: Annotated[str | None, Query(max_length=256, pattern=_PRINTABLE)] = None,
        by: Annotated[Groups, Query(description="What makes a row: of month, day, tenant, key, model.")] = (
            "key,model,day"
        ),
        format: Annotated[str | None, Query(pattern="^(json|csv)$", description="In place of Accept.")] = None,
    ) -> Response:
        """What was used, from the ledger: as JSON, or as CSV where ``Accept`` or ``format`` asks for it."""
        groups = by.split(",")
        rows = await store.call(lambda s: s.usage(since, until, key, tenant, model, groups))
        accepted = request.headers.get("accept", "")
        if format == "csv" or (format is None and "text/csv" in accepted and "application/json" not in accepted):
            from serving.tenants.csv_export import usage_csv

            file = {"Content-Disposition": 'attachment; filename="usage.csv"'}
            return Response(usage_csv(rows, groups), headers=file, media_type="text/csv; charset=utf-8")
        return JSONResponse({"data": [asdict(row) for row in rows]})

    documented = answers(CaptureInfo, 201, 404)
    documented["responses"][409] = {**documented["responses"][404], "description": "The key is captured already."}

    @router.post("/captures", **documented)
    async def start_capture(body: NewCapture, request: Request) -> Response:
        """Has one key's bodies captured, encrypted for the recipient, for a while. The audit log tells of it first."""

        def start(s: "Store") -> Any:
            from serving.tenants.capture import check_recipient

            check_recipient(body.recipient)
            return s.start_capture(**body.model_dump(), created_by=_who(request))

        return JSONResponse((await store.call(start)).as_json(), 201)

    @router.get("/captures", **answers(CaptureList))
    async def list_captures() -> Response:
        """All captures, the latest first."""
        return JSONResponse({"data": [capture.as_json() for capture in await store.call(lambda s: s.captures())]})

    @router.delete("/captures/{capture_id}", **answers(CaptureInfo, 200, 404))
    async def end_capture(capture_id: Id, request: Request) -> Response:
        """Ends one before its time. What it has captured stays."""

        def end(s: "Store") -> Any:
            if not any(capture.id == capture_id for capture in s.captures()):
                raise ApiError(404, f"there is no capture {capture_id[:100]!r}", "capture_not_found")
            return s.end_capture(capture_id, by=_who(request))

        return JSONResponse((await store.call(end)).as_json())

    return router


def _limits(limits: Limits) -> KeyLimits:
    return KeyLimits(**limits.model_dump())
