"""The engine computes what the trained module computes: every architecture of the registry and every variant.

Twenty prompts of 1 to near the longest length in one batch, 32 tokens after each, chunked prefill and prefix caching
on. The oracle is the Hugging Face module without a cache. Random weights, so that nothing is learned to be insensitive.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.e2e.server import CHECKPOINT
from tests.lora import merge
from tests.parity.harness import (
    KINDS,
    NEW_TOKENS,
    TOLERANCE,
    Case,
    Engines,
    Variant,
    adapters,
    differences,
    prompts,
    run_jobs,
    save,
    variants,
)

pytestmark = pytest.mark.engine

# What `make test` runs beside the eager cases; `make parity` runs all of them.
QUICK = {
    ("compiled", "medassist_gpt", 1),  # the flattened layout, whose rotation has a path of its own for compiling
    ("tensor-parallel", "medassist_gpt", 1),  # each rank rotates with its part of the frequencies
    ("tensor-parallel", "gpt", 0),  # heads gathered without an output projection
    ("pipeline-parallel", "gpt", 0),  # learned positions on the first stage, an untied head on the last
    ("draft", "medassist_gpt", 1),
    ("lora", "medassist_gpt", 1),
    ("lora", "tinymorfer", 0),  # a projection that is fused in the checkpoint
    ("expert-parallel", "medassist_deepseek", 0),
    ("mtp", "medassist_deepseek", 0),
}
PIPELINES = ("pipeline-parallel", "compiled-pipeline-parallel")
ADAPTERS = ("lora", "lora-tensor-parallel", "lora-pipeline-parallel")
SPECULATION = ("ngram", "draft")
# What latent attention, experts and multi-token prediction bring.
LATENT_ONLY = ("expert-parallel", "no-latents", "padded-latents", "mtp", "compiled-mtp", "mtp-expert-parallel")
# What a model whose tokens all see each other cannot do; it says so (test_bidirectional_refusals).
CAUSAL_ONLY = {*PIPELINES, *ADAPTERS, *SPECULATION}


def cases(*kinds: str) -> list[Any]:
    result = []
    for kind in kinds:
        for variant in variants():
            if kind in CAUSAL_ONLY and not variant.causal:
                continue
            if kind in LATENT_ONLY and not variant.latent:
                continue
            if kind in ADAPTERS and variant.arch.no_adapters:
                continue
            quick = kind == "eager" or (kind, variant.arch.model_type, variant.number) in QUICK
            result.append(
                pytest.param(
                    Case(kind, variant), id=f"{kind}-{variant.name}", marks=[] if quick else [pytest.mark.slow]
                )
            )
    return result


@pytest.mark.parametrize("case", cases("eager", "compiled", "tensor-parallel", *PIPELINES, *SPECULATION, *LATENT_ONLY))
def test_served_logprobs_are_the_modules(case: Case, engines: Engines) -> None:
    result = engines.result(case)
    model = case.variant.module()
    worst, others = differences(model, prompts(model.config), result)
    assert worst < TOLERANCE
    assert others == 0, "greedy tokens that are not the module's likeliest"
    assert result["compiled"] == (case.kind.startswith("compiled") and case.variant.causal)
    cached = max(answer["cached"] for answer in result["greedy"][1])
    # vLLM's own attention over latents on CPUs has none.
    has_prefix_cache = case.variant.causal and case.kind != "padded-latents"
    assert cached >= 256 if has_prefix_cache else cached == 0, "the prefix cache"


@pytest.mark.parametrize("case", cases(*ADAPTERS))
def test_served_adapter_is_the_merged_one(case: Case, engines: Engines) -> None:
    """Each projection alone and all together, in one batch with requests to the model alone."""
    job, result = engines.job(case), engines.result(case)
    names = adapters(engines.checkpoint(case.variant), engines.directory)
    count = len(job["prompts"])
    for number, path in enumerate([None, *names.values()]):
        model = case.variant.module()
        if path is not None:
            plain = model(torch.tensor([job["prompts"][0]])).logits
            merge(model, path)
            assert (model(torch.tensor([job["prompts"][0]])).logits - plain).abs().max() > 0.1, "too weak to show"
        part = slice(number * count, (number + 1) * count)
        served = {
            "prompt_logprobs": result["prompt_logprobs"][part],
            "greedy": [answers[part] for answers in result["greedy"]],
        }
        worst, others = differences(model, job["prompts"], served)
        assert worst < TOLERANCE, path
        assert others == 0, path


def llama_of(variant: Variant) -> LlamaForCausalLM:
    """Llama with the variant's hidden size, layers and vocabulary, and weights drawn alike."""
    config = variant.config()
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return llama


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_bfloat16_is_as_exact_as_vllms_llama(variant: Variant, tmp_path: Path) -> None:
    """Against float32 with the same rounded weights; at most three times what Llama's class of vLLM shows."""
    models = {"ours": variant.module(), "llama": llama_of(variant)}
    ids = prompts(models["ours"].config)
    jobs = []
    for name, model in models.items():
        model.to(torch.bfloat16)
        save(model, tmp_path / name)
        model.float()
        jobs.append(
            {
                "checkpoint": str(tmp_path / name),
                "options": KINDS["bfloat16"][0],
                "prompts": ids,
                "new_tokens": NEW_TOKENS,
            }
        )
    results = run_jobs(tmp_path / "engines", jobs, "bfloat16")
    errors = {n: differences(m, ids, r)[0] for (n, m), r in zip(models.items(), results, strict=True)}
    assert errors["ours"] <= 3 * errors["llama"], errors


REFUSED = {
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "LoRA": {"enable_lora": True},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in variants() if not v.causal], ids=lambda v: v.name)
def test_bidirectional_models_refuse_what_needs_causal_attention(variant: Variant, tmp_path: Path) -> None:
    save(variant.module(), tmp_path / "model")
    jobs = [
        {"checkpoint": str(tmp_path / "model"), "options": options | {"enforce_eager": True}, "prompts": [[1]],
         "new_tokens": 1}
        for options in REFUSED.values()
    ]  # fmt: skip
    for words, result in zip(REFUSED, run_jobs(tmp_path / "engines", jobs, "eager"), strict=True):
        assert words in result["error"]
        assert "causal: false" in result["error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_the_shipped_checkpoint(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    ids = prompts(model.config)
    job = {"checkpoint": str(CHECKPOINT), "options": KINDS[kind][0], "prompts": ids, "new_tokens": NEW_TOKENS}
    worst, others = differences(model, ids, run_jobs(tmp_path, [job], kind)[0])
    assert worst < TOLERANCE
    assert others == 0


def test_the_shipped_tokenizer_restores_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "What helps a 3-year-old with croup? Fieber: 38,5 °C \U0001f912"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
