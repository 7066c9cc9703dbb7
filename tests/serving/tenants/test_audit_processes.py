"""The audit log under several processes, and under those that are killed."""

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

from serving.tenants.audit import AuditLog
from serving.tenants.audit_files import Head
from serving.tenants.audit_verify import events
from tests.serving.tenants.test_audit import SECRET, check, request

_APPENDING = """
import sys, time
from pathlib import Path
from serving.tenants.audit import AuditLog
folder, name, batches = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
log, number = AuditLog(folder, b"k" * 32, 365), 0
number = log.positions.get(name, 0)
print("up", flush=True)
while batches:
    batches -= 1
    log.append([{"event": "request", "journal": name, "offset": number + k} for k in range(1, 8)])
    number += 7
"""


def appending(folder: Path, name: str, batches: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _APPENDING, str(folder), name, str(batches)], stdout=subprocess.PIPE)


def test_processes_share_a_log(tmp_path: Path) -> None:
    tmp_path /= "audit"
    processes = [appending(tmp_path, f"journal-{index}", 60) for index in range(3)]
    mine = AuditLog(tmp_path, SECRET, 365)
    for number in range(1, 21):
        mine.append([request(number)])
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    positions = AuditLog(tmp_path, SECRET, 365).positions
    assert positions == {"worker-0": 2_000} | {f"journal-{index}": 420 for index in range(3)}
    assert mine.positions == positions
    report = check(tmp_path)
    assert report.ok, report.problems
    offsets = [e["offset"] for e in events(tmp_path) if e.get("journal") == "journal-1"]
    assert offsets == list(range(1, 421))


def test_kill_9_at_any_moment_leaves_a_log_that_is_whole(tmp_path: Path) -> None:
    """Each process goes on where the positions say that the last one has come to: nothing twice, nothing missing."""
    tmp_path /= "audit"
    rng = random.Random(5)
    for _ in range(6):
        process = appending(tmp_path, "journal", -1)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.1))
        process.kill()
        process.wait(10)
        with contextlib.suppress(FileNotFoundError):
            assert check(tmp_path).ok, check(tmp_path).problems
    AuditLog(tmp_path, SECRET, 365)
    report = check(tmp_path)
    assert report.ok
    assert not report.notes
    offsets = [event["offset"] for event in events(tmp_path) if "journal" in event]
    assert offsets == list(range(1, len(offsets) + 1))
    assert Head.read(tmp_path / "head", SECRET) is not None
