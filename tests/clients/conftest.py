"""Fixtures of the commands' tests."""

from pathlib import Path

import pytest

from clients.store import URL_VARIABLE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own MEDASSIST_HOME, which does not exist yet."""
    monkeypatch.setenv("MEDASSIST_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    return tmp_path / "home"
