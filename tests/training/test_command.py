"""What the real command says to wrong input and to a full disk: one paragraph, exit code 2, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clients import cli
from tests.disks import small_disk
from tests.training.lines import write_recipe
from training import state
from training.run import Stopped

SHORT = ("--set=steps=4", "--set=checkpoint_every=2", "--set=eval_every=4")


def command(recipe: Path | str, out: Path, *more: str) -> int:
    """The command's exit code."""
    threads = torch.get_num_threads()
    try:
        cli.main(["train", str(recipe), "--out", str(out), *more])
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        torch.set_num_threads(threads)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data set and a finished run of four steps."""
    folder = tmp_path_factory.mktemp("made")
    assert command(write_recipe(folder), folder / "run", *SHORT) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy to break, of a run that has not ended."""
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("final"))
    recipe = tmp_path / "copy/lines.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


def refused(capsys: pytest.CaptureFixture[str], recipe: Path | str, out: Path, *more: str) -> str:
    """The one paragraph that the command ends with."""
    capsys.readouterr()
    assert command(recipe, out, *more) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("medassist: ")
    assert "\n" not in said
    assert not (out / "final").exists()
    return said


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json"])
def test_flipped_bit_in_a_checkpoint(file: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = copied / "run/checkpoints/step-00000004"
    flip_a_bit(newest / file)
    said = refused(capsys, copied / "lines.yaml", copied / "run", *SHORT)
    assert said.startswith(f"medassist: {newest / file} ")
    assert f"Delete the folder {newest} to go on from the checkpoint before it" in said
    shutil.rmtree(newest)
    assert command(copied / "lines.yaml", copied / "run", *SHORT) == 0
    assert "from step 2" in capsys.readouterr().out


def test_flipped_bit_in_a_shard(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("validation", "train"):
        flip_a_bit(copied / "lines" / split / "00000.shard")
        said = refused(capsys, copied / "lines.yaml", copied / "new", *SHORT)
        assert f"{copied / 'lines' / split / '00000.shard'} is damaged" in said


def test_missing_data(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = copied / "lines.yaml"
    assert f"data.path: {copied / 'nowhere'} is not a directory" in refused(
        capsys, recipe, copied / "new", f"--set=data.path={copied / 'nowhere'}"
    )
    (copied / "lines/train/00000.shard").unlink()
    assert f"{copied / 'lines/train/00000.shard'} is missing" in refused(capsys, recipe, copied / "new")
    shutil.rmtree(copied / "lines/train")
    assert f"{copied / 'lines/train'} has no manifest.json" in refused(capsys, recipe, copied / "new")


def test_other_data_is_not_continued_with(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "lines/validation")
    assert "was trained on other text" in refused(capsys, copied / "lines.yaml", copied / "run", *SHORT)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("model.preset=huge", "model.preset"),
        ("model.architecture=none", "none"),
        ("model.changes.hidden=3", "model.changes.hidden"),
        ("model.changes.num_heads=many", "num_heads"),
        ("train.window=100000", "train.window"),
        ("train.stepz=4", "train.stepz"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("loss_on=answers", "train.loss_on"),
        ("parallel.tensor=2", "parallel.tensor"),
    ],
)
def test_wrong_settings(more: str, named: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, made / "lines.yaml", tmp_path / "new", f"--set={more}")
    assert not (tmp_path / "new/checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: steps is given twice"),
        ("train: [\n", "wrong.yaml, line 2"),
        ("train: 4\n", "train is a section"),
        ("- 3\n", "a recipe is a mapping"),
        ("trian:\n  steps: 1\n", "trian"),
        (b"\xff\xfe\x00", "wrong.yaml"),
        ("name: \x00\n", "wrong.yaml"),
    ],
)
def test_wrong_recipes(text: str | bytes, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert named in refused(capsys, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nosuch", str(tmp_path / "nosuch.yaml")):
        said = refused(capsys, name, tmp_path / "run")
        assert f"no recipe {name!r}" in said
        assert "demo" in said


def test_a_stop_does_not_claim_to_be_saved(tmp_path: Path) -> None:
    newest = tmp_path / "step-00000006"
    assert str(Stopped(15, 6, newest)) == f"stopped by SIGTERM after step 6, which is saved in {newest}"
    assert f"step 9, which could not be saved (the newest checkpoint: {newest})" in str(Stopped(2, 9, newest))
    assert "(the newest checkpoint: none)" in str(Stopped(2, 9, None))


def run(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clients.cli", "train", str(recipe), "--out", str(out), "--set=steps=12",
         "--set=checkpoint_every=3", "--set=keep=1", "--set=log_every=3"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_full_disk(made: Path, tmp_path: Path) -> None:
    """A disk for one checkpoint, not for two: the first is kept, the run goes on, and what is missing can be redone."""
    size = sum(file.stat().st_size for file in (made / "run/checkpoints/step-00000004").iterdir())
    with small_disk(tmp_path / "disk", size + 250_000) as disk:
        full = run(made / "lines.yaml", disk / "run")
        said = " ".join(full.stdout.split())
        for step in (6, 9, 12):
            assert f"The checkpoint of step {step} could not be written (No space left on device" in said
        assert f"the last good one is {disk}/run/checkpoints/step-00000003" in said
        assert full.returncode == 2  # final/ has no room either
        assert f"medassist: {disk}/run/final could not be written: " in full.stderr
        assert "Traceback" not in full.stderr
        assert list((disk / "run").glob("final*")) == []
        assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["step-00000003"]
        assert state.read_facts(disk / "run/checkpoints/step-00000003")["step"] == 3

        subprocess.run(["mount", "-o", f"remount,size={8 * size}", disk], check=True)
        again = run(made / "lines.yaml", disk / "run")
        assert again.returncode == 0, again.stderr
        assert "from step 3" in again.stdout
        assert (disk / "run/final/model.safetensors").exists()
