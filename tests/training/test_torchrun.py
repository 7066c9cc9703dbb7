"""The real command under ``torchrun``: two ranks train as one process does, and end and continue as it does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.lines import STEPS, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("data"))


def start(recipe: Path, out: Path, ranks: int, *sets: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "clients.cli", "train", str(recipe), "--out", str(out),
         *(f"--set={one}" for one in sets)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(child: subprocess.Popen[str], code: int = 0) -> str:
    try:
        said, _ = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == code, said
    return said


def losses(out: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows if name in row] for name in ("step", "loss", "held_out_loss")}


def assert_same_run(a: Path, b: Path) -> None:
    """That of two runs the losses are equal to 1e-5, which is the last digit of the file, and the weights close."""
    of_a, of_b = losses(a), losses(b)
    assert of_a["step"] == of_b["step"]
    assert len(of_a["loss"]) == STEPS
    assert len(of_a["held_out_loss"]) == 2
    for name in ("loss", "held_out_loss"):
        assert of_a[name] == pytest.approx(of_b[name], rel=0, abs=1.01e-5)
    weights, others = load_file(a / "final/model.safetensors"), load_file(b / "final/model.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    ended(start(recipe, out, 1))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(strategy: str, recipe: Path, alone: Path, tmp_path: Path) -> None:
    said = ended(start(recipe, tmp_path / "run", 2, f"parallel.strategy={strategy}"))
    assert f"2 ranks ({strategy}" in said
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "before", "after"),
    [("fsdp", 2, 1), ("ddp", 2, 1), ("fsdp", 1, 2)],
)
def test_stopped_and_continued_on_another_number_of_ranks(
    strategy: str, before: int, after: int, recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """SIGTERM (torchrun hands it on) saves what the ranks have; the losses, before and after, are those of one."""
    out = tmp_path / "run"
    # A checkpoint early on is the sign to send the signal: the run must not be over when it arrives.
    child = start(recipe, out, before, f"parallel.strategy={strategy}", "train.checkpoint_every=2")
    try:
        deadline = time.monotonic() + 100
        while child.poll() is None and not (out / "checkpoints/step-00000002").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    newest = max(path.name for path in (out / "checkpoints").iterdir())
    step = int(newest.removeprefix("step-"))
    assert 2 <= step < STEPS, said
    assert f"stopped by SIGTERM after step {step}" in said
    assert not (out / "final").exists()

    said = ended(start(recipe, out, after, f"parallel.strategy={strategy}"))
    assert f"from step {step}" in said
    assert f"written by {before} ranks and is continued by {after}" in " ".join(said.split())
    assert_same_run(out, alone)


@pytest.mark.slow
def test_what_the_main_rank_refuses_ends_all_at_once(recipe: Path, alone: Path) -> None:
    started = time.monotonic()
    said = ended(start(recipe, alone, 2, "seed=9"), code=1)  # torchrun's own code
    assert "holds a run with another recipe (train.seed)" in said
    assert "rank1]: Traceback" not in said
    assert time.monotonic() - started < 60
