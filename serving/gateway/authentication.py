"""Who asks: the key in a request's head.

OpenAI's clients send it as ``Authorization: Bearer``, Anthropic's as ``x-api-key``, Azure's as ``api-key``. Secrets are
looked up by their SHA-256, so that the time an answer takes tells nothing of how much of a wrong one is right.
"""

import hmac
import time
from collections.abc import Sequence

from prometheus_client import Counter

from serving.gateway.errors import ApiError
from serving.tenants.key import NOBODY, Key
from serving.tenants.key_table import KeyTable
from serving.tenants.secrets import digest

MISSING, INVALID = "missing_api_key", "invalid_api_key"
_CHALLENGE = ((b"www-authenticate", b"Bearer"),)
_NO_DIGEST = bytes(32)  # of no key; compared with where there is none
# Why a request has no valid key: code and message.
_REFUSALS = {
    "missing": (MISSING, "an API key is needed: send it as 'Authorization: Bearer KEY'"),
    "several": (INVALID, "the request has several API keys, which differ: send one"),
    "unknown": (INVALID, "the API key is not valid"),
    "expired": (INVALID, "the API key has expired"),
}


class Authentication:
    """See above.

    Args:
        keys: None: nobody needs a key.
        failures: counter with the label ``reason``: "missing", "several", "unknown" or "expired".
    """

    def __init__(self, keys: KeyTable | None, failures: Counter) -> None:
        self._keys = keys
        self._failures = {reason: failures.labels(reason) for reason in _REFUSALS}

    def authenticate(self, headers: Sequence[tuple[bytes, bytes]]) -> Key:
        """The key that a request has come with, or nobody's where none is required: most clients insist on sending
        one, so it is not looked at then.

        Args:
            headers: names in lower case.

        Raises:
            ApiError: 401.
        """
        return self._key(self._find(headers))

    def renew(self, key: Key) -> Key:
        """A key that a request has come with, as it is now: it may have been changed, revoked or expired meanwhile.

        Raises:
            ApiError: 401.
        """
        if self._keys is None or not key.id:
            return key
        return self._key(_unexpired(self._keys.find(key.digest)))

    def knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether :meth:`authenticate` would let a request in; counts no failure."""
        return isinstance(self._find(headers), Key)

    def _find(self, headers: Sequence[tuple[bytes, bytes]]) -> Key | str:
        """The key, or the reason why there is none."""
        keys = self._keys
        if keys is None or not keys.required:
            return NOBODY
        secret, several = b"", False
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                given = given.strip() if scheme.lower() == b"bearer" else b""
            elif name in (b"x-api-key", b"api-key"):
                given = value.strip()
            else:
                continue
            if given:
                several = several or (secret != b"" and not hmac.compare_digest(secret, given))
                secret = given
        if not secret:
            return "missing"
        if several:
            return "several"
        hashed = digest(secret)
        key = keys.find(hashed)
        if not hmac.compare_digest(_NO_DIGEST if key is None else key.digest, hashed) or key is None:
            return "unknown"
        return _unexpired(key)

    def _key(self, found: Key | str) -> Key:
        if isinstance(found, Key):
            return found
        self._failures[found].inc()
        code, message = _REFUSALS[found]
        raise ApiError(401, message, code, headers=_CHALLENGE)


def _unexpired(key: Key | None) -> Key | str:
    if key is None:
        return "unknown"
    return key if key.expires is None or key.expires > time.time() else "expired"
