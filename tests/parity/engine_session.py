"""Runs vLLM engines inside this process, one after the other: one import of vLLM for many checks.

    python -m tests.parity.engine_session JOBS.json OUT.json

A job is ``{"checkpoint", "options", "prompts", "new_tokens", "lora": [{"name", "path"}, ...]}``. Every prompt is
scored, then continued greedily, twice: the second time, whole blocks of it come from the prefix cache. All prompts are
in one call, so that the engine mixes prefill and decode of many requests. With adapters, each prompt is given once to
the model alone and once to each adapter, all in the same call. ``"distributions": true`` asks for log-probabilities of
the whole vocabulary instead, ``"drafts": true`` for the counts of speculative decoding over each prompt alone.
"""

import gc
import json
import os
import sys
from typing import Any

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(ENVIRONMENT)

if os.environ.get("MEDASSIST_STOCK_LATENTS"):
    from modeling.layers import vllm_latent_cpu

    vllm_latent_cpu.register = lambda: None


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Results of a job: ``prompt_logprobs`` and, per pass, ``greedy`` ids, log-probabilities and cached tokens."""
    from vllm import LLM, SamplingParams

    parallel = {"tensor_parallel_size", "pipeline_parallel_size"} & job["options"].keys()
    options: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 * 2**20,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 128,  # prompts beyond 128 tokens are prefilled in chunks
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "mp" if parallel else "uni",
        "disable_log_stats": not job.get("drafts"),
    }
    llm = LLM(job["checkpoint"], **(options | job["options"]))
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    requests: dict[str, Any] = {}
    adapters = [None]
    if job.get("lora"):
        from vllm.lora.request import LoRARequest

        adapters += [LoRARequest(a["name"], number, a["path"]) for number, a in enumerate(job["lora"], 1)]
        requests["lora_request"] = [adapter for adapter in adapters for _ in prompts]
        prompts = prompts * len(adapters)
    if job.get("drafts"):
        return _drafts(llm, prompts, job["new_tokens"])
    if job.get("distributions"):
        return {"distributions": [_distributions(llm, prompt) for prompt in prompts]}
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], logprobs=0, ignore_eos=True, detokenize=False)
    scored = llm.generate(prompts, scoring, use_tqdm=False, **requests)
    result: dict[str, Any] = {
        "prompt_logprobs": [
            [
                choices[token].logprob
                for token, choices in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
            ]
            for o in scored
        ],
        "greedy": [],
        "compiled": bool(llm.llm_engine.vllm_config.compilation_config.mode),
        "cache": _cache(llm),
    }
    for _ in range(2):
        answers = []
        for output in llm.generate(prompts, greedy, use_tqdm=False, **requests):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            logprobs = [choices[token].logprob for token, choices in zip(ids, answer.logprobs, strict=True)]
            answers.append({"ids": ids, "logprobs": logprobs, "cached": output.num_cached_tokens})
        result["greedy"].append(answers)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def _cache(llm: Any) -> dict[str, int]:
    """What the engine has allocated for its paged cache, and for how many tokens."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    (group,) = config.kv_cache_groups
    return {
        "bytes": sum(tensor.size for tensor in config.kv_cache_tensors),
        "tokens": config.num_blocks * group.kv_cache_spec.block_size,
    }


def _drafts(llm: Any, prompts: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Answers to prompts, one after the other, and what became of the tokens drafted for all of them."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    answers = [list(llm.generate([p], greedy, use_tqdm=False)[0].outputs[0].token_ids) for p in prompts]
    values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "answers": answers,
        "steps": values["vllm:spec_decode_num_drafts"],
        "drafted": values["vllm:spec_decode_num_draft_tokens"],
        "accepted": values["vllm:spec_decode_num_accepted_tokens"],
    }


def _distributions(llm: Any, prompt: dict[str, Any]) -> list[list[float]]:
    """Log-probabilities of the whole vocabulary after each token of a prompt."""
    from vllm import SamplingParams

    size = llm.llm_engine.model_config.get_vocab_size()
    everything = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=size, logprobs=size, detokenize=False)
    output = llm.generate([prompt], everything, use_tqdm=False)[0]
    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return [[row[token].logprob for token in range(size)] for row in rows]


if __name__ == "__main__":
    with open(sys.argv[1]) as f:
        jobs = json.load(f)
    results = []
    for job in jobs:
        try:
            results.append(run(job))
        except Exception as e:
            results.append({"error": f"{type(e).__name__}: {e}"})
        with open(sys.argv[2], "w") as f:
            json.dump(results, f)
