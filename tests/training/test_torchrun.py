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

from training.shards import tokenizer_hash, write_manifest, write_shard, describe_shard
from modeling.tokenizers import train_bpe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on one GPU")

STEPS = 50
RECIPE = """
data:
  path: DATA
model:
  preset: tiny
train:
  steps: 50
  window: 32
  batch_size: 2
  accumulation: 2
  threads: 1
  log_every: 1
  eval_every: 25
  checkpoint_every: 20
  keep: 9
optimizer:
  warmup: 5
"""
LINES = [f"The {size} {thing} is {colour}." for size in ("big", "small", "old", "new", "round")
         for thing in ("brick", "leaf", "sun", "sea") for colour in ("red", "green", "yellow", "blue")]  # fmt: skip


def prepared(folder: Path) -> Path:
    """A data set of many short documents, as ``medassist data prepare`` leaves it."""
    tokenizer = train_bpe(LINES, 300, 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    sha256 = tokenizer_hash(folder / "tokenizer/tokenizer.json")
    for name, lines in (("train", LINES[8:]), ("validation", LINES[:8])):
        documents = [[*tokenizer.encode(line), tokenizer.eos_token_id] for line in lines]
        (folder / name).mkdir()
        write_shard(folder / name / "00000.shard", documents, len(tokenizer), sha256)
        entry = describe_shard(folder / name / "00000.shard", sum(map(len, documents)), len(documents))
        write_manifest(folder / name, [entry], len(tokenizer), sha256, sum(map(len, lines)))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "lines.yaml"
    path.write_text(RECIPE.replace("DATA", str(prepared(folder / "lines"))))
    return path


def start(recipe: Path, out: Path, ranks: int, *sets: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "clients.cli", "train", str(recipe), "--out", str(out),
         *(f"--set={one}" for one in sets)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
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
    """That of two runs the losses are equal to 1e-5, and the weights close."""
    of_a, of_b = losses(a), losses(b)
    assert len(of_a["loss"]) == STEPS
    assert len(of_a["held_out_loss"]) == 2
    assert of_a["step"] == of_b["step"]
    for name in ("loss", "held_out_loss"):
        assert of_a[name] == pytest.approx(of_b[name], abs=1e-5)
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


def interrupted(recipe: Path, out: Path, *sets: str) -> str:
    """Two ranks until torchrun is asked to end, after the checkpoint of step 20; what they said."""
    child = start(recipe, out, 2, *sets)
    deadline = time.monotonic() + 100
    while child.poll() is None and not (out / "checkpoints/step-00000020").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    return said


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_are_one_process(strategy: str, recipe: Path, alone: Path, tmp_path: Path) -> None:
    ended(start(recipe, tmp_path / "run", 2, f"parallel.strategy={strategy}"))
    assert_same_run(tmp_path / "run", alone)
