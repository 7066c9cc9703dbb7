"""``medassist usage``, as an operator meets it."""

import csv
import io
import json
from pathlib import Path

import pytest

from clients.store import URL_VARIABLE
from serving.tenants.csv_export import write_csv
from serving.tenants.statements import add_usage
from serving.tenants.store import Store, UsageRow
from tests.clients.commands import run

COUNTS = {"failed": 1, "prompt_tokens": 1000, "completion_tokens": 200, "estimated": 0}


@pytest.fixture(autouse=True)
def key_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A key with usage in the default store."""
    monkeypatch.setenv("MEDASSIST_HOME", str(tmp_path))
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with Store(f"sqlite:///{tmp_path}/medassist.db") as store:
        store.upgrade()
        key, _ = store.create_key(tenant="ward", name='=HYPERLINK("http://x"),7')
        with store.write() as connection:
            for day, model, requests in (("2026-10-31", "m", 1), ("2026-11-01", "m", 2), ("2026-11-30", "n", 4)):
                row = {"day": day, "key": key.id, "tenant": "ward", "model": model, "requests": requests, **COUNTS}
                connection.execute(add_usage(True), row)
    return key.id


def test_a_report_with_its_sum(capsys: pytest.CaptureFixture[str], key_id: str) -> None:
    code, out, err = run(capsys, "usage", "--by", "tenant,model")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["tenant", "model", "requests", "failed", "prompt", "tokens", "completion", "tokens", "estimated"],
        ["ward", "m", "3", "2", "2,000", "400", "0"],
        ["ward", "n", "4", "1", "1,000", "200", "0"],
        ["all", "7", "3", "3,000", "600", "0"],
    ]


@pytest.mark.parametrize(
    ("arguments", "requests"),
    [
        ((), [1, 2, 4]),
        (("--month", "2026-11"), [2, 4]),
        (("--month", "2026-12"), []),
        (("--since", "2026-11-01"), [2, 4]),
        (("--until", "2026-11-01"), [1, 2]),
        (("--since", "2026-11-01", "--until", "2026-11-01"), [2]),
        (("--model", "n"), [4]),
        (("--tenant", "other"), []),
        (("--by", "month"), [1, 6]),
    ],
)
def test_what_is_asked_for(
    arguments: tuple[str, ...], requests: list[int], capsys: pytest.CaptureFixture[str], key_id: str
) -> None:
    code, out, _ = run(capsys, "usage", "--json", *arguments)
    rows = json.loads(out)
    assert code == 0
    assert [row["requests"] for row in rows] == requests
    if rows and "--by" not in arguments:
        assert list(rows[0])[:4] == ["key", "name", "model", "day"]
        assert rows[0]["key"] == key_id
    assert json.loads(run(capsys, "usage", "--json", "--key", key_id, *arguments)[1]) == rows


def test_csv_is_read_back_and_holds_no_formula(capsys: pytest.CaptureFixture[str], key_id: str, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "usage", "--month", "2026-11", "--csv", tmp_path / "november.csv")
    assert (code, out) == (0, "")
    content = (tmp_path / "november.csv").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == 3
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert [(row["key"], row["model"], row["day"], row["requests"], row["prompt_tokens"]) for row in rows] == [
        (key_id, "m", "2026-11-01", "2", "1000"),
        (key_id, "n", "2026-11-30", "4", "1000"),
    ]
    assert rows[0]["name"] == '\'=HYPERLINK("http://x"),7'
    code, out, _ = run(capsys, "usage", "--month", "2026-11", "--csv", "-")
    assert (code, out.replace("\r\n", "\n")) == (0, content.decode().replace("\r\n", "\n"))


def test_every_beginning_of_a_formula_is_guarded() -> None:
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1"):
        file = io.StringIO(newline="")
        write_csv(file, ["name", "requests"], [UsageRow(None, None, None, "k", text, None, 5, 0, 0, 0, 0)])
        assert list(csv.reader(io.StringIO(file.getvalue(), newline="")))[1] == [f"'{text}", "5"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--month", "november"), "--month must be a month such as 2026-11"),
        (("--month", "2026-13"), "--month must be a month such as 2026-11"),
        (("--since", "1.11.2026"), "--since must be a day such as"),
        (("--month", "2026-11", "--since", "2026-11-01"), "--month excludes --since and --until"),
        (("--since", "2026-11-02", "--until", "2026-11-01"), "--until is before --since"),
        (("--by", "secret"), "by must be of month, day, tenant, key, model, got 'secret'"),
        (("--json", "--csv", "-"), "--json and --csv exclude each other"),
        (("--csv", "/nowhere/x.csv"), "--csv: /nowhere/x.csv cannot be written: there is no folder /nowhere"),
        (("--csv", "/"), "--csv: / cannot be written: Is a directory"),
        (("--key", "key_nope"), "there is no key 'key_nope'"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "usage", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("medassist: ")
    assert expected in err
