"""What a run says it was made with, and what it does not say."""

import json
import re

import pytest

from training.environment import code_version, describe, without_secrets


def test_a_run_is_described_in_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py", "--set", "x=correct horse", "hf_abcdefghijklmnop"])
    told = json.loads(json.dumps(describe()))
    for name in ("started", "command", "code", "python", "packages", "system", "cpu", "cores", "threads", "gpus"):
        assert name in told
    assert told["packages"]["torch"]
    assert told["variables"]["OMP_NUM_THREADS"] == "1"
    assert "hf_abc" not in json.dumps(told)
    assert "correct horse" not in json.dumps(told)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["started"])


def test_the_code_version_names_the_commit() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+g[0-9a-f]{12}(\.dirty)?)?", code_version())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--token", "abc", "run"], ["--token", "[hidden]", "run"]),
        (["--api-key=abc"], ["--api-key=[hidden]"]),
        (["hub.token=abc", "WANDB_API_KEY=abc"], ["hub.token=[hidden]", "WANDB_API_KEY=[hidden]"]),
        (["x=hf_0123456789abc", "https://me:pw@host/x"], ["x=[hidden]", "https://[hidden]host/x"]),
        # What only looks like one is told: a run cannot be repeated without.
        (["watch.sample_tokens=64", "tokenizer.name=x"], ["watch.sample_tokens=64", "tokenizer.name=x"]),
        (["--recipe", "demo", "--out", "runs/keyless"], ["--recipe", "demo", "--out", "runs/keyless"]),
    ],
)  # fmt: skip
def test_secrets_of_the_command_line_are_hidden(given: list[str], told: list[str]) -> None:
    assert without_secrets(given) == told
