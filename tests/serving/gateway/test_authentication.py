"""Who may ask, and what the time of a refusal tells."""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.gateway.authentication import Authentication
from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.tenants.key import NOBODY
from serving.tenants.key_table import KeyTable
from tests.serving.gateway.keeping import Keeping

Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def keeping(tmp_path: Path) -> Keeping:
    return Keeping(tmp_path)


def authentication(keeping: Keeping) -> tuple[Authentication, KeyTable, Metrics]:
    table, metrics = KeyTable(keeping.accounts), Metrics()
    return Authentication(table, metrics.auth_failures), table, metrics


def refused(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    assert caught.value.status == 401
    assert (b"www-authenticate", b"Bearer") in caught.value.headers
    return caught.value


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer %s")],
        [(b"authorization", b"bearer   %s ")],
        [(b"x-api-key", b"%s")],
        [(b"api-key", b"%s")],
        [(b"authorization", b"Bearer %s"), (b"x-api-key", b"%s")],
        [(b"authorization", b"Basic dTpw"), (b"x-api-key", b"%s")],
    ],
)
def test_a_key_is_found_wherever_clients_send_it(keeping: Keeping, headers: Headers) -> None:
    row, secret = keeping.key()
    who, _, _ = authentication(keeping)
    given = [(name, value.replace(b"%s", secret.encode())) for name, value in headers]
    assert who.authenticate([(b"host", b"a"), *given]).id == row["id"]


@pytest.mark.parametrize(
    ("headers", "code", "reason"),
    [
        ([], "missing_api_key", "missing"),
        ([(b"authorization", b"Basic %s")], "missing_api_key", "missing"),
        ([(b"authorization", b"%s")], "missing_api_key", "missing"),
        ([(b"authorization", b"Bearer")], "missing_api_key", "missing"),
        ([(b"x-api-key", b" ")], "missing_api_key", "missing"),
        ([(b"authorization", b"Bearer %sx")], "invalid_api_key", "unknown"),
        ([(b"authorization", b"Bearer \xff\x00")], "invalid_api_key", "unknown"),
        ([(b"authorization", b"Bearer %s"), (b"x-api-key", b"other")], "invalid_api_key", "several"),
        ([(b"x-api-key", b"other"), (b"api-key", b"%s")], "invalid_api_key", "several"),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b"), (b"api-key", b"b")], "invalid_api_key",
         "several"),
    ],
)  # fmt: skip
def test_all_others_are_refused(keeping: Keeping, headers: Headers, code: str, reason: str) -> None:
    _, secret = keeping.key()
    who, _, metrics = authentication(keeping)
    given = [(name, value.replace(b"%s", secret.encode())) for name, value in headers]
    error = refused(lambda: who.authenticate(given))
    assert error.code == code
    assert secret not in error.message
    assert metrics.auth_failures.labels(reason)._value.get() == 1


def test_only_who_has_the_whole_of_an_expired_key_learns_that_it_was_one(keeping: Keeping) -> None:
    _, secret = keeping.key(expires=int(time.time()) - 1)
    _, later = keeping.key(expires=int(time.time()) + 100)
    who, _, metrics = authentication(keeping)
    assert "expired" in refused(lambda: who.authenticate([(b"api-key", secret.encode())])).message
    assert "expired" not in refused(lambda: who.authenticate([(b"api-key", secret[:-1].encode())])).message
    assert metrics.auth_failures.labels("expired")._value.get() == 1
    assert who.authenticate([(b"api-key", later.encode())]).id


def test_a_key_is_revoked_with_the_next_look_and_one_is_needed_from_then_on(keeping: Keeping) -> None:
    who, table, _ = authentication(keeping)
    anything: Headers = [(b"authorization", b"Bearer sk-whatever-clients-insist-on")]
    assert who.authenticate(anything) is NOBODY
    row, secret = keeping.key()
    table.refresh()
    assert who.authenticate([(b"api-key", secret.encode())]).id == row["id"]
    refused(lambda: who.authenticate(anything))
    row["revoked"] = int(time.time())
    keeping.tell()
    assert table.refresh()
    assert refused(lambda: who.authenticate([(b"api-key", secret.encode())])).code == "invalid_api_key"
    assert refused(lambda: who.authenticate([])).code == "missing_api_key"


def test_without_a_keeper_nobody_needs_a_key() -> None:
    assert Authentication(None, Metrics().auth_failures).authenticate([]) is NOBODY


SHARED = (0, 10, 40)  # characters of a wrong key that are right
ROUNDS, LOOKS = 400, 20


def test_wrong_keys_take_the_same_time_whatever_they_share_with_a_right_one(keeping: Keeping) -> None:
    """Classes of wrong keys are measured in turns, each class twice: medians of different classes may differ by as much
    as those of the same class do, and no more."""
    secrets = [keeping.key()[1] for _ in range(50)]
    who, _, _ = authentication(keeping)
    chance = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"

    def wrong(shared: int) -> Headers:
        right = chance.choice(secrets)
        rest = "".join(chance.choice(letters) for _ in range(len(right) - shared - 1))
        other = next(c for c in chance.sample(letters, 2) if c != right[shared])
        return [(b"authorization", f"Bearer {right[:shared]}{other}{rest}".encode())]

    def cost(headers: Headers) -> int:
        best = 10**9
        for _ in range(LOOKS):
            before = time.thread_time_ns()
            try:
                who.authenticate(headers)
            except ApiError:
                best = min(best, time.thread_time_ns() - before)
        return best

    classes = [(shared, half) for shared in SHARED for half in "ab"]
    times: dict[Any, list[int]] = {each: [] for each in classes}
    for _ in range(ROUNDS):
        chance.shuffle(classes)
        for each in classes:
            times[each].append(cost(wrong(each[0])))
    median = {each: statistics.median(found) for each, found in times.items()}
    same = max(abs(median[shared, "a"] - median[shared, "b"]) for shared in SHARED)
    whole = {shared: statistics.median(times[shared, "a"] + times[shared, "b"]) for shared in SHARED}
    # One character more that is compared is far less than a microsecond; a whole look-up more is several.
    noise = max(3 * same, 0.02 * min(whole.values()))
    assert max(whole.values()) - min(whole.values()) <= noise, (whole, same)
