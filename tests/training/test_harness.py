"""lm-evaluation-harness around our module: its numbers against ones computed here, and what is refused."""

import gzip
import json
import logging
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.gpt.config import GPTConfig
from modeling.gpt.model import GPTForCausalLM
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from training import harness

WINDOW = 64
WORDS = ("rest", "water", "fever", "cold", "doctor", "drink", "seen", "help", "plenty", "what")


def sentence(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i + i * seed) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Random weights large enough that choices differ clearly."""
    torch.manual_seed(0)
    config = MedAssistGPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=WINDOW, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("harness") / "random"
    MedAssistGPTForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


class Direct:
    """Log-probabilities by one call of the module for each sequence."""

    def __init__(self, checkpoint: Path, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def score(self, before: list[int], after: list[int]) -> float:
        ids = torch.tensor([before + after])
        log_probs = self.model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(log_probs[len(before) + i - 1, token].item() for i, token in enumerate(after))

    def continuation(self, context: str, answer: str) -> float:
        before, whole = self.encode(context), self.encode(context + answer)
        after = whole[len(before) :]
        return self.score(before[-(WINDOW - 1 - len(after)) :], after)


@pytest.fixture(scope="module")
def direct(checkpoint: Path, tokenizer: Any) -> Direct:
    return Direct(checkpoint, tokenizer)


def test_pubmedqa_is_the_argmax_of_log_probabilities_computed_here(
    checkpoint: Path, direct: Direct, tmp_path: Path
) -> None:
    rows = [
        {"question": sentence(i, 4) + "?", "contexts": [sentence(i + 1, 2), sentence(i + 2, 1 + 3 * (i % 5))],
         "decision": harness.DECISIONS[i % 3], "pmid": i}
        for i in range(12)
    ]  # fmt: skip
    summary = harness.report(str(checkpoint), ["pubmedqa"], write(tmp_path / "rows.jsonl.gz", rows), batch_size=5)
    result = summary["tasks"]["pubmedqa"]
    right, longer = [], 0
    for row, scored in zip(rows, result["per_row"], strict=True):
        abstract = "\n".join(row["contexts"])
        context = f"Abstract: {abstract}\nQuestion: {row['question']}\nAnswer:"
        expected = [direct.continuation(context, f" {answer}") for answer in harness.DECISIONS]
        assert scored["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        right.append(harness.DECISIONS[expected.index(max(expected))] == row["decision"])
        longest = max(len(direct.encode(f"{context} {answer}")) for answer in harness.DECISIONS)
        longer += longest > WINDOW - 1
    accuracy = sum(right) / 12
    assert 0 < accuracy < 1
    assert result["metrics"]["acc"]["value"] == pytest.approx(accuracy)
    assert result["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 11))
    assert 0 < longer < 12
    assert result["truncated"] == longer
    assert result["commonest"] == pytest.approx(4 / 12)
    assert any(f"{longer} of 12 rows" in line for line in harness.table(summary))


def test_perplexity_is_that_of_pieces_scored_here(checkpoint: Path, direct: Direct, tmp_path: Path) -> None:
    """Two texts with a common end have equal last pieces, which the harness by itself scores wrongly."""
    end = sentence(5, 30)
    texts = [f"{sentence(1, 9)} {end}", f"{sentence(2, 14)} {end}", "A short fever.", sentence(3, 40)]
    data = write(tmp_path / "texts.jsonl", [{"answer": text} for text in texts])
    result = harness.report(str(checkpoint), ["perplexity"], data, column="answer")["tasks"]["perplexity"]
    start, piece = direct.model.config.eos_token_id, WINDOW - 2
    scores = []
    for text in texts:
        ids = [start, *direct.encode(text)]
        score = 0.0
        for first in range(1, len(ids), piece):
            last = min(first + piece, len(ids))
            # The first piece has a token before it, and the last one all that fits.
            before = ids[max(0, last - WINDOW + 1) : first] if first > 1 else ids[:1]
            score += direct.score(before, ids[first:last])
        scores.append(score)
    assert max(len(direct.encode(text)) for text in texts) > piece
    assert [row["log_likelihoods"][0] for row in result["per_row"]] == pytest.approx(scores, abs=1e-3)
    bits = -sum(scores) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert result["metrics"]["byte_perplexity"]["value"] == pytest.approx(2**bits, rel=1e-5)


def test_choices_and_a_task_file_read_the_same_rows_and_a_report_holds_none_of_their_text(
    checkpoint: Path, direct: Direct, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def connect(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    caplog.set_level(logging.DEBUG, "datasets")
    rows = [{"question": f"Zyx{i} {sentence(i, 3)}?", "choices": ["Water helps", "Rest", sentence(i, 2)],
             "answer": i % 3} for i in range(6)]  # fmt: skip
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\noutput_type: multiple_choice\ntest_split: none\ndataset_path: elsewhere/unknown\n"
                    'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: choices\n'
                    "doc_to_target: answer\n")  # fmt: skip
    data = write(tmp_path / "rows.jsonl", rows)
    summary = harness.report(str(checkpoint), ["choices", str(task)], data, limit=5)
    ours, theirs = summary["tasks"]["choices"], summary["tasks"]["mine"]
    assert ours["rows"] == theirs["rows"] == 5
    assert ours["per_row"] == theirs["per_row"]
    context = f"Question: {rows[2]['question']}\nAnswer:"
    expected = [direct.continuation(context, f" {choice}") for choice in rows[2]["choices"]]
    assert ours["per_row"][2]["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    written = capfd.readouterr()
    for text in (json.dumps(summary), written.out, written.err, caplog.text):
        assert "Zyx" not in text
        assert "helps" not in text


def test_macro_f1_is_the_mean_over_answers_right_or_given() -> None:
    # Answer 0: two right of two, given three times. Answer 1: never right. Answer 2: given, never right.
    pairs = [(0, 0), (0, 0), (1, 0), (1, 2)]
    assert harness.macro_f1(pairs) == pytest.approx((0.8 + 0 + 0) / 3)


def test_the_standard_error_of_a_ratio_agrees_with_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (300,), generator=generator)
    losses = lengths * (3 + 0.5 * torch.randn(300, generator=generator))
    pairs = [(-loss.item(), int(n)) for loss, n in zip(losses, lengths, strict=True)]
    draws = torch.randint(0, 300, (2000, 300), generator=generator)
    ratios = losses[draws].sum(1) / lengths[draws].sum(1)
    assert harness.ratio_stderr("bits_per_byte", pairs) == pytest.approx(ratios.std().item() / math.log(2), rel=0.1)
    assert harness.ratio_stderr("byte_perplexity", pairs) == pytest.approx(ratios.exp().std().item(), rel=0.1)
    assert harness.ratio_stderr("bits_per_byte", pairs[:1]) is None


GOOD = {"question": "Q?", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("choices", [json.dumps(GOOD), "", "{broken"], "line 3: is no JSON"),
        ("choices", ["[1]"], "line 1: is no JSON object"),
        ("choices", [json.dumps(GOOD | {"answer": 2})], 'line 1: needs "question"'),
        ("choices", [json.dumps(GOOD | {"answer": True})], 'line 1: needs "question"'),
        ("choices", [json.dumps(GOOD | {"choices": ["a", " "]})], 'line 1: needs "question"'),
        ("pubmedqa", [json.dumps({"question": "Q?", "contexts": "text", "decision": "yes"})], '"contexts"'),
        ("pubmedqa", [json.dumps({"question": "Q?", "contexts": ["text"], "decision": "Yes"})], '"decision"'),
        ("perplexity", [json.dumps({"text": " "})], "--column"),
        ("perplexity", [""], "has no rows"),
        ("unknown", [json.dumps(GOOD)], "neither one of pubmedqa, choices, perplexity nor a task file"),
    ],
)
def test_rows_that_a_task_cannot_use_are_named_by_line(
    task: str, lines: list[str], message: str, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        harness.load_task(task, data)


def test_a_gzipped_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl.gz", [{"text": sentence(i, 20)} for i in range(50)])
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz"):
        harness.load_task("perplexity", data)


def test_what_cannot_be_evaluated_says_what_to_set(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ValueError, match="--data"):
        harness.report(str(checkpoint), ["choices"])
    with pytest.raises(ValueError, match="--window 65: random has 64 positions"):
        harness.report(str(checkpoint), ["choices"], data, window=65)
    with pytest.raises(ValueError, match="--tokenizer"):
        harness.report("http://127.0.0.1:9/v1", ["choices"], data)
    with pytest.raises(ValueError, match=r"choices, row 1: an answer of .* tokens"):
        harness.report(str(checkpoint), ["choices"], write(data, [GOOD | {"choices": ["a", "b " * 99]}]))
    config = GPTConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                       max_position_embeddings=32, causal=False)  # fmt: skip
    GPTForCausalLM(config).save_pretrained(tmp_path / "seeing")
    with pytest.raises(ValueError, match="seeing is not causal"):
        harness.report(str(tmp_path / "seeing"), ["choices"], data, tokenizer=checkpoint)
