"""What a gateway asks an engine: is it healthy, how much has it to do, which models has it.

Functions and small readers without a memory of the engine's past; :mod:`serving.gateway.replica` draws conclusions.
"""

import errno
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yarl

# Bytes of an answer that is read; vLLM's metrics are 0.1 to 0.5 MB.
MAX_ANSWER = 4 * 2**20
NAMES_SHOWN = 10

# They begin with literal text, which is looked for fast.
_REQUESTS = re.compile(rb"\nvllm:num_requests_(running|waiting)(?:\{.*\})? ([0-9.e+]+)")
_CACHE = re.compile(rb"\nvllm:(?:gpu|kv)_cache_usage_perc(?:\{.*\})? ([0-9.e+-]+)")
_REFUSALS = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTSOCK)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that an engine runs, those that wait in it, and the share of its KV cache in use (0 to 1)."""

    running: int
    waiting: int
    cache_usage: float


@dataclass(frozen=True, slots=True)
class Health:
    """What a look at an engine's health found.

    Attributes:
        ok: it answers, and says that it is well.
        reason: why not.
        certain: it is gone, or says itself that it is not well; otherwise it may only be late.
        restarted: it may be another process when it comes back.
    """

    ok: bool
    reason: str = ""
    certain: bool = False
    restarted: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """The model's name at an engine, and the positions that it has there (None: not told)."""

    served_name: str
    max_model_len: int | None = None


async def get(session: aiohttp.ClientSession, url: yarl.URL, seconds: float) -> tuple[int, bytes]:
    """Status and body of an answer.

    Raises:
        aiohttp.ClientError, OSError: there is none within ``seconds`` (a TimeoutError then), or it is too large.
    """
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with session.get(url, timeout=timeout, allow_redirects=False) as response:
        return response.status, await read(response)


async def read(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer.

    Raises:
        aiohttp.ClientPayloadError: it is larger than ``MAX_ANSWER``.
    """
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_ANSWER:
            raise aiohttp.ClientPayloadError("the answer is too large")
    return bytes(body)


async def look(session: aiohttp.ClientSession, url: yarl.URL, seconds: float) -> tuple[int, Health]:
    """Asks for an engine's health. The status is 0 where there was no answer."""
    try:
        status, _ = await get(session, url, seconds)
    except (aiohttp.ClientError, OSError) as e:
        late = isinstance(e, TimeoutError)
        return 0, Health(False, describe(e), certain=is_refusal(e), restarted=not late)
    if 200 <= status < 300:
        return status, Health(True)
    hint = ": is api_key_env right?" if status in (401, 403) else ""
    # vLLM's server answers 503 once its engine core is dead.
    certain = status == 503
    return status, Health(False, f"answers {status} to {url.path}{hint}", certain=certain, restarted=True)


def is_refusal(error: BaseException) -> bool:
    """Whether nobody listens at the address."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return isinstance(cause, OSError) and cause.errno in _REFUSALS


def describe(error: BaseException) -> str:
    """A failure to reach an engine, in words; holds nothing that was sent or received."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno == errno.ENOENT:
        return "its socket does not exist"
    if is_refusal(error):
        return "connection refused"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its host name is not known"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLError | aiohttp.ClientSSLError):
        return "its TLS certificate is not trusted, or it does not speak TLS"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError | aiohttp.ClientOSError):
        return "connection lost"
    return f"no usable answer ({type(error).__name__})"


def parse_load(page: bytes) -> Load | None:
    """Reads vLLM's metrics page; None: it has no numbers of requests.

    Engines of several ranks have a series for each: requests add up, of the caches the fullest counts.
    """
    page = b"\n" + page
    counts = {b"running": 0.0, b"waiting": 0.0}
    series = _REQUESTS.findall(page)
    try:
        for which, value in series:
            counts[which] += float(value)
        usage = max(map(float, _CACHE.findall(page)), default=0.0)
        return Load(int(counts[b"running"]), int(counts[b"waiting"]), usage) if series else None
    except (ValueError, OverflowError):  # such as 1e999
        return None


def find_model(status: int, page: bytes, public: str, given: str | None, adapters: Iterable[str]) -> Found:
    """Finds a model in an engine's answer to ``/v1/models``; an engine without this list is believed to have it.

    Raises:
        ValueError: it does not have it, or does not tell.
    """
    if status in (404, 405):
        return Found(given or public)
    if status != 200:
        hint = ": is api_key_env right?" if status in (401, 403) else ""
        raise ValueError(f"answers {status} to /v1/models{hint}")
    return choose_model(page, public, given, adapters)


def choose_model(page: bytes, public: str, given: str | None, adapters: Iterable[str]) -> Found:
    """Finds a model in an engine's ``/v1/models``: ``given`` if set, else that of its public name, else the only one.

    Raises:
        ValueError: it is not there, or adapters are missing; the message lists what is.
    """
    try:
        content: Any = orjson.loads(page)
        entries = {str(entry["id"]): entry for entry in content["data"]}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ValueError("its /v1/models is no list of models; is this an OpenAI-compatible server?") from None
    names = [repr(name[:80]) for name in entries]
    there = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if names[NAMES_SHOWN:] else "")
    if missing := [name for name in adapters if name not in entries]:
        raise ValueError(f"it has no adapter {missing[0]!r}; it has: {there or 'nothing'}")
    base = [name for name, entry in entries.items() if not entry.get("parent")]
    if given is not None:
        name = given
    elif public in base:
        name = public
    elif len(base) == 1:
        name = base[0]
    else:
        raise ValueError(f"it has no model {public!r}; set served_name to one of: {there or 'nothing'}")
    longest = entries.get(name, {}).get("max_model_len")
    return Found(name, longest if isinstance(longest, int) and longest > 0 else None)


@dataclass(frozen=True, slots=True)
class Status:
    """What ``medassist serve`` says about an engine of its own.

    Attributes:
        ready_at: when a start that is under way should be over, in seconds since 1970.
        start_seconds: how long its start takes.
    """

    state: str
    reason: str = ""
    ready_at: float | None = None
    start_seconds: float | None = None


class StatusFile:
    """Reads such a status again whenever its file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: tuple[int, int] | None = None
        self._status = Status("starting")

    def read(self) -> Status:
        """The engine's status; "starting" where there is no file, or none that can be read."""
        try:
            about = self.path.stat()
            version = (about.st_mtime_ns, about.st_ino)
            if version != self._version:
                content: Any = orjson.loads(self.path.read_bytes())
                ready_at, start_seconds = content.get("ready_at"), content.get("start_seconds")
                self._status = Status(
                    str(content["state"]),
                    str(content.get("reason") or ""),
                    float(ready_at) if ready_at is not None else None,
                    float(start_seconds) if start_seconds is not None else None,
                )
                self._version = version
        except FileNotFoundError:
            self._version, self._status = None, Status("starting", "not started yet")
        except (OSError, orjson.JSONDecodeError, KeyError, AttributeError, TypeError, ValueError) as e:
            self._version, self._status = None, Status("starting", f"its status cannot be read ({type(e).__name__})")
        return self._status
