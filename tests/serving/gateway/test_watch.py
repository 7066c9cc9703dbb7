"""Changes of the settings file, as editors, Kubernetes and plain writes make them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.gateway.watch import stamp, watch

INTERVAL = 0.02


class Seen:
    """Contents at each call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.contents: list[str] = []
        self.calls, self.told = asyncio.Semaphore(0), 0

    async def __call__(self) -> None:
        self.contents.append(self.path.read_text())
        self.calls.release()
        if self.contents[-1] == "bad":
            raise ValueError("bad settings")

    async def after(self, calls: int) -> list[str]:
        """The contents, when there have been that many calls, and time for one too many."""
        for _ in range(calls - self.told):
            await asyncio.wait_for(self.calls.acquire(), 5)
        self.told = calls
        await asyncio.sleep(4 * INTERVAL)
        return self.contents


@contextlib.asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Seen]:
    seen = Seen(path)
    task = asyncio.create_task(watch(path, seen, INTERVAL, known=stamp(path)))
    try:
        yield seen
    finally:
        assert not task.done()
        task.cancel()


def test_a_file_that_is_replaced_missing_or_touched_the_wrong_way(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"

    async def change() -> None:
        path.write_text("one")
        async with watched(path) as seen:
            assert await seen.after(0) == []
            path.write_text("two")
            assert await seen.after(1) == ["two"]
            new = tmp_path / "new"  # what editors do; same size, and even the same time
            new.write_text("tre")
            times = path.stat()
            os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
            new.rename(path)
            assert await seen.after(2) == ["two", "tre"]
            path.unlink()
            assert await seen.after(2) == ["two", "tre"]
            path.write_text("back")
            assert await seen.after(3) == ["two", "tre", "back"]

    asyncio.run(change())


def test_a_config_map_that_swaps_its_folder(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "gateway.yaml").write_text(version)
    (tmp_path / "..data").symlink_to("v1")
    path = tmp_path / "gateway.yaml"
    path.symlink_to("..data/gateway.yaml")

    async def swap() -> None:
        async with watched(path) as seen:
            (tmp_path / "..tmp").symlink_to("v2")
            (tmp_path / "..tmp").rename(tmp_path / "..data")
            assert await seen.after(1) == ["v2"]

    asyncio.run(swap())


def test_a_half_written_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("")

    async def write_slowly() -> None:
        async with watched(path) as seen:
            with path.open("a") as file:
                for _ in range(60):
                    file.write("x")
                    file.flush()
                    await asyncio.sleep(INTERVAL / 4)
            assert await seen.after(1) == ["x" * 60]

    asyncio.run(write_slowly())


def test_a_change_before_the_first_look_counts(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("loaded")

    async def change_first() -> None:
        known = stamp(path)
        path.write_text("changed while loading")
        seen = Seen(path)
        task = asyncio.create_task(watch(path, seen, INTERVAL, known=known))
        assert await seen.after(1) == ["changed while loading"]
        task.cancel()

    asyncio.run(change_first())


def test_what_the_reload_raises_does_not_end_the_watching(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("good")

    async def spoil_and_mend() -> None:
        async with watched(path) as seen:
            path.write_text("bad")
            assert await seen.after(1) == ["bad"]
            path.write_text("mended")
            assert await seen.after(2) == ["bad", "mended"]

    asyncio.run(spoil_and_mend())
    assert [record.message for record in caplog.records] == [f"{path} has changed, and could not be applied"]
