from collections.abc import Iterator

import pytest

from tests.e2e.server import CHECKPOINT, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped checkpoint behind the gateway; one engine for the whole session, left as it was found."""
    server = Server(CHECKPOINT, tmp_path_factory.mktemp("server"))
    try:
        yield server.wait_ready()
    finally:
        server.stop()
