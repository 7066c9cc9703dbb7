"""The engine computes what the trained module computes: every architecture of the registry, in float32.

Twenty prompts of 1 to 400 tokens, chunked prefill and prefix caching on, eager and compiled. The oracle is the
Hugging Face module without a cache.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling import checkpoint
from modeling.fingerprint import probe_ids
from modeling.registry import REGISTRY
from modeling.tokenizers import train_bpe
from tests.e2e.server import CHECKPOINT

pytestmark = pytest.mark.engine
LENGTHS = (1, 2, 3, 5, 8, 13, 31, 64, 96, 127, 128, 129, 130, 160, 200, 255, 256, 257, 300, 400)
TOLERANCE = 1e-4  # nats
# What to vary of each architecture's tiny configuration.
VARIANTS: dict[str, list[dict]] = {"medassist_gpt": [{"rope_layout": "per_head"}, {"rope_layout": "flattened"}]}


@dataclass(frozen=True)
class Case:
    model_type: str
    changes: dict
    options: dict

    @property
    def name(self) -> str:
        return "-".join([self.model_type, *map(str, self.changes.values()), *self.options]) or self.model_type


def cases() -> list:
    """Every architecture and variant, eager and compiled; `make test` compiles one variant of each."""
    params = []
    for model_type in REGISTRY:
        for number, changes in enumerate(VARIANTS.get(model_type, [{}])):
            eager = Case(model_type, changes, {"enforce_eager": True})
            compiled = Case(model_type, changes, {"compiled": True})
            params.append(pytest.param(eager, id=eager.name))
            marks = [] if number == len(VARIANTS.get(model_type, [{}])) - 1 else [pytest.mark.slow]
            params.append(pytest.param(compiled, id=compiled.name, marks=marks))
    return params


def write_random(directory: Path, case: Case) -> None:
    """A checkpoint of the architecture's tiny size, with weights large enough that a mistake shows."""
    tokenizer = train_bpe(["a small text"], 260, 512)
    config = REGISTRY[case.model_type].config_class().tiny(vocab_size=len(tokenizer), **case.changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    checkpoint.write(directory, model, tokenizer)


def compare(directory: Path, options: dict, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = [probe_ids(length, model.config.vocab_size) for length in LENGTHS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    options = {"enforce_eager": False} if "compiled" in options else options
    script = Path(__file__).with_name("engine_session.py")
    command = [sys.executable, str(script), str(directory), str(tmp_path / "prompts.json"), str(tmp_path / "out.json")]
    env = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*command, json.dumps(options)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    served = json.loads((tmp_path / "out.json").read_text())

    first, second = served["greedy"]
    assert max(run["cached"] for run in second) >= 256, "the prefix cache was not used"
    for ids, prompt_logprobs, *runs in zip(prompts, served["prompt_logprobs"], first, second, strict=True):
        for run in runs:
            whole = torch.tensor([ids + run["ids"]])
            with torch.no_grad():
                expected = model(whole, use_cache=False).logits[0].log_softmax(-1)
            scores = expected[:-1].gather(1, whole[0, 1:, None])[:, 0]
            actual = torch.tensor(prompt_logprobs + run["logprobs"])
            assert (actual - scores).abs().max() < TOLERANCE, len(ids)
            greedy = expected[len(ids) - 1 : -1].argmax(-1).tolist()
            assert run["ids"] == greedy, len(ids)


@pytest.mark.parametrize("case", cases())
def test_random_weights(case: Case, tmp_path: Path) -> None:
    write_random(tmp_path / "model", case)
    compare(tmp_path / "model", case.options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"compiled": True}], ids=["eager", "compiled"])
def test_the_shipped_checkpoint(options: dict, tmp_path: Path) -> None:
    compare(CHECKPOINT, options, tmp_path)


def test_the_shipped_tokenizer_restores_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "What helps a 3-year-old with croup? Fieber: 38,5 °C \U0001f912"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
