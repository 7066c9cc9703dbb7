"""The fingerprint of a checkpoint: what the trained model computes, recorded beside its weights.

``fingerprint.json`` holds checksums of weights and tokenizer (where there is one), and float32 log-probabilities of
fixed token ids. Before a model is served, ``serving.fingerprint`` recomputes them through the engine; whatever makes
the engine compute something else (a wrong constant, layout, dtype, a damaged file) is caught there.

A model that is not causal has log-probabilities too: those that it gives a sequence's own tokens when it sees them all.

    {"version": 1,
     "sha256": {"model.safetensors": "...", "tokenizer.json": "..."},
     "dtype": "float32",
     "probes": [{"token_ids": [t0, ..., tn], "logprobs": [log p(t1 | t0), ...],
                 "greedy_ids": [...], "greedy_logprobs": [...]}]}
"""

import hashlib
import json
from pathlib import Path
from typing import Any

FILE_NAME = "fingerprint.json"
VERSION = 1
# One token; a block's worth; enough to cross a KV block (128 tokens on CPU) and be prefilled in several chunks.
PROBE_LENGTHS = (1, 16, 200)
GREEDY_TOKENS = 8
# A continuation is recorded only as far as the best token leads the second by this much (nats): closer than that,
# another order of summation may rightly choose the other.
GREEDY_MARGIN = 1e-2


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every weight file and of the tokenizer."""
    files = [*sorted(directory.glob("*.safetensors")), directory / "tokenizer.json"]
    result = {}
    for path in files:
        if path.exists():
            with path.open("rb") as f:
                result[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return result


def probe_ids(length: int, vocab_size: int) -> list[int]:
    """Fixed pseudo-random ids (a linear congruential generator, so that any language can repeat them)."""
    state, ids = 12345 + length, []
    for _ in range(length):
        state = (1103515245 * state + 12345) % 2**31
        ids.append((state >> 8) % vocab_size)
    return ids


def record(model: Any, directory: Path) -> None:
    """Computes the fingerprint of ``model``, whose files are already in ``directory``, and writes it there.

    Args:
        model: a language model of Hugging Face's interface; evaluated in float32 on its own device.

    Raises:
        ValueError: it computes values that are no finite numbers, so that nothing could be compared with them.
    """
    import torch

    was_training, dtype = model.training, model.dtype
    model.eval().float()
    longest = model.config.max_position_embeddings
    probes = []
    with torch.no_grad():
        for length in PROBE_LENGTHS:
            ids = probe_ids(max(1, min(length, longest - GREEDY_TOKENS)), model.config.vocab_size)
            probes.append({"token_ids": ids} | _score(model, ids))
    model.train(was_training).to(dtype)
    content = {"version": VERSION, "sha256": checksums(directory), "dtype": "float32", "probes": probes}
    (directory / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def _logits(model: Any, ids: list[int], keep: int) -> Any:
    """After each of the last ``keep`` of ``ids``: (keep, V)."""
    import torch

    prompt = torch.tensor([ids], device=model.device)
    logits = model(prompt, use_cache=False, logits_to_keep=keep).logits[0].float()
    if not all(bool(torch.isfinite(row).all()) for row in logits):
        raise ValueError(
            "the model computes logits that are no finite numbers, though its weights are finite: its weights are far "
            "too large (the training diverged, or they are not what the configuration says they are)"
        )
    return logits


def _score(model: Any, ids: list[int]) -> dict[str, list[Any]]:
    # Row by row: with a large vocabulary, a copy of all logits is as large as the model's largest tensor.
    logits = _logits(model, ids, len(ids))
    given = [float(row.log_softmax(-1)[token]) for row, token in zip(logits[:-1], ids[1:], strict=True)]
    logprobs = logits[-1].log_softmax(-1)  # (V,)
    del logits
    greedy_ids: list[int] = []
    greedy_logprobs: list[float] = []
    while len(greedy_ids) < GREEDY_TOKENS and len(ids) + len(greedy_ids) < model.config.max_position_embeddings:
        best, second = (*logprobs.topk(min(2, len(logprobs))).values.tolist(), float("-inf"))[:2]
        if best - second < GREEDY_MARGIN:
            break
        greedy_ids.append(int(logprobs.argmax()))
        greedy_logprobs.append(best)
        logprobs = _logits(model, ids + greedy_ids, 1)[0].log_softmax(-1)
    return {"logprobs": given, "greedy_ids": greedy_ids, "greedy_logprobs": greedy_logprobs}
