"""Addresses of stores. Imports the standard library only: settings and the supervisor use it, too.

No message repeats an address: it can hold a password, or be one in the wrong place.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

URL_VARIABLE = "MEDASSIST_STORE_URL"  # environment variable
_PREFIX = "the store's URL "
RULE = "must be postgresql://USER@HOST[:PORT]/NAME or sqlite:///PATH"
_POSTGRESQL = re.compile(r"(?:postgresql|postgres|postgresql\+psycopg)://")
_SQLITE = "sqlite:///"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:@/]*)(:[0-9]+)?")
_SECRETS = ("password", "sslpassword")
_SECONDS = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


def connect_arguments(url: str) -> dict[str, Any]:
    """How to connect: ``{"driver": "sqlite" | "psycopg", "arguments": what its connect() gets by name}``.

    Connections are in autocommit: a transaction begins with the statement that says so. ``arguments`` hold the
    password, where ``url`` does.

    Raises:
        ValueError: it is no address of a store.
    """
    if path := sqlite_path(url):
        return {
            "driver": "sqlite",
            "arguments": {"database": str(path), "timeout": 10.0, "isolation_level": None, "check_same_thread": False},
        }
    host, query = _split(url)
    given = {name for name, _ in query}
    timeouts = {name: value for name, value in _SECONDS.items() if name not in given}
    if not host.startswith(("/", "%2F", "%2f")) and "tcp_user_timeout" not in given:
        timeouts["tcp_user_timeout"] = 15_000  # a server that is gone without a word; milliseconds
    if "application_name" not in given:
        timeouts["application_name"] = "medassist"  # type: ignore[assignment]
    conninfo = "postgresql://" + url.partition("://")[2]
    # Without prepared statements: poolers such as PgBouncer give each transaction another session.
    arguments = {"conninfo": conninfo, "autocommit": True, "prepare_threshold": None, **timeouts}
    return {"driver": "psycopg", "arguments": arguments}


def sqlite_path(url: str) -> Path | None:
    """Where the database lies; None: it is PostgreSQL's.

    Raises:
        ValueError: it is no address of a store.
    """
    if not url.startswith("sqlite:"):
        _split(url)
        return None
    path = url.removeprefix(_SQLITE)
    if path == url or not path or path == ":memory:" or path.startswith("file:") or not url.isprintable():
        raise ValueError(f"{_PREFIX}{RULE}; of a file, by its absolute path: sqlite:////var/lib/medassist.db")
    return Path(path).expanduser().absolute()


def passwords(url: str) -> list[str]:
    """Those in the address, as they stand there and as they are meant; for looking whether a text repeats one."""
    found = [value for name, value in parse_qsl(url.partition("?")[2]) if name in _SECRETS]
    authority = re.split(r"[/?]", url.partition("://")[2], maxsplit=1)[0]
    if "@" in authority:
        found.append(authority.rpartition("@")[0].partition(":")[2])
    return [text for text in {*found, *map(unquote, found)} if text]


def refuse_password(url: str, where: str = "") -> None:
    """For addresses on a command line or in a file, which others can read.

    Args:
        where: it stands, such as "--store"; the message begins with that.

    Raises:
        ValueError: it holds a password, or is no address of a store.
    """
    try:
        secret = not url.startswith("sqlite:") and passwords(url)
        if not secret:
            sqlite_path(url)
    except ValueError as e:
        # With "@" it is most likely a password with a character that must be escaped.
        advice = f"; a password does not belong there: {_INSTEAD}" if "@" in url else ""
        raise ValueError(f"{where} {str(e).removeprefix(_PREFIX)}{advice}".strip()) from None
    if secret:
        raise ValueError(f"{where} may not hold a password, which others could read there: {_INSTEAD}".strip())


_INSTEAD = f"set PGPASSWORD, or use ~/.pgpass, or put the whole URL in a variable ({URL_VARIABLE}, or store.url_env)"


def _split(url: str) -> tuple[str, list[tuple[str, str]]]:
    """Hosts and query of PostgreSQL's address. Strict, since libpq repeats in its messages what it takes for a host or
    a port, and that is part of a password with a character that should have been escaped."""
    scheme = _POSTGRESQL.match(url)
    if not scheme or not url.isprintable() or " " in url or "#" in url:
        raise ValueError(f"{_PREFIX}{RULE}")
    authority, _, query = url[scheme.end() :].partition("?")
    authority, _, name = authority.partition("/")
    _, _, hosts = authority.rpartition("@")
    wrong = "@" in name + query or authority.count("@") > 1 or "/" in name
    if wrong or not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        raise ValueError(f"{_PREFIX}{RULE}; other characters in its parts are percent-encoded, such as %40 for @")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(f"{_PREFIX}{RULE}; after '?' come NAME=VALUE, with '&' between") from None
    return hosts, pairs
