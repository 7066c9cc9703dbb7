"""Which cells the engine benchmark measures, and how often."""

from typing import Any

import pytest

from loadtest.engine_plan import DECODE, PREFILL, Cell, Options, cells, plan, repeats, schedule


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--rounds", {"rounds": 3}),
        ("--rounds", {"rounds": 0}),
        ("--sequences", {"sequences": ()}),
        ("--sequences", {"sequences": (8, 0)}),
        ("--sequences", {"sequences": (8, 8)}),
        ("--new-tokens", {"new_tokens": 1}),
        ("--prompt", {"prompt": 0}),
        ("--threads", {"threads": 0}),
        ("--minutes", {"minutes": 0}),
        ("--dtype", {"dtype": "int8"}),
        ("--profile", {"profile": "some"}),
    ],
)
def test_what_cannot_be_measured_is_refused_by_the_name_of_its_option(option: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=option):
        Options(**changes)


def test_cells_are_decode_and_prefill_at_every_number_of_sequences() -> None:
    found = cells(Options(sequences=(1, 8), new_tokens=32, prompt=512), positions=1024)
    assert found == [
        Cell(DECODE, 1, 16, 32),
        Cell(DECODE, 8, 16, 32),
        Cell(PREFILL, 1, 512, 1),
        Cell(PREFILL, 8, 512, 1),
    ]
    assert [cell.name for cell in found[1:3]] == ["decode 32, 8 sequences", "prefill 512, 1 sequence"]


def test_tokens_are_those_after_the_first_when_decoding_and_those_of_the_prompt_in_prefill() -> None:
    assert Cell(DECODE, 8, 16, 32).tokens == 8 * 31
    assert Cell(PREFILL, 8, 512, 1).tokens == 8 * 512


@pytest.mark.parametrize("positions", [33, 40, 256, 512, 513, 1024])
def test_cells_fit_into_the_positions_of_the_model(positions: int) -> None:
    found = cells(Options(new_tokens=32, prompt=512), positions)
    assert all(cell.prompt >= 1 and cell.prompt + cell.new_tokens <= positions for cell in found)
    assert {cell.prompt for cell in found if cell.phase == PREFILL} == {min(512, positions - 1)}


def test_answers_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="--new-tokens 32 do not fit into this model's 32 positions"):
        cells(Options(new_tokens=32), positions=32)


def test_plan_gives_every_cell_its_least_even_without_time() -> None:
    assert plan([1.0, 100.0], seconds=1, rounds=10) == [4, 4]
    assert plan([1.0, 100.0], seconds=1, rounds=2) == [2, 2]


def test_plan_gives_every_cell_the_most_when_there_is_time() -> None:
    assert plan([1.0, 2.0, 3.0], seconds=1e6, rounds=10) == [10, 10, 10]


def test_plan_fills_the_time_with_the_cheap_cells_without_spending_more() -> None:
    pairs = plan([1.0, 10.0, 100.0], seconds=4 * 111 + 60, rounds=10)
    assert pairs == [10, 8, 4]  # of the 60 s, 6 for the first to be full and 40 for four of the second; 14 are left
    assert plan([1.0, 10.0, 100.0], seconds=4 * 111 + 70, rounds=10) == [10, 10, 4]


def test_schedule_spreads_the_pairs_of_a_cell_over_all_rounds() -> None:
    rounds = schedule([10, 4])
    assert len(rounds) == 10
    assert all(0 in playing for playing in rounds)
    assert [number for number, playing in enumerate(rounds) if 1 in playing] == [2, 4, 7, 9]


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 50), (0.001, 50), (0.1, 10), (0.3, 4), (1.0, 1), (40.0, 1)])
def test_short_cells_are_repeated_until_they_take_a_second(seconds: float, times: int) -> None:
    assert repeats(seconds) == times
