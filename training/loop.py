"""The training loop: recipe in, checkpoint directory out, on one process or many.

    recipe -> text -> windows -> steps -> RUN/final

A step is ``batch_size * accumulation`` windows, whatever the number of ranks. Every rank computes its share in
micro-batches; sums of losses are divided by what the whole step has of them, gradients are summed over ranks. So
neither accumulation nor ranks change what a step does. The same command again continues from the newest checkpoint.
"""

import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling import checkpoint, registry
from training import acceleration, card, curves, flops, parallel, state
from training.data import Batch, Windows
from training.dataset import Dataset, open_dataset
from training.environment import code_version, describe
from training.meter import Meter, SpikeDetector, bits_per_byte, peak_memory, token_bytes
from training.optimizer import Optimizers, rate
from training.parallel import Ranks, Trainable
from training.progress import bar
from training.publish import Upload
from training.recipe import Recipe
from training.run import Log, Stop, Stopped, begin, refuse_other_run, settings, write_down
from training.samples import sample
from training.trackers import JsonLines, Trackers


def train(recipe: Recipe, out: Path, console: Console | None = None, resume: str = "auto") -> Path:
    """Trains and returns the checkpoint directory ``out/final``.

    Args:
        resume: see :func:`training.run.begin`.

    Raises:
        ValueError: settings that do not fit together or the machine, a damaged file, or ``out`` holds another run.
        Stopped: SIGTERM or SIGINT came; the state is saved, where it could be.
    """
    torch.set_num_threads(recipe.train.threads or len(os.sched_getaffinity(0)))
    ranks = parallel.start(recipe.parallel.tensor)
    say = Log(out, console or Console(), ranks.main)
    logging.disable_progress_bar()  # transformers' own bars, between ours
    try:
        final = _train(recipe, out, ranks, say, resume)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        advice = acceleration.out_of_memory(error, recipe.train.batch_size, recipe.train.accumulation)
        if advice is None:
            raise
        raise ValueError(advice) from error
    finally:
        parallel.stop()
    if ranks.main and recipe.upload.repo:  # no other rank waits for it
        say.plain(Upload(final, recipe.upload.repo, recipe.upload.private, say=say.plain).finish().text)
    return final


def build(recipe: Recipe, vocab_size: int, eos_token_id: int | None) -> Any:
    """The recipe's model with new weights, float32.

    Raises:
        ValueError: no such architecture, preset or setting, or one that does not fit the text.
    """
    config = preset_of(recipe)(**({"vocab_size": vocab_size, "eos_token_id": eos_token_id} | recipe.model.changes))
    if config.vocab_size < vocab_size:
        raise ValueError(f"model.changes.vocab_size ({config.vocab_size}) is below the tokenizer's {vocab_size}")
    if recipe.train.window > config.max_position_embeddings:
        raise ValueError(
            f"train.window ({recipe.train.window}) is above the model's {config.max_position_embeddings} positions "
            "(model.changes.max_position_embeddings)"
        )
    torch.manual_seed(recipe.train.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.loss_chunk, model.z_loss = recipe.train.loss_chunk, recipe.train.z_loss
    return model


def preset_of(recipe: Recipe) -> Any:
    """The constructor of the recipe's configuration.

    Raises:
        ValueError: no such architecture, preset or setting.
    """
    m = recipe.model
    presets = registry.get(m.architecture).presets()
    if m.preset not in presets:
        raise ValueError(f"model.preset: {m.architecture} has {', '.join(presets)}, not {m.preset!r}")
    if unknown := sorted(set(m.changes) - set(presets[m.preset]().to_dict())):
        raise ValueError(f"model.changes.{unknown[0]}: {m.architecture} has no such setting")
    return presets[m.preset]


def check_ranks(recipe: Recipe, world: int) -> None:
    """Raises ValueError where a step cannot be cut into equal shares and micro-batches."""
    t, windows = recipe.train, recipe.windows_a_step
    if windows % world or (windows // world) % min(t.batch_size, windows // world):
        raise ValueError(
            f"a step of {windows} windows (train.batch_size {t.batch_size} * train.accumulation {t.accumulation}) "
            f"cannot be cut into {world} equal shares of whole micro-batches: change one, or the number of ranks"
        )


def _train(recipe: Recipe, out: Path, ranks: Ranks, say: Log, resume: str) -> Path:
    t, o = recipe.train, recipe.optimizer
    check_ranks(recipe, ranks.world)
    precision = acceleration.resolve_precision(t.precision, ranks.device)
    preset_of(recipe)  # before any work

    def opened() -> tuple[Path | None, Dataset, Windows, Windows | None]:
        if ranks.main:
            newest = begin(recipe, out, resume)
        else:
            newest = state.newest(out / "checkpoints") if resume in ("auto", "never") else Path(resume)
        dataset = open_dataset(recipe, out, say.console, ranks.main)
        return newest, dataset, *dataset.windows(recipe, verify=ranks.main)

    newest, dataset, data, held_out = ranks.main_first(opened)
    model = build(recipe, len(dataset.tokenizer), dataset.tokenizer.eos_token_id)
    facts = {
        "recipe": recipe.to_dict(), "data": dataset.fingerprint, "config": settings(model.config),
        "code": code_version(), "skipped": 0, "best": None,
    }  # fmt: skip
    before = state.read_facts(newest) if newest else None
    if newest and before:
        refuse_other_run(before, facts, recipe, newest, out, say)
    if ranks.main:
        write_down(recipe, out, ranks.world * ranks.tensor)
    parameters = sum(p.numel() for p in model.parameters())
    cost = flops.flops_per_token(model, t.window)
    if t.compile:
        acceleration.compile_layers(model)
    if t.activation_checkpointing:
        acceleration.checkpoint_activations(model)
    trainable = parallel.distribute(model, ranks, recipe.parallel.strategy, precision)
    optimizers = Optimizers(model, o.name, o.lr, o.weight_decay, (o.beta1, o.beta2))
    if ranks.world > 1:  # dropout differs between the shares of a step; weights do not
        torch.manual_seed(t.seed + 1_000_003 * ranks.rank)
    done = 0
    checkpoints = state.Checkpoints(
        out / "checkpoints", keep=t.keep, keep_best=t.keep_best, keep_every=t.keep_every,
        asynchronous=t.async_checkpoints, say=say.plain,
    )  # fmt: skip
    if newest and before:
        state.load(newest, model, optimizers.all, say.plain)
        done, facts["skipped"], facts["best"] = before["step"], before["skipped"], before["best"]
        say(f"[bold]Continuing[/] {out} from step {done}")
    say(
        f"[bold]Training[/] {type(model).__name__}, {parameters:,} parameters, {t.steps} steps of "
        f"{recipe.windows_a_step * t.window:,} tokens ({len(data):,} windows an epoch), {_place(ranks, trainable)}"
    )
    peak = recipe.watch.peak_tflops * 1e12 or (
        flops.peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    )
    meter = Meter(t.steps, done, cost, peak * ranks.world * ranks.tensor if peak else None)
    trackers = Trackers(out, recipe.watch, recipe.to_dict(), done, warn=say.plain) if ranks.main else None
    run = _Run(recipe, out, trainable, optimizers, data, held_out, dataset, checkpoints, trackers, meter, say, facts)
    try:
        with Stop() as stop:
            run.steps(done, stop)
    finally:  # a run that is stopped has things to write, too
        checkpoints.close()
        if trackers:
            trackers.close()
    final = _export(recipe, out, trainable, dataset, say)
    ranks.barrier()
    return final


def _place(ranks: Ranks, trainable: Trainable) -> str:
    if ranks.mesh is None:
        return f"{torch.get_num_threads()} threads" if ranks.device.type == "cpu" else str(ranks.device)
    return f"{ranks.world * ranks.tensor} ranks ({trainable.strategy}, {ranks.tensor} share a layer)"


class Step(NamedTuple):
    """What an optimizer step did, over all ranks.

    Attributes:
        losses: name -> mean of each part of the loss. "loss" is the language model's own, in nats a token.
        norm: of the gradient, before clipping; where it is not finite, nothing was changed.
        tokens: of text, without padding.
        report: what the model's ``after_step`` returned; nothing for a step that was skipped.
    """

    losses: dict[str, float]
    norm: float
    tokens: int
    report: dict[str, Any]

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.norm)


def train_step(trainable: Trainable, optimizers: Optimizers, parts: Sequence[Batch], clip: float) -> Step:
    """One optimizer step over this rank's micro-batches, and those of all others.

    Every sum is divided by its terms in the whole step, so how a batch is cut does not matter; and ``after_step`` is
    called once, with the statistics of all of it. A step whose gradient is not finite is skipped.
    """
    model, ranks = trainable.model, trainable.ranks
    weights = model.loss_weights
    own: Counter[str] = Counter()
    for part in parts:
        own.update(model.loss_counts(part))
    tokens = sum(int(part.is_text.sum()) for part in parts)
    terms = ranks.sum(torch.tensor([*(own[name] for name in weights), tokens], dtype=torch.float64))
    counts = {name: max(1.0, float(n)) for name, n in zip(weights, terms, strict=False)}
    losses = dict.fromkeys(weights, torch.zeros((), device=ranks.device))
    statistics: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        made = trainable.objective(part.to(ranks.device), last=number == len(parts))
        means = {name: made.sums[name] / counts[name] for name in weights}
        torch.stack([weights[name] * mean for name, mean in means.items()]).sum().backward()
        for name, mean in means.items():
            losses[name] = losses[name] + mean.detach()
        for name, value in made.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
    norm = trainable.clip(clip)
    total = ranks.sum(torch.stack([losses[name] for name in weights])).tolist()
    statistics = {name: ranks.sum(value) for name, value in statistics.items()}
    step = Step(dict(zip(weights, total, strict=True)), norm, int(terms[-1]), {})
    if step.skipped:
        model.zero_grad(set_to_none=True)
        return step
    optimizers.step()
    return step._replace(report=model.after_step(statistics))


def evaluate(
    trainable: Trainable, data: Windows, batch_size: int, sizes: Tensor | None = None, limit: int = 0
) -> dict[str, float]:
    """Means over the held-out text of what the model measures: "loss", in nats a token, and its other parts; and
    "perplexity" and "bits_per_byte" of the tokens that there is a loss for.

    Args:
        batch_size: windows at a time on a rank.
        sizes: (V,) int64, bytes of each token; None: no bits per byte.
        limit: windows, the first ones; 0: all.
    """
    model, ranks = trainable.model, trainable.ranks
    model.eval()
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    text_bytes = 0
    for batch in data.in_order(batch_size, ranks.rank, ranks.world, limit):
        for name, (value, terms) in trainable.measure(batch.to(ranks.device)).items():
            sums[name] += value
            counts[name] += terms
        if sizes is not None:
            text_bytes += int(sizes[batch.labels[batch.labels >= 0]].sum())
    model.train()
    names = sorted(sums)
    totals = ranks.sum(torch.tensor([[sums[n], counts[n]] for n in names] + [[text_bytes, 0]], dtype=torch.float64))
    means = {name: float(s / max(1, c)) for name, (s, c) in zip(names, totals[:-1].tolist(), strict=True)}
    means["perplexity"] = math.exp(min(700.0, means["loss"]))
    if all_bytes := float(totals[-1, 0]):
        means["bits_per_byte"] = bits_per_byte(float(totals[names.index("loss"), 0]), int(all_bytes))
    return means


class _Run(NamedTuple):
    """All that the steps of a run need."""

    recipe: Recipe
    out: Path
    trainable: Trainable
    optimizers: Optimizers
    data: Windows
    held_out: Windows | None
    dataset: Dataset
    checkpoints: state.Checkpoints
    trackers: Trackers | None
    meter: Meter
    say: Log
    facts: dict[str, Any]

    def steps(self, done: int, stop: Stop) -> None:
        """The steps from ``done`` to the recipe's last."""
        t, o, ranks = self.recipe.train, self.recipe.optimizer, self.trainable.ranks
        sizes = self._sizes()
        if self.held_out is None:
            self.say("There is no held-out text (or too little for a window): no held-out loss will be reported")
        samples = JsonLines(self.out / "samples.jsonl", done, self.say.plain) if ranks.main else None
        spikes, skipped_in_a_row = SpikeDetector(), 0
        self.trainable.model.train()
        self.meter.resume()
        with bar(self.say.console, ranks.main) as progress:
            task = progress.add_task("Step", total=t.steps, completed=done, info="")
            for number in range(done + 1, t.steps + 1):
                factor = rate(o.schedule, number - 1, t.steps, o.warmup, o.decay_share, o.final_lr)
                self.optimizers.set_lr(factor)
                parts = self.data.micro_batches(
                    number - 1, self.recipe.windows_a_step, t.batch_size, ranks.rank, ranks.world
                )
                step = train_step(self.trainable, self.optimizers, parts, t.clip)
                self.meter.update(step.tokens, step.skipped)
                skipped_in_a_row = skipped_in_a_row + 1 if step.skipped else 0
                self.facts["skipped"] += step.skipped
                self._warn_of(number, step, skipped_in_a_row, spikes)
                said = f"loss {step.losses['loss']:.3f}{_balance(step.report)}"
                progress.update(task, advance=1, info=f"{said}  {self._speed()}")
                last = number == t.steps
                if number % t.log_every == 0 or last:
                    self._log(number, step, o.lr * factor)
                self.meter.pause()
                score, best = None, False
                if number % t.eval_every == 0 or last:
                    measured: dict[str, float] = {}
                    if self.held_out is not None:
                        measured = evaluate(self.trainable, self.held_out, t.batch_size, sizes, t.eval_windows)
                    score = measured.get("loss")
                    best = score is not None and (self.facts["best"] is None or score < self.facts["best"])
                    self.facts["best"] = score if best else self.facts["best"]
                    self._report(number, said, measured, samples)
                stopping = ranks.largest(stop.number)
                if number % t.checkpoint_every == 0 or last or stopping or (best and t.keep_best):
                    self.checkpoints.save(number, self.trainable.model, self.optimizers.all, self.facts, score)
                if stopping and not last:
                    self.checkpoints.close()
                    raise Stopped(stopping, number, state.newest(self.out / "checkpoints"))
                self.meter.resume()

    def _sizes(self) -> Tensor | None:
        """Bytes of each token, where bits per byte can be told."""
        try:
            return token_bytes(self.dataset.tokenizer) if self.held_out else None
        except ValueError as error:
            self.say.plain(f"No bits per byte will be reported: {error}")
            return None

    def _speed(self) -> str:
        mfu = f", MFU {self.meter.mfu:.1%}" if self.meter.mfu else ""
        return f"{self.meter.tokens_per_second:,.0f} tok/s{mfu}"

    def _warn_of(self, number: int, step: Step, skipped_in_a_row: int, spikes: SpikeDetector) -> None:
        """Tells of skipped steps and of spikes of the loss.

        Raises:
            ValueError: too many steps in a row were skipped.
        """
        t = self.recipe.train
        if step.skipped:
            self.say(f"[yellow]step {number}: the gradient is not finite; the step is skipped[/]")
            if skipped_in_a_row >= t.max_skipped:
                raise ValueError(
                    f"the gradient was not finite in {skipped_in_a_row} steps in a row (train.max_skipped): lower "
                    f"optimizer.lr or raise optimizer.warmup; {self.out / 'checkpoints'} holds earlier states"
                )
        if spike := spikes.update(number, step.losses["loss"]):
            self.say(f"[yellow]step {number}: the loss jumped to {spike.loss:.3f}, from about {spike.expected:.3f}[/]")
            if self.trackers:
                self.trackers.write(number, loss_spike=spike.loss, loss_expected=spike.expected)

    def _log(self, number: int, step: Step, lr: float) -> None:
        if self.trackers is None:
            return
        self.trackers.write(
            number,
            **step.losses,
            grad_norm=step.norm,
            lr=lr,
            tokens_per_second=self.meter.tokens_per_second,
            **({"mfu": self.meter.mfu} if self.meter.mfu else {}),
            seconds=self.meter.seconds,
            skipped=self.facts["skipped"],
            peak_memory=peak_memory(),
            **step.report,
        )

    def _report(self, number: int, said: str, measured: dict[str, float], samples: JsonLines | None) -> None:
        """Writes down an evaluation, with continuations of the recipe's prompts and the curves so far."""
        watch, t = self.recipe.watch, self.recipe.train
        texts: list[str] = []
        if watch.prompts:
            with _whole(self.trainable) as model:
                if model is not None:
                    texts = sample(model, self.dataset.tokenizer, watch.prompts, watch.sample_tokens)
        if self.trackers is None or samples is None:
            return
        if measured:
            self.trackers.write(number, **{f"held_out_{name}": value for name, value in measured.items()})
        for prompt, text in zip(watch.prompts, texts, strict=False):
            samples.write(step=number, prompt=prompt, text=text)
        try:
            curves.draw(self.out / "metrics.jsonl", self.out)
        except OSError as error:
            self.say(f"[yellow]the curves could not be drawn: {error}[/]")
        held_out = f"  held-out {measured['loss']:.3f}" if measured else ""
        bpb = f" ({measured['bits_per_byte']:.3f} bits a byte)" if "bits_per_byte" in measured else ""
        self.say(
            f"step {number}/{t.steps}  {said}{held_out}{bpb}  {self._speed()}  "
            f"{self.meter.seconds_left / 60:.1f} min left"
        )


class _whole:
    """The model as one process has it, on the main rank; None on the others. All ranks enter together."""

    def __init__(self, trainable: Trainable) -> None:
        self.trainable = trainable

    def __enter__(self) -> Any:
        model, ranks = self.trainable.model, self.trainable.ranks
        if self.trainable.strategy != "fsdp" and ranks.tensor == 1:
            return model if ranks.main else None
        weights = self.trainable.full_state_dict()
        if weights is None:
            return None
        with torch.random.fork_rng():  # its first weights are drawn, and overwritten
            copy = type(model)(model.config)
        copy.load_state_dict(weights)
        copy.tie_weights()
        return copy

    def __exit__(self, *_: object) -> None:
        self.trainable.ranks.barrier()


def _export(recipe: Recipe, out: Path, trainable: Trainable, dataset: Dataset, say: Log) -> Path:
    """Writes ``out/final``: the model, its card, and what it was made with. Paths of this machine are left out."""
    final, ranks = out / "final", trainable.ranks
    with _whole(trainable) as model:
        if model is None:
            return final
        model = model.to("cpu").eval()
        dataset.tokenizer.model_max_length = model.config.max_position_embeddings
        checkpoint.write(final, model, dataset.tokenizer, recipe.generation.model_dump())
    for name in ("metrics.jsonl", "curves.png"):
        if (out / name).exists():
            shutil.copy(out / name, final / name)
    public = recipe.model_copy(deep=True)
    public.data.path = Path(recipe.data.path).name
    public.corpus.facts, public.corpus.evaluation = (
        text if not Path(text).is_absolute() else Path(text).name
        for text in (recipe.corpus.facts, recipe.corpus.evaluation)
    )
    (final / "recipe.yaml").write_text(public.to_yaml(), encoding="utf-8")
    card.write_card(
        final, public.to_dict(), describe() | {"ranks": ranks.world * ranks.tensor}, out / "metrics.jsonl",
        dataset.manifests(), dataset.sources(public),
        license=recipe.upload.license, repo=recipe.upload.repo,
    )  # fmt: skip
    say(f"[bold green]Done[/] {final}  (serve it: medassist serve {final})")
    return final


def _balance(report: dict[str, Any]) -> str:
    """The coefficient of variation of the experts' load in the layer where it is worst, for the progress line."""
    worst = max(report.get("expert_load_cv", ()), default=None)
    return "" if worst is None else f"  load cv {worst:.2f}"
