"""Captured bodies: readable by the recipient alone, bounded in time and size, and whole or known not to be."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from serving.tenants import capture
from serving.tenants.capture import CaptureOrder, Recorder, check_recipient, flush, new_pair, read
from tests.serving.gateway.doubles import Engine
from tests.serving.gateway.keeping import Keeping, bearer, records, serving
from tests.waiting import eventually

BODY, ANSWER = b'{"prompt": "a word about a patient"}', b"an answer about a patient"


def order(public: str, seconds: float = 60) -> CaptureOrder:
    return CaptureOrder("cap_1", "key_a", public, time.time() + seconds)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cap_1").glob("*.capture"))


def recorded(folder: Path, public: str) -> Path:
    recorder = Recorder(order(public), folder, "req-1")
    recorder.request(BODY)
    for at in range(0, len(ANSWER), 10):
        recorder.answer(ANSWER[at : at + 10])
    recorder.close(200)
    flush(10)
    (path,) = files(folder)
    return path


def test_the_recipient_and_nobody_else_reads_it(tmp_path: Path) -> None:
    private, public = new_pair()
    path = recorded(tmp_path / "captures", public)
    found = read(path, private)
    assert (found.request, found.answer) == (BODY, ANSWER)
    assert found.end is not None
    assert (found.end["status"], found.end["cut"]) == (200, False)
    assert {name: found.header[name] for name in ("capture", "request", "key")} == {
        "capture": "cap_1", "request": "req-1", "key": "key_a"
    }  # fmt: skip
    content = path.read_bytes()
    assert b"patient" not in content
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with pytest.raises(ValueError, match="changed, or is for another recipient"):
        read(path, new_pair()[0])


def test_whatever_is_changed_is_noticed(tmp_path: Path) -> None:
    private, public = new_pair()
    path = recorded(tmp_path, public)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            found = read(path, private)
        except ValueError:
            continue
        # A length that was changed hides what is behind it, and with it the end.
        assert found.end is None, at


def test_a_file_that_lost_its_end_says_so(tmp_path: Path) -> None:
    private, public = new_pair()
    path = recorded(tmp_path, public)
    os.truncate(path, path.stat().st_size - 1)
    found = read(path, private)
    assert found.end is None
    assert (found.request, found.answer) == (BODY, ANSWER)


def test_frames_cannot_be_exchanged_between_requests(tmp_path: Path) -> None:
    private, public = new_pair()
    first = recorded(tmp_path / "one", public)
    second = recorded(tmp_path / "two", public)
    head, _, frames = first.read_bytes().partition(b"\n")
    other, _, _ = second.read_bytes().partition(b"\n")
    first.write_bytes(other + b"\n" + frames)
    with pytest.raises(ValueError, match="was changed"):
        read(first, private)
    first.write_bytes(head.replace(b"req-1", b"req-2") + b"\n" + frames)
    with pytest.raises(ValueError, match="was changed"):
        read(first, private)


def test_it_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = new_pair()
    given = order(public, 60)
    recorder = Recorder(given, tmp_path, "req-1")
    recorder.request(BODY)
    now = time.time()
    monkeypatch.setattr(capture.time, "time", lambda: now + 61)
    assert not given.open
    recorder.answer(ANSWER)
    recorder.close(200)
    flush(10)
    found = read(files(tmp_path)[0], private)
    assert (found.request, found.answer) == (BODY, b"")
    assert found.end is not None
    assert found.end["cut"]


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = new_pair()
    monkeypatch.setattr(capture, "MAX_FILE", 100)
    recorder = Recorder(order(public), tmp_path, "req-1")
    recorder.request(b"x" * 90)
    recorder.answer(b"y" * 20)
    recorder.close(200)
    flush(10)
    found = read(files(tmp_path)[0], private)
    assert (len(found.request), len(found.answer)) == (90, 0)
    assert found.end is not None
    assert found.end["cut"]
    monkeypatch.setattr(capture, "MAX_CAPTURE", 100)
    again = Recorder(order(public), tmp_path, "req-2")
    again.request(BODY)
    again.close(200)
    flush(10)
    assert len(files(tmp_path)) == 1, "the capture is full"


def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "captures").write_text("not a folder")
    recorder = Recorder(order(new_pair()[1]), tmp_path / "captures", "req-1")
    recorder.request(BODY)
    recorder.answer(ANSWER)
    recorder.close(200)
    flush(10)


@pytest.mark.parametrize("recipient", ["", "0" * 64, "x" * 64, "a" * 63])
def test_keys_that_protect_nothing_are_refused(recipient: str) -> None:
    with pytest.raises(ValueError, match=r"64 hexadecimal digits|anybody could read"):
        check_recipient(recipient)
    check_recipient(new_pair()[1])


def test_names_of_captures_cannot_lead_elsewhere(tmp_path: Path) -> None:
    bad = CaptureOrder("../elsewhere", "key_a", new_pair()[1], time.time() + 60)
    recorder = Recorder(bad, tmp_path / "captures", "../../req")
    recorder.request(BODY)
    recorder.close(200)
    flush(10)
    assert not list(tmp_path.rglob("*.capture"))
    recorder = Recorder(order(new_pair()[1]), tmp_path / "captures", "../../req")
    recorder.request(BODY)
    recorder.close(200)
    flush(10)
    assert [path.parent for path in tmp_path.rglob("*.capture")] == [tmp_path / "captures" / "cap_1"]


def test_cryptography_is_loaded_only_by_a_capture() -> None:
    code = "import sys, serving.gateway.worker, serving.tenants.capture; print('cryptography' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_the_gateway_captures_one_key_and_says_so(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_captures_one_key(tmp_path), 60))


def test_stopping_a_capture_ends_what_is_being_recorded(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_ends_what_is_recorded(tmp_path), 60))


async def _ends_what_is_recorded(tmp_path: Path) -> None:
    keeping, stopped = Keeping(tmp_path), asyncio.Event()
    private, public = new_pair()
    captured, secret = keeping.key()

    async def streams(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "before"}]}\n\n')
        await stopped.wait()
        await response.write(b'data: {"choices": [{"text": "after"}]}\n\ndata: [DONE]\n\n')
        return response

    async with Engine(streams).running() as engine, serving(keeping, engine) as client:
        keys = client.gateway.accounts._keys
        keeping.captures.append(
            {"id": "cap_1", "key": captured["id"], "recipient": public, "expires": time.time() + 60}
        )
        keeping.tell()
        assert await eventually(lambda: bool(keys.captures))
        async with client.post(stream=True, headers=bearer(secret)) as response:
            said = await response.content.readuntil(b"before")
            keeping.captures.clear()
            keeping.tell()
            assert await eventually(lambda: not keys.captures)
            stopped.set()
            said += await response.read()
        flush(10)
    assert b"after" in said
    (path,) = files(tmp_path / "captures")
    found = read(path, private)
    assert b"before" in found.answer
    assert b"after" not in found.answer
    assert found.end is not None
    assert found.end["cut"]


async def _captures_one_key(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path)
    private, public = new_pair()
    captured, secret = keeping.key()
    _, other = keeping.key("other")
    async with Engine().running() as engine, serving(keeping, engine) as client:
        row = {"id": "cap_1", "key": captured["id"], "recipient": public, "expires": time.time() + 60}
        keeping.captures.append(row)
        keeping.tell()
        assert await eventually(lambda: bool(client.gateway.accounts._keys.captures))
        async with client.post(headers=bearer(other)) as response:
            assert response.status == 200
        async with client.post(stream=True, headers=bearer(secret)) as response:
            said = await response.read()
        async with client.post(headers=bearer(secret), temperature=99) as response:
            refusal = await response.read()
            assert response.status == 400
        assert [record.captured for record in await records(keeping, 3)] == [False, True, True]
        flush(10)
        found = [read(path, private) for path in sorted(files(tmp_path / "captures"), key=lambda p: p.stat().st_mtime)]
        # An order whose time has passed is not obeyed, even if nobody has said that it is over.
        row["expires"] = time.time() - 1
        keeping.tell()
        assert await eventually(lambda: not client.gateway.accounts._keys.captures[captured["id"]].open)
        async with client.post(headers=bearer(secret)) as response:
            assert response.status == 200
        assert not (await records(keeping, 4))[-1].captured
    assert sorted(item.answer for item in found) == sorted([said, refusal])
    assert all(b'"messages"' in item.request for item in found)
    assert {item.end["status"] for item in found if item.end} == {200, 400}
