"""Names of models, and addresses of engines."""

import re
from urllib.parse import urlsplit

import yarl

# Slashes for names such as organisation/model. No part is "." or "..", so a name can stand in a route.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
NAME_RULE = "must be at most 128 letters, digits, '.', '_', '-' or '/', each part beginning with a letter or digit"
_LONGEST_SOCKET = 103  # bytes of a Unix socket's path, on the system that allows least


def is_name(name: str) -> bool:
    """Whether a model, an adapter or an alias can be called that."""
    return len(name) <= 128 and _NAME.fullmatch(name) is not None


def normal_url(url: str) -> str:
    """An engine's address in the one form that is compared and stored.

    Raises:
        ValueError: it is none, or holds what does not belong there. The message does not repeat it.
    """
    rule = "must be http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH/TO/SOCKET"
    if not url.isprintable():
        raise ValueError(f"{rule}, without control characters")
    if url.startswith("unix:"):
        path = "/" + url.removeprefix("unix:").lstrip("/")
        if not url.startswith("unix:/") or len(path) < 2:
            raise ValueError("must have the absolute path of a socket, such as unix:/run/engine.sock")
        if len(path.encode()) > _LONGEST_SOCKET:
            raise ValueError(f"has a socket's path of {len(path.encode())} bytes; the longest is {_LONGEST_SOCKET}")
        return f"unix:{path}"
    if "@" in url:
        raise ValueError("may not hold a user or password: put the key in a variable, and its name in api_key_env")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(rule) from None
    if parts.scheme not in ("http", "https") or not host or " " in url or "\\" in url:
        raise ValueError(rule)
    if parts.query or parts.fragment:
        raise ValueError(f"{rule}, without '?' and '#'")
    path = re.sub(r"/v1$", "", parts.path.rstrip("/")).rstrip("/")
    host = f"[{host}]" if ":" in host else host
    standard = port == {"http": 80, "https": 443}[parts.scheme]
    normal = f"{parts.scheme}://{host}{'' if port is None or standard else f':{port}'}{path}"
    try:
        # As the HTTP client and the resolver will: a name that they cannot encode fails with no plain error there.
        address = yarl.URL(normal)
        if not address.host or not address.raw_host:
            raise ValueError(rule)
        address.raw_host.encode("idna")
    except ValueError:
        raise ValueError(f"{rule}; its host is no name or address that can be looked up") from None
    return normal
