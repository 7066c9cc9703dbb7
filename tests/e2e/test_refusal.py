"""A model that does not reproduce its training is not served."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

import modeling
from tests.e2e.server import CHECKPOINT, START_LIMIT, Server

pytestmark = pytest.mark.engine


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "altered-model"))


def refusal(checkpoint: Path, tmp_path: Path, **env: str) -> str:
    """What ``medassist serve`` says; it must exit with 1 and must never have been ready."""
    server = Server(checkpoint, tmp_path / "logs", env=env)
    deadline = time.monotonic() + START_LIMIT
    try:
        while server.process.poll() is None and time.monotonic() < deadline:
            assert "ready:" not in server.log
            time.sleep(0.2)
        assert server.process.returncode == 1, server.log
    finally:
        server.stop()
    line = next(line for line in server.log.splitlines() if "NOT SERVED" in line)
    assert "altered-model" in line
    return line


def test_one_flipped_bit_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors is not the file that was trained" in refusal(checkpoint, tmp_path)


def test_a_missing_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "fingerprint.json").unlink()
    assert "no fingerprint.json" in refusal(checkpoint, tmp_path)


def test_a_fingerprint_altered_by_hand(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "fingerprint.json"
    content = json.loads(path.read_text())
    content["probes"][1]["logprobs"][3] += 0.001
    path.write_text(json.dumps(content))
    message = refusal(checkpoint, tmp_path)
    found = re.search(r"off by up to ([\d.e-]+)", message)
    assert found
    assert float(found[1]) == pytest.approx(0.001, abs=1e-4)
    assert "probe 2, token 4" in message


def test_a_serving_class_that_computes_something_else(checkpoint: Path, tmp_path: Path) -> None:
    """The same package with one constant changed: attention scores 1 % too large."""
    changed = tmp_path / "changed/modeling"
    shutil.copytree(Path(modeling.__file__).parent, changed, ignore=shutil.ignore_patterns("__pycache__"))
    source = changed / "medassist/vllm_model.py"
    text = source.read_text()
    assert "scale=config.head_dim**-0.5" in text
    source.write_text(text.replace("scale=config.head_dim**-0.5", "scale=1.01 * config.head_dim**-0.5"))
    message = refusal(checkpoint, tmp_path, PYTHONPATH=str(changed.parent))
    assert "does not compute what was trained" in message
