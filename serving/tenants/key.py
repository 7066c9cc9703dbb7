"""API keys as the gateway's workers know them."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use; None: as much as there is.

    Attributes:
        requests_per_minute, tokens_per_minute: in any 60 seconds; tokens of prompts and answers together.
        concurrency: requests at once.
        max_tokens: longest answer of one request, in tokens.
        tokens_per_month: of a calendar month, in UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    max_tokens: int | None = None
    tokens_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret.

    Attributes:
        id: ``key_`` and 16 letters and digits; no secret. Empty: nobody's, where no key is required.
        tenant: whose it is. Keys of a tenant share a prefix cache.
        name: for people.
        digest: SHA-256 of the whole secret.
        models: names that it may use; None: all.
        admin: may use ``/admin``, and read the metrics.
        metrics: may read the metrics.
        share: of the capacity under overload, relative to other keys.
        expires: seconds since the epoch; None: never.
        cache_salt: the tenant's; sent to engines with every prompt.
    """

    id: str
    tenant: str
    name: str = ""
    digest: bytes = b""
    models: frozenset[str] | None = None
    admin: bool = False
    metrics: bool = False
    limits: KeyLimits = KeyLimits()
    share: float = 1.0
    expires: float | None = None
    cache_salt: str = ""

    @property
    def hashed_id(self) -> str:
        """What logs show instead of the id: 16 hexadecimal digits."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:16] if self.id else ""


NOBODY = Key(id="", tenant="")
