"""``medassist usage``: what was used, from the ledger."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TextIO

import orjson
import typer

from clients.store import Config, Json, StoreUrl, locate, open_store
from clients.tables import print_table
from clients.times import parse_day, parse_month
from serving.tenants.csv_export import COUNTS, columns_of, write_csv


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command(
        epilog="Examples: medassist usage --month 2026-11 --by tenant,model; "
        "medassist usage --since 2026-11-01 --csv november.csv"
    )(usage)


def usage(
    since: Annotated[str | None, typer.Option(metavar="DAY", help="First day, in UTC.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Last day, in UTC.")] = None,
    month: Annotated[str | None, typer.Option(metavar="MONTH", help="Such as 2026-11, in place of both.")] = None,
    by: Annotated[
        str, typer.Option(metavar="A,B", help="What makes a row: any of key, model, day, month and tenant.")
    ] = "key,model,day",
    key: Annotated[str | None, typer.Option(metavar="ID", help="Only this key's.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write CSV there; -: to standard output.")
    ] = None,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Reports requests and tokens by key, model and day, from the ledger."""
    if json and csv_file is not None:
        raise ValueError("--json and --csv exclude each other")
    first = parse_day(since, "--since") if since else None
    last = parse_day(until, "--until") if until else None
    if month:
        if since or until:
            raise ValueError("--month excludes --since and --until")
        first, last = parse_month(month, "--month")
    if first and last and last < first:
        raise ValueError("--until is before --since")
    groups = [name.strip() for name in by.split(",") if name.strip()]
    with open_store(locate(config, store)) as opened:
        if key:  # "": requests without one
            opened.key(key)
        rows = opened.usage(first, last, key=key, tenant=tenant, model=model, by=groups)
    columns = columns_of(groups)
    if json:
        print(orjson.dumps([{name: getattr(row, name) for name in columns} for row in rows]).decode())
    elif csv_file is not None:
        with _output(csv_file) as file:
            write_csv(file, columns, rows)
    else:
        cells = [[_cell(getattr(row, name)) for name in columns] for row in rows]
        if len(rows) != 1:
            sums = [_cell(sum(getattr(row, name) for row in rows)) for name in COUNTS]
            cells.append(["all", *[""] * len(columns)][: len(columns) - len(COUNTS)] + sums)
        print_table([name.replace("_", " ") for name in columns], cells)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value) or "-"


@contextmanager
def _output(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        file = open(name, "w", encoding="utf-8", newline="")  # noqa: SIM115
    except OSError as e:
        reason = f"there is no folder {os.path.dirname(name)}" if isinstance(e, FileNotFoundError) else e.strerror
        raise ValueError(f"--csv: {name} cannot be written: {reason}") from None
    with file:
        yield file
