"""``medassist audit`` and ``medassist capture``, as an operator meets them."""

import csv
import json
import re
import shutil
import stat
import time
from pathlib import Path

import pytest

from serving.tenants.audit import AuditLog
from serving.tenants.audit_verify import EVENTS, events
from serving.tenants.capture import CaptureOrder, Recorder, flush
from serving.tenants.statements import set_head
from serving.tenants.store import Store
from tests.clients.commands import run

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def key(capsys: pytest.CaptureFixture[str], home: Path) -> str:
    """Id of a key in a new store, and a few requests of it in the audit log."""
    assert run(capsys, "keys", "create", "--tenant", "ward-7")[0] == 0
    with Store(f"sqlite:///{home}/medassist.db") as store:
        secret, key_id = store.audit_secret(), store.keys()[0].id
    AuditLog(home / "audit", secret, 30).append(
        [{"event": "request", "key": key_id, "model": "=1+1", "status": 200 + n, "request_id": "r"} for n in range(3)]
    )
    return str(key_id)


def lines(home: Path) -> tuple[Path, list[bytes]]:
    (path,) = (home / "audit").glob("*.jsonl")
    return path, path.read_bytes().splitlines(keepends=True)


def test_verify_says_that_all_is_whole_or_where_it_is_not(
    capsys: pytest.CaptureFixture[str], home: Path, key: str
) -> None:
    code, out, err = run(capsys, "audit", "verify")
    assert (code, err) == (0, "")
    assert "5 lines in 1 file, numbers 1 to 5; the store knows it up to number 2" in out
    path, good = lines(home)
    path.write_bytes(b"".join(good).replace(b'"status":201', b'"status":403'))
    code, out, err = run(capsys, "audit", "verify")
    assert code == 1
    assert f"{path.name}, line 4: was changed" in out
    assert "was changed, in" in err
    code, out, _ = run(capsys, "audit", "verify", "--json")
    assert (code, json.loads(out)["problems"][0]["line"]) == (1, 4)


def test_the_store_knows_what_a_copy_has_not(capsys: pytest.CaptureFixture[str], home: Path, key: str) -> None:
    """The log as it was before the last change, its head with it."""
    path, _ = lines(home)
    old = {file: file.read_bytes() for file in (path, home / "audit/head")}
    assert run(capsys, "keys", "revoke", key)[0] == 0
    assert run(capsys, "audit", "verify")[0] == 0
    for file, content in old.items():
        file.write_bytes(content)
    code, out, _ = run(capsys, "audit", "verify")
    assert code == 1
    assert "the store knows of 6 lines, the log ends with 5" in out
    # What is written now does not take the place of what the store knows.
    assert run(capsys, "keys", "create", "--tenant", "ward-8")[0] == 0
    assert run(capsys, "keys", "create", "--tenant", "ward-9")[0] == 0
    assert "the store knows it up to number" not in run(capsys, "audit", "verify")[1]
    assert "number 6, that the store knows, is not in it" in run(capsys, "audit", "verify")[1]


def test_a_log_that_is_gone_is_a_problem(
    capsys: pytest.CaptureFixture[str], home: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home / "audit")
    code, out, _ = run(capsys, "audit", "verify")
    assert code == 1
    assert "there is no log, and the store knows 2 lines of it" in out
    assert run(capsys, "keys", "revoke", key)[0] == 0
    code, out, _ = run(capsys, "audit", "verify")
    assert (code, "number 2, that the store knows, is not in it" in out) == (1, True)
    shutil.rmtree(home / "audit")
    (home / "log_id").unlink()
    assert run(capsys, "audit", "verify")[0] == 1
    # Nor is another home, which the store has never heard of, in order.
    with Store(f"sqlite:///{home}/medassist.db") as store, store.write() as connection:
        connection.execute(set_head(True), {"log": "f" * 16, "sequence": 1, "hash": "0" * 64, "now": 1})
    monkeypatch.setenv("MEDASSIST_HOME", str(home.parent / "another"))
    code, out, _ = run(capsys, "audit", "verify", "--store", f"sqlite:///{home}/medassist.db")
    assert (code, out.startswith("log_id: neither it nor a log is in"), "f" * 16 in out) == (1, True, True)


def test_every_event_is_in_the_manual() -> None:
    text = Path("docs/operations.md").read_text().partition("## The audit log")[2].partition("| event |")[2]
    rows = re.findall(r"^\| (`.*?) \|", text.partition("\n\n")[0], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall("`(.*?)`", row)) == sorted(EVENTS)


def test_show_and_export_choose_events(
    capsys: pytest.CaptureFixture[str], home: Path, key: str, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "audit", "show", "--event", "request", "--last", 2)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["4", "5"]
    assert f"key={key}" in out
    code, out, _ = run(capsys, "audit", "show", "--key", key, "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["key.created", *["request"] * 3]
    code, out, _ = run(capsys, "audit", "export", "--until", "2020-01-01")
    assert (code, out) == (0, "")
    code, out, _ = run(capsys, "audit", "export")
    assert [json.loads(line) for line in out.splitlines()] == list(events(home / "audit"))
    assert run(capsys, "audit", "export", "--event", "request", "--csv", tmp_path / "out.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(row["status"], row["model"]) for row in rows] == [(str(200 + n), "'=1+1") for n in range(3)]
    assert "hash" not in rows[0]
    content = (tmp_path / "out.csv").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == 4
    code, _, err = run(capsys, "audit", "show", "--event", "key.create")
    assert (code, "there is no event 'key.create': there are request, key.created" in err) == (2, True)
    # What was changed is not shown.
    path, good = lines(home)
    path.write_bytes(b"".join(good).replace(b'"status":201', b'"status":403'))
    code, out, err = run(capsys, "audit", "show", "--event", "request")
    assert [line.split()[0] for line in out.splitlines()] == ["3", "5"]
    assert "a line that was changed is left out" in err
    assert b"403" not in run(capsys, "audit", "export")[1].encode()
    assert run(capsys, "audit", "show", "--since", "2027-01-02", "--until", "2027-01-01")[0] == 2


def test_a_capture_from_order_to_reading(
    capsys: pytest.CaptureFixture[str], home: Path, key: str, tmp_path: Path
) -> None:
    private = tmp_path / "incident.key"
    code, public, _ = run(capsys, "capture", "keygen", private)
    public = public.strip()
    assert (code, len(public), stat.S_IMODE(private.stat().st_mode)) == (0, 64, 0o600)
    assert private.read_text().strip() not in public
    code, _, err = run(capsys, "capture", "keygen", private)
    assert (code, "is there already" in err, "Errno" in err) == (2, True, False), "an existing key is not overwritten"

    order = ("capture", "start", "--key", key, "--recipient", public, "--reason", "ticket 4711")
    assert run(capsys, *order, "--minutes", 1441)[0] == 2
    assert run(capsys, *order[:5], "0" * 64, *order[6:], "--minutes", 5)[0] == 2
    code, out, _ = run(capsys, *order, "--minutes", 30, "--by", "dpo")
    assert code == 0
    capture = out.strip()
    (started,) = [event for event in events(home / "audit") if event["event"] == "capture.started"]
    assert (started["capture"], started["key"], started["by"], started["reason"]) == (
        capture,
        key,
        "dpo",
        "ticket 4711",
    )

    code, _, err = run(capsys, "capture", "read", home / "captures" / capture, "--private-key", private)
    assert (code, "from its first request on" in err, "Errno" in err) == (2, True, False)
    code, _, err = run(capsys, *order, "--minutes", 30)
    assert code == 2
    assert f"by {capture}: stop that one first" in err

    recorder = Recorder(CaptureOrder(capture, key, public, time.time() + 60), home / "captures", "req-9")
    recorder.request(b'{"prompt": "fever"}')
    recorder.answer(b'{"text": "rest\\u001b[2J"}')
    recorder.close(200)
    flush(10)
    (listed,) = json.loads(run(capsys, "capture", "list", "--json")[1])
    assert (listed["id"], listed["active"], listed["requests_here"]) == (capture, True, 1)

    code, out, _ = run(capsys, "capture", "read", home / "captures" / capture, "--private-key", private)
    assert code == 0
    assert '{"prompt": "fever"}' in out
    code, out, _ = run(capsys, "capture", "read", home / "captures" / capture, "--private-key", private, "--json")
    content = json.loads(out)
    assert (content["body"], content["status"], content["whole"]) == ({"prompt": "fever"}, 200, True)

    other = tmp_path / "other.key"
    run(capsys, "capture", "keygen", other)
    code, out, err = run(capsys, "capture", "read", home / "captures" / capture, "--private-key", other)
    assert (code, out) == (1, "")
    assert "another recipient" in err

    assert run(capsys, "capture", "stop", capture)[0] == 0
    assert "ended" in run(capsys, "capture", "list")[1]
    assert "capture.ended" in [event["event"] for event in events(home / "audit")]
    assert run(capsys, "audit", "verify")[0] == 0
