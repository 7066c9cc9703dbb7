"""Journals: what was appended is read, whatever happens to the writer; what was torn is not."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from serving.tenants.journal import MAGIC, RESERVE, Journal, JournalFile, remove, segments
from tests.disks import small_disk
from tests.waiting import until

SMALL = 4096  # bytes of a segment


def read_all(path: Path) -> list[bytes]:
    found, position = [], 0
    with JournalFile(path) as file:
        while True:
            lines, ends = file.read(position, 1000)
            if not lines:
                return found
            found += lines
            position = ends[-1]


def read_folder(folder: Path) -> list[bytes]:
    return [line for path in segments(folder) for line in read_all(path)]


def fill(journal: Journal, count: int, size: int = 100) -> list[bytes]:
    lines = [b"%06d" % number + bytes([97 + number % 26]) * (number % size) for number in range(count)]
    for line in lines:
        journal.append(line)
    return lines


def test_records_are_read_in_their_order_across_segments(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    lines = []
    for _ in range(20):  # the next segment is made meanwhile, or the records wait for it
        lines += fill(journal, 30)
        time.sleep(0.005)
        journal.tick()
    assert until(lambda: journal.tick() or not journal._waiting)
    assert journal.room
    journal.close()
    assert read_folder(tmp_path) == lines
    assert len(segments(tmp_path)) > 3
    assert not list(tmp_path.glob("*.new"))


def test_reading_goes_on_where_it_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with JournalFile(segments(tmp_path)[0]) as file:
        assert file.read(0) == ([], [])
        journal.append(b"one")
        lines, ends = file.read(0)
        assert (lines, ends) == ([b"one"], [len(MAGIC) + 8 + 3])
        assert file.read(ends[-1]) == ([], [])
        journal.append(b"two")
        assert file.read(ends[-1])[0] == [b"two"]
    journal.close()


def test_a_record_longer_than_the_limit_is_read_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(b"x" * 5000)
    journal.append(b"y")
    with JournalFile(segments(tmp_path)[0]) as file:
        lines, ends = file.read(0, 100)
        assert lines == [b"x" * 5000]
        assert file.read(ends[-1], 100)[0] == [b"y"]
    journal.close()


def test_a_segment_is_complete_when_its_owner_is_done_with_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    path = next(path for path in segments(tmp_path) if path.name.endswith("-000001.journal"))
    with JournalFile(path) as file:
        assert not file.complete
        fill(journal, 20)
        assert not file.complete
        assert until(lambda: journal._next is not None)
        fill(journal, 90)
        assert file.complete
    journal.close()
    assert all(JournalFile(path).complete for path in segments(tmp_path))


@pytest.mark.parametrize("torn", [1, 5, 8, 9, 40])
def test_a_torn_record_does_not_count_and_all_before_it_does(tmp_path: Path, torn: int) -> None:
    journal = Journal(tmp_path)
    lines = fill(journal, 10)
    last = b"never whole" * 5
    whole = struct.pack("<II", len(last), zlib.crc32(last)) + last
    journal._map[journal._position : journal._position + torn] = whole[:torn]  # killed within the copy
    journal.close()
    assert read_folder(tmp_path) == lines


def test_a_damaged_length_is_no_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    lines = fill(journal, 3)
    at = journal._position
    journal._map[at : at + 8] = struct.pack("<II", 2**31, 1)
    journal.close()
    assert read_folder(tmp_path) == lines


WRITER = """
import os, sys, time
from pathlib import Path
from serving.tenants.journal import Journal
journal, number = Journal(Path(sys.argv[1]), 65536), 0
while True:
    journal.append(b"%010d" % number + b"x" * (number % 300))
    number += 1
    if number % 20 == 0:
        os.write(1, b"%d %d\\n" % (number, len(journal._waiting)))
        journal.tick()
        while not journal.room:  # as for new requests
            time.sleep(0.001)
            journal.tick()
"""


def test_what_was_appended_outlives_a_kill(tmp_path: Path) -> None:
    for delay in (0.05, 0.2, 0.35):
        folder = tmp_path / f"{delay}"
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split(b"\n")
        number, waiting = map(int, said[-2].split()) if len(said) > 1 else (0, 0)
        assert not waiting, "nothing is in memory alone while requests are taken"
        found = read_folder(folder)
        numbers = [int(line[:10]) for line in found]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= number
        assert all(len(line) == 10 + n % 300 for n, line in zip(numbers, found, strict=True))
        assert all(JournalFile(path).complete for path in segments(folder))


def test_no_room_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 2**18) as disk:
        journal = Journal(disk, 2**16)
        filler = disk / "filler"
        assert until(lambda: journal._next is not None)
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        lines = []
        while journal.room and len(lines) < 10_000:
            lines.append(b"%06d" % len(lines) + b"x" * 200)
            journal.append(lines[-1])
        assert not journal.room
        lines.append(b"of a request that was running")
        journal.append(lines[-1])
        assert until(lambda: not list(disk.glob("*.new")))  # what could not be made is removed, by another thread
        filler.unlink()
        assert until(lambda: journal.tick() or journal.room)
        journal.close()
        assert read_folder(disk) == lines


def test_without_room_there_is_no_journal(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 2**16) as disk, pytest.raises(OSError, match="No space left"):
        Journal(disk)


def test_files_are_private_and_only_finished_ones_count(tmp_path: Path) -> None:
    old, young = tmp_path / "a-000001.new", tmp_path / "b-000001.new"
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (1, 1))
    journal = Journal(tmp_path)
    assert [path.stat().st_mode & 0o777 for path in segments(tmp_path)] == [0o600] * len(segments(tmp_path))
    assert young.exists()
    assert not old.exists()
    journal.close()


def test_a_forked_child_leaves_the_journal_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(b"before")
    leave, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            journal.append(b"of the child")
        finally:
            os.write(told[1], b"x")
            os.read(leave[0], 1)
            os._exit(0)
    try:
        os.read(told[0], 1)
        journal.append(b"after")
        with JournalFile(segments(tmp_path)[0]) as file:
            assert not file.complete
            journal.close()
            assert file.complete  # though the child lives
    finally:
        os.write(leave[1], b"x")
        os.waitpid(child, 0)
    assert read_folder(tmp_path) == [b"before", b"after"]


def test_readers_do_not_hinder_the_owner(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    path = segments(tmp_path)[0]
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    journal.append(b"x")
    with JournalFile(path) as other:
        other.sync()
    remove(path)
    assert not path.exists()
    journal.append(b"y")  # into a file without a name: no error
    journal.close()


def test_while_there_is_no_next_segment_the_last_room_is_for_running_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "_create_next", lambda journal: None)  # a disk that takes for ever
    journal = Journal(tmp_path, SMALL)
    lines = []
    while journal.room:
        lines.append(b"x" * 100)
        assert journal.append(lines[-1])
    running = [b"y" * 100] * (SMALL // RESERVE // 108 - 1)
    assert len(running) > 5
    assert all(map(journal.append, running))
    assert not journal._waiting
    assert read_folder(tmp_path) == lines + running
    monkeypatch.undo()
    assert until(lambda: journal.tick() or journal.room)
    journal.close()


def test_what_waits_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenants.journal.MOST_WAITING", 1000)
    monkeypatch.setattr(Journal, "_create_next", lambda journal: None)
    journal = Journal(tmp_path, SMALL)
    kept = [line for line in [b"%04d" % number + b"x" * 96 for number in range(100)] if journal.append(line)]
    assert SMALL // 108 < len(kept) <= SMALL // 108 + 10
    assert not journal.append(b"x" * 100)
    monkeypatch.undo()
    journal.close()
    assert read_folder(tmp_path) == kept


def test_a_record_that_comes_after_the_end_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    assert journal.append(b"before")
    journal.close()
    late = [b"%04d" % number + b"x" * 96 for number in range(100)]
    assert all(map(journal.append, late))
    assert read_folder(tmp_path) == [b"before", *late]
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    more = [journal.append(b"x" * 100) for _ in range(100)]
    assert not more[-1], "and counted, where it cannot be"
    tmp_path.mkdir()
