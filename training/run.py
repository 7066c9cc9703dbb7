"""A run's directory, and how a run ends before its last step.

recipe.yaml  environment.json  train.log  metrics.jsonl  samples.jsonl  curves.png  curves.svg
tokenizer/  data/ (rendered corpora)  checkpoints/  final/
"""

import json
import os
import signal
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from training import recipe as recipes
from training import state
from training.environment import describe
from training.recipe import Recipe


class Stopped(Exception):
    """A run was asked to end by a signal.

    Args:
        number: the signal.
        step: the last one that was done.
        saved: the newest checkpoint, which is of that step unless it could not be written.
    """

    def __init__(self, number: int, step: int, saved: Path | None) -> None:
        of_it = saved is not None and int(saved.name[5:]) == step
        kept = f"is saved in {saved}" if of_it else f"could not be saved (the newest checkpoint: {saved or 'none'})"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, which {kept}")
        self.exit_code = 128 + number


class Stop:
    """Within it, the first SIGTERM or SIGINT is noted, for the loop to end after its step; a second one interrupts."""

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Log:
    """What a run tells: on the console, and with the time in ``train.log``. Silent on ranks but the main one."""

    def __init__(self, out: Path, console: Console, main: bool) -> None:
        self.console, self._path = console, out / "train.log" if main else None

    def plain(self, text: str) -> None:
        """Tells what is not this program's own wording, and may hold brackets."""
        self(escape(text))

    def __call__(self, text: str) -> None:
        """``text`` may have rich's markup."""
        if self._path is None:
            return
        self.console.print(text, highlight=False, soft_wrap=True)
        try:
            with self._path.open("a") as f:
                f.write(
                    f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {Text.from_markup(text).plain}\n"
                )
        except OSError:
            pass  # a full disk is told by what matters: checkpoints and metrics


def begin(recipe: Recipe, out: Path, resume: str) -> Path | None:
    """Prepares the directory, and finds the checkpoint to go on from. Called on the main rank.

    Args:
        resume: "auto": the newest checkpoint, if there is one; "never": ``out`` must have none; or a checkpoint's path.

    Raises:
        ValueError: ``out`` holds a run with another recipe, or there is no such checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.yaml"
    newest = state.newest(out / "checkpoints")
    if path.exists() and (newest is not None or (out / "final").exists()):
        before = recipes.parse(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(before, dict):
            raise ValueError(f"{path} is damaged: it is not a recipe; choose another --out")
        refuse_other_recipe(before, recipe, out)
    if resume == "never" and newest is not None:
        raise ValueError(
            f"{out} holds a run already (step {int(newest.name[5:])}): choose another --out, or --resume auto"
        )
    if resume not in ("auto", "never"):
        newest = Path(resume)
        if not (newest / "state.json").is_file():
            raise ValueError(f"--resume: {newest} is not a checkpoint (it has no state.json)")
        own = state.newest(out / "checkpoints")
        if own is not None and int(own.name[5:]) > state.read_facts(newest)["step"]:
            # What is written now would be older than it, and the first to be removed.
            raise ValueError(
                f"--resume: {out} holds {own.name}, which is newer than {newest.name}: choose another --out"
            )
    return newest


def write_down(recipe: Recipe, out: Path, ranks: int) -> None:
    """Writes what the run is and where it runs, once nothing speaks against it."""
    _replace(out / "recipe.yaml", recipe.to_yaml())
    _replace(out / "environment.json", json.dumps(describe() | {"ranks": ranks}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all: half a recipe would refuse the run that is continued after a kill."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def refuse_other_recipe(before: dict[str, Any], recipe: Recipe, where: Path) -> None:
    """Raises ValueError where a run cannot be continued with this recipe, naming the fields."""
    if names := recipes.changed(before, recipe.to_dict()):
        raise ValueError(
            f"{where} holds a run with another recipe ({', '.join(names)}): choose another --out, or delete "
            "it to start over. --resume CHECKPOINT with another --out branches off with another rate, schedule or "
            "number of steps"
        )


def settings(config: Any) -> dict[str, Any]:
    """What of a model's configuration decides its numbers, as a checkpoint gives it back: JSON has no integer keys."""
    left_out = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")
    return dict(json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k not in left_out})))


def refuse_other_run(
    before: dict[str, Any], facts: dict[str, Any], recipe: Recipe, path: Path, out: Path, say: Log
) -> None:
    """Raises ValueError where a checkpoint is of another recipe, text, tokenizer or configuration.

    A run in ``out`` that begins with a checkpoint of another directory branches off: its rate, schedule and number of
    steps are its own.
    """
    names = recipes.changed(before["recipe"], recipe.to_dict())
    own = path.resolve().parent == (out / "checkpoints").resolve()
    if refused := [name for name in names if own or name not in recipes.BRANCHING]:
        raise ValueError(f"{path} is of a run with another recipe ({', '.join(refused)}): use the one it was made with")
    if names:
        say(f"Branching off {path} with other settings: {', '.join(names)}")
    if before["data"] != facts["data"]:
        raise ValueError(
            f"{path} was trained on other text, or with another tokenizer, than {recipe.data.path or 'the corpus'} now "
            "holds (their fingerprints differ): restore that, or choose another --out"
        )
    if names := [
        k for k in {**before["config"], **facts["config"]} if before["config"].get(k) != facts["config"].get(k)
    ]:
        raise ValueError(f"{path} is of another model: {', '.join(sorted(names))} differ; choose another --out")
    if before["code"] != facts["code"]:
        say(f"The checkpoint was written by version {before['code']} of the code, this is {facts['code']}")
