"""HTTP clients for engines: one session for each, over TCP or a Unix socket."""

import os
from collections.abc import Mapping, Sequence

import aiohttp
import yarl

from serving.gateway.settings import EngineAt

# vLLM closes idle connections after 5 s; ours must go first, or a request meets a closing socket.
KEEP_ALIVE = 4.0
READ_BUFFER = 2**16  # bytes of an answer that wait here for a slow client; beyond twice that the engine has to wait


def parse_address(url: str) -> tuple[str, yarl.URL]:
    """Path of the Unix socket, if it is one, and the root of its URLs.

    Raises:
        ValueError: it is no URL of an engine.
    """
    if url.startswith("unix:"):
        # The host is not looked up: the connector knows only the socket.
        return url.removeprefix("unix:"), yarl.URL("http://engine")
    try:
        base = yarl.URL(url)
        good = base.scheme in ("http", "https") and bool(base.host)
    except ValueError as e:  # also a UnicodeError, of a host name that cannot be one
        raise ValueError(f"url: {url!r} is not a URL: {e}") from None
    if not good:
        raise ValueError(f"url: {url!r} must be like http://10.0.0.5:8000 or unix:/run/engine.sock")
    return "", base.with_path(base.path.rstrip("/").removesuffix("/v1").rstrip("/"))


def request_headers(at: EngineAt) -> dict[str, str]:
    # Answers are passed on as they are, so they must not be compressed.
    headers = {"Accept-Encoding": "identity"}
    if at.api_key_env:
        key = os.environ.get(at.api_key_env)
        if not key:
            raise ValueError(f"api_key_env: the environment variable {at.api_key_env} is not set")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def open_session(
    socket: str, headers: Mapping[str, str], timeout: aiohttp.ClientTimeout, traces: Sequence[aiohttp.TraceConfig]
) -> aiohttp.ClientSession:
    """A session that reuses connections and passes answers on as they come.

    Args:
        socket: path of a Unix socket; "": TCP.
    """
    connector: aiohttp.BaseConnector
    if socket:
        connector = aiohttp.UnixConnector(path=socket, limit=0, keepalive_timeout=KEEP_ALIVE)
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        skip_auto_headers=("User-Agent",),
        timeout=timeout,
        trust_env=False,
        auto_decompress=False,
        read_bufsize=READ_BUFFER,
        trace_configs=list(traces),
    )
