"""What a worker knows of keys, what it lets them do, and what it writes down of their requests."""

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from serving.gateway.authentication import Authentication
from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.parameters import Checked
from serving.gateway.settings import Model, Settings
from serving.gateway.settlement import KeyCounters, record_of, tokens_used
from serving.gateway.tracing import Trace, Tracer
from serving.tenants.journal import Journal
from serving.tenants.key import Key
from serving.tenants.key_table import KeyTable
from serving.tenants.limits import Limits

if TYPE_CHECKING:
    from serving.gateway.relay import Request
    from serving.tenants.capture import Recorder

TICK = 0.25  # seconds between looks at the keeper's files
MOST_FAILURES, FAILURES_SECONDS = 10, 60.0  # requests without a key, where one is needed, that are written down
NO_ROOM_RETRY = 5  # seconds, in Retry-After
CAPTURES = "captures"  # folder in settings.home
CAPTURES_LIMIT = 2.0  # seconds at the end for what was captured to be written
# vLLM's, on every route that computes something of a prompt.
_UNSALTED = frozenset(("/tokenize",))


class Grant(Protocol):
    """Leave for one request, from :meth:`Accounts.admit`.

    Attributes:
        headers: ``x-ratelimit-*``, for the answer.
    """

    headers: tuple[tuple[bytes, bytes], ...]

    def done(self, tokens: int) -> None:
        """The request has ended and has used so many. To be called exactly once."""


class Accounts:
    """See above.

    Args:
        workers: processes that share the load.
        folder: the keeper's; None: there is none, no key is required and nothing is written down.
    """

    def __init__(self, settings: Settings, metrics: Metrics, workers: int = 1, folder: Path | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        self._tracer = Tracer(settings.tracing)
        self._keys = KeyTable(folder) if folder else None
        self._authentication = Authentication(self._keys, metrics.auth_failures)
        self._limits = Limits(settings, metrics, workers, self._keys.spent) if self._keys else None
        self._counters = KeyCounters(metrics)
        self._journal: Journal | None = None
        self._journal_folder: Path | None = None
        self._full = False  # there is no room for a journal
        self._failures, self._failures_since = 0, 0.0
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._keys is None or self._limits is None:
            return
        self._open_journal(self._keys)
        await self._limits.start()
        self._ticking = asyncio.create_task(self._tick(self._keys))

    async def stop(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait((self._ticking,))
        if self._limits is not None:
            await self._limits.stop()
        if self._journal is not None:
            self._journal.close()
        if (capture := sys.modules.get("serving.tenants.capture")) is not None:
            await asyncio.to_thread(capture.flush, CAPTURES_LIMIT)

    async def apply(self, settings: Settings) -> None:
        """Takes new settings into use."""
        self.settings = settings
        if self._limits is not None:
            await self._limits.apply(settings)

    async def _tick(self, keys: KeyTable) -> None:
        while True:
            await asyncio.sleep(TICK)
            # A file that cannot be read now is looked at again; what was known stays.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                keys.refresh()
            if keys.journal != self._journal_folder:
                self._open_journal(keys)
            elif self._journal is not None:
                self._journal.tick()

    def _open_journal(self, keys: KeyTable) -> None:
        if keys.journal is not None:
            try:
                journal = Journal(keys.journal)
            except OSError:
                self._full = True
                return
            if self._journal is not None:  # there was no store yet
                self._journal.close()
            self._journal, self._journal_folder, self._full = journal, keys.journal, False

    def authenticate(self, headers: Sequence[tuple[bytes, bytes]]) -> Key:
        """Who asks, by the headers of a request; their names are in lower case.

        Raises:
            ApiError: 401.
        """
        return self._authentication.authenticate(headers)

    def renew(self, key: Key) -> Key:
        """A key as it is now, for a request that it was let in with a while ago. Raises as :meth:`authenticate`."""
        return self._authentication.renew(key)

    def knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request may come in, by its headers. That it may not is no failure."""
        return self._authentication.knows(headers)

    def trace(self, traceparent: bytes) -> Trace | None:
        """The span of a request that begins; None: it is not traced."""
        return self._tracer.begin(traceparent)

    def prepare(self, key: Key, route: str, checked: Checked, model: Model) -> None:
        """Makes a request fit for an engine that several tenants share.

        The tenant's salt keeps the engine's prefix cache from telling one tenant what another has sent. A client's own
        ``cache_salt`` is mixed into it, so that nobody can choose another tenant's.
        """
        if self._journal is not None and model.chunk_usage:
            checked.count_chunks()
        if key.cache_salt and self.settings.cache_salts and model.cache_salts and route not in _UNSALTED:
            own: str = checked.body.get("cache_salt", "")
            salt = hashlib.blake2b(own.encode(), digest_size=16, key=key.cache_salt.encode()[:64])
            checked.body["cache_salt"] = salt.hexdigest()
            checked.salted = True
            # Another tenant's prompt is not in any cache for this one.
            other = int.from_bytes(salt.digest()[:8], "little")
            checked.prefixes = tuple(prefix ^ other for prefix in checked.prefixes)

    async def admit(self, key: Key, prompt_tokens: int, max_tokens: int | None) -> Grant | None:
        """Leave for a request; None: the key has no limits.

        Raises:
            ApiError: 429, or 503 where the request could not be written down.
        """
        if self._full if self._journal is None else not self._journal.room:
            what = "there is no room to write down what is used: the gateway's disk is full"
            raise ApiError(503, what, "accounting_unavailable", None, NO_ROOM_RETRY)
        return await self._limits.admit(key, prompt_tokens, max_tokens) if self._limits and key.id else None

    def recorder(self, key: Key, request_id: bytes, body: bytes) -> "Recorder | None":
        """Takes a request's body where its key's are captured; None: they are not."""
        order = self._keys.captures.get(key.id) if self._keys and self._keys.captures else None
        if order is None or not order.open:
            return None
        from serving.tenants.capture import Recorder

        recorder = Recorder(order, self.settings.home_folder / CAPTURES, request_id.decode())
        recorder.request(body)
        return recorder

    def settle(self, request: "Request", status: int, code: str, seconds: float) -> None:
        """Writes down a request that ends."""
        used = tokens_used(request, status)
        prompt_tokens, completion_tokens, _ = used
        key = request.key
        if request.grant is not None:
            request.grant.done(prompt_tokens + completion_tokens)
        if key.id:
            self._counters.count(key, status, prompt_tokens, completion_tokens)
        journal = self._journal
        if (journal is None and not self._full) or not (key.id or not self._too_many_failures()):
            return
        # Room that is left is for requests that were let in: refusals must not fill the memory.
        if journal is None or not (
            (journal.room or request.phase != "reading")
            and journal.append(record_of(request, status, code, seconds, used).pack())
        ):
            self.metrics.records_dropped.inc()

    def _too_many_failures(self) -> bool:
        """Whether another request of a stranger is not worth a record: guessing must not fill the disk. All of them
        are counted as metrics."""
        if self._keys is None or not self._keys.required:
            return False
        now = monotonic()
        if now - self._failures_since >= FAILURES_SECONDS:
            self._failures, self._failures_since = 0, now
        self._failures += 1
        return self._failures > MOST_FAILURES
