"""The ``medassist`` command.

Modules that need an extra are imported inside the commands, so that ``medassist --help`` is quick and works without.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from clients import audit, benchmarks, captures, checkpoints, data, evaluation, gateway, keys, store, training, usage
from clients.installation import demo_checkpoint, printable
from clients.installation import fail as _fail
from clients.installation import needs as _needs

app = typer.Typer(
    help="Train small medical language models from scratch, and serve them with vLLM.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they can print local variables, which hold questions and answers
)
app.add_typer(audit.app, name="audit")
app.add_typer(benchmarks.app, name="bench")
app.add_typer(captures.app, name="capture")
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
app.add_typer(store.app, name="store")
checkpoints.register(app)
evaluation.register(app)
gateway.register(app)
training.register(app)
usage.register(app)

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
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on, 8000 if not given; 0 takes a free one.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The gateway's settings (YAML), in place of CHECKPOINTs; options win."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines of each checkpoint; 1 if not given.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that take requests; 1 if not given.")] = None,
    latency_target: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time in which answers are worth having; what would be later is refused."),
    ] = None,
    target_first_token: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The same, until the first token.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; the model's own if not given.")
    ] = None,
    eager: Annotated[
        bool | None,
        typer.Option("--eager/--compile", help="Without or with torch.compile; eager on CPUs if not given."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each engine's ranks.")] = None,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache of each engine on CPUs, in GiB.")] = 1.0,
    drain_seconds: Annotated[
        float | None, typer.Option(min=0, help="Time for running requests to finish at the end; 30 if not given.")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where to keep the engines' logs; not kept if not given.")
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "--tp", min=1, help="Ranks that share every layer.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "--pp", min=1, help="Stages that the layers are split into.")
    ] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", "--ep", help="Ranks hold whole experts instead of parts of all.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="[MODEL:]NAME=DIR", help="A LoRA adapter, served as a model of its own name; repeatable."),
    ] = None,
    speculative: Annotated[
        str | None,
        typer.Option(
            metavar="ngram|mtp|DIR",
            help="Drafts by repeated text, the model's own multi-token prediction, or a smaller checkpoint.",
        ),
    ] = None,
    speculative_tokens: Annotated[int, typer.Option(min=1, help="Tokens drafted at a time.")] = 4,
    quantization: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Quantise weights at loading, by vLLM's name of the method.")
    ] = None,
    vllm_args: Annotated[
        str, typer.Option(metavar="'ARGS'", help="Further arguments of `vllm serve`, such as '--max-num-seqs 64'.")
    ] = "",
) -> None:
    """Serves checkpoints behind an OpenAI-compatible API until Ctrl-C or SIGTERM.

    SIGUSR2 restarts workers and engines one after the other, without a failed request; SIGHUP, or a change of the file,
    reads --config again.
    """
    if importlib.util.find_spec("vllm") is None:
        _fail("serving needs vLLM: pip install 'medassist[cpu]' (with an NVIDIA GPU: 'medassist[gpu]')", 1)
    with _needs("cpu"):
        from serving.plan import Options
        from serving.serve import run

    options = Options(
        host=host,
        port=port,
        config=config,
        replicas=replicas,
        workers=workers,
        latency_target=latency_target,
        first_token_target=target_first_token,
        dtype=dtype,
        max_model_len=max_model_len,
        eager=eager,
        threads=threads,
        kv_cache_gib=kv_cache_gib,
        drain_seconds=drain_seconds,
        log_dir=log_dir,
        tensor_parallel=tensor_parallel_size,
        pipeline_parallel=pipeline_parallel_size,
        expert_parallel=expert_parallel,
        adapters=tuple(lora or ()),
        speculative=speculative,
        speculative_tokens=speculative_tokens,
        quantization=quantization,
        vllm_args=vllm_args,
    )
    paths = [Path(checkpoint) for checkpoint in checkpoints or []]
    raise typer.Exit(run(paths if paths or config else [demo_checkpoint()], options))


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


def main(arguments: list[str] | None = None) -> None:
    """The console script; ``arguments`` are the command line's if None. Leaves by SystemExit.

    A setting that is wrong (ValueError) or a file that cannot be used (OSError) is one line and exit code 2.
    """
    try:
        app(arguments)
    except (ValueError, OSError) as e:
        typer.secho(f"medassist: {printable(' '.join(str(e).split()))}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
