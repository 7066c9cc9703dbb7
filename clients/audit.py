"""``medassist audit``: whether the audit log is whole, and what it says."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import orjson
import typer

from clients.installation import fail, printable
from clients.store import Config, Json, Place, StoreUrl, locate, open_store, say
from clients.times import parse_day

app = typer.Typer(help="The audit log of this machine: who used what, and who changed what.", no_args_is_help=True)

Since = Annotated[str | None, typer.Option(metavar="DAY", help="First day, in UTC.")]
Until = Annotated[str | None, typer.Option(metavar="DAY", help="Last day, in UTC.")]
Event = Annotated[str | None, typer.Option(metavar="NAME", help="Only these, such as request or key.created.")]
KeyId = Annotated[str | None, typer.Option(metavar="ID", help="Only what concerns this key.")]
_CHAIN = ("log", "previous", "hash")  # of use to the verifier alone


@app.command(epilog="Example: medassist audit verify --config gateway.yaml && echo whole")
def verify(config: Config = None, store: StoreUrl = None, json: Json = False) -> None:
    """Checks that no line was changed, removed, added or moved, and that the store knows no more of the log.

    Exit code 0: all is as it was written; 1: it is not, and standard output says where.
    """
    place = locate(config, store)
    from serving.tenants.audit_verify import Problem, log_id
    from serving.tenants.audit_verify import verify as check

    folder = _folder(place)
    with open_store(place) as opened:
        secret, heads = opened.audit_secret(), opened.audit_heads()
    log = log_id(folder, secret)
    # Where the log has no head that says which it is, the store's only one is it.
    known = heads.get(log) or (next(iter(heads.values())) if not log and len(heads) == 1 else None)
    report = check(folder, secret, known)
    others = sorted(set(heads) - {report.log, log})
    if others and not report.log and report.ok:
        text = f"neither it nor a log is in {place.home}, and the store knows of logs: {', '.join(others)}"
        report.problems.append(Problem("log_id", 0, text))
    if json:
        print(
            orjson.dumps(
                {
                    "ok": report.ok,
                    "log": report.log,
                    "files": report.files,
                    "lines": report.lines,
                    "first": report.first,
                    "last": report.last,
                    "known_to_store": known[0] if known else None,
                    "problems": [{"file": p.file, "line": p.line, "text": p.text} for p in report.problems],
                    "notes": report.notes,
                    "other_logs": others,
                }
            ).decode()
        )
    else:
        for problem in report.problems:
            print(printable(str(problem)))
        for note in report.notes:
            print(printable(f"note: {note}"))
        if others and report.log:
            print(f"note: the store knows other logs, of other machines or folders: {', '.join(others)}")
        if report.ok:
            known_text = f"the store knows it up to number {known[0]}" if known else "the store knows nothing of it yet"
            print(
                f"whole: log {report.log}, {report.lines:,} lines in {report.files} file{'s' * (report.files != 1)}, "
                f"numbers {report.first} to {report.last}; {known_text}"
                if report.log
                else "there is no audit log yet"
            )
    if not report.ok:
        where = len({(p.file, p.line) for p in report.problems})
        fail(f"the audit log was changed, in {where} place{'s' * (where > 1)}", 1)


@app.command(epilog="Example: medassist audit show --event key.created --since 2026-11-01")
def show(
    since: Since = None,
    until: Until = None,
    event: Event = None,
    key: KeyId = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the latest.")] = 50,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Shows the latest events. Lines that were changed are left out: `medassist audit verify` says where."""
    latest = deque(_Chosen(locate(config, store), since, until, event, key), maxlen=last)
    for line in latest:
        if json:
            print(orjson.dumps(line).decode())
            continue
        fields = {name: value for name, value in line.items() if name not in (*_CHAIN, "time", "event", "sequence")}
        said = " ".join(f"{name}={_cell(value)}" for name, value in fields.items() if value not in ("", None))
        print(printable(f"{line['sequence']:>8}  {line['time']}  {line['event']:<16}  {said}".rstrip()))


@app.command(epilog="Example: medassist audit export --since 2026-11-01 --until 2026-11-30 --csv november.csv")
def export(
    since: Since = None,
    until: Until = None,
    event: Event = None,
    key: KeyId = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write CSV there; -: to standard output.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Write lines of JSON there; -: to standard output.")] = "-",
    config: Config = None,
    store: StoreUrl = None,
) -> None:
    """Writes events to a file, for other programs; JSON lines keep their hashes. Changed lines are left out."""
    if csv_file is not None and out != "-":
        raise ValueError("--csv and --out exclude each other")
    chosen = _Chosen(locate(config, store), since, until, event, key)
    if csv_file is None:
        with _output(out) as file:
            for line in chosen:
                file.write(orjson.dumps(line).decode() + "\n")
        return
    from serving.tenants.csv_export import write_rows

    names: dict[str, None] = {}
    for line in chosen:
        names |= dict.fromkeys(line)
    columns = [name for name in names if name not in _CHAIN]
    with _output(csv_file) as file:
        write_rows(file, columns, ([_cell(line.get(name, "")) for name in columns] for line in chosen))


def _folder(place: Place) -> Path:
    return place.home / "audit"


class _Chosen:
    """The events that were asked for; they can be gone through several times.

    Raises:
        ValueError: an option is not valid.
    """

    def __init__(self, place: Place, since: str | None, until: str | None, event: str | None, key: str | None) -> None:
        from serving.tenants.audit_verify import EVENTS

        self._folder, self._event, self._key = _folder(place), event, key
        self._first = parse_day(since, "--since").isoformat() if since else ""
        self._last = parse_day(until, "--until").isoformat() if until else "9999"
        if self._last < self._first:
            raise ValueError("--until is before --since")
        if event not in (None, *EVENTS):
            raise ValueError(f"--event: there is no event {event!r}: there are {', '.join(EVENTS)}")
        with open_store(place) as opened:
            self._secret = opened.audit_secret()
        self._told = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from serving.tenants.audit_verify import events

        left_out = 0

        def leave_out() -> None:
            nonlocal left_out
            left_out += 1

        for line in events(self._folder, self._first, self._last, secret=self._secret, left_out=leave_out):
            if self._event in (None, line["event"]) and self._key in (None, line.get("key")):
                yield line
        if left_out and not self._told:
            self._told = True
            lines = "a line that was changed is" if left_out == 1 else f"{left_out:,} lines that were changed are"
            say(f"{lines} left out: `medassist audit verify` says where")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


@contextmanager
def _output(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdout
        return
    with open(name, "w", newline="", encoding="utf-8") as file:
        yield file
