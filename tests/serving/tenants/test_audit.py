"""The audit log: whatever one hand does to it is found; whatever a crash does to it is mended."""

import hmac
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.tenants import audit
from serving.tenants.audit import AuditLog
from serving.tenants.audit_files import GENESIS, HEAD_SIZE, name_of
from serving.tenants.audit_verify import Problem, Report, events, log_id, verify

SECRET = b"k" * 32
EPOCH = 1_790_000_000  # a second of 2026-09-21


class Clock:
    """The wall clock of :mod:`serving.tenants.audit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = float(EPOCH)
        own = SimpleNamespace(time=lambda: self.now, strftime=time.strftime, gmtime=time.gmtime)
        monkeypatch.setattr(audit, "time", own)
        monkeypatch.setattr(audit.os, "fdatasync", lambda fd: None)  # thousands of them take a minute
        monkeypatch.setattr(audit.os, "fsync", lambda fd: None)

    def next_day(self, days: int = 1) -> None:
        self.now += 86_400 * days


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """An own folder in an own one: a log has a file beside it."""
    (tmp_path / "audit").mkdir()
    return tmp_path / "audit"


@pytest.fixture
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


def request(number: int, journal: str = "worker-0") -> dict[str, object]:
    return {"event": "request", "key": "key_a", "request_id": f"r{number}", "journal": journal, "offset": number * 100}


def three_days(folder: Path, clock: Clock, lines: int = 4) -> AuditLog:
    log = AuditLog(folder, SECRET, 365)
    for day in range(3):
        for number in range(lines // 2):
            log.append([request(day * 100 + 2 * number + 1), request(day * 100 + 2 * number + 2)])
        clock.next_day()
    clock.next_day(-1)
    return log


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


def check(folder: Path, head: tuple[int, str] | None = None) -> Report:
    return verify(folder, SECRET, head)


def test_lines_say_what_was_given_and_chain_from_the_beginning(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path / "audit", SECRET, 365)
    assert not files(tmp_path / "audit"), "a log without events has no file"
    log.append([{"event": "key.created", "key": "key_a", "time": EPOCH - 0.25}])
    log.append([request(1), request(2)])

    (path,) = files(tmp_path / "audit")
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4]
    assert [line["event"] for line in lines] == ["audit.positions", "key.created", "request", "request"]
    assert lines[1]["time"] == time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(EPOCH - 1)) + ".750Z"
    assert lines[1]["key"] == "key_a"
    assert {line["log"] for line in lines} == {log.log_id} == {log_id(path.parent, SECRET)}
    assert [line["previous"] for line in lines] == [GENESIS, *(line["hash"] for line in lines[:-1])]
    for raw, line in zip(path.read_bytes().splitlines(), lines, strict=True):
        body = raw.partition(b',"previous"')[0]
        day = path.stem.removeprefix("audit-").encode()
        assert line["hash"] == hmac.new(SECRET, day + line["previous"].encode() + body, "sha256").hexdigest()
    assert log.head == (4, lines[-1]["hash"])
    assert check(path.parent, log.head).ok
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with pytest.raises(ValueError, match="must not have the fields"):
        log.append([{"event": "request", "hash": "mine"}])
    assert check(path.parent, log.head).lines == 4


# What one hand can do to the files. Each returns the file and the line (from 1) at which it must be found, or None
# where it has changed nothing.


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _change(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    lines = _lines(path)
    at = rng.randrange(len(lines))
    event = orjson.loads(lines[at])
    event[rng.choice(["sequence", "time", "event", "key", "request_id", "previous", "hash", "log"])] = "another"
    lines[at] = orjson.dumps(event) + b"\n"
    path.write_bytes(b"".join(lines))
    return path.name, at + 1


def _remove(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    lines = _lines(path)
    at = rng.randrange(len(lines))
    last = at == len(lines) - 1
    path.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
    if not last:
        return path.name, at + 1
    later = [p for p in files(folder) if p.name > path.name]
    return (later[0].name, 1) if later else (path.name, at)


def _duplicate(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    lines = _lines(path)
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines) + 1)
    path.write_bytes(b"".join([*lines[:to], lines[at], *lines[to:]]))
    # Two equal neighbours: either is the second one.
    return path.name, to + 1 + (to == at)


def _exchange(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    lines = _lines(path)
    one, other = sorted(rng.sample(range(len(lines)), 2))
    lines[one], lines[other] = lines[other], lines[one]
    path.write_bytes(b"".join(lines))
    return path.name, one + 1


def _move(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    """A line to another day's file; also where the order stays: the last line to be the next day's first."""
    source, target = rng.sample(files(folder), 2)
    if rng.random() < 0.3 and source.name < target.name:
        at, to = -1, 0
    else:
        at, to = rng.randrange(len(_lines(source))), rng.randrange(len(_lines(target)) + 1)
    lines = _lines(source)
    line = lines.pop(at)
    source.write_bytes(b"".join(lines))
    there = _lines(target)
    there.insert(to, line)
    target.write_bytes(b"".join(there))
    return target.name, to + 1


def _truncate(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    whole = path.read_bytes().count(b"\n")
    if size and not path.read_bytes().endswith(b"\n"):
        return path.name, whole + 1
    later = [p for p in files(folder) if p.name > path.name]
    return (later[0].name, 1) if later else (path.name, whole)


def _remove_file(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    path.unlink()
    later = [p for p in files(folder) if p.name > path.name]
    if later:
        return later[0].name, 1
    return files(folder)[-1].name, len(_lines(files(folder)[-1]))


def _flip(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    line = content[:at].count(b"\n") + 1
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name, line


def _insert(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    """A line that was made without the secret."""
    path = rng.choice(files(folder))
    lines = _lines(path)
    at = rng.randrange(len(lines) + 1)
    model = orjson.loads(lines[min(at, len(lines) - 1)])
    if at == len(lines):
        model |= {"sequence": model["sequence"] + 1, "previous": model["hash"]}
    model |= {"key": "key_b", "hash": rng.randbytes(32).hex()}
    path.write_bytes(b"".join([*lines[:at], orjson.dumps(model) + b"\n", *lines[at:]]))
    return path.name, at + 1


def _rename(folder: Path, rng: random.Random) -> tuple[str, int] | None:
    path = rng.choice(files(folder))
    other = path.with_name(name_of(f"20{rng.randrange(20, 40)}-01-0{rng.randrange(1, 9)}"))
    path.rename(other)
    return other.name, 1


HANDS: list[Callable[[Path, random.Random], tuple[str, int] | None]] = [
    _change, _remove, _duplicate, _exchange, _move, _truncate, _remove_file, _flip, _insert, _rename,
]  # fmt: skip


@pytest.mark.parametrize("hand", HANDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_one_manipulation_is_found_in_its_place(
    hand: Callable[[Path, random.Random], tuple[str, int] | None],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
    clock: Clock,
) -> None:
    clock.now = EPOCH
    folder = tmp_path_factory.mktemp("audit") / "audit"
    log = three_days(folder, clock)
    before = {path.name: path.read_bytes() for path in files(folder)}
    place = hand(folder, random.Random(seed))
    if {path.name: path.read_bytes() for path in files(folder)} == before:
        return
    for head in (None, log.head):
        report = check(folder, head)
        found = [(problem.file, problem.line) for problem in report.problems]
        assert found, "not found"
        assert place in found, [str(problem) for problem in report.problems]
    # A process that goes on with the log does not hide it.
    AuditLog(folder, SECRET, 365).append([request(1_000)])
    after = check(folder)
    assert not after.ok
    assert not any("at this start" in note for note in after.notes)
    shutil.rmtree(folder)


@pytest.mark.parametrize("which", [0, -1])
def test_the_first_and_the_last_line_are_held_too(tmp_path: Path, clock: Clock, which: int) -> None:
    log = three_days(tmp_path, clock)
    assert check(tmp_path, log.head) == Report(log.log_id, 3, 15, 1, 15)
    path = files(tmp_path)[which]
    lines = _lines(path)
    for kept in (lines[1:] if which == 0 else lines[:-1], []):
        path.write_bytes(b"".join(kept))
        assert not check(tmp_path).ok
        path.write_bytes(b"".join(lines))
        assert check(tmp_path).ok


@pytest.mark.parametrize("at", [0, 1, 40, 200, 300, HEAD_SIZE - 1])
def test_a_changed_head_is_found(tmp_path: Path, clock: Clock, at: int) -> None:
    log = three_days(tmp_path, clock)
    head = tmp_path / "head"
    content = head.read_bytes()
    assert len(content) == HEAD_SIZE
    for bit in range(8):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        head.write_bytes(flipped)
        report = check(tmp_path)
        assert [problem.file for problem in report.problems] == ["head"]
        assert report.log == log.log_id
    head.unlink()
    assert check(tmp_path).problems == [Problem("head", 0, "it was removed")]
    # And for good: the process that makes a new one says so in the log.
    AuditLog(tmp_path, SECRET, 365)
    report = check(tmp_path)
    assert [str(p) for p in report.problems] == [
        f"{files(tmp_path)[-1].name}, line 6: a process found that the log had been changed: the head was removed"
    ]


def test_an_older_copy_of_everything_is_found_by_the_store(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path / "log", SECRET, 365)
    log.append([request(1)])
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    old = log.head
    log.append([request(2)])
    assert check(tmp_path / "copy").ok, "it is whole by itself"
    (problem,) = check(tmp_path / "copy", log.head).problems
    assert problem.text == "the store knows of 3 lines, the log ends with 2: the rest was removed"
    assert check(tmp_path / "log", old).ok, "the store's may lag behind"
    assert check(tmp_path / "log", (2, "f" * 64)).problems[0].line == 2
    shutil.rmtree(tmp_path / "log")
    assert not check(tmp_path / "log", old).ok
    assert check(tmp_path / "log").ok


def test_another_secret_finds_nothing_in_order(tmp_path: Path, clock: Clock) -> None:
    three_days(tmp_path, clock)
    assert not verify(tmp_path, b"x" * 32).ok


def test_retention_removes_whole_days_and_says_so(tmp_path: Path, clock: Clock) -> None:
    log = three_days(tmp_path, clock)
    assert [path.name for path in files(tmp_path)] == [f"audit-2026-09-{day}.jsonl" for day in (21, 22, 23)]
    clock.next_day(9)  # 2 October
    log = AuditLog(tmp_path, SECRET, 10)
    assert [path.name for path in files(tmp_path)] == [
        "audit-2026-09-22.jsonl", "audit-2026-09-23.jsonl", "audit-2026-10-02.jsonl"
    ]  # fmt: skip
    (event,) = [event for event in events(tmp_path) if event["event"] == "audit.removed"]
    assert event["files"] == ["audit-2026-09-21.jsonl"]
    assert event["through"] == _first(files(tmp_path)[0])["sequence"] - 1 == 5
    report = check(tmp_path, log.head)
    assert report.ok, report.problems
    assert report.first == 6
    # What is now the first line cannot go unseen either.
    path = files(tmp_path)[0]
    path.write_bytes(b"".join(_lines(path)[1:]))
    assert [str(p) for p in check(tmp_path).problems] == [
        "audit-2026-09-22.jsonl, line 1: has number 7, behind audit-2026-09-21.jsonl that retention has removed: "
        "number 6 is missing"
    ]


def test_retention_removes_all_but_today(tmp_path: Path, clock: Clock) -> None:
    log = three_days(tmp_path, clock)
    positions = dict(log.positions)
    clock.next_day(400)
    log.append([{"event": "gateway.started"}])
    assert len(files(tmp_path)) == 1
    assert check(tmp_path, log.head).ok
    assert AuditLog(tmp_path, SECRET, 365).positions == positions


@pytest.mark.parametrize("renamed", [None, "audit-2020-01-01.jsonl"])
def test_retention_does_not_make_good_what_a_hand_has_removed(
    tmp_path: Path, clock: Clock, renamed: str | None
) -> None:
    three_days(tmp_path, clock)
    second = files(tmp_path)[1]
    second.rename(second.with_name(renamed)) if renamed else second.unlink()
    clock.next_day(9)
    log = AuditLog(tmp_path, SECRET, 10)  # in which the first of the days is too old
    log.append([{"event": "gateway.started"}])
    assert "audit-2026-09-21.jsonl" in [path.name for path in files(tmp_path)]
    assert not check(tmp_path).ok


def test_a_death_in_the_middle_of_retention_is_no_damage(tmp_path: Path, clock: Clock) -> None:
    three_days(tmp_path, clock)
    kept = {path: path.read_bytes() for path in files(tmp_path)[:1]}
    clock.next_day(9)
    AuditLog(tmp_path, SECRET, 10)
    for path, content in kept.items():
        path.write_bytes(content)
    report = check(tmp_path)
    assert report.ok
    assert "left over" in report.notes[0]
    AuditLog(tmp_path, SECRET, 10)
    assert not any(path.exists() for path in kept)
    assert check(tmp_path).ok


def _first(path: Path) -> dict[str, Any]:
    line: dict[str, Any] = orjson.loads(path.read_bytes().splitlines()[0])
    return line


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), rollover=st.booleans())
def test_a_death_in_the_middle_of_an_append_is_mended(
    share: float, rollover: bool, tmp_path_factory: pytest.TempPathFactory, clock: Clock
) -> None:
    """All lengths to which the last write may have come, with the head not yet written."""
    clock.now = EPOCH
    folder = tmp_path_factory.mktemp("audit") / "audit"
    log = AuditLog(folder, SECRET, 365)
    log.append([request(n) for n in (1, 2)])
    head, stored = (folder / "head").read_bytes(), log.head
    if rollover:
        clock.next_day()
    before = sum(path.stat().st_size for path in files(folder))
    log.append([request(n) for n in (3, 4, 5)])
    (folder / "head").write_bytes(head)
    path = files(folder)[-1]
    old = 0 if rollover else before
    os.truncate(path, old + round(share * (path.stat().st_size - old)))
    whole = sum(path.read_bytes().count(b"\n") for path in files(folder)) - 3

    report = check(folder, stored)
    assert report.ok, report.problems
    assert report.lines == 3 + whole
    again = AuditLog(folder, SECRET, 365)
    assert again.positions["worker-0"] == 100 * (2 + max(0, whole - rollover))
    said = [event for event in events(folder) if event["event"] == "audit.recovered"]
    if 0 < share < 1 or (share == 1 and whole):
        assert [event["lines"] for event in said] == [whole] or path.stat().st_size == old
    again.append([request(6)])
    after = check(folder, again.head)
    assert after.ok, after.problems
    assert not after.notes
    assert [e["request_id"] for e in events(folder) if e["event"] == "request"][:2] == ["r1", "r2"]


def test_a_crash_does_not_hide_what_was_changed_before(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path, SECRET, 365)
    log.append([request(1), request(2)])
    (path,) = files(tmp_path)
    good = _lines(path)
    # The last whole line removed, and what looks like a line that was being written.
    path.write_bytes(b"".join(good[:-1]) + good[-1][:50])
    assert check(tmp_path).problems[0].line == 3
    AuditLog(tmp_path, SECRET, 365).append([request(3)])
    assert [problem.line for problem in check(tmp_path).problems] == [3, 4, 4]
    assert "changed, or cut off" in check(tmp_path).problems[0].text


def test_an_append_that_fails_appends_nothing(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, SECRET, 365)
    log.append([request(1)])
    before, head = files(tmp_path)[0].read_bytes(), log.head

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "fdatasync", full)
        with pytest.raises(OSError, match="No space"):
            log.append([request(2)])
    assert files(tmp_path)[0].read_bytes() == before
    assert (log.head, log.positions) == (head, {"worker-0": 100})
    log.append([request(2)])
    assert check(tmp_path, log.head).ok
    assert not [event for event in events(tmp_path) if event["event"] == "audit.recovered"]


def test_positions_are_found_without_reading_all(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, SECRET, 365)
    log.append([request(5, "idle"), request(7, "gone")])
    log.forget(["gone"])
    monkeypatch.setattr(audit, "CHECKPOINT", 100)
    for number in range(1, 60):
        log.append([request(10 * number + k, f"worker-{number % 3}") for k in range(10)])
    clock.next_day()
    log.append([request(1_000, "late")])
    expected = {"idle": 500, "worker-0": 57_900, "worker-1": 58_900, "worker-2": 59_900, "late": 100_000}
    assert log.positions == expected
    read: list[str] = []
    original = audit.backwards
    monkeypatch.setattr(audit, "backwards", lambda path: read.append(path.name) or original(path))
    assert AuditLog(tmp_path, SECRET, 365).positions == expected
    assert read == [files(tmp_path)[-1].name]
    assert check(tmp_path, log.head).ok


def test_a_clock_that_is_set_back_does_not_break_the_order(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path, SECRET, 365)
    log.append([request(1)])
    clock.next_day(-3)
    log.append([request(2)])
    AuditLog(tmp_path, SECRET, 365).append([request(3)])
    assert len(files(tmp_path)) == 1
    assert check(tmp_path).ok
