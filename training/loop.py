"""The training loop: recipe in, checkpoint directory out.

    corpus -> tokenizer -> shards -> packed windows -> loop -> DIR/final

``DIR`` holds everything the run was and did: ``recipe.json``, ``environment.json``, ``metrics.jsonl``, ``tokenizer/``,
``data/``, ``checkpoints/`` and at the end ``final/``. Running the same command again continues from the newest
checkpoint.
"""

import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling import checkpoint, registry
from modeling.tokenizers import ASSISTANT, END_OF_TURN, train_bpe
from training import state
from training.corpus import Phrasing, Renderer, encode_conversation, read_evaluation, read_facts, resolve
from training.data import Batch, PackedDocuments
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


@torch.no_grad()
def evaluate(model: Any, data: PackedDocuments) -> dict[str, float]:
    """Means over the held-out documents of what the model measures: "loss", in nats a token, and its other parts."""
    model.eval()
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for batch in data.epoch():
        for name, (value, terms) in model.measure(batch).items():
            sums[name] += value
            counts[name] += terms
    model.train()
    return {name: sums[name] / max(1, counts[name]) for name in sums}


class Step(NamedTuple):
    """What an optimizer step did.

    Attributes:
        losses: name -> mean of each part of the loss. "loss" is the language model's own, in nats a token.
        norm: of the gradient, before clipping.
        report: what the model's ``after_step`` returned; nothing for a step that was skipped.
    """

    losses: dict[str, float]
    norm: float
    report: dict[str, Any]


def train_step(model: Any, optimizers: Optimizers, batches: Iterator[Batch], accumulation: int, clip: float) -> Step:
    """One optimizer step over ``accumulation`` micro-batches.

    Every sum is divided by its terms in the whole step, so how a batch is cut into micro-batches does not matter; and
    ``after_step`` is called once, with the statistics of all of them. A step whose gradient is not finite is skipped.
    """
    parts = [next(batches) for _ in range(accumulation)]
    weights = model.loss_weights
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(model.loss_counts(part))
    losses = dict.fromkeys(weights, 0.0)
    statistics: dict[str, Tensor] = {}
    for part in parts:
        made = model.objective(part)
        means = {name: made.sums[name] / max(1, counts[name]) for name in weights}
        torch.stack([weights[name] * mean for name, mean in means.items()]).sum().backward()
        for name, mean in means.items():
            losses[name] += float(mean.detach())
        for name, value in made.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
    if not math.isfinite(norm):
        model.zero_grad(set_to_none=True)
        return Step(losses, norm, {})
    optimizers.step()
    return Step(losses, norm, model.after_step(statistics))


def _run_steps(
    recipe: Recipe,
    out: Path,
    model: Any,
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
            losses, norm, report = train_step(model, optimizers, batches, t.accumulation, t.clip)
            meter.update(t.batch_size * t.accumulation * t.window)
            said = f"loss {losses['loss']:.3f}{_balance(report)}"
            progress.update(bar, advance=1, info=f"{said}  {meter.tokens_per_second:,.0f} tok/s")
            number = step + 1
            if number % t.log_every == 0 or number == t.steps:
                log.write(
                    step=number,
                    **losses,
                    grad_norm=norm,
                    lr=o.lr * factor,
                    tokens_per_second=meter.tokens_per_second,
                    seconds=meter.seconds,
                    **report,
                )
            meter.pause()
            if number % t.eval_every == 0 or number == t.steps:
                measured = evaluate(model, held_out)
                log.write(step=number, **{f"held_out_{name}": value for name, value in measured.items()})
                progress.console.print(
                    f"step {number}/{t.steps}  {said}  held-out {measured['loss']:.3f}  "
                    f"{meter.tokens_per_second:,.0f} tok/s  {meter.seconds_left / 60:.1f} min left"
                )
            if number % t.checkpoint_every == 0 and number < t.steps:
                state.save(out / "checkpoints", number, model, optimizers, recipe.to_dict(), t.keep)
            meter.resume()


def _balance(report: dict[str, Any]) -> str:
    """The coefficient of variation of the experts' load in the layer where it is worst, for the progress line."""
    worst = max(report.get("expert_load_cv", ()), default=None)
    return "" if worst is None else f"  load cv {worst:.2f}"


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
