"""Where a run's figures go: ``metrics.jsonl`` always; TensorBoard, Weights & Biases and trackio when asked.

The file is the record, and the others are shown what is written to it. Each of them has a thread and a queue, so that
none can hold up the run, and what fails in one becomes one warning. Without a network W&B writes to the run's directory
(``wandb sync`` sends it later) and trackio to its own folder.
"""

import importlib.util
import json
import math
import os
import queue
import secrets
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

QUEUE = 10_000  # lines that a tracker may be behind
CLOSING_SECONDS = 60.0  # for all trackers together to write what they have

Warn = Callable[[str], None]


class Settings(Protocol):
    """What is read of the recipe's section ``watch``."""

    @property
    def tensorboard(self) -> bool: ...
    @property
    def wandb(self) -> bool: ...
    @property
    def trackio(self) -> bool: ...
    @property
    def project(self) -> str: ...


class JsonLines:
    """Appends rows to a file of JSON lines that survives what runs go through.

    When a run is resumed, rows past the step resumed from are dropped, and so is a last line that a kill has torn. A
    disk without room costs rows, not the run, and leaves no half of one. Numbers are rounded to 6 significant digits;
    those that are not finite are written as null, which is all that JSON has for them.

    Args:
        resumed_from: the last step whose rows are kept; 0 starts the file anew.
        warn: told once if rows cannot be written.
    """

    def __init__(self, path: Path, resumed_from: int = 0, warn: Warn = warnings.warn) -> None:
        self.path, self._warn, self._failed = path, warn, False
        kept = [row for row in read(path) if row.get("step", 0) <= resumed_from] if resumed_from else []
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)
        self._whole = self._file.tell()

    def write(self, **values: Any) -> None:
        line = (json.dumps(_plain(values)) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError("no room for a whole line")
            self._whole += len(line)
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._whole)
            if not self._failed:
                self._warn(f"{self.path} cannot be written ({error}): the run goes on, and rows are missing from it")
            self._failed = True

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without a torn last one; none if there is no such file.

    Raises:
        ValueError: another line that is not a JSON object.
    """
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "{}")
        except ValueError as error:
            if number == len(lines):  # nothing, unless it is torn: a whole line ends with a newline
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if row:
            rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


class Trackers:
    """The metrics file of a run, and the trackers that the recipe asks for.

    Args:
        out: the run's directory.
        watch: which trackers, and the project's name.
        config: the recipe, shown by the trackers; must hold no secrets.
        resumed_from: steps that the run had made when this process began.
        warn: told what fails, once for each tracker.

    Raises:
        ValueError: a tracker that is not installed.
    """

    def __init__(
        self, out: Path, watch: Settings, config: dict[str, Any], resumed_from: int = 0, warn: Warn = warnings.warn
    ) -> None:
        asked = [name for name in OPENERS if getattr(watch, name)]
        for name in asked:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"watch.{name} needs {name}: pip install 'medassist[watch]', or set it to false")
        self._warn = warn
        self.log = JsonLines(out / "metrics.jsonl", resumed_from, warn)
        self._workers = [
            _Worker(name, lambda open_=OPENERS[name]: open_(out, watch, config, resumed_from, warn), warn)  # type: ignore[misc]
            for name in asked
        ]

    def write(self, step: int, **values: Any) -> None:
        """One row. Trackers are shown its numbers; lists, such as experts' loads, are in the file alone."""
        self.log.write(step=step, **values)
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.put(step, numbers)

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """Lets the trackers write what they have, for so many seconds at most."""
        self.log.close()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(seconds / len(self._workers))
            if worker.is_alive():
                self._warn(f"{worker.name} has not finished after {seconds:.0f} s and is left behind")


class Tracker(Protocol):
    """What a tracker's library can do, in one shape."""

    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _Worker(threading.Thread):
    """Opens a tracker and feeds it, away from the run. A daemon: what hangs in it does not hold up the exit."""

    def __init__(self, name: str, open_: Callable[[], Tracker], warn: Warn) -> None:
        super().__init__(name=name, daemon=True)
        self._open, self._warn = open_, warn
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUE)
        self._overflowed = False
        self.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        try:
            if self.is_alive():
                self._rows.put_nowait((step, values))
        except queue.Full:
            if not self._overflowed:
                self._warn(f"{self.name} cannot keep up: rows are left out there; metrics.jsonl has them all")
            self._overflowed = True

    def stop(self) -> None:
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            return  # it hangs, and is left behind

    def run(self) -> None:
        try:
            tracker = self._open()
            while row := self._rows.get():
                tracker.write(*row)
            tracker.close()
        # BaseException: a library that calls exit() in here must not take the warning with it.
        except BaseException as error:
            self._warn(f"{self.name} failed ({type(error).__name__}: {error}); the run goes on without it")


class _TensorBoard:
    def __init__(self, out: Path, watch: Settings, config: dict[str, Any], resumed_from: int, warn: Warn) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps made again after a resume take the place of those recorded before.
        self._writer = SummaryWriter(out / "tensorboard", purge_step=resumed_from + 1 if resumed_from else None)
        if not resumed_from:
            self._writer.add_text("recipe", f"```\n{json.dumps(config, indent=1)}\n```")

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, out: Path, watch: Settings, config: dict[str, Any], resumed_from: int, warn: Warn) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            warn("wandb has no key (WANDB_API_KEY): it writes to the run's directory; `wandb sync` sends it later")
            mode = "offline"
        self._run = wandb.init(
            project=watch.project,
            name=out.name,
            id=_run_id(out / "wandb-id.txt", bool(resumed_from)),
            dir=str(out),
            config=config,
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            # The terminal is the run's own, and the command line may hold what is nobody's business.
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        # Its own step may never go back, as it does for a run that is resumed from an earlier one.
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, out: Path, watch: Settings, config: dict[str, Any], resumed_from: int, warn: Warn) -> None:
        import trackio

        name = f"{out.name}-{_run_id(out / 'trackio-id.txt', bool(resumed_from))}"
        # It prints a few lines; sys.stdout is the whole process' and cannot be turned off for this thread alone.
        self._run = trackio.init(
            watch.project, name, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _run_id(path: Path, resumed: bool) -> str:
    """The run's id at a tracker, kept beside the run so that it is the same when the run is resumed."""
    if not (resumed and path.exists()):
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
