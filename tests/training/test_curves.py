"""The pictures of a run, from whatever there is of it."""

import json
import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from training.curves import draw, series, smoothed

matplotlib = pytest.importorskip("matplotlib")


def rows(steps: int, every: int = 10, experts: bool = False) -> list[dict[str, Any]]:
    rng, made = random.Random(0), []
    for step in range(every, steps + 1, every):
        loss = 0.05 + 8.0 * math.exp(-step / 300) + abs(rng.gauss(0, 0.03))
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": 3e-3 * min(1, step / 100, (steps - step + 1) / 900),
                               "grad_norm": 4 * math.exp(-step / 500) + abs(rng.gauss(0.3, 0.1)),
                               "tokens_per_second": rng.gauss(5700, 100)}  # fmt: skip
        if experts:
            row["expert_load_cv"] = [1.5 * math.exp(-step / 80) + 0.1, 0.2]
        made.append(row)
        if step % (20 * every) == 0:
            made.append({"step": step, "held_out_loss": loss * 1.1})
    return made


def written(folder: Path, made: list[dict[str, Any]]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize(
    "made",
    [
        rows(3000, experts=True),
        rows(10),
        [{"step": 10, "loss": 2.0}],
        [{"step": 10, "held_out_loss": 2.0}],
        [{"step": 1, "loss": None, "grad_norm": float("inf"), "lr": 0.0}, {"step": 2, "loss": 0.0, "lr": 0.1}],
        [*rows(300), *rows(600)],  # resumed by hand: steps go back
    ],
    ids=["whole", "one line", "one point", "held out alone", "not finite", "twice"],
)
def test_what_there_is_is_drawn(tmp_path: Path, made: list[dict[str, Any]]) -> None:
    paths = draw(written(tmp_path, made), tmp_path)
    assert [path.name for path in paths] == ["curves.png", "curves.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert ET.parse(paths[1]).getroot().tag.endswith("svg")


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert draw(written(tmp_path, []), tmp_path) == []
    assert draw(written(tmp_path, [{"step": 1}]), tmp_path) == []


def test_the_same_run_gives_the_same_svg(tmp_path: Path) -> None:
    metrics = written(tmp_path, rows(100))
    first = draw(metrics, tmp_path)[1].read_bytes()
    assert draw(metrics, tmp_path)[1].read_bytes() == first


def test_series_leave_out_what_is_missing_or_not_finite() -> None:
    made = [{"step": 1, "x": 1.0}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": [1.0, 3.0]}]
    assert series(made[:3], "x") == ([1.0], [1.0])
    assert series(made[3:], "x", max) == ([4.0], [3.0])


def test_smoothing_keeps_the_start_and_is_not_turned_by_the_last_value() -> None:
    line = [2.0 * i for i in range(30)]
    assert smoothed(line, 7)[:27] == pytest.approx(line[:27])
    assert smoothed([1.0] * 29 + [5.0], 7)[-1] == pytest.approx(2.0)
