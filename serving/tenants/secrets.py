"""Secrets of keys: how they are made, and which of other origin are good enough."""

import hashlib
import itertools
import math
import re
import secrets
import string
from collections import Counter

PREFIX = "ma_"
SHORTEST = 32  # characters of a secret that an operator brings
_ID_CHARACTERS = string.ascii_lowercase + string.digits
_BITS = 96
# Words of passwords, examples and placeholders, without punctuation. One of them in a secret need not make it weak, but
# no random one of some length has any: 36**6 is far from what anybody draws.
_PLACEHOLDERS = (
    "apikey",
    "changeit",
    "changeme",
    "correcthorse",
    "default",
    "dummykey",
    "example",
    "letmein",
    "masterkey",
    "medassist",
    "notsecret",
    "passw0rd",
    "password",
    "placeholder",
    "qwerty",
    "replaceme",
    "secretkey",
    "sk1234",
    "supersecret",
    "testkey",
    "testtest",
    "yourkey",
    "yoursecret",
)
_DEFAULTS = frozenset(
    (
        "admin",
        "changeme",
        "demo",
        "dummy",
        "empty",
        "key",
        "none",
        "null",
        "secret",
        "sk",
        "sk123",
        "test",
        "token",
        "x",
    )
)
_RUNS = ("abcdefghijklmnopqrstuvwxyz", "0123456789", "qwertyuiop", "asdfghjkl", "zxcvbnm")
# The commonest pairs of letters in English: nearly half of the pairs in a text, one in sixteen at random.
_PAIRS = frozenset(
    re.findall(
        "..",
        "thheineranreonatenndtiesorteofedisitalarsttontngsehaasouiolevecomedehiriroicneearacelichllbemasiomur",
    )
)


def new_id(prefix: str) -> str:
    """``prefix`` and 16 of [a-z0-9]; no secret."""
    return prefix + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(16))


def new_key() -> tuple[str, str]:
    """Id and secret of a new key. The secret has 256 random bits."""
    return new_id("key_"), PREFIX + secrets.token_urlsafe(32)


def digest(secret: bytes) -> bytes:
    """What is stored of a secret. A fast hash is enough: nobody guesses 96 bits or more, however fast."""
    return hashlib.sha256(secret).digest()


def check_strength(secret: str) -> None:
    """For secrets that an operator brings.

    Raises:
        ValueError: it is too short, a default, or not random. The message does not repeat it.
    """
    advice = "leave it out, and a good one is made; or take `openssl rand -base64 32`"
    if reason := _weakness(secret):
        raise ValueError(f"the secret {reason}: {advice}")


def _weakness(secret: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", secret.lower())
    if not re.fullmatch(r"[!-~]*", secret):
        return "may hold only what a header can, ASCII without spaces or line ends"
    if plain in _DEFAULTS or any(word in plain for word in _PLACEHOLDERS):
        return "is a default, or an example that everybody knows"
    if len(secret) < SHORTEST:
        return f"is too short: {len(secret)} characters, of at least {SHORTEST}"
    if len(secret) > 512:
        return "is too long: 512 characters are the most"
    period = (secret + secret).index(secret, 1)
    if period < len(secret) or _longest_repetition(secret) >= 8:
        return "repeats itself"
    if any(plain[i : i + 6] in run or plain[i : i + 6] in run[::-1] for i in range(len(plain) - 5) for run in _RUNS):
        return "holds a row of neighbours, such as 123456 or qwerty"
    counts = Counter(secret)
    bits = sum(count * math.log2(len(secret) / count) for count in counts.values())
    if bits < _BITS or len(counts) < 10:
        return f"has too few different characters: they amount to {bits:.0f} bits, of at least {_BITS}"
    words = re.findall(r"[a-z]+", secret.lower())
    pairs = ["".join(pair) for word in words for pair in itertools.pairwise(word)]
    if len(pairs) >= 18 and sum(pair in _PAIRS for pair in pairs) > len(pairs) * 0.42:
        return "reads like words, which can be guessed"
    return ""


def _longest_repetition(text: str) -> int:
    """Characters of the longest part that stands there twice."""
    longest = 0
    for start in range(len(text)):
        while text.find(text[start : start + longest + 1], start + 1) >= 0 and start + longest < len(text):
            longest += 1
    return longest
