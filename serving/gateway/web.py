"""What answers say to browsers: to guess nothing, keep nothing and show nothing, and which other sites' pages may ask.

All of it is put together once; an answer costs a look-up.
"""

from collections.abc import Iterable

from serving.gateway.errors import ApiError

MAX_AGE = 600  # seconds in which a browser need not ask again what it may send
METHODS = b"GET, POST"
EXPOSED = (
    "x-request-id", "retry-after", "retry-after-ms", "x-should-retry",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)  # fmt: skip
# What the API reads, and what OpenAI's and Anthropic's clients send.
ALLOWED = frozenset((
    b"authorization", b"content-type", b"x-api-key", b"x-request-id", b"x-request-timeout", b"traceparent",
    b"tracestate", b"anthropic-version", b"anthropic-beta", b"anthropic-dangerous-direct-browser-access",
    b"openai-beta", b"openai-organization", b"openai-project", b"user-agent",
))  # fmt: skip
_ALLOWED_PREFIX = b"x-stainless-"  # of those clients' own statistics
_OPERATORS = ("/admin", "/metrics")  # not for other sites' pages, whatever the settings say
_SAFE = (
    b"x-content-type-options: nosniff\r\n"
    b"content-security-policy: default-src 'none'; frame-ancestors 'none'\r\n"
    b"referrer-policy: no-referrer\r\n"
    b"cross-origin-resource-policy: same-origin\r\n"
)
_NOT_STORED = b"cache-control: no-store\r\n"
_SECURE = b"strict-transport-security: max-age=31536000\r\n"

Fields = tuple[bytes, int]
"""Header lines, and how many there are."""


class Web:
    """The header lines that every answer gets, whoever gives it.

    Args:
        origins: whose pages may use the API, such as ``https://app.example.org``; compared exactly.
        secure: the listeners speak TLS.
    """

    def __init__(self, origins: Iterable[str] = (), secure: bool = False) -> None:
        allowed = [_normal(origin) for origin in origins]
        always = _SAFE + (_SECURE if secure else b"")
        if allowed:
            always += b"vary: origin\r\n"  # or a cache gives one site's answer to another
        self._plain = _both(always)
        exposed = ", ".join(EXPOSED).encode()
        self._of = {
            origin: _both(
                b"%baccess-control-allow-origin: %b\r\naccess-control-expose-headers: %b\r\n"
                % (always, origin, exposed)
            )
            for origin in allowed
        }

    def fields(self, origin: bytes, path: str, kept: bool) -> Fields:
        """The lines of one answer.

        Args:
            origin: the request's ``Origin``; empty without one.
            kept: the application has said how the answer may be stored.
        """
        if origin and origin in self._of and not path.startswith(_OPERATORS):
            return self._of[origin][kept]
        return self._plain[kept]

    def preflight(self, path: str, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]] | None:
        """What a browser wants to know before it lets a page ask; None: the request is none of those.

        Raises:
            ApiError: 403, the page may not.
        """
        origin = wanted = b""
        names: list[bytes] = []
        for name, value in headers:
            if name == b"origin":
                origin = value
            elif name == b"access-control-request-method":
                wanted = value
            elif name == b"access-control-request-headers":
                names += [part.strip().lower() for part in value.split(b",")]
        if not origin or not wanted:
            return None
        if origin not in self._of or path.startswith(_OPERATORS):
            raise ApiError(403, "pages of this origin may not use this API: see cors.origins", "origin_not_allowed")
        allowed = [name for name in names if name in ALLOWED or name.startswith(_ALLOWED_PREFIX)]
        return [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", b", ".join(allowed or sorted(ALLOWED))),
            (b"access-control-max-age", b"%d" % MAX_AGE),
        ]


def _both(lines: bytes) -> tuple[Fields, Fields]:
    """Of an answer that says nothing about storing it, and of one that does."""
    whole = _NOT_STORED + lines
    return (whole, whole.count(b"\r\n")), (lines, lines.count(b"\r\n"))


def _normal(origin: str) -> bytes:
    """As browsers write it: in lower case, without the scheme's own port."""
    origin = origin.lower()
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80").encode()
