"""A real run is killed at random moments and continued until it is done: the weights are those of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.things import write_corpus

STEPS = 30
RECIPE = f"""
corpus:
  facts: CORPUS/facts.jsonl
  evaluation: CORPUS/evaluation.jsonl
  renders: 8
tokenizer:
  vocab_size: 300
model:
  preset: tiny
  changes:
    residual_dropout: 0.1
train:
  steps: {STEPS}
  window: 128
  batch_size: 2
  accumulation: 2
  threads: 1
  loss_on: answers
  log_every: 1
  eval_every: 10
  checkpoint_every: 1
  keep_best: true
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_corpus(folder / "things")
    (folder / "things.yaml").write_text(RECIPE.replace("CORPUS", str(folder / "things")))
    return folder / "things.yaml"


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clients.cli", "train", "--recipe", recipe, "--out", out, "--resume", "auto"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(recipe: Path, out: Path) -> str:
    """Runs to the end; the hash of the weights."""
    child = start(recipe, out)
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert list((out / "checkpoints").glob("*.partial")) == []
    return hashlib.sha256((out / "final/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished(recipe, tmp_path_factory.mktemp("runs") / "straight")


def kill_when(recipe: Path, out: Path, moment: Callable[[], bool]) -> bool:
    """Kills a run as soon as ``moment`` is there; whether that was before its end."""
    child = start(recipe, out)
    try:
        deadline = time.monotonic() + 120
        while child.poll() is None and not moment():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        said, _ = child.communicate(timeout=60)
        assert child.returncode in (0, -signal.SIGKILL), said
        return child.returncode != 0
    finally:
        child.kill()
        child.wait()


def beyond(names: Callable[[], set[str]], after: int) -> Callable[[], bool]:
    """Whether more than ``after`` names are there that are not now."""
    before, begun = names(), set[str]()

    def moment() -> bool:
        begun.update(names() - before)
        return len(begun) > after

    return moment


def moments(out: Path, rng: random.Random, number: int) -> Callable[[], bool]:
    """By turns: while a checkpoint is written, between or within steps, and while the run begins."""
    if number % 3 == 0:
        return beyond(lambda: {path.name for path in out.glob("checkpoints/step-*.partial")}, rng.randrange(4))
    if number % 3 == 1:
        logged = beyond(lambda: {str((out / "metrics.jsonl").stat().st_size)} if (out / "metrics.jsonl").exists()
                        else set(), rng.randrange(4))  # fmt: skip
        delay, since = rng.uniform(0, 0.1), list[float]()

        def moment() -> bool:
            if not since and logged():
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > delay

        return moment
    then = time.monotonic() + rng.uniform(0, 5)
    return lambda: time.monotonic() > then


def killed_and_continued(recipe: Path, out: Path, kills: int, seed: int) -> tuple[str, int]:
    """The hash of the final weights, and how many of the kills came before the end, the last one in the export."""
    rng, done = random.Random(seed), 0
    for i in range(kills - 1):
        done += kill_when(recipe, out, moments(out, rng, i))
        if (out / "final").exists():
            break
    else:
        done += kill_when(recipe, out, (out / "final.partial").exists)
    return finished(recipe, out), done


def test_three_kills(recipe: Path, uninterrupted: str, tmp_path: Path) -> None:
    weights, kills = killed_and_continued(recipe, tmp_path / "run", 3, seed=0)
    assert kills == 3
    assert weights == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(recipe: Path, uninterrupted: str, tmp_path: Path) -> None:
    done, i = 0, 0
    while done < 20:  # in as many runs as it takes
        weights, kills = killed_and_continued(recipe, tmp_path / f"run{i}", 20 - done, seed=100 + i)
        assert weights == uninterrupted
        done, i = done + kills, i + 1
