"""What a run reports: throughput, time left, and a line of JSON for each logged step."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Meter:
    """Tokens per second and seconds left, over the time spent training (evaluation and checkpoints left out).

    Args:
        steps: steps of the whole run.
        done: steps made before this process.
        clock: seconds; replaceable in tests.
    """

    def __init__(self, steps: int, done: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps, self.first, self.step = steps, done, done
        self.tokens = 0
        self.seconds = 0.0
        self._clock = clock
        self._since = clock()

    def pause(self) -> None:
        self.seconds += self._clock() - self._since

    def resume(self) -> None:
        self._since = self._clock()

    def update(self, tokens: int) -> None:
        """One optimizer step over ``tokens`` input tokens is done."""
        now = self._clock()
        self.seconds += now - self._since
        self._since = now
        self.tokens += tokens
        self.step += 1

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        made = self.step - self.first
        return (self.steps - self.step) * self.seconds / made if made else 0.0


class MetricsLog:
    """Appends JSON lines to a file; when resumed, lines past the step resumed from are dropped."""

    def __init__(self, path: Path, resumed_from: int = 0) -> None:
        kept = []
        if path.exists() and resumed_from:
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resumed_from]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(_rounded(values)) + "\n")
        self._file.flush()


def _rounded(value: Any) -> Any:
    """The same with every number in it rounded to 5 places."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value
