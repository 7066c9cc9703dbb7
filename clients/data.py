"""``medassist data``: prepares data sets for training, and tells what is in them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clients.installation import fail, needs, printable

app = typer.Typer(help="Data sets for training: prepare them from text, and see what is in them.", no_args_is_help=True)


@app.command(
    epilog="Examples: medassist data prepare notes/ --out data/notes --tokenizer gpt2  |  "
    "medassist data prepare medquad.jsonl.gz --columns question,answer --out data/medquad --vocab-size 4096  |  "
    "medassist data prepare tinystories --out data/stories --tokenizer p50k_base"
)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders of .txt, .jsonl, .parquet, PubMed .xml, PMC .nxml or .tar.gz (all also .gz, text "
            "and lines also .zst); tinystories; pubmed-abstracts; or hf:NAME[:SPLIT], a Hugging Face data set.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="An encoding of tiktoken's, such as gpt2, or a folder; trained on the text if not given."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=260, help="Tokens of a tokenizer trained here.")] = 4096,
    sample_mib: Annotated[int, typer.Option(min=1, help="Text to train a tokenizer on, in MiB.")] = 32,
    columns: Annotated[
        str | None, typer.Option(help="Columns of tables, joined by blank lines: question,answer; text if not given.")
    ] = None,
    text_documents: Annotated[str, typer.Option(help="A document in plain text: file, line or blank-line.")] = "file",
    jats: Annotated[bool, typer.Option("--jats", help="The columns hold JATS XML.")] = False,
    minimum: Annotated[int, typer.Option(min=1, help="Shorter documents are left out, in characters.")] = 100,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate/--keep-duplicates", help="Drop exact and near duplicates.")
    ] = True,
    expected_documents: Annotated[
        int, typer.Option(min=1, help="Documents that duplicates are looked for among; 65 bytes of memory each.")
    ] = 2_000_000,
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of documents held out for validation.")] = 0.01,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of documents held out for the end.")] = 0.01,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a shard is closed.")] = 2**26,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
) -> None:
    """Makes shards from text; the same command continues a run that was interrupted."""
    with needs("train"):
        from training.prepare import pipeline
    if text_documents not in ("file", "line", "blank-line"):
        raise ValueError(f"--text-documents is file, line or blank-line, not {text_documents!r}")
    options = pipeline.Options(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sample_bytes=sample_mib * 2**20,
        columns=tuple(column.strip() for column in columns.split(",")) if columns else None,
        text_documents=text_documents,  # type: ignore[arg-type]
        jats=jats,
        minimum=minimum,
        deduplicate=deduplicate,
        expected_documents=expected_documents,
        validation=validation,
        test=test,
        shard_tokens=shard_tokens,
    )
    try:
        manifest = _with_bar(sources, out, options, workers)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command continues where {out} is", 130)
    _describe(out, manifest)
    for warning in _empty_splits(manifest):
        typer.secho(f"warning: {warning}", err=True, fg="yellow")


def _empty_splits(manifest: dict[str, Any]) -> list[str]:
    """What follows from each split that was asked for and got no document."""
    asked, kept = manifest["options"], manifest["documents"]["kept"]
    follows = {
        "train": "there is nothing to train on: give lower --validation and --test",
        "validation": "training will not be able to report held-out loss: give a higher --validation",
        "test": "nothing is set aside to measure the finished model on: give a higher --test",
    }
    shares = {"train": 1 - asked["validation"] - asked["test"]} | {n: asked[n] for n in ("validation", "test")}
    return [
        f"none of the {kept:,} documents fell to {name}, which was to get {shares[name]:.3g} of them, so {sentence} "
        "(with another --out), or more documents"
        for name, sentence in follows.items()
        if shares[name] > 0 and not manifest["splits"][name]["documents"]
    ]


def _with_bar(sources: list[str], out: Path, options: Any, workers: int | None) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from training.prepare import pipeline

    bar = Progress(
        TextColumn("Preparing"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=Console(stderr=True), refresh_per_second=2,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None, info="tokenizer")

        def report(progress: pipeline.Progress) -> None:
            info = f"{progress.read:,} documents, {progress.tokens:,} tokens"
            bar.update(task, completed=progress.done, total=progress.total, info=info)

        return pipeline.prepare(sources, out, options, workers, report)


@app.command(epilog="Example: medassist data info data/medquad --verify")
def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a data set.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare its checksum.")] = False,
) -> None:
    """Tells what is in a data set; with --verify also whether it is all there and undamaged."""
    with needs("train"):
        from training import shards
        from training.prepare import pipeline
    manifest = pipeline.read_manifest(folder)
    for split in manifest["splits"]:
        shards.open_shards(folder / split, folder / "tokenizer", verify=verify)
    found = pipeline.dataset_fingerprint({s: shards.read_manifest(folder / s) for s in manifest["splits"]})
    if found != manifest["fingerprint"]:
        raise ValueError(f"{folder / 'manifest.json'} is not of these shards: prepare the data set again")
    _describe(folder, manifest)
    if verify:
        typer.echo("every shard is there and undamaged")


def _describe(folder: Path, manifest: dict[str, Any]) -> None:
    counts, lengths = manifest["documents"], manifest["lengths"]
    lines = [f"{folder}  fingerprint {manifest['fingerprint']}"]
    for source in manifest["sources"]:
        size = f"{source['bytes']:,} bytes in {source['files']:,} files" if source["bytes"] is not None else "a stream"
        lines.append(f"  from {source['name']}: {size}, {source['read']:,} documents read, {source['kept']:,} kept")
    lines.append(
        f"  left out: {counts['too_short']:,} too short, {counts['too_long']:,} too long, {counts['malformed']:,} "
        f"malformed, {counts['exact']:,} exact duplicates, {counts['near']:,} near duplicates"
    )
    lines += [f"  damaged, read as far as possible: {name}" for name in manifest["damaged_files"]]
    found = manifest["deduplication"]
    if found and found["false_positive_rate"] > 1e-3:
        lines.append(
            f"  {found['false_positive_rate']:.1%} of the last documents were dropped by chance: prepare again with a "
            "higher --expected-documents"
        )
    for name, split in manifest["splits"].items():
        sizes = f"{split['documents']:>12,} documents {split['tokens']:>15,} tokens {split['bytes']:>17,} bytes"
        lines.append(f"  {name:<10} {sizes}")
    spread = ", ".join(f"{name}%: {value:,}" for name, value in lengths["percentiles"].items())
    lines.append(
        f"  vocabulary {manifest['tokenizer']['vocab_size']:,} ({manifest['tokenizer']['dtype']}), "
        f"{manifest['bytes_per_token']:.2f} bytes a token"
    )
    lines.append(f"  tokens a document: mean {lengths['mean']:,}, longest {lengths['longest']:,}; {spread}")
    typer.echo("\n".join(printable(line) for line in lines))
