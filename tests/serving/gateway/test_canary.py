"""Replicas that compute something else are found; those that cannot be asked are not blamed."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl

from serving.gateway import canary
from serving.gateway.canary import CanaryBaseline, Target, Verdict, check
from tests.serving.gateway.faulty_engine import FaultyEngine, running
from tests.waiting import eventually


def ask(engine: FaultyEngine, baseline: CanaryBaseline, path: Path | None = None, turn: int = 0,
        label: str = "demo[0]", longest: int | None = None) -> Verdict:  # fmt: skip
    async def run() -> Verdict:
        async with running(engine), aiohttp.ClientSession() as session:
            url = yarl.URL(engine.url + "/v1/completions")
            return await check(Target(label, session, url, "there", longest), baseline, path, turn)

    return asyncio.run(run())


@pytest.fixture
def engine() -> FaultyEngine:
    return FaultyEngine()


@pytest.fixture
def fingerprint(tmp_path: Path) -> Path:
    """Of two probes, both of what the engine computes; the first also of two greedy tokens."""
    path = tmp_path / "fingerprint.json"
    probes: list[dict[str, Any]] = [
        {"token_ids": [5, 6, 7, 8, 9], "logprobs": [-1.0, -2.0, -3.0, -4.0], "greedy_ids": [7, 3],
         "greedy_logprobs": [-0.5, -0.25]},
        {"token_ids": [1, 2, 3], "logprobs": [-1.0, -2.0], "greedy_ids": [], "greedy_logprobs": []},
        {"token_ids": [1], "logprobs": [], "greedy_ids": [], "greedy_logprobs": []},
    ]  # fmt: skip
    path.write_text(json.dumps({"version": 1, "sha256": {"model.safetensors": ""}, "probes": probes}))
    return path


def test_first_numbers_are_the_models_and_others_must_agree(engine: FaultyEngine) -> None:
    baseline = CanaryBaseline()
    assert ask(engine, baseline) == Verdict("ok")
    assert engine.completions[0]["model"] == "there"
    engine.logprobs = [-1.1, -2.4, -2.9, -4.0]
    engine.chosen_logprobs = [-9.0]  # another token was about as likely
    assert ask(engine, baseline, label="demo[1]").outcome == "ok"
    engine.logprobs = [-9.0, -9.0, -9.0, -9.0]
    verdict = ask(engine, baseline, label="demo[1]")
    assert verdict.outcome == "deviates"
    assert "6.5 off those computed by demo[0]" in verdict.reason
    assert "computed formerly" in ask(engine, baseline).reason
    engine.logprobs = [-1.0] * 9
    assert "other tokens" in ask(engine, baseline).reason


@pytest.mark.parametrize("spoilt", [None, "NaN", [], {}])
def test_values_that_are_no_numbers_deviate_even_at_first(engine: FaultyEngine, spoilt: Any) -> None:
    engine.logprobs[2] = spoilt
    baseline = CanaryBaseline()
    assert ask(engine, baseline).outcome == "deviates"
    assert baseline.numbers is None


def test_engine_reproduces_its_fingerprint(engine: FaultyEngine, fingerprint: Path) -> None:
    baseline = CanaryBaseline()
    engine.chosen, engine.chosen_logprobs = [7, 3], [-0.5, -0.25]
    assert ask(engine, baseline, fingerprint) == Verdict("ok")
    assert engine.completions[-1]["prompt"] == [5, 6, 7, 8, 9]
    engine.chosen_logprobs = [-0.5, -3.0]
    assert ask(engine, baseline, fingerprint).outcome == "deviates"
    # After another choice the context is another one, and what follows tells nothing.
    engine.chosen = [8, 3]
    assert ask(engine, baseline, fingerprint).outcome == "ok"
    engine.chosen_logprobs = [-1.5, -0.25]
    assert "off by up to 1; 0.5 is allowed" in ask(engine, baseline, fingerprint).reason
    engine.logprobs, engine.chosen_logprobs = [-1.0], []
    assert "missing" in ask(engine, baseline, fingerprint).reason


def test_probes_take_turns_and_those_too_long_are_left_out(engine: FaultyEngine, fingerprint: Path) -> None:
    baseline = CanaryBaseline()
    engine.chosen_logprobs = [-0.5, -0.25]
    for turn, length in ((0, 5), (1, 3), (2, 5), (-1, 3)):
        ask(engine, baseline, fingerprint, turn)
        assert len(engine.completions[-1]["prompt"]) == length
    ask(engine, baseline, fingerprint, 0, longest=6)
    assert len(engine.completions[-1]["prompt"]) == 3
    assert ask(engine, baseline, fingerprint, 0, longest=2).outcome == "unsupported"


def test_fingerprint_that_cannot_be_read_lets_no_engine_pass(engine: FaultyEngine, fingerprint: Path) -> None:
    baseline = CanaryBaseline()
    assert "cannot be read" in ask(engine, baseline, fingerprint.with_name("none.json")).reason
    engine.chosen_logprobs = [-0.5, -0.25]
    assert ask(engine, baseline, fingerprint).outcome == "ok"
    whole = fingerprint.read_text()
    fingerprint.unlink()
    assert ask(engine, baseline, fingerprint).outcome == "ok"  # known from before
    fingerprint.write_text(whole[:-9])
    os.utime(fingerprint, ns=(1, 1))
    assert ask(engine, baseline, fingerprint) == Verdict("deviates", ask(engine, baseline, fingerprint).reason)
    assert "damaged" in ask(engine, baseline, fingerprint).reason


@pytest.mark.parametrize(
    ("status", "outcome", "known_outcome"),
    [(404, "unsupported", "unsupported"), (400, "unsupported", "unsupported"), (501, "unsupported", "unsupported"),
     (429, "failed", "failed"), (503, "failed", "failed"), (307, "failed", "failed"), (500, "failed", "deviates")],
)  # fmt: skip
def test_refusals(engine: FaultyEngine, status: int, outcome: str, known_outcome: str) -> None:
    engine.status["/v1/completions"] = status
    assert ask(engine, CanaryBaseline()).outcome == outcome
    assert ask(engine, CanaryBaseline(numbers=[-1.0])).outcome == known_outcome
    assert not engine.asked["/elsewhere"]


def test_engine_without_echo_or_logprobs_is_not_blamed(engine: FaultyEngine) -> None:
    engine.echoes = False
    assert ask(engine, CanaryBaseline()).outcome == "unsupported"
    engine.tells = False
    assert ask(engine, CanaryBaseline(numbers=[-1.0])).outcome == "unsupported"


def test_slow_answer_is_no_deviation(engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TIMEOUT", 0.1)
    engine.delay["/v1/completions"] = 0.5
    assert ask(engine, CanaryBaseline(numbers=[-1.0])) == Verdict("failed", "canary: no answer in time", late=True)


def test_numbers_are_forgotten_with_the_last_that_agreed(engine: FaultyEngine) -> None:
    baseline = CanaryBaseline()
    for label in ("demo[0]", "demo[1]"):
        assert ask(engine, baseline, label=label).outcome == "ok"
    engine.logprobs = [-9.0, -9.0, -9.0, -9.0]
    baseline.forget("demo[0]")
    assert ask(engine, baseline, label="demo[2]").outcome == "deviates"
    baseline.forget("demo[1]")
    assert ask(engine, baseline, label="demo[2]").outcome == "ok"
    assert baseline.source == "demo[2]"


def test_replica_that_does_not_answer_holds_up_no_other(engine: FaultyEngine) -> None:
    hangs = FaultyEngine()
    hangs.delay["/v1/completions"] = 60

    async def run() -> Verdict:
        async with running(engine, hangs), aiohttp.ClientSession() as session:
            baseline = CanaryBaseline()
            targets = [Target(e.url, session, yarl.URL(e.url + "/v1/completions"), "demo") for e in (hangs, engine)]
            first = asyncio.create_task(check(targets[0], baseline, None, 0))
            assert await eventually(lambda: hangs.asked["/v1/completions"])
            verdict = await asyncio.wait_for(check(targets[1], baseline, None, 0), 5)
            first.cancel()
            return verdict

    assert asyncio.run(run()) == Verdict("ok")
