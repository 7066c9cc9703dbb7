"""`medassist eval --tasks` of the served checkpoint against the module itself: the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modeling.tokenizers import train_bpe
from tests.e2e.server import CHECKPOINT, Server
from training import harness

pytestmark = pytest.mark.engine

TOPICS = ("asthma", "a stroke", "high blood pressure", "kidney stones", "a fever", "migraine", "diabetes", "an ulcer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for pubmedqa, and a text column for perplexity; some are longer than the model's window."""
    rows = []
    for i, topic in enumerate(TOPICS):
        sentences = [f"Patients with {topic} were seen {n} times in group {n * i % 7}." for n in range(5 + 16 * i)]
        rows.append({"question": f"Does rest help with {topic}?", "contexts": sentences,
                     "decision": ("yes", "no", "maybe")[i % 3], "text": " ".join(sentences)})  # fmt: skip
    path = tmp_path_factory.mktemp("evaluation") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def medassist_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clients.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)


def test_a_served_model_has_the_same_results_as_its_module(server: Server, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = medassist_eval(
        server.base_url, "--tokenizer", CHECKPOINT, "--tasks", "pubmedqa,perplexity", "--data", data, "--out", out
    )
    assert done.returncode == 0, done.stderr
    served: dict[str, Any] = json.loads(out.read_text())
    assert served["model"] == server.model
    assert done.stdout.splitlines() == harness.table(served)
    module = harness.report(str(CHECKPOINT), ["pubmedqa", "perplexity"], data)
    # The harness adds a piece's log-probabilities in float32: numbers around 25,000, a long text's, are 0.002 apart.
    for name, spacing in (("pubmedqa", 0.0), ("perplexity", 2e-7)):
        ours, theirs = module["tasks"][name], served["tasks"][name]
        for row, other in zip(ours["per_row"], theirs["per_row"], strict=True):
            assert row["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3, rel=spacing)
        for metric, score in ours["metrics"].items():
            same = theirs["metrics"][metric]["value"]
            assert score["value"] == (same if name == "pubmedqa" else pytest.approx(same, rel=1e-5)), metric
        assert theirs["truncated"] == ours["truncated"]
    assert 0 < module["tasks"]["pubmedqa"]["truncated"] < len(TOPICS)
    assert "Patients" not in server.log + done.stdout + done.stderr + out.read_text()


def test_what_an_endpoint_would_fail_by_is_said_before_any_row(server: Server, data: Path, tmp_path: Path) -> None:
    def refusal(**settings: Any) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            harness.report(server.base_url, ["pubmedqa"], data, **{"tokenizer": CHECKPOINT} | settings)
        return str(error.value)

    train_bpe(["What helps with a cold?"], vocab_size=300, max_length=512).save_pretrained(tmp_path / "other")
    assert "is not the tokenizer of medassist-demo" in refusal(tokenizer=tmp_path / "other", window=100)
    assert "set --window to its --max-model-len" in refusal(window=2000)
    assert "medassist-demo; set --model" in refusal(served="another")
    assert "has no tokenizer" in refusal(tokenizer=tmp_path)


def test_settings_of_the_other_kind_of_evaluation_are_refused() -> None:
    done = medassist_eval(CHECKPOINT, "--limit", "5")
    assert done.returncode == 2
    assert "are for --tasks" in done.stderr
    done = medassist_eval(CHECKPOINT, "--tasks", "pubmedqa", "--questions", "questions.jsonl")
    assert done.returncode == 2
    assert "--questions" in done.stderr
