"""The collector of traces: where it is, and what it wants to be told."""

import contextlib
import importlib.util
import os
import re
from urllib.parse import unquote, urlsplit

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a header's name
_VALUE = re.compile(r"[ -~]*")


def traces_url(endpoint: str) -> str:
    """Where spans are sent to: ``/v1/traces`` of the endpoint, unless it names that itself.

    Raises:
        ValueError: it is no ``http://`` or ``https://`` URL, or holds what belongs into headers.
    """
    try:
        url = urlsplit(endpoint)
        wrong = url.scheme not in ("http", "https") or not url.hostname or url.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError("must have no user, password or query: put credentials into headers_env")
    path = url.path.rstrip("/")
    return f"{url.scheme}://{url.netloc}{path if path.endswith('/v1/traces') else path + '/v1/traces'}"


def read_headers(variable: str | None) -> dict[str, str]:
    """Headers for the collector from an environment variable, ``name=value,name=value`` with values in percent
    encoding, as OpenTelemetry has them.

    Raises:
        ValueError: it is not set, or not so; the message does not show it.
    """
    if not variable:
        return {}
    text = os.environ.get(variable, "")
    if not text:
        raise ValueError(f"the variable {variable} is not set")
    headers = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        name, value = name.strip(), unquote(value.strip())
        if not equals or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the variable {variable} must hold name=value,name=value")
        headers[name] = value
    return headers


def require_protocol() -> None:
    """Raises ValueError where OpenTelemetry's protocol messages are not installed."""
    found = None
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec("opentelemetry.proto")
    if found is None:
        raise ValueError("tracing.endpoint needs a package more: pip install 'medassist[tracing]'")
