"""What the store holds of keys, captures and usage, as commands and admin routes show it: never a secret, nor a digest.

Times are whole seconds since the epoch.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from serving.gateway.names import NAME_RULE, is_name
from serving.tenants.key import KeyLimits

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST = 2**53  # the largest number that every reader of JSON takes
LIMITS = tuple(field.name for field in fields(KeyLimits))


class NoSuchKey(ValueError):
    """There is no key of that id."""


class CaptureActive(ValueError):
    """The key is captured already."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key without its secret. Attributes as of :class:`serving.tenants.key.Key`, and:

    Attributes:
        created, expires, revoked: None: does not expire, is not revoked.
        origin: id of the first of the keys that each took the place of the one before.
    """

    id: str
    tenant: str
    name: str
    models: tuple[str, ...] | None
    admin: bool
    metrics: bool
    limits: KeyLimits
    share: float
    created: int
    expires: int | None
    revoked: int | None
    origin: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "StoredKey":
        return cls(
            id=row["id"],
            tenant=row["tenant"],
            name=row["name"],
            models=None if row["models"] is None else tuple(json.loads(row["models"])),
            admin=bool(row["admin"]),
            metrics=bool(row["metrics"]),
            limits=KeyLimits(**{name: row[name] for name in LIMITS}),
            share=row["share"],
            created=row["created"],
            expires=row["expires"],
            revoked=row["revoked"],
            origin=row["origin"],
        )

    def row(self) -> dict[str, Any]:
        """Its columns, but for the digest."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "limits"}
        models = None if self.models is None else json.dumps(self.models)
        return {
            **columns,
            **asdict(self.limits),
            "models": models,
            "admin": int(self.admin),
            "metrics": int(self.metrics),
        }

    def state(self, now: float | None = None) -> str:
        """ "active", "revoked" or "expired"."""
        if self.revoked is not None:
            return "revoked"
        return "active" if self.expires is None or self.expires > (now or time.time()) else "expired"

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and admin routes."""
        return {**asdict(self), "state": self.state()}

    def check(self) -> None:
        """Raises ValueError where a value is none that a key can have; the message names it."""
        check_tenant(self.tenant)
        check_text("name", self.name, 128)
        if self.models is not None:
            if not self.models:
                raise ValueError("models must hold at least one name; without it, the key may use all")
            if wrong := [name for name in self.models if not isinstance(name, str) or not is_name(name)]:
                raise ValueError(f"models: each {NAME_RULE}, got {wrong[0]!r}")
        for name in LIMITS:
            value = getattr(self.limits, name)
            if value is not None and not (type(value) is int and 1 <= value <= LARGEST):
                raise ValueError(f"{name} must be a whole number from 1 to {LARGEST}, got {value!r}")
        if not (type(self.share) in (int, float) and math.isfinite(self.share) and 0 < self.share <= 1e6):
            raise ValueError(f"share must be a number above 0, got {self.share!r}")
        for name in ("admin", "metrics"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.expires is not None and not (type(self.expires) is int and 0 <= self.expires <= LARGEST):
            raise ValueError(f"expires must be whole seconds since the epoch, got {self.expires!r}")


@dataclass(frozen=True, slots=True)
class StoredCapture:
    """An order to capture one key's bodies.

    Attributes:
        recipient: public key of who can read them.
        created_by: who ordered it.
        ended: before its time; None: was not.
    """

    id: str
    key: str
    recipient: str
    reason: str
    created_by: str
    created: int
    expires: int
    ended: int | None

    @property
    def active(self) -> bool:
        return self.ended is None and self.expires > time.time()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "active": self.active}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Of the ledger, summed up by what was asked for; what was not asked for is None.

    Attributes:
        name: the key's.
        requests: all, ``failed`` ones included: those that got an error, or whose client left.
        estimated: requests whose tokens are the gateway's estimate.
    """

    month: str | None
    day: str | None
    tenant: str | None
    key: str | None
    name: str | None
    model: str | None
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    estimated: int


def check_tenant(name: str) -> None:
    if not _TENANT.fullmatch(name):
        rule = "must be at most 64 letters, digits, '.', '_' or '-', and begin with a letter or digit"
        raise ValueError(f"tenant {rule}, got {name!r}")


def check_text(name: str, text: str, longest: int) -> None:
    if not isinstance(text, str) or len(text) > longest or not text.isprintable():
        raise ValueError(f"{name} must be at most {longest} characters that can be printed")


def parse_models(models: Iterable[str] | None) -> tuple[str, ...] | None:
    """In the order given, each once."""
    return None if models is None else tuple(dict.fromkeys(models))
