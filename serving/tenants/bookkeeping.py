"""A gateway's keeper, and the store that is made with the first key while the gateway runs: it is taken into use then.

Imports little before there is something to keep: the process that uses it is to stay small.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.tenants.keeper import Keeper

CONFIG, LATER = "config.json", "later.json"
INTERVAL = 1.0  # seconds between looks for a store
PATIENCE = 30.0  # seconds in which a store that has appeared must be usable: it is being made
HANDOVER = 5.0  # seconds that the keeper without a store may take for the last records


class KeeperFailed(RuntimeError):
    """The keeper cannot begin, so nothing may be served."""


class Bookkeeping:
    """See above. The folder has the configuration of a keeper, if there is something to keep from the start, and in
    :data:`LATER` that of one for the default store, where there is no store yet; both are of
    :func:`serving.tenants.keeper_config.write_config`.

    Args:
        folder: private to this gateway.
        report: told what a person should know, in one line; from other threads, too.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._folder, self._report = folder, report
        self._lock = threading.Lock()
        self._keeper: Keeper | None = None
        self._stopped = False

    def start(self) -> None:
        """Starts the keeper, if there is something to keep; then workers can start.

        Raises:
            KeeperFailed: it cannot begin.
        """
        if (self._folder / CONFIG).exists():
            from serving.tenants.keeper import start_keeper

            self._keeper = start_keeper(self._folder, self._report)

    async def watch(self) -> str:
        """Waits for the store, where there is none yet, and takes it into use. The workers learn of it by the files in
        the folder, and need not be replaced.

        Returns:
            Only where nothing may be served any more, and why.
        """
        later = self._folder / LATER
        if later.exists():
            content: dict[str, Any] = json.loads(later.read_bytes())
            path: str = content["store"]["arguments"]["database"]
            appeared: float | None = None
            while True:
                if os.path.exists(path):  # noqa: ASYNC240 - a local file, once a second
                    appeared = appeared or time.monotonic()
                    reason = await asyncio.to_thread(self._use, content)
                    if not reason:
                        break
                    if time.monotonic() - appeared > PATIENCE:
                        return f"there is a store now, and nobody knows whether requests need a key: {reason}"
                await asyncio.sleep(INTERVAL)
            self._report(f"there is a store now, {path}: it is in use, and requests need a key as soon as it has one")
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    def _use(self, content: dict[str, Any]) -> str:
        """Starts the keeper of a store; returns why that did not work, or nothing."""
        from serving.tenants.keeper import start_keeper

        with self._lock:
            if self._stopped:
                return "the gateway stops"
            try:
                store_id, secret = identify(content["store"], content["revision"])
                known = {**content, "store_id": store_id, "audit": {**content["audit"], "secret": secret}}
                write_private(self._folder / CONFIG, known)
                keeper = start_keeper(self._folder, self._report)
            except (ValueError, KeeperFailed, OSError) as e:
                return str(e)
            earlier, self._keeper = self._keeper, keeper
        if earlier is not None:  # the workers leave its journals now
            earlier.stop(HANDOVER)
        return ""

    def stop(self, seconds: float) -> None:
        """When the workers have ended. The keeper may take so long for the last records."""
        with self._lock:
            self._stopped = True
        if self._keeper is not None:
            self._keeper.stop(seconds)


def identify(store: Mapping[str, Any], revision: str) -> tuple[str, str]:
    """Id of a store, and the secret of its audit logs.

    Args:
        store: as :class:`serving.tenants.ledger.Ledger` takes it.
        revision: that its tables must be of.

    Raises:
        ValueError: it cannot be used.
    """
    from serving.tenants.ledger import Ledger, StoreAway

    ledger = Ledger(store)
    try:
        found = ledger.revision()
        if found != revision:
            raise ValueError(f"the store is at revision {found}, and not at {revision}: run `medassist store upgrade`")
        facts = ledger.facts("store_id", "audit_secret")
    except StoreAway as e:
        raise ValueError(f"the store cannot be used: {e}") from None
    finally:
        ledger.close()
    store_id, secret = facts["store_id"], facts["audit_secret"]
    if not store_id or not secret:
        raise ValueError("the store lacks its id or the secret of its audit log: was it restored in part?")
    return store_id, secret


def write_private(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON for this user alone, in the place of what was there. Raises OSError."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(content, file)
