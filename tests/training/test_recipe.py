"""Recipes: typed fields, overrides, and messages that name the setting."""

from pathlib import Path
from typing import Any

import pytest

from modeling import registry
from training import recipe
from training.corpus import resolve


@pytest.mark.parametrize("path", sorted(recipe.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_names_things_that_exist(path: Path) -> None:
    loaded = recipe.load(path.stem)
    assert loaded.name == path.stem
    assert resolve(loaded.corpus.facts).exists()
    assert resolve(loaded.corpus.evaluation).exists()
    config = registry.get(loaded.model.architecture).presets()[loaded.model.preset]
    assert config(**loaded.model.changes).max_position_embeddings >= loaded.train.window


def write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_file_and_overrides_give_typed_values(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 5\n  window: 64\nmodel: {preset: tiny}\nwatch:\n")
    overrides = [
        "train.steps=7", "optimizer.lr=1e-2", "optimizer.weight_decay=1", "optimizer.name=adamw",
        "corpus.facts = /data/my=facts.jsonl", 'train.loss_on="answers"', "model.changes.residual_dropout=0.1",
        "model.changes.rope_layout=flattened", "watch.prompts=[Hello, 'a: b']", "about=7", "watch.project=1e3",
    ]  # fmt: skip
    loaded = recipe.load(path, overrides)
    assert (loaded.name, loaded.model.preset, loaded.train.steps, loaded.train.window) == ("mine", "tiny", 7, 64)
    assert (loaded.optimizer.lr, loaded.optimizer.name, loaded.train.loss_on) == (0.01, "adamw", "answers")
    assert isinstance(loaded.optimizer.weight_decay, float)
    assert loaded.corpus.facts == "/data/my=facts.jsonl"
    assert loaded.model.changes == {"residual_dropout": 0.1, "rope_layout": "flattened"}
    assert loaded.watch.prompts == ["Hello", "a: b"]
    assert loaded.watch.project == "1e3"  # text, as the field is
    assert loaded.train.batch_size == recipe.Train().batch_size  # a default
    assert recipe.load(write(tmp_path, loaded.to_yaml())) == loaded


def test_a_field_alone_is_enough_where_one_section_has_it() -> None:
    loaded = recipe.load("demo", ["steps=40", "lr=1e-3", "data.path=d", "preset=tiny", "project=mine"])
    assert (loaded.train.steps, loaded.optimizer.lr, loaded.data.path) == (40, 0.001, "d")
    assert (loaded.model.preset, loaded.watch.project) == ("tiny", "mine")
    assert recipe.load("demo", ["name=other"]).name == "other"  # the recipe's own field, not optimizer.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=7", r"train\.stesp.*steps"),
        ("stesp=7", r"unknown setting stesp"),
        ("trian.steps=7", "trian"),
        ("train.steps=many", r"train\.steps must be a valid integer, got 'many'"),
        ("train.steps=1.5", r"train\.steps must be a valid integer"),
        ("train.steps=true", r"train\.steps must be a valid integer"),
        ("train.steps=", r"train\.steps must be a valid integer"),
        ("optimizer.lr=fast", r"optimizer\.lr must be a valid number, got 'fast'"),
        ("optimizer.lr=0", r"optimizer\.lr must be greater than 0"),
        ("optimizer.beta2=1.0", r"optimizer\.beta2 must be less than 1"),
        ("model.changes=3", r"model\.changes must be a valid dictionary"),
        ("train=7", "train is a section"),
        ("name.first=demo", "name is not a section"),
        ("train.steps", "key=value"),
        ("train.steps=0", r"train\.steps must be greater than or equal to 1"),
        ("train.accumulation=-1", r"train\.accumulation must be greater than or equal to 1"),
        ("corpus.renders=0", r"corpus\.renders must be greater than or equal to 1"),
        ("train.loss_on=questions", r"train\.loss_on must be 'all' or 'answers'"),
        ("watch.prompts=hello", r"watch\.prompts must be a valid list"),
    ],
)
def test_wrong_setting_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.load("demo", [override])


def test_a_field_that_several_sections_have_is_refused_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.Upload.model_fields, "steps", recipe.Train.model_fields["steps"])  # today none has one
    with pytest.raises(ValueError, match=r"steps: say which, train\.steps or upload\.steps"):
        recipe.load("demo", ["steps=4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 5\n  window: 64\n  steps: 6\n", r"mine\.yaml, line 4: steps is given twice"),
        ("train:\n  steps: 5\ntrain:\n  window: 6\n", r"mine\.yaml, line 3: train is given twice"),
        ("train:\n  steps: 5\n window: 6\n", r"mine\.yaml, line 3: "),
        ("train: {steps: 5\n", r"mine\.yaml, line 2: "),
        ("train:\n  steps: !!python/object/apply:os.getcwd []\n", r"mine\.yaml, line 2: .*python/object"),
        ("? [a, b]\n: 1\n", r"mine\.yaml, line 1: .*unhashable"),
        ("about: a\x07b\n", r"mine\.yaml: .*not allowed"),
        ("1: 2\n", r"1\b.*string"),
        ("- train\n", r"mine\.yaml: a recipe is a mapping"),
        ("", r"mine\.yaml: a recipe is a mapping"),
        ("train: 3\n", "train is a section"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.load(write(tmp_path, text))


def test_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dmeo'.*demo"):
        recipe.load("dmeo")


def test_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        recipe.load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.batch_size=4", "train.accumulation=6"], []),
        (["train.batch_size=4"], ["train.batch_size * accumulation"]),
        (["eval_every=1", "checkpoint_every=1", "threads=3", "project=x", "repo=a/b", "temperature=0", "name=x"], []),
        (["optimizer.lr=1", "model.changes.residual_dropout=0.1"], ["model.changes", "optimizer.lr"]),
        (["train.seed=1", "train.steps=9", "loss_on=answers"], ["train.loss_on", "train.seed", "train.steps"]),
    ],
)
def test_what_a_run_cannot_be_continued_with(tmp_path: Path, overrides: list[str], names: list[str]) -> None:
    path = write(tmp_path, "train: {batch_size: 8, accumulation: 3}\n")
    old, new = recipe.load(path).to_dict(), recipe.load(path, overrides).to_dict()
    assert recipe.changed(old, new) == recipe.changed(new, old) == names


def test_every_field_is_described() -> None:
    rows: list[tuple[str, str, Any, str]] = list(recipe.described())
    assert all(kind and meaning for _, kind, _, meaning in rows)
    assert ("train.steps", "int", 1000, "optimizer steps") in rows
    loaded = recipe.Recipe().to_dict()
    fields = {f"{section}.{name}" for section, of in loaded.items() if isinstance(of, dict) for name in of}
    assert fields == {name for name, *_ in rows}
