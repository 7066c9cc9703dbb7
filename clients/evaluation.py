"""The command ``medassist eval``: the demo's own questions, or tasks of lm-evaluation-harness."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from clients.installation import fail, needs, printable


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command("eval", epilog="Example: medassist eval runs/x/final --tasks pubmedqa --data pubmedqa.jsonl.gz")(
        evaluate
    )


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_OR_URL", help="Checkpoint directory, or address of an API.")
    ],
    questions: Annotated[
        Path | None, typer.Option(help="JSONL of questions; the demo's held-out ones if not given.")
    ] = None,
    facts: Annotated[Path | None, typer.Option(help="JSONL of facts; the demo's if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the answers, or for the report on the tasks.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...", help="pubmedqa, choices, perplexity, or a YAML file of lm-evaluation-harness."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL (.gz) with the rows of the tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, from the first.")] = None,
    column: Annotated[str, typer.Option(help="Where the task perplexity finds its text.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the tokenizer: with --tasks, an address needs it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model at the address; its first if not given.")] = None,
    window: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a sequence; as many as the model takes if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences computed at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of a task's few-shot examples.")] = 1234,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=["MEDASSIST_API_KEY", "OPENAI_API_KEY"], help="Key, where the server wants one."),
    ] = None,
) -> None:
    """Asks held-out questions and reports how many answers are right; with --tasks, scores by log-likelihood."""
    is_url = target.startswith(("http://", "https://"))
    if not is_url and not (Path(target) / "config.json").is_file():
        raise ValueError(
            f"{target} is neither a checkpoint directory (it has no config.json) nor the address of an API"
        )
    import openai

    if tasks is None:
        if data or limit or tokenizer or model or window:
            raise ValueError("--data, --limit, --tokenizer, --model and --window are for --tasks, which is not given")
        try:
            with needs("train"):
                from training.evaluate import evaluate_checkpoint

                evaluate_checkpoint(target, questions, facts, out)
        except openai.APIError as e:
            fail(f"{target}: {e}", 1)
        return

    if questions or facts:
        raise ValueError("--questions and --facts are not for --tasks: give the rows as --data")
    if data:
        # Read when the libraries are imported. Nothing is fetched then; without --data a task file may name a data set.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with needs("train"):
        import aiohttp

        from training import harness
    try:
        summary = harness.report(
            target, [name.strip() for name in tasks.split(",")], data, limit=limit, column=column,
            tokenizer=tokenizer, key=api_key, served=model, window=window, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    except (openai.APIError, aiohttp.ClientError, TimeoutError) as e:
        fail(f"{target}: {printable(str(e) or type(e).__name__)}", 1)
    for line in harness.table(summary):
        print(printable(line))
    if out:
        out.write_text(json.dumps(summary, indent=1) + "\n")
