"""Recipes: typed fields, overrides, and messages that name the setting."""

from pathlib import Path

import pytest

from modeling import registry
from training import recipe
from training.corpus import resolve


@pytest.mark.parametrize("path", sorted(recipe.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_names_things_that_exist(path: Path) -> None:
    loaded = recipe.load(path.stem)
    assert loaded.name == path.stem
    assert resolve(loaded.corpus.facts).exists()
    assert resolve(loaded.corpus.evaluation).exists()
    config = getattr(registry.get(loaded.model.architecture).config_class(), loaded.model.preset)
    assert config(**loaded.model.changes).max_position_embeddings >= loaded.train.window


def test_file_and_overrides_give_typed_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nsteps = 5\nwindow = 64\n[model]\npreset = "tiny"\n')
    overrides = [
        "train.steps=7", "optimizer.lr=1e-2", "optimizer.weight_decay=1", "optimizer.name=adamw",
        "corpus.facts = /data/my=facts.jsonl", 'train.loss_on="all"', "model.changes.residual_dropout=0.1",
        "model.changes.rope_layout=flattened",
    ]  # fmt: skip
    loaded = recipe.load(str(path), overrides)
    assert (loaded.name, loaded.model.preset, loaded.train.steps, loaded.train.window) == ("mine", "tiny", 7, 64)
    assert (loaded.optimizer.lr, loaded.optimizer.name, loaded.train.loss_on) == (0.01, "adamw", "all")
    assert isinstance(loaded.optimizer.weight_decay, float)
    assert loaded.corpus.facts == "/data/my=facts.jsonl"
    assert loaded.model.changes == {"residual_dropout": 0.1, "rope_layout": "flattened"}
    assert loaded.train.batch_size == recipe.Train().batch_size  # a default


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=7", r"train\.stesp.*steps"),
        ("trian.steps=7", "trian"),
        ("train.steps=many", r"train\.steps must be of type int, got 'many'"),
        ("train.steps=1.5", r"train\.steps must be of type int"),
        ("train.steps=true", r"train\.steps must be of type int"),
        ("optimizer.lr=fast", r"optimizer\.lr must be of type float"),
        ("model.preset=3", r"model\.preset must be of type str"),
        ("model.changes=3", r"model\.changes must be of type dict"),
        ("train=7", "train is a section"),
        ("name.first=demo", "name is not a section"),
        ("train.steps", "key=value"),
        ("train.steps=0", r"train\.steps must be at least 1"),
        ("train.accumulation=-1", r"train\.accumulation must be at least 1"),
        ("corpus.renders=0", r"corpus\.renders must be at least 1"),
        ("train.loss_on=questions", r"train\.loss_on"),
    ],
)
def test_wrong_setting_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.load("demo", [override])


def test_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dmeo'.*demo"):
        recipe.load("dmeo")


def test_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml"):
        recipe.load(str(tmp_path / "mine.toml"))
