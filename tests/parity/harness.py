"""Parity between engine and module, generated from the registry: which cases there are, and how one is judged.

Engines are expensive to start, so that all selected cases of a kind share one process (:mod:`engine_session`), and the
adapters of an architecture share one engine.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling.fingerprint import probe_ids
from modeling.registry import REGISTRY, Architecture

LENGTHS = (1, 2, 3, 5, 8, 13, 31, 64, 96, 127, 128, 129, 160, 200, 255, 256, 257, 300, 400, 479)
LONG = (700, 900, 1000)  # instead of the last three, where the model has room
NEW_TOKENS = 32  # the tiny presets have 512 positions or more
TOLERANCE = 1e-4  # nats, float32
TIME_LIMIT = 900.0  # seconds for the engines of one kind

# How an engine is run: vLLM's options, and the environment of its process. "0|1" gives each rank a core.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TWO_RANKS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "eager": ({"enforce_eager": True}, ONE_PROCESS),
    "compiled": ({"enforce_eager": False}, ONE_PROCESS),
    "tensor-parallel": ({"enforce_eager": True, "tensor_parallel_size": 2}, TWO_RANKS),
    "expert-parallel": (
        {"enforce_eager": True, "tensor_parallel_size": 2, "enable_expert_parallel": True},
        TWO_RANKS,
    ),
    # Keys and values of all heads in the cache instead of latents.
    "no-latents": ({"enforce_eager": True}, ONE_PROCESS | {"VLLM_MLA_DISABLE": "1"}),
    # vLLM's own CPU_MLA, which takes one size, to which latents are padded, as for kernels on GPUs.
    "padded-latents": ({"enforce_eager": True}, ONE_PROCESS | {"MEDASSIST_STOCK_LATENTS": "1"}),
    "pipeline-parallel": ({"enforce_eager": True, "pipeline_parallel_size": 2}, TWO_RANKS),
    "compiled-pipeline-parallel": ({"enforce_eager": False, "pipeline_parallel_size": 2}, TWO_RANKS),
    "lora": ({"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8, "max_loras": 4}, ONE_PROCESS),
    "lora-tensor-parallel": (
        {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8, "max_loras": 4, "tensor_parallel_size": 2},
        TWO_RANKS,
    ),
    "lora-pipeline-parallel": (
        {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8, "max_loras": 4, "pipeline_parallel_size": 2},
        TWO_RANKS,
    ),
    "ngram": (
        {
            "enforce_eager": True,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        },
        ONE_PROCESS,
    ),
    # Drafted by a smaller model of the family; its checkpoint is filled in.
    "draft": (
        {"enforce_eager": True, "speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
        ONE_PROCESS,
    ),
    # Drafted by the model's own multi-token prediction.
    "mtp": ({"enforce_eager": True, "speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}, ONE_PROCESS),
    "compiled-mtp": (
        {"enforce_eager": False, "speculative_config": {"method": "mtp", "num_speculative_tokens": 2}},
        ONE_PROCESS,
    ),
    "mtp-expert-parallel": (
        {
            "enforce_eager": True,
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
        },
        TWO_RANKS,
    ),
    "bfloat16": ({"enforce_eager": True, "dtype": "bfloat16"}, ONE_PROCESS),
}


# vLLM's CPU build replaces functions when it sets n-gram drafting up, which it can do once in a process.
ALONE = {"ngram"}


def selected_architectures() -> list[Architecture]:
    """All of the registry, or the one that MEDASSIST_ARCH names (``make parity ARCH=...``).

    Raises:
        ValueError: there is none of that name.
    """
    name = os.environ.get("MEDASSIST_ARCH")
    if not name:
        return list(REGISTRY.values())
    if name not in REGISTRY:
        raise ValueError(f"ARCH={name}: the registry has {', '.join(REGISTRY)}")
    return [REGISTRY[name]]


@dataclass(frozen=True)
class Variant:
    """An architecture's tiny preset with one of the changes that its reference lists."""

    arch: Architecture
    number: int
    changes: Mapping[str, Any] = field(hash=False, compare=False)

    @property
    def name(self) -> str:
        values = {k: v.get("rope_type") if isinstance(v, dict) else v for k, v in self.changes.items()}
        return "-".join([self.arch.model_type, *(f"{k}={v}" for k, v in values.items())])

    @property
    def causal(self) -> bool:
        return bool(self.changes.get("causal", True))

    @property
    def latent(self) -> bool:
        """Whether its cache holds latents, and it predicts further tokens: it is of the DeepSeek kind."""
        return self.arch.model_type == "medassist_deepseek"

    def config(self, **changes: Any) -> Any:
        return self.arch.config_class().tiny(**(dict(self.changes) | changes))

    def module(self, **changes: Any) -> Any:
        """The torch module in float32, with weights large enough that a mistake shows."""
        torch.manual_seed(0)
        model = self.arch.model_class()(self.config(**changes)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
            for buffer in model.buffers():  # such as a router's bias
                buffer.copy_(torch.randn_like(buffer) * 0.1)
        return model


def variants() -> list[Variant]:
    return [
        Variant(arch, number, changes)
        for arch in selected_architectures()
        for number, changes in enumerate(arch.reference().variants)
    ]


@dataclass(frozen=True)
class Case:
    """One variant in one kind of engine."""

    kind: str
    variant: Variant


class Engines:
    """Runs each kind's selected cases together, when the first of them is asked for."""

    def __init__(self, directory: Path, cases: list[Case]) -> None:
        self.directory, self.cases = directory, cases
        self._results: dict[Case, dict[str, Any]] = {}

    def checkpoint(self, variant: Variant) -> Path:
        path = self.directory / "checkpoints" / variant.name
        if not path.exists():
            save(variant.module(), path)
        return path

    def draft(self, variant: Variant) -> Path:
        """A model of one layer that drafts for the variant's."""
        path = self.directory / "drafts" / variant.name
        if not path.exists():
            save(variant.module(num_hidden_layers=1), path)
        return path

    def result(self, case: Case) -> dict[str, Any]:
        """What the engine computed for a case: see :func:`engine_session.run`."""
        if case not in self._results:
            alone = case.kind in ALONE
            cases = [case] if alone else [c for c in self.cases if c.kind == case.kind]
            jobs = [self.job(c) for c in cases]
            self._results |= dict(zip(cases, run_jobs(self.directory / case.kind, jobs, case.kind), strict=True))
        result = self._results[case]
        assert "error" not in result, result["error"]
        return result

    def job(self, case: Case) -> dict[str, Any]:
        checkpoint = self.checkpoint(case.variant)
        job: dict[str, Any] = {
            "checkpoint": str(checkpoint), "options": KINDS[case.kind][0], "new_tokens": NEW_TOKENS,
            "prompts": prompts(case.variant.config()),
        }  # fmt: skip
        if case.kind == "draft":
            speculative = job["options"]["speculative_config"] | {"model": str(self.draft(case.variant))}
            job["options"] = job["options"] | {"speculative_config": speculative}
        if case.kind.startswith("lora"):
            job["prompts"] = job["prompts"][4::5]
            job["lora"] = [
                {"name": name, "path": str(path)} for name, path in adapters(checkpoint, self.directory).items()
            ]
        return job


def save(model: Any, path: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(path)


def run_jobs(directory: Path, jobs: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Runs engine jobs in a process of their own; every job has a result, or an ``error``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jobs.json").write_text(json.dumps(jobs))
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    files = [str(directory / "jobs.json"), str(directory / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.engine_session", *files],
        cwd=Path(__file__).parents[2], env=os.environ | KINDS[kind][1] | threads,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIME_LIMIT,
    )  # fmt: skip
    (directory / "log").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    results: list[dict[str, Any]] = json.loads((directory / "out.json").read_text())
    for result in results:
        if "error" in result:
            result["error"] += "\n" + done.stdout[-3000:]
    return results


def prompts(config: Any) -> list[list[int]]:
    """Twenty, of 1 token to near the longest that the model takes, or 1,000."""
    long = config.max_position_embeddings >= LONG[-1] + NEW_TOKENS
    lengths = (*LENGTHS[: -len(LONG)], *LONG) if long else LENGTHS
    return [probe_ids(length, config.vocab_size) for length in lengths]


def projections(checkpoint: Path) -> list[str]:
    """Names of the layers' matrices, such as ``q_proj``: what an adapter can adapt."""
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", framework="pt") as f:
        matrices = [n for n in f.keys() if ".layers." in n and len(f.get_slice(n).get_shape()) == 2]  # noqa: SIM118
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in matrices})


def adapters(checkpoint: Path, directory: Path) -> dict[str, Path]:
    """An adapter for each projection alone, and one for all together; written when they are not there yet."""
    from tests.lora import write_adapter

    names = projections(checkpoint)
    result = {}
    for seed, (name, modules) in enumerate([*((n, [n]) for n in names), ("all", names)]):
        path = directory / "adapters" / checkpoint.name / name
        if not path.exists():
            write_adapter(path, checkpoint, modules, rank=8, alpha=16, seed=seed)
        result[name] = path
    return result


@torch.no_grad()
def expected(model: Any, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, list[int]]:
    """What the module says, without a cache.

    Returns:
        Log-probabilities of the prompt's tokens from the second on and of the answer's, and the likeliest token at each
        place of the answer.
    """
    whole = torch.tensor([prompt + answer])
    given = len(prompt)
    if getattr(model.config, "causal", True):
        rows = model(whole, use_cache=False).logits[0].float().log_softmax(-1)
    else:  # each token was chosen after another sequence
        first = model(whole[:, :given]).logits[0].float().log_softmax(-1)
        later = [
            model(whole[:, :length]).logits[0, -1:].float().log_softmax(-1)
            for length in range(given + 1, len(whole[0]))
        ]
        rows = torch.cat([first, *later, first[-1:]])
    return rows[:-1].gather(1, whole[0, 1:, None])[:, 0], rows[given - 1 : -1].argmax(-1).tolist()


def differences(model: Any, prompts: list[list[int]], result: Mapping[str, Any]) -> tuple[float, int]:
    """The largest difference in log-probability, in nats, and how many greedy tokens are not the module's likeliest."""
    cached = functools.lru_cache(maxsize=None)(lambda p, a: expected(model, list(p), list(a)))
    found, others = [], 0
    for prompt, prompt_logprobs, *runs in zip(prompts, result["prompt_logprobs"], *result["greedy"], strict=True):
        for run in runs:
            scores, greedy = cached(tuple(prompt), tuple(run["ids"]))
            served = torch.tensor(prompt_logprobs + run["logprobs"])
            found.append((served - scores).abs())
            others += sum(a != b for a, b in zip(run["ids"], greedy, strict=True))
    return float(torch.cat(found).nan_to_num(nan=float("inf")).max()), others
