"""The comparison of the ledger with what clients had finds what it must."""

from collections import Counter

import pytest

from loadtest.gateway.ledger import Truth, Written, disagreements

TRUTH = Truth(answered={"a": 10, "b": 12}, open={"c": 30})


@pytest.mark.parametrize(
    ("requests", "tokens", "audited"), [(2, 22, "ab"), (3, 22, "abc"), (3, 52, "abc"), (3, 40, "abc")]
)
def test_what_was_in_flight_may_count(requests: int, tokens: int, audited: str) -> None:
    assert disagreements(TRUTH, Written(requests, tokens, 0, Counter(audited))) == []


@pytest.mark.parametrize(
    ("requests", "tokens", "audited", "fault"),
    [
        (1, 10, "a", "requests, which must be 2 to 3"),
        (4, 52, "abcd", "never sent, such as d"),
        (2, 21, "ab", "tokens, which must be 22"),
        (3, 53, "abc", "tokens, which must be 22"),
        (2, 22, "ac", "not in the audit log, such as b"),
        (3, 34, "abb", "twice, such as b"),
        (3, 34, "ab", "the ledger has 3 requests, the audit log 2"),
    ],
)
def test_loss_and_double_counting_are_found(requests: int, tokens: int, audited: str, fault: str) -> None:
    assert any(fault in line for line in disagreements(TRUTH, Written(requests, tokens, 0, Counter(audited))))
