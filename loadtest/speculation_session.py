"""Engines of one checkpoint with and without drafts, in one process that :mod:`loadtest.speculation` starts.

    python -m loadtest.speculation_session SPECIFICATION.json OUT.json

They live side by side and take turns on the same prompts, one sequence at a time, so that only the drafts differ.
"""

import itertools
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams


class Contender:
    """An engine that drafts ``drafted`` tokens at a time; 0: none."""

    def __init__(self, checkpoint: str, drafted: int, options: dict[str, Any]) -> None:
        self.drafted, self.numbers = drafted, itertools.count()
        speculation = {"method": "mtp", "num_speculative_tokens": drafted}
        self.llm = LLM(
            checkpoint,
            dtype=options["dtype"],
            enforce_eager=options["eager"],
            max_num_seqs=8,
            kv_cache_memory_bytes=64 * 2**20,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            **({"speculative_config": speculation} if drafted else {}),
        )

    def turn(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One answer after the other.

        Returns:
            Token ids of the "answers", "seconds" of the wall clock, "cpu" seconds, and "gained": how many tokens each
            step after a prompt's own gave.
        """
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False)
        began, cpu = time.perf_counter(), time.process_time()
        answers: list[list[int]] = []
        gained: list[int] = []
        for prompt in prompts:
            lengths = self._answer(prompt, greedy, answers)
            gained += [later - earlier for earlier, later in pairwise(lengths)]
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"drafted": self.drafted, "seconds": seconds, "cpu": cpu, "answers": answers, "gained": gained}

    def _answer(self, prompt: list[int], sampling: Any, answers: list[list[int]]) -> list[int]:
        """Adds an answer, and returns how long it was after each step that gave a token."""
        engine = self.llm.llm_engine
        engine.add_request(str(next(self.numbers)), {"prompt_token_ids": prompt}, sampling)
        lengths: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids = output.outputs[0].token_ids
                if len(ids) > (lengths[-1] if lengths else 0):
                    lengths.append(len(ids))
                if output.finished:
                    answers.append(list(ids))
        return lengths


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
