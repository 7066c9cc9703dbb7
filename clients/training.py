"""The command ``medassist train``."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from clients.installation import fail, needs


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog="Example: medassist train demo --out runs/short --set steps=200 --set checkpoint_every=50", cls=_Command
    )(train)


class _Command(typer.core.TyperCommand):
    """Its help ends with every field of a recipe."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from rich.console import Console
        from rich.table import Table

        from training.recipe import described

        width = shutil.get_terminal_size().columns
        table = Table("field", "type", "default", "meaning", title="Fields of a recipe (--set FIELD=VALUE)", box=None,
                      title_justify="left", padding=(0, 2, 0, 0))  # fmt: skip
        for name, kind, default, meaning in described():
            table.add_row(name, kind, str(default), meaning)
        Console(width=max(100, width), markup=False, highlight=False).print(table)


def train(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a .yaml file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run (runs/NAME if not given); the model is in OUT/final.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The same as RECIPE.")] = "demo",
    data: Annotated[str | None, typer.Option(help="Directory of `medassist data prepare`: --set data.path=...")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Overrides a field of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|CHECKPOINT", help="Where to continue from; auto: the newest checkpoint, if any."
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved recipe, sizes, costs and the first batch; train nothing."),
    ] = False,
) -> None:
    """Trains a model from scratch; the same command continues a run that was interrupted.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m clients.cli train RECIPE --out DIR
    """
    # OpenMP threads that wait: the default spins for long and halves the speed of whatever else runs; "passive" never
    # spins and costs a quarter of this loop's speed. A short spin costs neither.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from training.recipe import load

    loaded = load(name or recipe, [*(sets or ()), *([f"data.path={data}"] if data else ())])
    with needs("train"):
        from training import dry, loop
        from training.run import Stopped
    try:
        if dry_run:
            dry.show(loaded, out)
            return
        loop.train(loaded, out or Path("runs") / loaded.name, resume=resume)
    except Stopped as stopped:
        fail(f"{stopped}; the same command continues", stopped.exit_code)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues from the newest checkpoint", 130)
