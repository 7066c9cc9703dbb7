"""Runs third-party suites, each in a process of its own: their packages are in a directory of their own."""

import os
import subprocess
import sys
from pathlib import Path

SUITES = Path(sys.prefix) / "suites"  # requirements/install.sh


def run(
    *arguments: object, cwd: Path | None = None, path: Path | None = None, timeout: int = 180, **env: str
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, and with the suites' packages and what is in ``path``; ``timeout`` in seconds."""
    assert SUITES.is_dir(), f"{SUITES} is missing: make install"
    ours = {
        "LANGSMITH_TRACING": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it is fetched
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(SUITES), *([str(path)] if path else [])]),
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | ours | env, capture_output=True, text=True, timeout=timeout
    )
