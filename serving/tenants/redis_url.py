"""Addresses of Redis. Stricter than its client, which takes a database that is no number for the first one.

No message repeats an address: it can hold a password, or be one in the wrong place.
"""

import re
from urllib.parse import parse_qsl

RULE = "must be redis://HOST[:PORT][/DB], rediss://... or unix://PATH[?db=DB]"
_AUTHORITY = re.compile(r"(?:[^:@/]*(?P<password>:[^:@/]*)?@)?(\[[0-9A-Fa-f:.%]+\]|[^\[\]:@/]+)(:[0-9]{1,5})?")
_SECRETS = ("password", "ssl_password")


def check_redis(url: str, *, secret: bool) -> None:
    """Refuses what Redis' client would misunderstand.

    Args:
        secret: whether it may hold a password, as nobody else can read it.

    Raises:
        ValueError: it is no address of Redis, or holds a password.
    """
    scheme, separator, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if mark else {}
    except ValueError:
        raise ValueError(RULE) from None
    authority, _, path = place.partition("/")
    local = scheme == "unix"
    if local:  # as in unix://USER@/PATH
        authority = authority + "localhost" if path and authority[-1:] in ("", "@") else ""
    found = _AUTHORITY.fullmatch(authority)
    if scheme not in ("redis", "rediss", "unix") or not separator or not url.isprintable() or " " in url or "#" in url:
        raise ValueError(RULE)
    if found is None:
        raise ValueError(f"{RULE}; other characters in a password are percent-encoded, such as %40 for @")
    databases = [options.get("db", "0"), *([path] if path and not local else [])]
    if not all(re.fullmatch(r"[0-9]+", database) for database in databases):
        raise ValueError(f"{RULE}, where DB is a number")
    if not secret and (found["password"] or any(name in options for name in _SECRETS)):
        raise ValueError(
            "may not hold a password, which others could read there: put the whole URL in a variable, and "
            "its name in url_env"
        )
