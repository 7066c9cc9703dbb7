"""``medassist bench``: the gateway, our vLLM classes beside vLLM's Llama, drafts, the latent cache, and training."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from clients.installation import demo_checkpoint, needs
from loadtest.engine_plan import DTYPES, PROFILES, Options

DEFAULTS = Options()
Figures = Annotated[Path | None, typer.Option(help="File for all figures.")]
Report = Annotated[Path | None, typer.Option(help="File for a report in Markdown.")]


class GatewayUnlessNamed(TyperGroup):
    """``medassist bench --rounds 8`` is ``medassist bench gateway --rounds 8``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["gateway", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=GatewayUnlessNamed,
    help="Benchmarks: what the gateway costs (also without a command), engines, drafts, the latent cache, training.",
)


@app.command(epilog="Example: medassist bench --json bench.json --report bench.md")
def gateway(
    checkpoint: Annotated[Path | None, typer.Option(help="Directory to serve; the demo if not given.")] = None,
    url: Annotated[str | None, typer.Option(help="A gateway that runs on this machine, instead of serving.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, a multiple of 4.")] = None,
    requests: Annotated[int | None, typer.Option(help="Streams a round.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Streams in flight.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of every answer, in tokens.")] = None,
    json: Figures = None,
    report: Report = None,
) -> None:
    """Measures what the gateway costs: the same streams through it and straight to its engine."""
    with needs("cpu"):
        from loadtest import benchmark

    options: dict[str, object] = {"url": url, "rounds": rounds, "requests": requests, "concurrency": concurrency}
    options |= {"max-tokens": max_tokens, "json": json, "report": report}
    options["checkpoint"] = checkpoint or (None if url else demo_checkpoint())
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    raise typer.Exit(benchmark.main(arguments))


@app.command(epilog="Example: medassist bench engine --architecture medassist_gpt --preset published_303m")
def engine(
    ctx: typer.Context,
    architecture: Annotated[list[str] | None, typer.Option(help="Repeatable; all if not given.")] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; the largest of each architecture within 400M parameters if not given."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Most pairs of turns a cell, a multiple of 2.")] = DEFAULTS.rounds,
    sequences: Annotated[str, typer.Option(help="How many run together.")] = ",".join(map(str, DEFAULTS.sequences)),
    new_tokens: Annotated[int, typer.Option(help="Length of every answer when decoding.")] = DEFAULTS.new_tokens,
    prompt: Annotated[int, typer.Option(help="Length of every prompt when prefilling.")] = DEFAULTS.prompt,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.")] = DEFAULTS.threads,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = DEFAULTS.dtype,
    eager: Annotated[
        bool | None,
        typer.Option("--eager/--compile", help="Without or with torch.compile; eager on CPUs if not given."),
    ] = DEFAULTS.eager,
    hf: Annotated[bool, typer.Option(help="With generate() of transformers as a third.")] = DEFAULTS.transformers,
    minutes: Annotated[
        float, typer.Option(help="Time for each model; a cell's first four pairs are played even beyond.")
    ] = DEFAULTS.minutes,
    control: Annotated[
        bool, typer.Option("--control", help="Llama beside itself: how far the ratios stray without any difference.")
    ] = DEFAULTS.control,
    profile: Annotated[
        str, typer.Option(help=f"Cells to profile afterwards: {', '.join(PROFILES)}; below: where ours is slower.")
    ] = DEFAULTS.profile,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = DEFAULTS.seed,
    json: Figures = None,
    report: Report = None,
) -> None:
    """Measures our vLLM classes: beside vLLM's own Llama of the same size, and generate() of transformers."""
    options = Options(
        architectures=tuple(architecture or ()),
        presets=tuple(preset or ()),
        rounds=rounds,
        sequences=_numbers("--sequences", sequences),
        new_tokens=new_tokens,
        prompt=prompt,
        threads=threads,
        dtype=dtype,
        transformers=hf,
        minutes=minutes,
        eager=eager,
        control=control,
        profile=profile,
        seed=seed,
    )
    with needs("cpu"):
        from loadtest import engine_benchmark
    raise typer.Exit(engine_benchmark.main(options, _command(ctx), report, json))


@app.command(epilog="Example: medassist bench speculation runs/deepseek-demo/final --report speculation.md")
def speculation(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Of a model with multi-token prediction, and a tokenizer.")],
    drafted: Annotated[str, typer.Option(help="Tokens drafted at a time, an engine for each.")] = "1,2,3,4",
    rounds: Annotated[int, typer.Option(help="Turns of each engine.")] = 8,
    questions: Annotated[int, typer.Option(help="Questions a turn, from the evaluation file.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.")] = None,
    report: Report = None,
) -> None:
    """Measures what a model's own drafts are worth: with multi-token prediction beside the same engine without."""
    with needs("cpu"):
        from loadtest import speculation as benchmark
    options = benchmark.Options(
        checkpoint.resolve(), _numbers("--drafted", drafted), rounds=rounds, questions=questions, new_tokens=new_tokens,
        threads=threads,
    )  # fmt: skip
    raise typer.Exit(benchmark.main(options, _command(ctx, "speculation"), report))


@app.command(epilog="Example: medassist bench cache --report cache.md")
def cache(ctx: typer.Context, report: Report = None) -> None:
    """Measures the paged cache of models with latent attention, beside ordinary attention and the formulas."""
    with needs("cpu"):
        from loadtest import latent_cache
    raise typer.Exit(latent_cache.main(_command(ctx, "cache"), report))


@app.command(epilog="Example: medassist bench train --options unfused,whole_logits --report training.md")
def train(
    ctx: typer.Context,
    architecture: Annotated[str, typer.Option(help="Of the registry (medassist models).")] = "medassist_gpt",
    preset: Annotated[str, typer.Option(help="Its size.")] = "demo",
    data: Annotated[
        Path | None, typer.Option(help="Directory of medassist data prepare; random tokens if not given.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps a turn.")] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16, as in a recipe.")] = "auto",
    options: Annotated[
        str,
        typer.Option(
            help="What to measure of our own step besides: any of float32, bfloat16, compile, recompute, unfused, "
            "whole_logits, loss_chunk=N and batch_size=N, joined by '+', with commas between."
        ),
    ] = "",
    report: Report = None,
) -> None:
    """Measures a training step: ours beside Hugging Face's Trainer and a minimal loop, on the same work."""
    with needs("cpu"):
        from loadtest import training as benchmark
    chosen = benchmark.Options(
        architecture, preset, data, window=window, batch_size=batch_size, rounds=rounds, steps=steps, threads=threads,
        precision=precision, options=tuple(filter(None, options.split(","))),
    )  # fmt: skip
    raise typer.Exit(benchmark.main(chosen, _command(ctx, "train"), report))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers and commas, such as 1,8,32, got {text!r}") from None


def _command(ctx: typer.Context, name: str = "engine") -> str:
    """The command line with the options that were given, from what click made of it."""
    words = ["medassist", "bench", name]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [str(item)] if isinstance(parameter, click.Argument) else [parameter.opts[0], str(item)]
    return shlex.join(words)
