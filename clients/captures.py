"""``medassist capture``: bodies of one key's requests, encrypted, for a short time, for one recipient."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from clients.installation import fail, printable
from clients.store import Config, Json, StoreUrl, locate, open_store, say, who
from clients.tables import print_table
from clients.times import show_time

app = typer.Typer(
    help="Break glass: capture one key's requests and answers, encrypted for one recipient, for a short time.",
    no_args_is_help=True,
)


@app.command(epilog="Example: medassist capture keygen ~/incident-42.key")
def keygen(
    file: Annotated[Path, typer.Argument(help="For the private key; must not be there yet.")],
) -> None:
    """Makes the recipient's pair of keys: the private one into FILE, the public one to standard output.

    To be done by who will read the capture, on their own machine: the gateway's never needs the private key.
    """
    from serving.tenants.capture import new_pair

    private, public = new_pair()
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{file} is there already, and may hold a key that is needed: name another file") from None
    with open(fd, "w", encoding="ascii") as opened:
        opened.write(private + "\n")
    print(public)


@app.command(
    epilog="Example: medassist capture start --key key_3f9x2m8q1c7v5b0n --minutes 30 --recipient 5f0c... "
    "--reason 'ticket 4711: answers end in the middle'"
)
def start(
    key: Annotated[str, typer.Option(metavar="ID", help="Whose requests.")],
    minutes: Annotated[float, typer.Option(help="For how long; at most 1440, a day.")],
    recipient: Annotated[str, typer.Option(metavar="PUBLIC", help="Public key, from `medassist capture keygen`.")],
    reason: Annotated[str, typer.Option(help="Why; goes into the audit log: no word about a patient.")],
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who orders it; the user's name if not given.")] = None,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Orders a capture. Gateways begin within 5 seconds, and end it by themselves when its time has passed."""
    from serving.tenants.capture import LONGEST, check_recipient

    if not 0 < minutes <= LONGEST / 60:
        raise ValueError(f"--minutes must be above 0 and at most {LONGEST / 60:.0f}, got {minutes:g}")
    check_recipient(recipient)
    with open_store(locate(config, store)) as opened:
        capture = opened.start_capture(
            key=key, recipient=recipient, reason=reason, created_by=by or who(), seconds=max(1, round(minutes * 60))
        )
    if json:
        print(orjson.dumps(capture.as_json()).decode())
        return
    print(capture.id)
    say(f"captures {key} until {show_time(capture.expires)} UTC; the audit log says so")


@app.command(epilog="Example: medassist capture stop cap_4d8s2k9f0a1b7c3e")
def stop(
    capture: Annotated[str, typer.Argument(metavar="ID", help="As `medassist capture list` shows it.")],
    config: Config = None,
    store: StoreUrl = None,
) -> None:
    """Ends a capture before its time. What it has captured stays."""
    with open_store(locate(config, store)) as opened:
        ended = opened.end_capture(capture, by=who())
    print(f"{ended.id}: ended at {show_time(ended.ended if ended.ended is not None else ended.expires)} UTC")


@app.command("list", epilog="Example: medassist capture list")
def list_(config: Config = None, store: StoreUrl = None, json: Json = False) -> None:
    """Lists the captures, the latest first, and how many requests of each are on this machine."""
    place = locate(config, store)
    with open_store(place) as opened:
        found = opened.captures()
    counts = {c.id: sum(1 for _ in (place.home / "captures" / c.id).glob("*.capture")) for c in found}
    if json:
        print(orjson.dumps([{**c.as_json(), "requests_here": counts[c.id]} for c in found]).decode())
        return
    head = ("id", "key", "state", "from", "until", "by", "requests here", "reason")
    rows = [
        (
            c.id,
            c.key,
            "active" if c.active else "ended",
            show_time(c.created),
            show_time(c.ended if c.ended is not None else c.expires),
            c.created_by,
            str(counts[c.id]),
            c.reason,
        )
        for c in found
    ]
    print_table(head, rows)


@app.command(epilog="Example: medassist capture read captures/cap_4d8s2k9f0a1b7c3e --private-key incident-42.key")
def read(
    path: Annotated[Path, typer.Argument(metavar="FOLDER|FILE", help="A capture's folder, or one of its files.")],
    private_key: Annotated[Path, typer.Option(metavar="FILE", help="From `medassist capture keygen`.")],
    json: Json = False,
) -> None:
    """Decrypts captured requests and prints them: THE BODIES, IN CLEAR.

    Exit code 1: a file was changed, or is for another recipient; the others are printed.
    """
    private = private_key.read_text(encoding="ascii", errors="replace").strip()
    wrong = 0
    for file in _files(path):
        from serving.tenants.capture import read as decrypt

        try:
            found = decrypt(file, private)
        except ValueError as e:
            wrong += 1
            say(str(e), fg="red")
            continue
        whole = found.end is not None and not found.end["cut"]
        content = {
            **found.header,
            "status": found.end["status"] if found.end else None,
            "whole": whole,
            "body": _body(found.request),
            "answer": _body(found.answer),
        }
        if json:
            print(orjson.dumps(content).decode())
            continue
        print(printable(f"== {content['request']}  key {content['key']}  {show_time(int(content['time']))} UTC"))
        print(f"== request\n{_text(found.request)}")
        print(f"== answer, status {content['status'] or 'not known'}\n{_text(found.answer)}")
        if not whole:
            print("== not whole: some of it was not captured")
    if wrong:
        fail(f"{wrong} file{'s' * (wrong > 1)} could not be read", 1)


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise ValueError(
            f"{path} is not there: a capture has a folder from its first request on, below `captures` in the home "
            "folder of each gateway that had one"
        )
    if path.is_dir():
        found = sorted(path.glob("*.capture"), key=lambda file: (file.stat().st_mtime, file.name))
        if not found:
            raise ValueError(f"{path} holds no captured requests")
        yield from found
    else:
        yield path


def _body(body: bytes) -> Any:
    """JSON where it is, else text."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")


def _text(body: bytes) -> str:
    return "\n".join(printable(line) for line in body.decode(errors="replace").splitlines())
