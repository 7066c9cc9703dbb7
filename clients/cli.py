"""The ``medassist`` command.

Modules that need an extra are imported inside the commands, so that ``medassist --help`` is quick and works without.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    help="Train small medical language models from scratch, and serve them with vLLM.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they can print local variables, which hold questions and answers
)

BaseUrl = Annotated[str, typer.Option(envvar="MEDASSIST_BASE_URL", help="Address of the API.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar=["MEDASSIST_API_KEY", "OPENAI_API_KEY"], help="Key, where the server wants one."),
]
Model = Annotated[str | None, typer.Option(help="Model to ask; the server's first if not given.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 always takes the likeliest token.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
LOCAL = "http://127.0.0.1:8000/v1"


@app.command(epilog="Example: medassist serve runs/demo/final --port 8080")
def serve(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Directories written by training, or NAME=DIRECTORY; the demo if none."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; the model's own if not given.")
    ] = None,
    eager: Annotated[
        bool | None,
        typer.Option("--eager/--compile", help="Without or with torch.compile; eager on CPUs if not given."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each engine.")] = None,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache of each engine on CPUs, in GiB.")] = 1.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time for running requests to finish at the end.")] = 30.0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where to keep the engines' logs; not kept if not given.")
    ] = None,
) -> None:
    """Serves checkpoints behind an OpenAI-compatible API until Ctrl-C or SIGTERM."""
    if importlib.util.find_spec("vllm") is None:
        _fail("serving needs vLLM: pip install 'medassist[cpu]' (with an NVIDIA GPU: 'medassist[gpu]')", 1)
    with _needs("cpu"):
        from serving.serve import Options, run

    options = Options(
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        eager=eager,
        threads=threads,
        kv_cache_gib=kv_cache_gib,
        drain_seconds=drain_seconds,
        log_dir=log_dir,
    )
    paths = [Path(checkpoint) for checkpoint in checkpoints or []] or [demo_checkpoint()]
    raise typer.Exit(run(paths, options))


@app.command(epilog="Example: medassist train --recipe demo --out runs/short --set train.steps=200")
def train(
    out: Annotated[Path, typer.Option(help="Directory of the run; the checkpoint is written to OUT/final.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or path of a .toml file.")] = "demo",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a field of the recipe; repeatable."),
    ] = None,
) -> None:
    """Trains a model from scratch; the same command continues a run that was interrupted."""
    # OpenMP threads that wait: the default spins for long and halves the speed of whatever else runs; "passive" never
    # spins and costs a quarter of this loop's speed. A short spin costs neither.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from training.recipe import load

    loaded = load(recipe, sets)
    try:
        with _needs("train"):
            from training import loop
        loop.train(loaded, out)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the newest checkpoint", 130)


@app.command("eval", epilog="Example: medassist eval http://127.0.0.1:8000/v1")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_OR_URL", help="Checkpoint directory, or address of an API.")
    ],
    questions: Annotated[
        Path | None, typer.Option(help="JSONL of questions; the demo's held-out ones if not given.")
    ] = None,
    facts: Annotated[Path | None, typer.Option(help="JSONL of facts; the demo's if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the answers.")] = None,
) -> None:
    """Asks held-out questions and reports how many answers are right."""
    is_url = target.startswith(("http://", "https://"))
    if not is_url and not (Path(target) / "config.json").is_file():
        raise ValueError(
            f"{target} is neither a checkpoint directory (it has no config.json) nor the address of an API"
        )
    import openai

    try:
        with _needs("train"):
            from training.evaluate import evaluate_checkpoint

            evaluate_checkpoint(target, questions, facts, out)
    except openai.APIError as e:
        _fail(f"{target}: {e}", 1)


@app.command(epilog="Example: medassist bench --json bench.json --report bench.md")
def bench(
    checkpoint: Annotated[Path | None, typer.Option(help="Directory to serve; the demo if not given.")] = None,
    url: Annotated[str | None, typer.Option(help="A gateway that runs on this machine, instead of serving.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, a multiple of 4.")] = None,
    requests: Annotated[int | None, typer.Option(help="Streams a round.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Streams in flight.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of every answer, in tokens.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
    report: Annotated[Path | None, typer.Option(help="File for a report in Markdown.")] = None,
) -> None:
    """Measures what the gateway costs: the same streams through it and straight to its engine."""
    with _needs("cpu"):
        from loadtest import benchmark

    options: dict[str, object] = {"url": url, "rounds": rounds, "requests": requests, "concurrency": concurrency}
    options |= {"max-tokens": max_tokens, "json": json, "report": report}
    options["checkpoint"] = checkpoint or (None if url else demo_checkpoint())
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    raise typer.Exit(benchmark.main(arguments))


@app.command(epilog='Example: medassist ask "What are the signs of a stroke?"')
def ask(
    question: Annotated[
        str | None, typer.Argument(show_default=False, help="The question; '-' reads it from standard input.")
    ] = None,
    base_url: BaseUrl = LOCAL,
    api_key: ApiKey = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Asks one question and prints the answer, and nothing else, as it comes."""
    if question == "-" or (question is None and not sys.stdin.isatty()):
        question = sys.stdin.read()
    if not (question and question.strip()):
        raise ValueError('no question: medassist ask "...", or pipe it in')
    from clients import terminal

    assistant = terminal.Assistant(base_url, api_key, model, temperature=temperature, max_tokens=max_tokens)
    raise typer.Exit(terminal.ask(assistant, question.strip()))


@app.command(epilog="Example: medassist chat --temperature 0")
def chat(
    base_url: BaseUrl = LOCAL,
    api_key: ApiKey = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Converses with a model in the terminal; Ctrl-C stops an answer."""
    from clients import terminal

    assistant = terminal.Assistant(base_url, api_key, model, temperature=temperature, max_tokens=max_tokens)
    raise typer.Exit(terminal.chat(assistant))


def demo_checkpoint() -> Path:
    """The checkpoint shipped with the project.

    Raises:
        ValueError: it is not there.
    """
    package = importlib.util.find_spec("training")
    locations = package and package.submodule_search_locations
    assert locations, "the package training is part of every installation"
    path = Path(locations[0]) / "checkpoints/medassist-demo"
    if not path.is_dir():
        raise ValueError(
            f"no CHECKPOINT given, and the demo's is not at {path}: train one with "
            "`medassist train --out runs/demo`, then `medassist serve runs/demo/final`"
        )
    return path


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Around imports: a package that only this extra installs may be missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in ("modeling", "training", "serving", "clients", "loadtest"):
            raise
        _fail(f"this needs {e.name}: pip install 'medassist[{extra}]'", 1)


def _fail(message: str, code: int) -> NoReturn:
    typer.secho(f"medassist: {message}", err=True, fg="red")
    raise typer.Exit(code)


def main(arguments: list[str] | None = None) -> None:
    """The console script; ``arguments`` are the command line's if None. Leaves by SystemExit.

    A setting that is wrong (ValueError) or a file that cannot be used (OSError) is one line and exit code 2.
    """
    try:
        app(arguments)
    except (ValueError, OSError) as e:
        typer.secho(f"medassist: {' '.join(str(e).split())}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
