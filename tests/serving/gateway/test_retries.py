"""Retries stay a share of the requests, whatever fails."""

import pytest

from serving.gateway.retries import RetryBudget
from serving.gateway.settings import Retries


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowed(budget: RetryBudget, tries: int) -> int:
    return sum(budget.allow() for _ in range(tries))


@pytest.mark.parametrize("rate", [1, 50])
def test_an_outage_is_retried_for_a_share_of_requests_only(rate: int) -> None:
    clock = Clock()
    budget = RetryBudget(Retries(budget=0.2), clock=clock)
    granted = 0
    for _ in range(60 * rate):  # a minute in which every request fails and asks for two retries
        budget.deposit()
        granted += allowed(budget, 2)
        clock.now += 1 / rate
    # A fifth of the requests, ten at once, and ten more every ten seconds.
    expected = 0.2 * 60 * rate + 10 + 60
    assert 0.9 * expected <= granted <= 1.02 * expected


def test_a_quiet_gateway_has_ten_retries_and_gets_them_back() -> None:
    clock = Clock()
    budget = RetryBudget(Retries(budget=0.0), clock=clock)
    assert allowed(budget, 50) == 10
    clock.now += 5
    assert allowed(budget, 50) == 5
    clock.now += 3600
    assert allowed(budget, 50) == 10


def test_nothing_is_saved_up_for_a_storm() -> None:
    clock = Clock()
    budget = RetryBudget(Retries(budget=0.2), clock=clock)
    for _ in range(100_000):
        budget.deposit()
        clock.now += 0.001
    clock.now += 60
    assert allowed(budget, 50_000) <= 10 + 0.2 * 10_000 * 0.01


def test_workers_share_the_free_retries() -> None:
    budget = RetryBudget(Retries(), share=0.25, clock=Clock())
    assert allowed(budget, 10) == 2
