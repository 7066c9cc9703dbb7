"""Recipes: everything a training run depends on, in one TOML file with typed fields.

``load("demo", ["train.steps=100"])`` reads ``training/recipes/demo.toml`` (or a path) and applies overrides.
"""

import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Corpus:
    """Where the text comes from.

    Attributes:
        facts: JSONL of question-and-answer facts, relative to the package ``training`` or absolute
            (:mod:`training.corpus` states the fields).
        evaluation: JSONL of held-out phrasings; never trained on.
        renders: training documents made from each fact.
    """

    facts: str = "corpora/medqa/facts.jsonl"
    evaluation: str = "corpora/medqa/evaluation.jsonl"
    renders: int = 100


@dataclass
class Tokenizer:
    """``vocab_size``: tokens of the byte-level BPE trained on the corpus."""

    vocab_size: int = 3072


@dataclass
class Model:
    """``architecture`` is a model_type of the registry, ``preset`` a classmethod of its configuration, ``changes``
    fields that differ from the preset."""

    architecture: str = "medassist_gpt"
    preset: str = "demo"
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Train:
    """The loop.

    Attributes:
        steps: optimizer steps.
        window: tokens a window.
        batch_size: windows a micro-batch.
        accumulation: micro-batches an optimizer step; the loss is weighted by tokens, so only memory depends on it.
        seed: of weights, documents' order and dropout.
        clip: largest norm of the gradient.
        threads: torch threads; 0 means all cores this process may use.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations on held-out text.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        loss_on: "answers" or "all" tokens.
    """

    steps: int = 1000
    window: int = 256
    batch_size: int = 16
    accumulation: int = 1
    seed: int = 0
    clip: float = 1.0
    threads: int = 0
    log_every: int = 10
    eval_every: int = 200
    checkpoint_every: int = 200
    keep: int = 2
    loss_on: str = "answers"


@dataclass
class Optimizer:
    """Peak learning rate ``lr``, ``warmup`` in steps, ``decay_share`` of all steps at the end."""

    name: str = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = 100
    decay_share: float = 0.3


@dataclass
class Generation:
    """Sampling defaults written to ``generation_config.json``; the engine uses them where a request says nothing."""

    temperature: float = 0.2
    top_p: float = 0.95


@dataclass
class Recipe:
    name: str = "demo"
    corpus: Corpus = field(default_factory=Corpus)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self) -> None:
        for name in ("steps", "window", "batch_size", "accumulation", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self.train, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self.train, name)}")
        if self.train.loss_on not in ("answers", "all"):
            raise ValueError(f"train.loss_on must be 'answers' or 'all', got {self.train.loss_on!r}")
        if self.corpus.renders < 1:
            raise ValueError(f"corpus.renders must be at least 1, got {self.corpus.renders}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe by name or path and applies ``section.field=value`` overrides.

    Raises:
        ValueError: no such recipe, field or a value of the wrong type; the message says which.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {name!r}: give the path of a .toml file, or one of {known}")
    values = {"name": path.stem} | tomllib.loads(path.read_text())
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}")
        target = values
        *sections, last = key.strip().split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override!r}: {section} is not a section")
        target[last] = _parse(text.strip())
    return _build(Recipe, values, "")


def _parse(text: str) -> Any:
    """A TOML value, or the text itself when it is none (so that strings need no quotes)."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown setting {prefix}{unknown[0]}; there are {', '.join(sorted(known))}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        wanted = types[name]
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} is a section; set one of its fields, {prefix}{name}.FIELD=value")
            built[name] = _build(wanted, value, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        base = dict if wanted not in (int, float, str, bool) else wanted
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, base) or (isinstance(value, bool) and base is not bool):
            raise ValueError(f"{prefix}{name} must be of type {base.__name__}, got {value!r}")
        built[name] = value
    return cls(**built)
