"""The engine benchmark's arithmetic against values worked out by hand."""

import json
from dataclasses import asdict, replace

import pytest

from loadtest.engine_plan import DECODE, PREFILL, Cell
from loadtest.engine_report import (
    GENERATE,
    LLAMA,
    OURS,
    Measured,
    Model,
    Operator,
    Profile,
    Result,
    Turn,
    markdown,
    operators,
    reading,
    table,
)

CELL = Cell(DECODE, 8, 16, 32)
# Ratios by the clock 0.5, 1.0, 2.0, 1.1 in the order of the pairs; in CPU time 0.8, 0.9, 0.5, 0.6.
PAIRS = [((100, 1.0, 1.0), (200, 1.0, 1.6)), ((100, 1.0, 1.0), (100, 1.0, 0.9)), ((200, 1.0, 2.0), (100, 1.0, 0.5)),
         ((110, 1.0, 1.0), (100, 1.0, 6 / 11))]  # fmt: skip


def measured(pairs: list = PAIRS, generated: dict[int, float] | None = None, cell: Cell = CELL) -> Measured:
    """Turns in the order they are played: ours first in even pairs; ``generated``: seconds for 100 tokens by pair."""
    turns = []
    for number, (ours, llama) in enumerate(pairs):
        played = [Turn(OURS, number, *ours), Turn(LLAMA, number, *llama)]
        turns += reversed(played) if number % 2 else played
        if number in (generated or {}):
            assert generated
            turns.append(Turn(GENERATE, number, 100, generated[number], 2 * generated[number]))
    return Measured(cell, turns)


def scaled(ratio: float, count: int = 4) -> list:
    return [((ratio * 100, 1.0, 1.0), (100, 1.0, 1.0))] * count


def model(cells: list[Measured], profiles: list[Profile] | None = None) -> Model:
    return Model("gpt tiny", [("parameters", "1,000", "1,001")], ["a note"], cells, profiles or [])


def test_tokens_per_second_are_the_median_of_the_turns() -> None:
    assert measured().tokens_per_second(OURS) == 105
    assert measured().tokens_per_second(LLAMA) == 100
    assert measured().tokens_per_second(GENERATE) is None


def test_ratio_is_that_of_the_two_turns_of_each_pair_whatever_their_order() -> None:
    ratio = measured().ratio(LLAMA)
    assert ratio
    assert (ratio.median, ratio.least, ratio.greatest) == pytest.approx((1.05, 0.5, 2.0))


def test_cpu_ratio_takes_cpu_seconds() -> None:
    ratio = measured().ratio(LLAMA, cpu=True)
    assert ratio
    assert (ratio.median, ratio.least, ratio.greatest) == pytest.approx((0.7, 0.5, 0.9))


def test_ratio_to_generate_is_of_those_pairs_only_that_it_played_in() -> None:
    # 100 and 200 tokens/s of ours in pairs 0 and 2, against 200 and 50.
    ratio = measured(generated={0: 0.5, 2: 2.0}).ratio(GENERATE)
    assert ratio
    assert (ratio.median, ratio.least, ratio.greatest) == pytest.approx((2.25, 0.5, 4.0))
    assert measured().ratio(GENERATE) is None


def test_a_drift_that_slows_both_down_leaves_the_pair_ratios_alone() -> None:
    drifting = [((100, s, s), (100, s, s)) for s in (1.0, 2.0, 4.0, 8.0)]
    ratio = measured(drifting).ratio(LLAMA)
    assert ratio
    assert (ratio.least, ratio.greatest) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("clock", "cpu", "below"), [(1.0, 1.0, False), (0.99, 1.1, True), (1.1, 0.99, True), (1.2, 1.3, False)]
)
def test_a_cell_is_below_one_by_either_clock(clock: float, cpu: float, below: bool) -> None:
    pairs = [((100, 1 / clock, 1 / cpu), (100, 1.0, 1.0))] * 4
    assert measured(pairs).below_one() is below


def test_reading_names_the_cells_below_one_and_no_others() -> None:
    slow = measured(scaled(0.9), cell=Cell(PREFILL, 32, 512, 1))
    text = reading(model([measured(scaled(1.1)), slow]))
    assert "Below 1.0 of Llama: prefill 512, 32 sequences (0.900 by the clock, 0.900 in CPU time)." in text
    assert "decode" not in text
    assert "does not resolve" not in text


def test_reading_says_where_the_pairs_lie_on_both_sides() -> None:
    assert "does not resolve a difference: decode 32, 8 sequences" in reading(
        model([measured(scaled(0.9, 3) + scaled(1.2, 1))])
    )


def test_reading_names_the_lowest_cell_when_none_is_below_one() -> None:
    text = reading(model([measured(scaled(1.2)), measured(scaled(1.1), cell=Cell(PREFILL, 1, 512, 1))]))
    assert text == "No cell is below 1.0 of Llama; the lowest is prefill 512, 1 sequence at 1.100."


def test_table_has_columns_for_generate_only_where_it_played() -> None:
    assert "generate()" not in table(model([measured()]))
    with_generate = table(model([measured(generated={0: 0.5}), measured(scaled(1.0))]))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in with_generate.splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert lines[2][:5] == ["decode 32, 8 sequences", "4", "105", "100", "1.050 (0.500..2.000)"]
    assert lines[2][6] == "200"
    assert lines[3][6:] == ["-", "-", "-"]


def test_operators_are_ordered_by_time_and_the_rest_is_summed_up() -> None:
    rows = [Operator(f"op{i}", float(i), i, 0.5 * i, 2) for i in range(1, 6)]
    lines = operators(Profile(CELL, rows), most=2).splitlines()
    assert [line.strip("|").split("|")[0].strip() for line in lines[2:]] == ["`op5`", "`op4`", "3 others", "all"]
    assert [cell.strip() for cell in lines[-2].strip("|").split("|")] == ["3 others", "6.0", "6", "3.0", "6", "+3.0"]
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == ["all", "15.0", "15", "7.5", "10", "+7.5"]


def test_report_holds_every_model_its_sizes_notes_and_profiles() -> None:
    first = model([measured(generated={0: 0.5})], [Profile(CELL, [Operator("aten::mm", 2.0, 4, 1.0, 4)])])
    result = Result({"date": "today"}, {"dtype": "float32"}, [first, replace(first, title="other base", profiles=[])])
    text = markdown(result)
    for part in (
        "## gpt tiny",
        "## other base",
        "1,001",
        "- a note",
        "`aten::mm`",
        "- date: today",
        "- dtype: float32",
    ):
        assert part in text
    assert text.count("### Where the time goes") == 1


def test_a_model_survives_the_way_between_processes() -> None:
    before = model([measured(generated={0: 0.5})], [Profile(CELL, [Operator("aten::mm", 2.0, 4, 1.0, 4)])])
    assert Model.from_dict(json.loads(json.dumps(asdict(before)))) == before


def test_figures_carry_the_ratios_that_the_report_shows() -> None:
    data = Result({}, {}, [model([measured()])]).to_dict()["models"][0]["cells"][0]
    assert data["name"] == "decode 32, 8 sequences"
    assert data["ours / Llama, wall"] == pytest.approx({"median": 1.05, "least": 0.5, "greatest": 2.0})
    assert data["ours / generate(), CPU"] is None
