"""The metrics file under kills, full disks and resumes; and the trackers' own libraries, offline."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training import trackers
from training.trackers import JsonLines, Trackers, read


def watch(**asked: bool) -> Any:
    return SimpleNamespace(**({"tensorboard": False, "wandb": False, "trackio": False, "project": "tests"} | asked))


def test_a_resumed_file_drops_the_rows_after_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (10, 20, 30):
        log.write(step=step, loss=1 / 3)
    JsonLines(path, resumed_from=20).write(step=30, loss=2.0)
    assert read(path) == [{"step": 10, "loss": 0.333333}, {"step": 20, "loss": 0.333333}, {"step": 30, "loss": 2.0}]
    JsonLines(path)
    assert path.read_text() == ""


def test_a_line_torn_by_a_kill_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.5}\n{"step": 20, "lo')
    assert read(path) == [{"step": 10, "loss": 1.5}]
    JsonLines(path, resumed_from=20).write(step=20, loss=1.0)
    assert path.read_text() == '{"step": 10, "loss": 1.5}\n{"step": 20, "loss": 1.0}\n'
    path.write_text('{"step": 10, "lo\n{"step": 20}\n')
    with pytest.raises(ValueError, match="line 1"):
        read(path)


def test_numbers_are_short_however_deep_and_always_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(step=1, lr=1.23456789e-7, load=[[1 / 3, 0.5]], parts={"a": 1 / 7}, norm=float("inf"))
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 1, "lr": 1.23457e-7, "load": [[0.333333, 0.5]], "parts": {"a": 0.142857}, "norm": None}


FULL = """
import resource, signal, sys
from pathlib import Path
from training.trackers import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a limit of the file's size, which fails as a full disk does
warnings = []
log = JsonLines(Path(sys.argv[1]), warn=warnings.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for step in range(20):
    log.write(step=step, loss=1.5, name="x" * 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write(step=99, loss=1.0)
print(len(warnings), warnings[0])
"""


def test_a_full_disk_costs_rows_and_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("1 "), done.stderr
    assert "run goes on" in done.stdout
    steps = [row["step"] for row in read(path)]
    assert steps == [*range(len(steps) - 1), 99]
    assert 2 < len(steps) < 10


def test_nothing_is_imported_unless_asked(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom types import SimpleNamespace as N\n"
        "from pathlib import Path\nfrom training.trackers import *\n"
        "t = Trackers(Path(sys.argv[1]), N(tensorboard=False, wandb=False, trackio=False, project='x'), {}, 0)\n"
        "t.write(1, loss=2.0); t.close()\n"
        "print([m for m in ('torch', 'tensorboard', 'wandb', 'trackio', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"watch\.wandb.*medassist\[watch\]"):
        Trackers(tmp_path, watch(wandb=True), {})


class Broken:
    """A tracker that fails or hangs where it is told to."""

    def __init__(self, where: str) -> None:
        self.where, self.release = where, threading.Event()
        self._at("open")

    def _at(self, place: str) -> None:
        if self.where == place:
            raise OSError(errno.ENOSPC, "no room")
        if self.where == f"hang in {place}":
            self.release.wait(20)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._at("write")

    def close(self) -> None:
        self._at("close")


@pytest.mark.parametrize("where", ["open", "write", "close", "hang in open", "hang in write", "hang in close"])
def test_a_tracker_that_fails_or_hangs_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setitem(trackers.OPENERS, "trackio", lambda *_: Broken(where))
    monkeypatch.setattr(trackers, "QUEUE", 50)
    told: list[str] = []
    kept = Trackers(tmp_path, watch(trackio=True), {}, warn=told.append)
    begun = time.monotonic()
    for step in range(200):
        kept.write(step + 1, loss=1.0)
        if where == "hang in close":
            time.sleep(0.001)
    kept.close(seconds=0.3)
    assert time.monotonic() - begun < 15  # of the 20 that it hangs
    assert len(read(tmp_path / "metrics.jsonl")) == 200
    assert all("trackio" in text for text in told)
    assert 1 <= len(told) <= 2  # that it cannot keep up is told as well


def test_tensorboard_shows_numbers_once_a_step_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Trackers(tmp_path, watch(tensorboard=True), {"train": {"steps": 30}})
    for step in (10, 20, 30):
        first.write(step, loss=float(step), expert_load=[[0.5, 0.5]])
    first.close()
    again = Trackers(tmp_path, watch(tensorboard=True), {}, resumed_from=20)
    again.write(30, loss=31.0)
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert events.Tags()["scalars"] == ["loss"]
    assert read(tmp_path / "metrics.jsonl")[0]["expert_load"] == [[0.5, 0.5]]


def test_trackio_keeps_a_resumed_run_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys\nfrom types import SimpleNamespace as N\n"
        "from pathlib import Path\nfrom training.trackers import *\n"
        "w = N(tensorboard=False, wandb=False, trackio=True, project='tests')\n"
        "for resumed in (0, 10):\n"
        "    t = Trackers(Path(sys.argv[1]), w, {'a': 1}, resumed)\n"
        "    t.write(resumed + 10, loss=2.0); t.close()\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "runs = S.get_runs('tests'); print(len(runs), [r['step'] for r in S.get_logs('tests', runs[0])])"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.endswith("1 [10, 20]\n"), done.stderr


@pytest.mark.parametrize("variables", [{"WANDB_MODE": "offline"}, {}], ids=["offline", "without a key"])
def test_wandb_writes_to_the_run_and_keeps_its_id(tmp_path: Path, variables: dict[str, str]) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys\nfrom types import SimpleNamespace as N\n"
        "from pathlib import Path\nfrom training.trackers import *\n"
        "w = N(tensorboard=False, wandb=True, trackio=False, project='tests')\n"
        "for resumed in (0, 10):\n"
        "    t = Trackers(Path(sys.argv[1]), w, {'a': 1}, resumed, warn=print)\n"
        "    t.write(resumed + 10, loss=2.0); t.close()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path)} | variables
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert ("has no key" in done.stdout) == (not variables)
    assert "failed" not in done.stdout
    run_id = (tmp_path / "wandb-id.txt").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")} == {f"run-{run_id}"}
