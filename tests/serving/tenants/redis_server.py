"""A Redis of a test's own, which may be killed, emptied and stopped."""

from pathlib import Path

import pytest
import redis

from loadtest.gateway.databases import RedisServer


class Server(RedisServer):
    """It runs, in a new folder within ``folder``, and keeps nothing on disk. The test is skipped where there is none.

    Attributes:
        client: of the test.
    """

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(folder / "redis")
        except RuntimeError as e:
            pytest.skip(str(e))
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def kill(self) -> None:
        self.client.close()
        super().kill()

    def calls(self) -> int:
        """Times that the limits' script has run."""
        stats: dict[str, dict[str, int]] = self.client.info("commandstats")  # type: ignore[assignment]
        return stats.get("cmdstat_evalsha", {"calls": 0})["calls"]
