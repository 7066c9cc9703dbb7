"""Secrets of keys: that ours are random, and that guessable ones are refused."""

import base64
import hashlib
import random
import re
import uuid
from collections.abc import Callable

import pytest

from serving.tenants.secrets import check_strength, digest, new_key


def test_a_new_key_has_256_random_bits_and_an_id_that_says_nothing_of_them() -> None:
    made = [new_key() for _ in range(200)]
    for key_id, secret in made:
        assert re.fullmatch(r"key_[a-z0-9]{16}", key_id)
        assert re.fullmatch(r"ma_[A-Za-z0-9_-]{43}", secret)
        assert len(base64.urlsafe_b64decode(secret.removeprefix("ma_") + "=")) == 32
        assert key_id.removeprefix("key_") not in secret
    assert len({key_id for key_id, _ in made}) == len({secret for _, secret in made}) == 200


def test_the_digest_is_of_the_whole_secret() -> None:
    assert digest(b"ma_abc") == hashlib.sha256(b"ma_abc").digest()


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("", "too short"),
        ("sk-1234", "a default"),
        ("changeme", "a default"),
        ("test", "a default"),
        ("Test", "a default"),
        ("secret", "a default"),
        ("medassist", "a default"),
        ("sk-1234567890abcdefKJHDWE98273kjhfd", "a default"),
        ("change-me-change-me-1-change-me-22", "a default"),
        ("correct-horse-battery-staple-correct", "a default"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "a default"),
        ("P4ssw0rd-P4ssw0rd!P4ssw0rd?P4ssw0rd#", "repeats itself"),
        ("Kj8#mPq2", "too short: 8 characters, of at least 32"),
        ("a" * 40, "repeats itself"),
        ("ab" * 20, "repeats itself"),
        ("Xk92mQp7Xk92mQp7Xk92mQp7Xk92mQp7", "repeats itself"),
        ("deadbeefcafebabe1337deadbeefcafe", "repeats itself"),
        ("kT8w2345678xPq9ZrLmV0cGhYbNsJdFu", "a row of neighbours"),
        ("zyxwvutsKq82mPd7Lh3nRb6TjGc9VxFo", "a row of neighbours"),
        ("1122331244133214423412314324431214", "too few different characters"),
        ("my-very-long-hospital-service-account-token", "reads like words"),
        ("Summer2024!Winter2025!Autumn2026!Spring", "reads like words"),
        ("Kq82 mPd7 Lh3n Rb6T jGc9 VxFo 1Zw5 ", "ASCII without spaces"),
        ("Kq82mPd7Lh3nRb6TjGc9VxFo1Zw5ü7Ys2", "ASCII without spaces"),
        ("Kq82mPd7Lh3nRb6TjGc9VxFo1Zw5Ys2\n", "ASCII without spaces"),
        ("Kq82mPd7" * 100, "too long"),
    ],
)
def test_weak_ones_are_refused_with_the_reason_and_not_repeated(secret: str, reason: str) -> None:
    with pytest.raises(ValueError, match="the secret ") as refused:
        check_strength(secret)
    message = str(refused.value)
    assert reason in message
    assert "leave it out" in message
    if len(secret) >= 8 and secret != "medassist":
        assert secret.strip() not in message


@pytest.mark.parametrize(
    "make",
    [
        lambda r: base64.b64encode(r.randbytes(32)).decode(),
        lambda r: r.randbytes(32).hex(),
        lambda r: r.randbytes(16).hex(),
        lambda r: "sk-" + base64.urlsafe_b64encode(r.randbytes(36)).decode(),
        lambda r: str(uuid.UUID(bytes=r.randbytes(16), version=4)),
    ],
)
def test_random_ones_are_taken(make: Callable[[random.Random], str]) -> None:
    source = random.Random(7)
    for _ in range(300):
        check_strength(make(source))
    for _ in range(50):
        check_strength(new_key()[1])
