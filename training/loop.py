"""The training loop: recipe in, checkpoint directory out.

    corpus -> tokenizer -> shards -> packed windows -> loop -> DIR/final

``DIR`` holds everything the run was and did: ``recipe.json``, ``environment.json``, ``metrics.jsonl``, ``tokenizer/``,
``data/``, ``checkpoints/`` and at the end ``final/``. Running the same command again continues from the newest
checkpoint.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling import checkpoint, registry
from modeling.tokenizers import ASSISTANT, END_OF_TURN, train_bpe
from training import state
from training.corpus import Phrasing, Renderer, encode_conversation, read_evaluation, read_facts, resolve
from training.data import IGNORED, Batch, PackedDocuments
from training.meter import Meter, MetricsLog
from training.optimizer import Optimizers, warmup_stable_decay
from training.recipe import Recipe
from training.shards import open_shards, tokenize


def train(recipe: Recipe, out: Path, console: Console | None = None) -> Path:
    """Trains and returns the checkpoint directory ``out/final``.

    Raises:
        ValueError: settings that do not fit together, or ``out`` holds a run with another recipe.
    """
    console = console or Console()
    t = recipe.train
    threads = t.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.manual_seed(t.seed)
    _describe_run(recipe, out)

    arch = registry.get(recipe.model.architecture)
    preset = getattr(arch.config_class(), recipe.model.preset, None)
    if preset is None:
        raise ValueError(f"model.preset: {recipe.model.architecture} has no preset {recipe.model.preset!r}")
    if unknown := sorted(set(recipe.model.changes) - set(preset().to_dict())):
        raise ValueError(f"model.changes.{unknown[0]}: {recipe.model.architecture} has no such setting")
    tokenizer = prepare_data(recipe, preset(**recipe.model.changes).max_position_embeddings, out, console)
    span = None
    if t.loss_on == "answers":
        span = (tokenizer.convert_tokens_to_ids(ASSISTANT), tokenizer.convert_tokens_to_ids(END_OF_TURN))
    data = PackedDocuments(open_shards(out / "data/train", out / "tokenizer"), t.window, t.batch_size, t.seed, span)
    held_out = PackedDocuments(open_shards(out / "data/held_out", out / "tokenizer"), t.window, t.batch_size, 0, span)

    config = preset(**({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | recipe.model.changes))
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"model.changes.vocab_size ({config.vocab_size}) is below the tokenizer's {len(tokenizer)}")
    if t.window > config.max_position_embeddings:
        raise ValueError(f"train.window ({t.window}) is above the model's {config.max_position_embeddings} positions")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    o = recipe.optimizer
    optimizers = Optimizers(model, o.name, o.lr, o.weight_decay, (o.beta1, o.beta2))

    done = 0
    if newest := state.latest(out / "checkpoints"):
        done = state.resume(newest, model, optimizers, recipe.to_dict())
        console.print(f"[bold]Continuing[/] {out} from step {done}")
    console.print(
        f"[bold]Training[/] {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{t.steps} steps of {t.batch_size * t.accumulation * t.window:,} tokens, {threads} threads"
    )
    log = MetricsLog(out / "metrics.jsonl", done)
    _run_steps(recipe, out, model, optimizers, data, held_out, log, done, console)

    final = out / "final"
    checkpoint.write(final, model, tokenizer, vars(recipe.generation))
    for name in ("recipe.json", "metrics.jsonl"):
        shutil.copy(out / name, final / name)
    console.print(f"[bold green]Done[/] {final}  (serve it: medassist serve {final})")
    return final


def prepare_data(recipe: Recipe, max_length: int, out: Path, console: Console) -> Any:
    """Trains the tokenizer and tokenises the rendered corpus, unless ``out`` has both; returns the tokenizer."""
    facts = read_facts(resolve(recipe.corpus.facts))
    renderer = Renderer(facts, Phrasing(resolve(recipe.corpus.facts).with_name("phrasing.toml")))
    if not (out / "tokenizer/tokenizer.json").exists():
        console.print(
            f"[bold]Tokenizer[/] byte-level BPE of {recipe.tokenizer.vocab_size} tokens from {len(facts)} facts"
        )
        texts = (text for f in facts for text in (f.answer, *(q.lower() for q in (*f.questions, *f.aliases))))
        train_bpe(texts, recipe.tokenizer.vocab_size, max_length).save_pretrained(out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    answers = {fact.id: fact.answer for fact in facts}
    held_out = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": answers[fact_id]}]
        for question, fact_id in read_evaluation(resolve(recipe.corpus.evaluation), facts)
    )
    rendered = renderer.conversations(recipe.corpus.renders, recipe.train.seed)
    total = len(facts) * recipe.corpus.renders
    for name, documents, count in (("train", rendered, total), ("held_out", held_out, None)):
        if not (out / "data" / name / "manifest.json").exists():
            with _progress(console) as progress:
                bar = progress.add_task(f"Tokenising {name}", total=count, info="")
                manifest = tokenize(
                    documents,
                    out / "data" / name,
                    out / "tokenizer",
                    conversation_encoder,
                    len(tokenizer),
                    progress=lambda n, p=progress, b=bar: p.advance(b, n),  # type: ignore[misc]
                )
            console.print(f"  {name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    return tokenizer


def conversation_encoder(tokenizer_dir: Path) -> Callable[[Any], list[int]]:
    """The encoder of conversations for :func:`training.shards.tokenize`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return lambda messages: encode_conversation(tokenizer, messages)


def batch_loss(model: Any, batch: Batch) -> Tensor:
    """Sum over the batch's loss tokens of the cross-entropy, in nats. The head runs only where there is a loss."""
    hidden = model.model(
        batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state  # (B, T, C)
    where = batch.labels != IGNORED  # (B, T)
    logits = model.lm_head(hidden[where])  # (loss tokens, V)
    return F.cross_entropy(logits.float(), batch.labels[where], reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, data: PackedDocuments) -> float:
    """Mean loss over the held-out documents, in nats a token."""
    model.eval()
    loss, tokens = 0.0, 0
    for batch in data.epoch():
        loss += float(batch_loss(model, batch))
        tokens += batch.loss_tokens
    model.train()
    return loss / tokens


def train_step(
    model: nn.Module, optimizers: Optimizers, batches: Iterator[Batch], accumulation: int, clip: float
) -> tuple[float, float]:
    """One optimizer step over ``accumulation`` micro-batches; returns the mean loss a token and the gradient's norm.

    The sum of the losses is divided by the tokens of the whole step, so how a batch is cut into micro-batches does not
    matter. A step whose gradient is not finite is skipped.
    """
    parts = [next(batches) for _ in range(accumulation)]
    tokens = sum(part.loss_tokens for part in parts)
    total = 0.0
    for part in parts:
        loss = batch_loss(model, part) / max(1, tokens)
        loss.backward()
        total += float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
    if norm == norm and norm != float("inf"):
        optimizers.step()
    else:
        model.zero_grad(set_to_none=True)
    return total, norm


def _run_steps(
    recipe: Recipe,
    out: Path,
    model: nn.Module,
    optimizers: Optimizers,
    data: PackedDocuments,
    held_out: PackedDocuments,
    log: MetricsLog,
    done: int,
    console: Console,
) -> None:
    t, o = recipe.train, recipe.optimizer
    batches = data.batches(first=done * t.accumulation)
    meter = Meter(t.steps, done)
    model.train()
    with _progress(console) as progress:
        bar = progress.add_task("Step", total=t.steps, completed=done, info="")
        for step in range(done, t.steps):
            factor = warmup_stable_decay(step, t.steps, o.warmup, o.decay_share)
            optimizers.set_lr(factor)
            loss, norm = train_step(model, optimizers, batches, t.accumulation, t.clip)
            meter.update(t.batch_size * t.accumulation * t.window)
            progress.update(bar, advance=1, info=f"loss {loss:.3f}  {meter.tokens_per_second:,.0f} tok/s")
            number = step + 1
            if number % t.log_every == 0 or number == t.steps:
                log.write(
                    step=number,
                    loss=loss,
                    grad_norm=norm,
                    lr=o.lr * factor,
                    tokens_per_second=meter.tokens_per_second,
                    seconds=meter.seconds,
                )
            meter.pause()
            if number % t.eval_every == 0 or number == t.steps:
                held_out_loss = evaluate(model, held_out)
                log.write(step=number, held_out_loss=held_out_loss)
                progress.console.print(
                    f"step {number}/{t.steps}  loss {loss:.3f}  held-out {held_out_loss:.3f}  "
                    f"{meter.tokens_per_second:,.0f} tok/s  {meter.seconds_left / 60:.1f} min left"
                )
            if number % t.checkpoint_every == 0 and number < t.steps:
                state.save(out / "checkpoints", number, model, optimizers, recipe.to_dict(), t.keep)
            meter.resume()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )


def _describe_run(recipe: Recipe, out: Path) -> None:
    """Writes what the run was started with. A finished or foreign run is recognised by its recipe.

    Raises:
        ValueError: ``out`` holds a run with another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recipe.to_dict(), indent=1) + "\n"
    path = out / "recipe.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{out} holds a run with another recipe (see {path}): choose another --out, or delete it")
    path.write_text(text)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
                   "threads": torch.get_num_threads()}  # fmt: skip
    (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
