"""The commands about models on disk: ``medassist import``, ``models``, ``inspect`` and ``upload``."""

import re
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from clients.installation import fail, needs, printable
from clients.tables import print_table

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A field of the configuration that the files lack, or a choice such as causal=true; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command("import", epilog="Example: medassist import checkpoint_step_17000.pt --out models/medassist-86m")(
        import_
    )
    app.command()(models)
    app.command(epilog="Example: medassist inspect pytorch_model.bin")(inspect)
    app.command(epilog="Example: medassist upload runs/demo --repo you/medassist-demo")(upload)


def import_(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A weight file, a folder, or owner/name[/FILE] on a Hugging Face hub.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="p50k_base, gpt2 or another encoding of tiktoken, a tokenizer.json or folder, or none."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    sets: Settings = None,
) -> None:
    """Makes a published model's files a checkpoint directory that can be served; executes nothing in them."""
    with needs("train"):
        from modeling.importing import import_checkpoint
        from modeling.importing.configuration import parse_settings

    settings = parse_settings(sets)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        result = import_checkpoint(source, out, tokenizer=tokenizer, revision=revision, settings=settings)
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_summary(result)


def models() -> None:
    """Lists the architectures and their sizes."""
    with needs("train"):
        from modeling.registry import REGISTRY

        rows = [row for arch in REGISTRY.values() for row in _preset_rows(arch)]
    print_table(("architecture", "preset", "parameters", "active", "layers", "width", "heads", "kv", "head size",
                 "vocabulary", "context", "what it is"), rows)  # fmt: skip


def inspect(
    path: Annotated[Path, typer.Argument(help="A weight file, or a folder with one.")],
    sets: Settings = None,
) -> None:
    """Says what a file or directory holds, and what an import of it needs; executes nothing in it."""
    with needs("train"):
        from modeling.importing.configuration import parse_settings
        from modeling.importing.describe import describe

    lines = describe(path, parse_settings(sets)).lines
    folder = path if path.is_dir() else path.parent
    if (folder / "fingerprint.json").exists():
        lines.append(("fingerprint", _fingerprint(folder)))
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        _print(f"{label:{width}}  {' '.join(text.split())}")


def upload(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run, or a checkpoint directory.")],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is created.")] = True,
) -> None:
    """Uploads a trained model to the Hugging Face Hub, with the token in HF_TOKEN."""
    with needs("train"):
        from training.publish import Upload, checkpoint_of

    outcome = Upload(checkpoint_of(run), repo, private, say=_print).finish(seconds=24 * 3600)
    if not outcome.done:
        fail(outcome.text, 1)
    _print(outcome.text)


def _fingerprint(folder: Path) -> str:
    from serving import fingerprint

    try:
        fingerprint.verify_files(folder)
    except (ValueError, TypeError, AttributeError) as e:
        return f"does not hold: {re.sub(r'^.*?: ', '', str(e), count=1)}"
    return "holds: weights and tokenizer are the ones that were fingerprinted"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exception, so that what is half written is removed."""
    raise SystemExit(128 + number)


def _print_summary(result: Any) -> None:
    for warning in result.warnings:
        typer.secho(f"warning: {printable(warning)}", err=True, fg="yellow")
    _print(f"{result.directory}: {result.model_type}, {result.parameters:,} parameters, from {result.source}")
    _print(f"format: {result.format}")
    by_origin: dict[str, list[str]] = {}
    for name, origin in result.origins.items():
        by_origin.setdefault(origin, []).append(f"{name} {getattr(result.config, name, '')}")
    for origin, fields in by_origin.items():
        _print(f"from {origin}: {', '.join(fields)}" if origin != "as published" else f"{origin}: {', '.join(fields)}")
    _print(f"tokenizer: {result.tokenizer}")
    for note in result.notes:
        _print(f"note: {note}")
    _print(f"serve it: medassist serve {result.directory}")


def _print(line: str) -> None:
    print(printable(line))


def _preset_rows(arch: Any) -> list[tuple[str, ...]]:
    import torch

    rows: list[tuple[str, ...]] = []
    for name, preset in arch.presets().items():
        config = preset()
        with torch.device("meta"):
            model = arch.model_class()(config)
        elements = {n: p.numel() for n, p in model.named_parameters()}  # a tied head is one with the embedding
        parameters = sum(elements.values())
        active = config.active_parameters(elements) if hasattr(config, "active_parameters") else parameters
        what = (preset.__doc__ or "").strip().partition("\n")[0].replace("`", "")
        rows.append((
            arch.model_type, name, f"{parameters:,}", f"{active:,}", str(config.num_hidden_layers),
            str(config.hidden_size), str(config.num_attention_heads),
            str(getattr(config, "num_key_value_heads", config.num_attention_heads)), str(config.head_dim),
            str(config.vocab_size), str(config.max_position_embeddings), what,
        ))  # fmt: skip
    return rows
