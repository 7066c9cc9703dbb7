"""Throughput, MFU, time left, loss spikes and bytes of tokens."""

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from training.meter import RECENT, Meter, SpikeDetector, bits_per_byte, peak_memory, token_bytes


class Clock:
    """Far from 0, as real clocks are: who divides by a time of day instead of a span is found out."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_throughput_and_time_left_leave_pauses_out() -> None:
    clock = Clock()
    meter = Meter(steps=10, done=4, clock=clock)
    assert (meter.tokens_per_second, meter.seconds_left) == (0.0, 0.0)
    for _ in range(2):
        clock.now += 3.0
        meter.update(tokens=600)
        meter.pause()
        clock.now += 50.0  # an evaluation, which does not count
        meter.pause()  # nor does a checkpoint within the pause
        clock.now += 50.0
        meter.resume()
    assert meter.seconds == pytest.approx(6.0)
    assert meter.tokens_per_second == pytest.approx(200.0)
    assert meter.seconds_left == pytest.approx(4 * 3.0)  # four steps are left at three seconds each


def test_time_between_an_update_and_a_pause_is_training() -> None:
    clock = Clock()
    meter = Meter(steps=10, clock=clock)
    clock.now += 2.0
    meter.update(tokens=600)
    clock.now += 1.0  # a line is logged
    meter.pause()
    clock.now += 9.0
    meter.resume()
    clock.now += 2.0
    meter.update(tokens=600)
    assert meter.seconds == pytest.approx(5.0)
    assert meter.tokens_per_second == pytest.approx(240.0)


def test_throughput_is_of_recent_steps_and_the_mean_of_all() -> None:
    clock = Clock()
    meter = Meter(steps=1000, clock=clock)
    clock.now += 300.0  # the first step compiles
    meter.update(tokens=100)
    for _ in range(RECENT):
        clock.now += 1.0
        meter.update(tokens=100)
    assert meter.tokens_per_second == pytest.approx(100.0)
    assert meter.seconds_left == pytest.approx(1000 - RECENT - 1)
    assert meter.tokens / meter.seconds == pytest.approx(100 * (RECENT + 1) / (300 + RECENT))


def test_mfu_is_achieved_over_possible_flops() -> None:
    clock = Clock()
    meter = Meter(steps=10, flops_per_token=2.12e9, peak=2 * 989.4e12, clock=clock)
    clock.now += 2.0
    meter.update(tokens=2 * 374_000)  # of both ranks
    assert meter.mfu == pytest.approx(374_000 * 2.12e9 / (2 * 989.4e12))
    assert meter.mfu == pytest.approx(0.4, abs=0.001)
    assert Meter(steps=10, flops_per_token=2.12e9).mfu is None


def test_skipped_steps_are_counted() -> None:
    meter = Meter(steps=10)
    meter.update(10, skipped=True)
    meter.update(10)
    assert (meter.skipped, meter.step) == (1, 2)


def test_peak_memory_is_in_bytes() -> None:
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    assert peak_memory() == pytest.approx(1024 * int(kilobytes[1]), rel=0.05)


def losses(steps: int, seed: int = 0) -> list[float]:
    """A run's: falls fast, then slowly, with noise."""
    rng = random.Random(seed)
    return [2.0 + 6.0 * math.exp(-step / 60) + rng.gauss(0, 0.08) for step in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_reported_once_with_what_was_expected(seed: int) -> None:
    run = losses(600, seed)
    for step in (400, 401, 402):
        run[step] += 2.5
    run[500] += 1.5
    detector = SpikeDetector()
    spikes = [spike for step, loss in enumerate(run) if (spike := detector.update(step, loss))]
    assert [spike.step for spike in spikes] == [400, 500]
    assert spikes[0].loss == run[400]
    assert spikes[0].expected == pytest.approx(2.0, abs=0.2)


def test_beginnings_and_drifts_are_no_spikes() -> None:
    detector = SpikeDetector()
    assert not any(detector.update(step, 100.0 if step % 7 == 0 else 1.0) for step in range(50))
    for slope in (0.001, 0.01, 0.1):
        detector, rng = SpikeDetector(), random.Random(0)
        assert not any(detector.update(s, 2.0 + slope * s + rng.gauss(0, 0.05)) for s in range(500)), slope
    detector = SpikeDetector()
    assert not any(detector.update(step, 1.0 + 1e-6 * (step % 3)) for step in range(200))  # hardly any spread


def test_a_loss_that_is_not_finite_disturbs_nothing() -> None:
    detector = SpikeDetector()
    for step in range(60):
        assert detector.update(step, 2.0 + 0.1 * (step % 2)) is None
        assert detector.update(step, float("nan")) is None
        assert detector.update(step, float("inf")) is None
    assert detector.update(60, 5.0) is not None


TEXTS = [
    "Rest and drink plenty of water.",
    "naïve Übelkeit \u2013 37,5 °C\n\n\tβ-blocker   10 µg",
    "发烧时应该看医生吗 दवा",
    "👩🏽‍⚕️🩺 and \u0000 and \u2028 and e\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_sum_to_those_of_the_text(tokenizer: Any, text: str) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (len(tokenizer),)
    assert int(sizes[tokenizer(text)["input_ids"]].sum()) == len(text.encode())
    assert int(sizes[[tokenizer.eos_token_id, tokenizer.pad_token_id]].sum()) == 0


@pytest.mark.usefixtures("tiktoken_ranks")
def test_bytes_of_a_tiktoken_encodings_tokens() -> None:
    from modeling.tiktoken_encodings import from_encoding

    tokenizer = from_encoding("p50k_base", 1024)
    sizes = token_bytes(tokenizer)
    for text in TEXTS:
        assert int(sizes[tokenizer(text)["input_ids"]].sum()) == len(text.encode())
    assert int(sizes[tokenizer.convert_tokens_to_ids("<|endoftext|>")]) == 0


def test_bits_per_byte_of_a_uniform_model_over_bytes_are_8() -> None:
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)


def test_a_tokenizer_without_bytes_has_no_bits_per_byte() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="byte-level"):
        token_bytes(words)
