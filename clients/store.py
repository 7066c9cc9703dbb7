"""``medassist store``: the database of keys and usage; and how the commands that need it find it."""

import contextlib
import getpass
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.installation import fail, printable
from clients.tables import print_table
from serving.tenants.store_url import URL_VARIABLE

if TYPE_CHECKING:
    from serving.tenants.store import Store

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The gateway's settings, which say where the store is.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help=f"postgresql://USER@HOST/NAME or sqlite:///PATH, without a password; {URL_VARIABLE} if not given, and "
        "SQLite in MEDASSIST_HOME or ~/.medassist without that.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

app = typer.Typer(help="The database of keys and usage: its tables, from version to version.", no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store is.

    Attributes:
        home: the folder of its audit log.
        retention_days: of that log.
        models: that requests can name; None: not known.
    """

    url: str
    home: Path
    retention_days: int
    models: frozenset[str] | None = None


def locate(config: Path | None, url: str | None) -> Place:
    """The store that the options, or else the environment, name.

    Raises:
        ValueError: they exclude each other, are not valid, or hold a password where others can read it.
    """
    from serving.gateway.operations import Audit, default_home
    from serving.gateway.operations import Store as StoreSettings
    from serving.tenants.store_url import refuse_password

    if config and url:
        raise ValueError("--config and --store exclude each other")
    if config:
        from serving.gateway.settings import load

        settings = load(config, local=True, references=False)
        adapters = (adapter for model in settings.models.values() for adapter in model.adapters)
        models = frozenset((*settings.models, *settings.aliases, *adapters))
        home = settings.home_folder.absolute()
        return Place(settings.store.resolve(home), home, settings.audit.retention_days, models)
    if url:
        refuse_password(url, "--store")
    home = default_home()
    return Place(url or StoreSettings().resolve(home), home, Audit().retention_days)


@contextlib.contextmanager
def open_store(place: Place, *, create: bool = False) -> Iterator["Store"]:
    """The store, whose changes go to the audit log.

    Args:
        create: whether to make one of SQLite that is not there.
    """
    from serving.tenants.announcing import announce_in, make_home
    from serving.tenants.store import Store

    with Store(place.url, announce_in(place.home, place.retention_days)) as store:
        if create and store.path and (not store.path.exists() or store.revision() is None):
            if store.path.parent == place.home:
                make_home(place.home)
            store.upgrade()
            say(f"made a store: {store.path}")
            say(f"gateways that run with the home {place.home} and no other store take it into use in 5 seconds")
        yield store


def who() -> str:
    """Who gives the command, for the audit log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def say(text: str, fg: str | None = None) -> None:
    """What is not the command's output: to standard error."""
    typer.secho(printable(text), err=True, fg=fg)


@app.command(epilog="Example: medassist store upgrade --config gateway.yaml")
def upgrade(config: Config = None, store: StoreUrl = None) -> None:
    """Makes the tables, or brings them to this version of the program; what they hold stays.

    Gateways of the version before go on with keys that they know, and count what they serve when they are updated.
    """
    place = locate(config, store)
    from serving.tenants.announcing import make_home
    from serving.tenants.schema import REVISION

    with open_store(place) as opened:
        if opened.path and opened.path.parent == place.home:
            make_home(place.home)
        before = opened.revision() if not opened.path or opened.path.exists() else None
        opened.upgrade()
        if before != REVISION:
            opened.note("store.upgraded", {"revision": REVISION, "from": before or "base"}, by=who())
        print(printable(f"{opened.where}: revision {REVISION}" + (" already" if before == REVISION else "")))


@app.command(epilog="Example: medassist store downgrade 0002 --yes")
def downgrade(
    revision: Annotated[str, typer.Argument(help="Such as 0002; base: no tables at all.")],
    config: Config = None,
    store: StoreUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Brings the tables back to an older version of the program; what newer ones have brought is lost.

    Stop the gateways of this version before: they cannot work with older tables.
    """
    from serving.tenants.schema import REVISION

    with open_store(locate(config, store)) as opened:
        lost = "all keys and the whole ledger" if revision == "base" else f"what came after revision {revision}"
        if not yes:
            import sys

            if not sys.stdin.isatty():
                fail(f"{lost} would be lost: say --yes", 2)
            typer.confirm(printable(f"{opened.where}: lose {lost}?"), abort=True, err=True)
        if opened.revision() == REVISION:
            opened.note("store.downgraded", {"revision": revision, "from": REVISION}, by=who())
        opened.downgrade(revision)
        print(printable(f"{opened.where}: revision {opened.revision() or 'base'}"))


@app.command(epilog="Example: medassist store show --store postgresql://medassist@db/medassist")
def show(config: Config = None, store: StoreUrl = None, json: Json = False) -> None:
    """Tells where the store is, at which revision, and how much it holds."""
    with open_store(locate(config, store)) as opened:
        from serving.tenants.schema import REVISION

        revision = opened.revision()
        facts: dict[str, object] = {"store": opened.where, "revision": revision, "program": REVISION}
        if revision == REVISION:
            facts["id"] = opened.fact("store_id")
            facts["rows"] = opened.counts()
    if json:
        import orjson

        print(orjson.dumps(facts).decode())
        return
    rows = facts.pop("rows", {})
    facts["revision"] = revision or "none: run `medassist store upgrade`"
    lines = [(name, str(value)) for name, value in facts.items()]
    if isinstance(rows, dict):
        lines += [(name, f"{count:,}") for name, count in sorted(rows.items())]
    print_table(("what", ""), lines)
