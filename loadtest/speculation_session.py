"""Engines of one checkpoint with and without drafts, in one process that :mod:`loadtest.speculation` starts.

    python -m loadtest.speculation_session SPECIFICATION.json OUT.json

They live side by side and take turns on the same prompts, one sequence at a time, so that only the drafts differ.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")


class Contender:
    """An engine that drafts ``drafted`` tokens at a time; 0: none."""

    def __init__(self, checkpoint: str, drafted: int, options: dict[str, Any]) -> None:
        self.drafted = drafted
        speculation = {"method": "mtp", "num_speculative_tokens": drafted}
        self.llm = LLM(
            checkpoint,
            dtype=options["dtype"],
            enforce_eager=options["eager"],
            max_num_seqs=8,
            kv_cache_memory_bytes=64 * 2**20,
            enable_prefix_caching=False,
            disable_log_stats=False,
            distributed_executor_backend="uni",
            **({"speculative_config": speculation} if drafted else {}),
        )

    def turn(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One answer after the other: token ids, seconds of the wall clock and of the processor, and draft counts."""
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False)
        before, began, cpu = counters(self.llm), time.perf_counter(), time.process_time()
        answers = [
            list(self.llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs[0].token_ids)
            for prompt in prompts
        ]
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = counters(self.llm)
        counted = {
            name: [b - a for a, b in zip(before.get(name, [0] * len(values)), values, strict=False)]
            for name, values in after.items()
        }
        return {"drafted": self.drafted, "seconds": seconds, "cpu": cpu, "answers": answers, "counters": counted}


def counters(llm: Any) -> dict[str, list[int]]:
    """The engines of a process share their counters, so that only differences over a turn mean something."""
    found = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:spec_decode_")
        if name in COUNTERS:
            found[name] = list(metric.values) if hasattr(metric, "values") else [metric.value]
    return found


def main(specification: Path, out: Path) -> None:
    given = json.loads(specification.read_text())
    tokenizer = AutoTokenizer.from_pretrained(given["checkpoint"])
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in given["questions"]
    ]
    contenders = [Contender(given["checkpoint"], drafted, given) for drafted in (0, *given["drafted"])]
    for contender in contenders:
        contender.turn(prompts[:4], given["new_tokens"])
    turns = []
    for number in range(given["rounds"]):
        for contender in contenders if number % 2 else reversed(contenders):
            turns.append(contender.turn(prompts, given["new_tokens"]) | {"round": number})
    out.write_text(json.dumps(turns))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
