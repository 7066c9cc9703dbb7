"""Do the routers balance their experts? Each on the same corpus with skewed topics, with and without its means.

    python -m training.experiments.balance [--steps 300] [--out docs/benchmarks/expert-balance.md]

The corpus is drawn from a seed. A document has one topic, and topics have words of their own; the r-th topic is drawn
with a probability proportional to ``r ** -SKEW`` (Zipf). Every router sees the same documents in the same order,
through the ordinary training loop.

What is reported is the coefficient of variation (standard deviation over mean, between the experts of a layer) of the
tokens that went to each expert, in the layer where it is largest: of single steps, and of the sums over the last
``WINDOW`` steps, where what is left is imbalance and not the luck of a step's documents.
"""

import argparse
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.losses import coefficient_of_variation
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from training import parallel
from training.data import Windows
from training.loop import train_step
from training.optimizer import Optimizers
from training.shards import Shard, write_shard

TOPICS, WORDS, LENGTH = 48, 20, 5  # topics, words of each, tokens of a document
SKEW = 1.5
DOCUMENTS = 100_000
TOKENS_A_STEP, TOKENS_A_WINDOW = 4096, 64
EXPERTS, TOP_K = 16, 4
WINDOW = 20  # steps whose loads are added up
LR = 3e-4
# Three times the usual one: routers that start with nearly equal affinities are moved all at once by one step of the
# bias, which then swings instead of settling.
INITIALIZER_RANGE = 0.06
# Four times the default, which is meant for runs of many thousand steps: affinities are apart by a tenth or so, and a
# bias must be able to cross that within a small part of the run.
RATE = 0.004

# What each router has against imbalance, and the first one without.
ROUTERS: dict[str, dict[str, Any]] = {
    "none": {"router": "aux_free", "router_bias_update_rate": 0.0},
    "aux_free": {"router": "aux_free", "router_bias_update_rate": RATE},
    "softmax": {"router": "softmax", "router_aux_loss_coef": 0.01},
    "noisy_top_k": {"router": "noisy_top_k", "router_aux_loss_coef": 0.01},
}


def documents(count: int, seed: int) -> Iterator[list[int]]:
    """Documents of one topic each; token 0 is not used."""
    rng = np.random.default_rng(seed)
    topics = np.arange(1, TOPICS + 1) ** -SKEW
    for topic in rng.choice(TOPICS, size=count, p=topics / topics.sum()):
        yield (1 + topic * WORDS + rng.choice(WORDS, size=LENGTH)).tolist()


def corpus(folder: Path, seed: int) -> list[Shard]:
    path = folder / "00000.shard"
    write_shard(path, documents(DOCUMENTS, seed), 1 + TOPICS * WORDS, bytes(32))
    return [Shard(path)]


def load_by_step(
    shards: list[Shard], settings: dict[str, Any], steps: int, seed: int, tokens: int = TOKENS_A_STEP
) -> Tensor:
    """Trains a small model with two layers of experts, ``tokens`` a step.

    Returns:
        The share of each expert in a layer's tokens: (steps, layers, E) float64.
    """
    torch.manual_seed(seed)
    config = MedAssistDeepseekConfig(
        vocab_size=1 + TOPICS * WORDS, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=24, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_shared_experts=0,
        n_group=1, topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=0, num_nextn_predict_layers=0,
        max_position_embeddings=TOKENS_A_WINDOW, initializer_range=INITIALIZER_RANGE, **settings,
    )  # fmt: skip
    model = MedAssistDeepseekForCausalLM(config).train()
    optimizers = Optimizers(model, "muon", LR, 0.1, (0.9, 0.95))
    trainable = parallel.distribute(model, parallel.start(), "auto", torch.float32)
    data, windows = Windows(shards, TOKENS_A_WINDOW, seed), tokens // TOKENS_A_WINDOW
    load = []
    for number in range(steps):
        step = train_step(trainable, optimizers, data.micro_batches(number, windows, windows), clip=1.0)
        load.append(torch.tensor(step.report["expert_load"], dtype=torch.float64))
    return torch.stack(load)


def worst_layer(load: Tensor) -> Tensor:
    """The coefficient of variation of the load in each step (steps,), in the layer where it is largest."""
    return coefficient_of_variation(load).amax(-1)


def worst_layer_of_windows(load: Tensor) -> Tensor:
    """The same of the sums over ``WINDOW`` steps: entry i is of the window that begins with step i."""
    return worst_layer(load.unfold(0, WINDOW, 1).mean(-1))


def report(loads: dict[str, Tensor], steps: int, seed: int) -> str:
    """The report in Markdown."""
    shown = sorted({s for s in (WINDOW, steps // 6, steps // 3, steps // 2, 2 * steps // 3, steps) if s >= WINDOW})
    lines = ["# Balance of experts on a corpus with skewed topics", "",
             f"Coefficient of variation of the experts' load in the worst layer, summed over the {WINDOW} steps before "
             "the step named:", "",
             "| router | balanced by | " + " | ".join(f"step {s}" for s in shown) + " |",
             "| --- | --- |" + " ---: |" * len(shown)]  # fmt: skip
    for name, load in loads.items():
        windows = worst_layer_of_windows(load)
        values = " | ".join(f"{windows[s - WINDOW]:.3f}" for s in shown)
        lines.append(f"| {ROUTERS[name]['router']} | {_means(ROUTERS[name])} | {values} |")
    lines += ["", f"Of single steps, the same; least, middle and largest of the last {2 * WINDOW} steps:", "",
              "| router | balanced by | least | median | largest |", "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for name, load in loads.items():
        single = worst_layer(load)[-2 * WINDOW :]
        values = f"{single.min():.3f} | {single.median():.3f} | {single.max():.3f}"
        lines.append(f"| {ROUTERS[name]['router']} | {_means(ROUTERS[name])} | {values} |")
    lines += [
        "",
        "## Where and how",
        "",
        f"- corpus: {TOPICS} topics, the r-th proportional to r^-{SKEW}, {WORDS} words each of their own; documents of "
        f"{LENGTH} tokens",
        f"- model: 2 layers with {EXPERTS} experts each, {TOP_K} a token, hidden size 64, no shared expert; Muon, "
        f"learning rate {LR}; initial standard deviation {INITIALIZER_RANGE}",
        f"- {steps} steps of {TOKENS_A_STEP} tokens; seed {seed}; the documents and their order are the same for all",
        f"- command: `python -m training.experiments.balance --steps {steps} --seed {seed}`",
        f"- {date.today()}, commit {_commit()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
    ]
    return "\n".join(lines) + "\n"


def _means(settings: dict[str, Any]) -> str:
    if "router_aux_loss_coef" in settings:
        return f"a loss, coefficient {settings['router_aux_loss_coef']}"
    rate = settings["router_bias_update_rate"]
    return f"the bias, rate {rate}" if rate else "nothing"


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=, changed"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"at least {2 * WINDOW}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the report; printed if left out")
    a = parser.parse_args()
    if a.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}")
    with tempfile.TemporaryDirectory() as folder:
        shards = corpus(Path(folder), a.seed)
        loads = {name: load_by_step(shards, settings, a.steps, a.seed) for name, settings in ROUTERS.items()}
    text = report(loads, a.steps, a.seed)
    if a.out:
        a.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
