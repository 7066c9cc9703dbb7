"""Tenants in front of the shared engine."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.e2e.server import Server
from tests.serving.gateway.doubles import Client, gateway_for
from tests.serving.gateway.keeping import Keeping


@contextlib.asynccontextmanager
async def tenants(server: Server, folder: Path, **settings: Any) -> AsyncIterator[tuple[Client, Keeping, list[str]]]:
    """A gateway of its own with two tenants, what is written down there, and the tenants' keys."""
    keeping = Keeping(folder)
    keys = [keeping.key(tenant)[1] for tenant in ("one", "two")]
    models = {server.model: {"engines": [{"url": f"unix:{server.engine['socket']}"}]}}
    async with gateway_for(accounts=keeping.accounts, home=str(folder), models=models, **settings) as client:
        yield client, keeping, keys
