"""What this installation has, and how a command says what it lacks."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer


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
def needs(extra: str) -> Iterator[None]:
    """Around imports: a package that only this extra installs may be missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in ("modeling", "training", "serving", "clients", "loadtest"):
            raise
        fail(f"this needs {e.name}: pip install 'medassist[{extra}]'", 1)


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey rather than show: names come from files of anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with that message and exit code."""
    typer.secho(f"medassist: {message}", err=True, fg="red")
    raise typer.Exit(code)
