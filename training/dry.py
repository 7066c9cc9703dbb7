"""``medassist train --dry-run``: what a recipe comes to, before anything is trained."""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from modeling.layers.cross_entropy import default_chunk
from modeling.layers.objective import IGNORED
from training import acceleration, flops
from training.dataset import is_rendered, open_dataset
from training.loop import build
from training.recipe import Recipe

SHOWN = 600  # characters of a window


def show(recipe: Recipe, out: Path | None = None, console: Console | None = None) -> None:
    """Prints the resolved recipe, parameters, FLOPs a token, a memory estimate and the first batch, decoded.

    Args:
        out: the run's directory, where a rendered corpus may lie; nothing is written to it.

    Raises:
        ValueError: as the run itself would.
    """
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = acceleration.resolve_precision(recipe.train.precision, device)
    console.print(recipe.to_yaml(), markup=False, highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        rendered = out is not None and is_rendered(recipe, out)
        dataset = open_dataset(recipe, out if out and rendered else Path(scratch), console, main=not rendered)
        data, held_out = dataset.windows(recipe)
        model = build(recipe, len(dataset.tokenizer), dataset.tokenizer.eos_token_id)
        t = recipe.train
        cost = flops.flops_per_token(model, t.window)
        tokens = recipe.windows_a_step * t.window * t.steps
        chunk = t.loss_chunk or default_chunk(model.config.vocab_size, device.type)
        memory = flops.memory_estimate(
            model, optimizer=recipe.optimizer.name, windows=t.batch_size, window=t.window,
            precision="bfloat16" if precision == torch.bfloat16 else "float32",
            activation_checkpointing=t.activation_checkpointing, loss_chunk=chunk,
        )  # fmt: skip
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for label, text in (
            ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
            ("FLOPs a token", f"{cost:.4g} (forward and backward)"),
            ("precision", str(precision).removeprefix("torch.")),
            ("windows an epoch", f"{len(data):,} of {t.window} tokens"),
            ("held-out windows", f"{len(held_out):,}" if held_out else "none: no held-out text"),
            ("tokens in all", f"{tokens:,} ({t.steps * recipe.windows_a_step / len(data):.2f} epochs)"),
            ("FLOPs in all", f"{cost * tokens:.3g}"),
            *((f"memory, {name.replace('_', ' ')}", f"{size / 2**20:,.1f} MiB") for name, size in memory.items()),
        ):
            table.add_row(label, text)
        console.print(table)
        batch = data.batch(data.numbers(0, min(t.batch_size, recipe.windows_a_step)))
        for row, ids in enumerate(batch.input_ids[:2]):
            learnt = int((batch.labels[row] != IGNORED).sum())
            console.print(f"\n[bold]window {row + 1} of the first batch[/] ({learnt} tokens with a loss)")
            text = dataset.tokenizer.decode(ids[batch.is_text[row]])
            console.print(text[:SHOWN] + ("..." if len(text) > SHOWN else ""), markup=False, highlight=False)
