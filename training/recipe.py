"""Recipes: everything a training run depends on, in one YAML file with typed fields.

``load("demo", ["steps=100"])`` reads ``training/recipes/demo.yaml`` (or a path) and applies overrides. A field is named
by its section (``train.steps``), or alone where only one section has it (``steps``).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"

# Fields that a run may be continued with changed: they decide what is written and shown, never a number of the model.
CHANGEABLE = {
    "train.threads", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep", "train.keep_best",
    "train.keep_every", "train.async_checkpoints", "train.activation_checkpointing", "train.loss_chunk",
    "train.eval_windows", "train.max_skipped", "parallel.strategy", "parallel.tensor",
    "data.path", "data.verify", "name",
}  # fmt: skip
CHANGEABLE_SECTIONS = {"watch", "upload", "generation"}
# What a run that branches off another one's checkpoint may have of its own besides: it is another run from there on.
BRANCHING = {"train.steps", "train.clip", "train.z_loss", "train.compile", "train.precision"} | {
    f"optimizer.{name}"
    for name in ("lr", "weight_decay", "beta1", "beta2", "schedule", "warmup", "decay_share", "final_lr")
}

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    path: str = Field("", description="directory written by `medassist data prepare`; empty: the corpus below")
    windows: Literal["documents", "stream"] = Field(
        "documents",
        description="'documents': whole documents side by side in a window, none sees another, long ones are cut; "
        "'stream': consecutive stretches of all text, in which documents do see each other",
    )
    verify: bool = Field(True, description="compare every shard with its SHA-256 at the start")


class Corpus(Section):
    facts: str = Field(
        "corpora/medqa/facts.jsonl",
        description="JSONL of question-and-answer facts, absolute or relative to the package `training`",
    )
    evaluation: str = Field("corpora/medqa/evaluation.jsonl", description="JSONL of held-out phrasings")
    renders: Positive = Field(100, description="training documents made from each fact")


class Tokenizer(Section):
    vocab_size: Positive = Field(3072, description="tokens of the byte-level BPE trained on the corpus")


class Model(Section):
    architecture: str = Field("medassist_gpt", description="model_type of the registry (`medassist models`)")
    preset: str = Field("demo", description="size: a classmethod of the architecture's configuration")
    changes: dict[str, Any] = Field(default_factory=dict, description="settings that differ from the preset")


class Train(Section):
    steps: Positive = Field(1000, description="optimizer steps")
    window: Positive = Field(256, description="tokens a window")
    batch_size: Positive = Field(16, description="windows at a time, on one rank")
    accumulation: Positive = Field(
        1, description="a step is batch_size * accumulation windows, over all ranks; only memory depends on the factors"
    )
    seed: NotNegative = Field(0, description="of weights, order of windows and dropout")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest norm of the gradient")
    threads: NotNegative = Field(0, description="CPU threads of a rank; 0: all cores this process may use")
    loss_on: Literal["all", "answers"] = Field("all", description="tokens the loss is taken on")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; weights stay float32. auto: bfloat16 on GPUs that have it"
    )
    compile: bool = Field(False, description="compile every layer (torch.compile)")
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of layers and compute them again in the backward pass"
    )
    loss_chunk: NotNegative = Field(0, description="rows of logits at a time in the loss; 0: chosen by vocabulary")
    z_loss: Annotated[float, Field(ge=0)] = Field(0.0, description="factor of the squared log-normaliser in the loss")
    max_skipped: Positive = Field(20, description="steps in a row without a finite gradient after which the run ends")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Positive = Field(200, description="steps between evaluations on held-out text")
    eval_windows: NotNegative = Field(0, description="windows of an evaluation; 0: all held-out text")
    checkpoint_every: Positive = Field(200, description="steps between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(False, description="keep the checkpoint with the lowest held-out loss too")
    keep_every: NotNegative = Field(0, description="keep every checkpoint whose step this divides; 0: none")
    async_checkpoints: bool = Field(True, description="write checkpoints while training goes on")


class Optimizer(Section):
    name: Literal["muon", "adamw"] = Field("muon", description="Muon on the layers' matrices, or AdamW on everything")
    lr: Annotated[float, Field(gt=0, le=10)] = Field(3e-3, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled; not of norms and biases")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="AdamW's")
    schedule: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, plateau, linear decay; or cosine")
    warmup: NotNegative = Field(100, description="steps until the peak")
    decay_share: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="wsd: share of all steps, at the end")
    final_lr: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="learning rate at the end, of the peak")


class Parallel(Section):
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="several ranks (torchrun): ddp copies the model, fsdp shards it; auto: what fits"
    )
    tensor: Positive = Field(1, description="ranks that share each layer (tensor and expert parallelism)")


class Watch(Section):
    tensorboard: bool = Field(False, description="write TensorBoard events to RUN/tensorboard")
    wandb: bool = Field(False, description="log to Weights & Biases; offline with WANDB_MODE=offline")
    trackio: bool = Field(False, description="log to trackio, which is local")
    project: str = Field("medassist", description="name of the project there")
    prompts: list[str] = Field(default_factory=list, description="continued after each evaluation, into samples.jsonl")
    sample_tokens: Positive = Field(48, description="longest continuation")
    peak_tflops: Annotated[float, Field(ge=0)] = Field(
        0.0, description="dense peak of one device for MFU; 0: from the table of known GPUs (training/flops.py)"
    )


class Upload(Section):
    repo: str = Field("", description="Hub repository (OWNER/NAME) that final/ is uploaded to; empty: none")
    private: bool = Field(True, description="make the repository private when it is created")
    license: str = Field("", description="of the weights, as the Hub spells it (apache-2.0); for the model card")


class Generation(Section):
    """Sampling defaults written to ``generation_config.json``; the engine uses them where a request says nothing."""

    temperature: Annotated[float, Field(ge=0)] = Field(0.2, description="sampling default of the served model")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="sampling default of the served model")


class Recipe(Section):
    name: str = Field("demo", description="name of the run")
    about: str = Field("", description="what it is for, what it costs and how long it takes")
    data: Data = Field(default_factory=Data)
    corpus: Corpus = Field(default_factory=Corpus)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    parallel: Parallel = Field(default_factory=Parallel)
    watch: Watch = Field(default_factory=Watch)
    upload: Upload = Field(default_factory=Upload)
    generation: Generation = Field(default_factory=Generation)

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if name in _sections() and not isinstance(value, dict | Section):
                raise ValueError(f"{name} is a section; set one of its fields, {name}.FIELD=value")
        return values

    @property
    def windows_a_step(self) -> int:
        return self.train.batch_size * self.train.accumulation

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _sections() -> dict[str, type[Section]]:
    return {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def described() -> Iterator[tuple[str, str, Any, str]]:
    """Every field: ``(section.name, type, default, meaning)``."""
    for section, cls in _sections().items():
        for name, field in cls.model_fields.items():
            kind = field.annotation
            said = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(kind)).replace("Literal", "").strip("[]")
            yield f"{section}.{name}", said, field.get_default(call_default_factory=True), field.description or ""


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe by name or path and applies ``field=value`` overrides.

    Raises:
        ValueError: no such recipe, field, or a value that does not fit; the message says which.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"no recipe {name!r}: give the path of a .yaml file, or one of {known}")
    try:
        values = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, such as `train:` with `steps: 100` below it")
    values = {"name": path.stem} | {key: ({} if value is None else value) for key, value in values.items()}
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}")
        target = values
        *sections, last = _qualified(key.strip()).split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override!r}: {section} is not a section")
        target[last] = _value(text.strip(), sections, last)
    return build(values)


def build(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        ValueError: an unknown field or a value that does not fit; the message names the field.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_explained(e) for e in error.errors())) from None


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields, as ``section.name``, in which two recipes differ and that a run cannot be continued without."""
    old, new = ({**r, "train": {**r.get("train", {}), "batch_size": None, "accumulation": None,
                                "batch_size * accumulation": r.get("train", {}).get("batch_size", 0)
                                * r.get("train", {}).get("accumulation", 0)}} for r in (old, new))  # fmt: skip
    names = {f"{s}.{n}" if isinstance(v, dict) else s for r in (old, new) for s, v in r.items()
             for n in (v if isinstance(v, dict) else [s])}  # fmt: skip
    return sorted(
        name
        for name in names - CHANGEABLE - {"about"}
        if name.split(".")[0] not in CHANGEABLE_SECTIONS and _field(old, name) != _field(new, name)
    )


def _field(recipe: dict[str, Any], name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _explained(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    section = where.rpartition(".")[0]
    cls = _sections().get(section, Recipe) if section else Recipe
    if error["type"] == "extra_forbidden":
        return f"unknown setting {where}; there are {', '.join(sorted(cls.model_fields))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    said = error["msg"].removeprefix("Input should be ")
    return f"{where} must be {said}, got {error['input']!r}"


def _qualified(key: str) -> str:
    """``steps`` -> ``train.steps``, where one section alone has such a field."""
    if "." in key or key in Recipe.model_fields:
        return key
    having = [section for section, cls in _sections().items() if key in cls.model_fields]
    if len(having) > 1:
        raise ValueError(f"--set {key}: say which, {' or '.join(f'{section}.{key}' for section in having)}")
    if not having:
        raise ValueError(
            f"unknown setting {key}; `medassist train --help` lists all (the model's own are model.changes.NAME)"
        )
    return f"{having[0]}.{key}"


def _value(text: str, sections: list[str], name: str) -> Any:
    """A YAML value; the text itself where the field is a string, or where it is no YAML."""
    cls = Recipe if not sections else _sections().get(sections[0]) if len(sections) == 1 else None
    field = cls.model_fields.get(name) if cls else None
    try:
        value = parse(text, "--set")
    except ValueError:
        return text
    wants_text = field is not None and field.annotation is str
    return text if wants_text and not isinstance(value, str) else "" if value is None else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (``4e-3`` is one), and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of a recipe: refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for one of these numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def parse(text: str, where: str) -> Any:
    """YAML.

    Raises:
        ValueError: it is not; the message gives the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{where}: {error}") from None
