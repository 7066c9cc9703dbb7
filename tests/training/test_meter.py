"""Throughput, time left and the metrics file."""

import json
from pathlib import Path

import pytest

from training.meter import Meter, MetricsLog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_and_time_left_leave_pauses_out() -> None:
    clock = Clock()
    meter = Meter(steps=10, done=4, clock=clock)
    assert (meter.tokens_per_second, meter.seconds_left) == (0.0, 0.0)
    for _ in range(2):
        clock.now += 2.0
        meter.update(tokens=600)
        clock.now += 1.0  # a line is logged, which counts
        meter.pause()
        clock.now += 50.0  # an evaluation, which does not
        meter.resume()
    assert meter.seconds == pytest.approx(6.0)
    assert meter.tokens_per_second == pytest.approx(200.0)
    assert meter.seconds_left == pytest.approx(4 * 3.0)  # four steps are left at three seconds each


def test_resumed_log_drops_the_lines_after_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step=step, loss=1 / 3)
    MetricsLog(path, resumed_from=20).write(step=30, loss=2.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 10, "loss": 0.33333}, {"step": 20, "loss": 0.33333}, {"step": 30, "loss": 2.0}]


def test_numbers_are_rounded_however_deep(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").write(step=1, load=[[1 / 3, 0.5], [2 / 3]], parts={"a": 1 / 7})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "load": [[0.33333, 0.5], [0.66667]], "parts": {"a": 0.14286}}


def test_log_of_a_new_run_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(step=10)
    MetricsLog(path)
    assert path.read_text() == ""
