"""What a token takes in the paged cache of a model with latent attention, from the engine's own allocation.

``medassist bench cache`` runs this. Each preset is started twice, with its latent cache and with ordinary attention
over the keys and values of all heads (``VLLM_MLA_DISABLE=1``), with random weights. Bytes a token are the bytes that
vLLM allocated over the tokens that its blocks hold; the formulas are

    latent     layers * (kv_lora_rank + qk_rope_head_dim) * bytes of a number
    ordinary   layers * heads * 2 * head size * bytes of a number

where the head size is that of a query and key, padded to what the attention kernel takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import engine_benchmark
from loadtest.engine_plan import Options as EngineOptions
from loadtest.engine_report import aligned
from loadtest.engine_sizes import HEAD_SIZES
from modeling.registry import get

MODEL_TYPE = "medassist_deepseek"
# Presets, and changes to them: ranks of the latent from small to the published one.
SIZES: tuple[tuple[str, dict[str, int]], ...] = (
    ("tiny", {}),
    ("tiny", {"kv_lora_rank": 128}),
    ("tiny", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    ("demo", {}),
    ("base_382m", {}),
)


@dataclass(frozen=True)
class Measured:
    """``allocated`` bytes for ``tokens`` tokens, next to ``formula`` bytes a token."""

    allocated: int
    tokens: int
    formula: int

    @property
    def bytes_per_token(self) -> float:
        return self.allocated / self.tokens


def formulas(config: Any, itemsize: int) -> tuple[int, int]:
    """Bytes a token: latent, ordinary."""
    width = max(config.qk_head_dim, config.v_head_dim)
    head = next(size for size in HEAD_SIZES if size >= width)
    latent = config.num_hidden_layers * config.cached_width * itemsize
    return latent, config.num_hidden_layers * config.num_attention_heads * 2 * head * itemsize


def measure(config: Any, dtype: str, latent: bool) -> tuple[int, int]:
    """Starts an engine in a process of its own and returns the bytes that it allocated, and the tokens they hold.

    Raises:
        RuntimeError: it did not start; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as directory:
        config.architectures = [get(config.model_type).hf_name]
        config.save_pretrained(directory)
        out = Path(directory) / "out.json"
        done = subprocess.run(
            [sys.executable, "-m", "loadtest.latent_cache", directory, dtype, str(out)],
            env=engine_benchmark.session_environment(EngineOptions()) | ({} if latent else {"VLLM_MLA_DISABLE": "1"}),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError("the engine did not start:\n" + "\n".join(done.stdout.splitlines()[-25:]))
        allocated, tokens = json.loads(out.read_text())
        return allocated, tokens


def session(directory: str, dtype: str, out: Path) -> None:
    """The engine's process."""
    from vllm import LLM

    llm: Any = LLM(
        directory, load_format="dummy", dtype=dtype, kv_cache_memory_bytes=256 * 2**20, max_num_seqs=8,
        max_model_len=512, enforce_eager=True, skip_tokenizer_init=True, distributed_executor_backend="uni",
    )  # fmt: skip
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    block = config.kv_cache_groups[0].kv_cache_spec.block_size
    out.write_text(json.dumps([sum(tensor.size for tensor in config.kv_cache_tensors), config.num_blocks * block]))


def table(rows: list[tuple[str, Measured, Measured]]) -> str:
    lines = [["model", "latent", "formula", "ordinary", "formula", "ordinary / latent"]]
    for name, latent, ordinary in rows:
        lines.append(
            [
                name, f"{latent.bytes_per_token:,.0f}", f"{latent.formula:,}", f"{ordinary.bytes_per_token:,.0f}",
                f"{ordinary.formula:,}", f"{ordinary.bytes_per_token / latent.bytes_per_token:.2f}",
            ]
        )  # fmt: skip
    return aligned(lines)


def main(command: str, report: Path | None = None, dtype: str = "float32") -> int:
    """Measures all sizes, prints the table and writes the report where asked to. Returns the exit code."""
    facts = engine_benchmark.environment(command)
    rows = []
    for preset, changes in SIZES:
        config = getattr(get(MODEL_TYPE).config_class(), preset)(**changes)
        name = ", ".join([preset, *(f"{field} {value}" for field, value in changes.items())])
        # Weights of the large one in 16 bits fit into the memory of a small machine.
        stored = "bfloat16" if preset.startswith("base") else dtype
        formula = formulas(config, 2 if stored == "bfloat16" else 4)
        print(f"measuring {name}", file=sys.stderr)
        try:
            found = [Measured(*measure(config, stored, latent), formula[not latent]) for latent in (True, False)]
        except RuntimeError as e:
            print(f"benchmark: {e}", file=sys.stderr)
            return 1
        rows.append((f"{name}, {stored}", found[0], found[1]))
    print(table(rows))
    if report:
        both = [["", ""], *([name, value] for name, value in facts.items())]
        text = ["# The latent cache", aligned(both), "Bytes a token in the paged cache.", table(rows), __doc__ or ""]
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n\n".join(text).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    session(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
