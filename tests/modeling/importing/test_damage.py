"""Damaged and hostile inputs: one paragraph, exit code 2, nothing left behind, nothing executed."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clients import cli
from tests.disks import small_disk
from tests.modeling.importing import damage, published
from tests.modeling.importing.damage import Case
from tests.modeling.importing.published import Sizes

CASES = damage.cases()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def assert_paragraph(err: str, message: str = "") -> None:
    assert err.startswith("medassist: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert 30 < len(err) < 1500
    assert re.search(message, err), err


def test_there_are_more_than_two_hundred_cases() -> None:
    assert len(CASES) > 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged_input_is_refused(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, marker = tmp_path / "source", tmp_path / "marker"
    folder.mkdir()
    given = case.build(folder, marker)
    before = sorted(tmp_path.rglob("*"))
    options = list(given.options)
    if "--tokenizer" not in options:
        options += ["--tokenizer", "none"]
    elif "DEFAULT" in options:
        options = []
    assert run("import", given.source, "--out", tmp_path / "new/out", *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_paragraph(captured.err, case.message)
    assert sorted(tmp_path.rglob("*")) == before
    assert not marker.exists()


@pytest.mark.parametrize("case", CASES[::12], ids=lambda case: case.name)
def test_damaged_input_is_described_or_refused(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, marker = tmp_path / "source", tmp_path / "marker"
    folder.mkdir()
    given = case.build(folder, marker)
    with contextlib.suppress(SystemExit):
        cli.main(["inspect", str(given.source)])
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("seed", range(3))
def test_any_changed_byte_of_a_pickle_ends_in_an_import_or_a_paragraph(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed byte may change nothing that matters, such as a learning rate; it must never do worse."""
    rng = random.Random(seed)
    path, out = tmp_path / "step.pt", tmp_path / "out"
    published.write_training_dictionary(path, published.prefixed(damage.MEDASSIST), damage.NATIVE)
    intact = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        structure = next(e for e in archive.infolist() if e.filename.endswith("data.pkl"))
    codes = []
    for _ in range(25):
        content = bytearray(intact)
        for _ in range(rng.choice((1, 1, 3))):
            content[structure.header_offset + rng.randrange(structure.file_size)] = rng.randrange(256)
        path.write_bytes(content)
        codes.append(run("import", path, "--out", out, "--tokenizer", "none"))
        captured = capsys.readouterr()
        assert codes[-1] in (0, 2)
        if codes[-1] == 2:
            assert_paragraph(captured.err)
            assert not out.exists()
        shutil.rmtree(out, ignore_errors=True)
        assert [p.name for p in tmp_path.iterdir()] == ["step.pt"]
    assert 2 in codes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published.write_folder(tmp_path / "source", damage.MEDASSIST, damage.NATIVE)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling"])
def test_what_is_there_is_not_overwritten(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "directory":
        out.mkdir()
        (out / "precious").touch()
    else:
        out.symlink_to(source if kind == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert run("import", source, "--out", out, "--tokenizer", "none") == 2
    assert_paragraph(capsys.readouterr().err, "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6])
def test_full_disk_leaves_nothing(pages: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are two pages; on larger disks one of the files after them does not fit."""
    with small_disk(tmp_path / "disk", pages * 4096) as disk:
        code = run("import", source, "--out", disk / "out", "--tokenizer", "none")
        err = capsys.readouterr().err
        if pages < 5 or code:
            assert code == 2
            assert_paragraph(err, "disk|space")
            assert list(disk.iterdir()) == []


def in_process(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which may write files of ``limit`` bytes."""
    program = "from clients.cli import main; main()"
    if limit is not None:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " + program
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_file_size_limit_leaves_nothing(source: Path, tmp_path: Path) -> None:
    done = in_process("import", source, "--out", tmp_path / "out", "--tokenizer", "none", limit=3000)
    assert (done.returncode, done.stdout) == (2, "")
    assert_paragraph(done.stderr, "ulimit")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_hostile_file_in_a_real_process(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"embed.weight": damage.Call(os.system, f"touch {marker}")}, tmp_path / "a.pt")
    done = in_process("import", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert_paragraph(done.stderr, r"(posix|os)\.system")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """140 MB, of which the largest tensor is 8 MB."""
    sizes = Sizes(vocab=2000, d=512, heads=8, kv=4, ff=2048, layers=9, ctx=32)
    folder = tmp_path_factory.mktemp("large")
    state = published.prefixed(published.medassist(sizes))
    yield published.write_training_dictionary(folder / "step.pt", state, published.native(sizes))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_interrupted_import_leaves_nothing(number: int, code: int, large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = "from clients.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, "import", large, "--out", out, "--tokenizer", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/checkpoint/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "Traceback" not in err
    assert not out.exists()
    if number == signal.SIGKILL:  # cannot be caught: the next import of that name cleans up
        assert [p.name.rpartition("-")[0] for p in tmp_path.iterdir()] == [".out.partial"]
        small = published.write_folder(tmp_path / "small", damage.MEDASSIST, damage.NATIVE)
        assert run("import", small, "--out", out, "--tokenizer", "none") == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_memory_stays_near_the_largest_tensor(large: Path, tmp_path: Path) -> None:
    program = f"""
import modeling.importing
from modeling.medassist.model import MedAssistGPTForCausalLM
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
modeling.importing.import_checkpoint({str(large)!r}, {str(tmp_path / "out")!r}, tokenizer="none")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 80  # MiB; the file has 140
