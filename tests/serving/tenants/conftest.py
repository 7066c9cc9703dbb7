"""Fixtures of the store's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.tenants.store import Store
from tests.databases import postgresql_database


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty store: nothing there yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/medassist.db"
        return
    with postgresql_database() as url:
        yield url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """One that has its tables."""
    with Store(store_url) as made:
        made.upgrade()
        yield made
