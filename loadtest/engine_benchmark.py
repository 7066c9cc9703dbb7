"""Our vLLM classes beside vLLM's own Llama class at equal sizes, and beside ``generate()`` of transformers.

``medassist bench engine`` runs this. Each model is measured in a process of its own (:mod:`loadtest.engine_session`),
in which all contenders live side by side and take turns; :mod:`loadtest.engine_report` defines the figures.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest import benchmark, engine_report, engine_sizes
from loadtest.engine_plan import Options
from loadtest.engine_report import Model, Result
from serving.engine import on_cpu
from serving.plugin import DIE_WITH_PARENT

# Makes glibc ask the kernel for huge pages. In small pages the engine that was loaded first was slower by several
# percent than the second, even where both were the same model (`--control`, decode of the 86M with one sequence).
HUGE_PAGES = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


def run(options: Options, command: str = "") -> Result:
    """Measures each model that ``options`` names; progress goes to standard error.

    Args:
        command: the command line, for the report.

    Raises:
        ValueError: no such architecture or preset, or one that the options do not fit.
        RuntimeError: a measurement failed; the message has the end of its log.
    """
    chosen = engine_sizes.choose(options.architectures, options.presets)
    for model_type, preset in chosen:  # before an hour has gone into the first
        engine_sizes.check(model_type, preset, options)
    surroundings = environment(command)
    return Result(surroundings, settings(options), [_measure(*model, options) for model in chosen])


def environment(command: str) -> dict[str, str]:
    """Date, hardware, commit and versions, those of what is measured here."""
    facts = benchmark.environment(command)
    for name in ("aiohttp", "httptools", "uvloop"):
        facts.pop(name, None)
    return facts | {"transformers": metadata.version("transformers")}


def settings(options: Options) -> dict[str, Any]:
    """As the report prints them; what was left to this module is filled in."""
    cpu = on_cpu()
    eager = cpu if options.eager is None else options.eager
    return {
        "dtype": options.dtype,
        "threads": _threads(options) if cpu else "not set",
        "mode": "eager" if eager else "torch.compile",
        "sequences": ", ".join(map(str, options.sequences)),
        "new tokens in decode cells": options.new_tokens,
        "prompt in prefill cells": options.prompt,
        "pairs of turns": f"up to {options.rounds} a cell",
        "time limit": f"{options.minutes:g} minutes a model, after the warm-up",
        "prefix cache": "off",
        "huge pages": f"asked for, {HUGE_PAGES}" if cpu else "not set",
        "seed": options.seed,
    }


def _threads(options: Options) -> int:
    if options.threads:
        return options.threads
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _measure(model_type: str, preset: str, options: Options) -> Model:
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as directory:
        folder = Path(directory)
        progress = os.dup(2)  # the session's own output, mostly vLLM's, goes to the log
        try:
            specification = {
                "model_type": model_type,
                "preset": preset,
                "options": asdict(options),
                "on_cpu": on_cpu(),
                "progress": progress,
                "out": str(folder / "out.json"),
            }
            (folder / "in.json").write_text(json.dumps(specification))
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "loadtest.engine_session", str(folder / "in.json")],
                    env=session_environment(options),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(progress,),
                )
                try:
                    code = process.wait()
                finally:
                    process.kill()
                    process.wait()
        finally:
            os.close(progress)
        if code:
            end = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"measuring {model_type} {preset} failed with exit code {code}:\n{end}")
        return Model.from_dict(json.loads((folder / "out.json").read_text()))


def session_environment(options: Options) -> dict[str, str]:
    env = os.environ | {
        DIE_WITH_PARENT: str(os.getpid()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engines in the session's own process
    }
    if on_cpu():
        # As `medassist serve` runs an engine: threads that wait do not spin. It also makes CPU seconds mean work.
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(_threads(options)),
            "OMP_WAIT_POLICY": "passive",
            "KMP_BLOCKTIME": "0",
        }
        name, _, value = HUGE_PAGES.partition("=")
        env[name] = ":".join(filter(None, [env.get(name), value]))
    return env


def main(options: Options, command: str, report: Path | None = None, figures: Path | None = None) -> int:
    """Runs, prints the tables, and writes a Markdown report and a JSON file of all figures where asked to.

    Returns:
        The exit code: 0; 1 if a measurement failed; 130 if it was interrupted.
    """
    try:
        result = run(options, command)
    except RuntimeError as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        return 130
    for model in result.models:
        print(engine_report.section(model), engine_report.reading(model), sep="\n\n", end="\n\n")
    for path, content in (
        (figures, json.dumps(result.to_dict(), indent=2) + "\n"),
        (report, engine_report.markdown(result)),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return 0
