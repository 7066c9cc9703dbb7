import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from serving.tenants.key import Key
from serving.tenants.record import Record
from serving.tenants.request_log import RequestLog, format_line
from tests.disks import small_disk

ROOT = Path(__file__).parents[3]
KEY = "key_0123456789abcdef"


def record(number: int = 0, **changes: object) -> Record:
    content = {
        "time": 1_800_000_000.5, "request_id": f"req-{number}", "key": KEY, "tenant": "clinic",
        "route": "/v1/chat/completions", "model": "demo", "status": 200, "code": "", "phase": "ending", "stream": True,
        "prompt_tokens": 7, "completion_tokens": 5, "estimated": False, "seconds": 1.0, "queued": 0.25, "upstream": 0.5,
        "first_token": 0.4, "replica": "0", "attempts": 1,
    }  # fmt: skip
    return Record(**(content | changes))  # type: ignore[arg-type]


def ids(text: str) -> list[str]:
    return [json.loads(line)["request_id"] for line in text.splitlines() if line]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path: Path, told: list[str]) -> Iterator[RequestLog]:
    log = RequestLog({"requests": True, "file": str(tmp_path / "requests.log")}, told.append)
    yield log
    log.close()


def test_a_line_holds_what_the_documentation_says() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    section = text.split("## The request log", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    line = orjson.loads(format_line(record()))
    assert rows == list(line)
    assert line["time"] == "2027-01-15T08:00:00.500Z"
    assert line["key"] == Key(KEY, "clinic").hashed_id
    assert KEY not in str(line)


def test_what_there_is_not_is_null() -> None:
    line = orjson.loads(
        format_line(record(key="", tenant="", model="", code="", replica="", first_token=-1, queued=-1))
    )
    for name in ("key", "tenant", "model", "code", "replica", "first_token_seconds", "queue_seconds", "trace_id"):
        assert line[name] is None, name


def test_a_file_that_is_rotated_away_is_begun_anew(log: RequestLog, tmp_path: Path, told: list[str]) -> None:
    file, old = tmp_path / "requests.log", tmp_path / "requests.log.1"
    log.write([record(0), record(1)])
    file.rename(old)
    log.write([record(2)])
    assert ids(old.read_text()) == ["req-0", "req-1"]
    assert ids(file.read_text()) == ["req-2"]
    assert file.stat().st_mode & 0o007 == 0, "not for everybody"
    file.unlink()
    file.write_text("")
    log.write([record(3)])
    assert ids(file.read_text()) == ["req-3"]
    assert told == []
    assert log.dropped == 0


def test_what_is_there_already_is_kept(log: RequestLog, tmp_path: Path) -> None:
    (tmp_path / "requests.log").write_text('{"request_id": "earlier"}\n')
    log.write([record(0)])
    assert ids((tmp_path / "requests.log").read_text()) == ["earlier", "req-0"]


def test_a_full_disk_stops_nothing_and_is_told_once(tmp_path: Path, told: list[str]) -> None:
    with small_disk(tmp_path / "disk", 65_536) as disk:
        log = RequestLog({"file": str(disk / "requests.log")}, told.append)
        count = 0
        while log.dropped == 0:
            log.write([record(count + i) for i in range(7)])
            count += 7
        log.write([record(count)])
        log.write([record(count + 1)])
        assert len(told) == 1
        assert "No space left on device" in told[0]
        dropped = log.dropped
        torn = (disk / "requests.log").read_bytes()
        (disk / "requests.log").rename(disk / "old")  # as logrotate does
        (disk / "old").unlink()
        log.write([record(100_000)])
        log.close()
        assert ids((disk / "requests.log").read_text()) == ["req-100000"]
        assert log.dropped == dropped
        assert len(told) == 2
        assert f"{dropped} lines were dropped" in told[1]
        assert len(ids(torn.rpartition(b"\n")[0].decode())) <= count


def test_a_torn_line_spoils_no_other(tmp_path: Path, told: list[str]) -> None:
    with small_disk(tmp_path / "disk", 65_536) as disk:
        (disk / "ballast").write_bytes(bytes(49_152))
        log = RequestLog({"file": str(disk / "requests.log")}, told.append)
        while log.dropped == 0:
            log.write([record(i) for i in range(9)])
        (disk / "ballast").unlink()
        log.write([record(100_000), record(100_001)])
        log.close()
        lines = (disk / "requests.log").read_text().splitlines()
    assert ids("\n".join(lines[-2:])) == ["req-100000", "req-100001"]
    broken = [line for line in lines if not line.endswith("}")]
    assert len(broken) <= 1


def test_a_folder_that_is_not_there_stops_nothing(tmp_path: Path, told: list[str]) -> None:
    log = RequestLog({"file": str(tmp_path / "none" / "requests.log")}, told.append)
    log.write([record()])
    log.write([record()])
    assert log.dropped == 2
    assert told == ["the request log cannot be written (No such file or directory): its lines are dropped until it can"]
    (tmp_path / "none").mkdir()
    log.write([record()])
    assert told[1:] == ["the request log is written again; 2 lines were dropped"]
    log.close()


def test_a_named_pipe_that_nobody_reads_stops_nothing(tmp_path: Path, told: list[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    log = RequestLog({"file": str(pipe)}, told.append)
    log.write([record()])
    assert log.dropped == 1
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log.write([record(1)])
    assert ids(os.read(reader, 65_536).decode()) == ["req-1"]
    os.close(reader)
    log.write([record(2)])
    log.close()
    assert log.dropped == 2


ON_STDOUT = """
import sys
from serving.tenants.record import Record
from serving.tenants.request_log import RequestLog
def tell(text):
    print(text, log.dropped, file=sys.stderr, flush=True)
record = Record.unpack(sys.argv[1].encode())
log = RequestLog({"file": None}, tell)
for command in sys.stdin:
    log.write([record] * int(command))
    tell("written")
"""


class OnStdout:
    """A process that logs to its standard output."""

    def __init__(self, stdout: int) -> None:
        command = [sys.executable, "-c", ON_STDOUT, record().pack().decode()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, text=True, bufsize=1
        )

    def write(self, count: int) -> tuple[list[str], int]:
        """What was told, and how many lines have been dropped so far."""
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        self.process.stdin.write(f"{count}\n")
        told: list[str] = []
        for line in self.process.stderr:
            text, _, dropped = line.strip().rpartition(" ")
            if text == "written":
                return told, int(dropped)
            told.append(text)
        raise AssertionError(told)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0


def read_all(reader: int) -> str:
    os.set_blocking(reader, False)
    pieces = []
    try:
        while piece := os.read(reader, 65_536):
            pieces.append(piece)
    except BlockingIOError:
        pass
    return b"".join(pieces).decode()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_standard_output_that_nobody_reads_holds_nothing_up(kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    log = OnStdout(writer)
    os.close(writer)
    began = time.monotonic()
    told, dropped = log.write(5000)
    assert ["nobody reads it" in line for line in told] == [True]
    assert 0 < dropped < 5000
    told, more = log.write(100)
    assert time.monotonic() - began < 30
    assert (told, more) == ([], dropped + 100)
    first = ids(read_all(reader))
    assert len(first) == 5000 - dropped, "whole lines only, and none that was counted as dropped"
    told, more = log.write(3)
    assert told == [f"the request log is written again; {dropped + 100} lines were dropped"]
    assert more == dropped + 100
    assert len(ids(read_all(reader))) == 3
    log.end()
    os.close(reader)


def test_standard_output_that_is_closed_stops_nothing() -> None:
    reader, writer = os.pipe()
    log = OnStdout(writer)
    os.close(writer)
    assert log.write(1) == ([], 0)
    os.close(reader)
    told, dropped = log.write(2)
    assert ["Broken pipe" in line for line in told] == [True]
    assert dropped == 2
    assert log.write(2) == ([], 4)
    log.end()
