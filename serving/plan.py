"""What ``medassist serve`` shall run: which checkpoints, how many engines of each, and how each is started.

Everything that can be known to fail is refused here, before anything is loaded or, at a reload, replaced.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving import fingerprint
from serving.engine import EngineOptions, EngineTracing, on_cpu
from serving.engine_environment import secret_variables
from serving.features import MTP, NAME, NGRAM, Features, assign_adapters, check, default_dtype, split_arguments
from serving.gateway.settings import Model, Settings, load
from serving.gateway.settings_file import explain
from serving.tenants.collector import traces_url

CPU_SEQUENCES = 128  # vLLM's default of --max-num-seqs for a server on CPUs, for each rank; on GPUs it is 256 or more


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        host, port, workers: of the gateway; None: as the configuration has them, or its defaults.
        drain_seconds: how long running requests may take to finish when the server, or an engine, is told to stop;
            None: as the configuration has it, or its default.
        config: the gateway's settings, a YAML file; None: none but these options.
        replicas: engines of each checkpoint; None: 1, or as the configuration says for each.
        latency_target, first_token_target: seconds within which an answer, and its first token, are worth having.
        dtype: of weights and activations; "auto" is float32 on CPUs (bfloat16 is slower on most), bfloat16 on GPUs and
            for quantised weights whose kernels have no float32.
        max_model_len: longest sequence in tokens; the model's own maximum if None.
        eager: without torch.compile; None: eager on CPUs, where compiling costs half a minute and gains nothing.
        threads: CPU threads of each rank of each engine; None: all cores but one, shared between all ranks.
        kv_cache_gib: KV cache of each engine on CPUs, GiB. On GPUs vLLM takes what is free.
        tensor_parallel, pipeline_parallel: ranks that share each layer, and stages of layers, of each engine.
        expert_parallel: ranks hold whole experts of a mixture, instead of a part of each.
        adapters: LoRA adapters, each ``NAME=DIRECTORY`` or ``MODEL:NAME=DIRECTORY``.
        speculative: "ngram", "mtp", or the directory of a checkpoint; drafts ``speculative_tokens`` tokens at a time.
        quantization: vLLM's name of a method that quantises weights while they are loaded.
        vllm_args: further arguments of ``vllm serve``, as in a shell.
        log_dir: folder for the engines' logs and ``engines.json`` (process ids and sockets); None: not kept.
    """

    host: str | None = None
    port: int | None = None
    workers: int | None = None
    config: Path | None = None
    replicas: int | None = None
    latency_target: float | None = None
    first_token_target: float | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    eager: bool | None = None
    threads: int | None = None
    kv_cache_gib: float = 1.0
    drain_seconds: float | None = None
    log_dir: Path | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    adapters: tuple[str, ...] = ()
    speculative: str | None = None
    speculative_tokens: int = 4
    quantization: str | None = None
    vllm_args: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *fingerprint.TOLERANCE):
            raise ValueError(f"--dtype must be auto, {', '.join(fingerprint.TOLERANCE)}; got {self.dtype!r}")
        for option, name in (
            ("kv_cache_gib", "kv-cache-gib"),
            ("latency_target", "latency-target"),
            ("first_token_target", "target-first-token"),
        ):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
        for option in ("threads", "replicas", "workers", "tensor_parallel", "pipeline_parallel", "speculative_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                name = option.replace("_", "-") + ("-size" if "parallel" in option else "")
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.replicas is not None and self.config:
            raise ValueError("--replicas is for checkpoints on the command line; with --config, say replicas there")
        split_arguments(self.vllm_args)


@dataclass(frozen=True)
class Launch:
    """One engine to be started: the checkpoint, how, and which of the model's replicas it is."""

    model: str
    replica: int
    checkpoint: Path
    options: EngineOptions

    def serves(self, other: "Launch") -> bool:
        """Whether an engine launched so does for the other too; that it got another share of the cores is no fault."""
        return replace(self, options=replace(self.options, threads=other.options.threads)) == other


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        settings: the gateway's, where models with a ``checkpoint`` lack their engines yet.
        launches: engines to be started, for those models.
        notes: what to tell the person who serves, a line each.
    """

    settings: Settings
    launches: tuple[Launch, ...]
    notes: tuple[str, ...]


def make(checkpoints: list[Path], options: Options) -> Plan:
    """The plan for the checkpoints of a command line, or for ``options.config``, which is read anew at each call.

    Args:
        checkpoints: checkpoint directories, or ``NAME=DIRECTORY``. A model is called like its directory (or like the
            run, for a run's ``final``). Empty with ``options.config``.

    Raises:
        ValueError: no such checkpoint, two of one name, features that do not fit a checkpoint, or a configuration that
            is not valid.
        OSError: the configuration cannot be read.
    """
    if options.config:
        if checkpoints:
            raise ValueError("checkpoints and --config: name the checkpoints in the configuration, or leave it out")
        settings = load(options.config, local=True)
    else:
        named = name_checkpoints(checkpoints)
        models = {name: Model(checkpoint=path, replicas=options.replicas or 1) for name, path in named.items()}
        settings = Settings(models=models)
    given = {name for name, model in settings.models.items() if "max_concurrency" in model.model_fields_set}
    settings = _with_options(settings, options)
    named = {name: model.checkpoint.resolve() for name, model in settings.models.items() if model.checkpoint}
    for name, path in named.items():
        if not (path / "config.json").is_file():
            raise ValueError(f"models.{name}: {path} is not a checkpoint directory: it has no config.json")
    if options.adapters and not named:
        raise ValueError("--lora: the configuration has no model with a checkpoint")
    engines, notes = plan(named, options, {name: settings.models[name].replicas for name in named})
    if endpoint := settings.tracing.endpoint:
        tracing = EngineTracing(traces_url(endpoint), settings.tracing.headers_env)
        engines = {name: replace(engine, tracing=tracing) for name, engine in engines.items()}
    secrets = secret_variables(settings)
    engines = {name: replace(engine, secrets=secrets) for name, engine in engines.items()}
    for name, engine in engines.items():
        if unknown := set(settings.models[name].adapters) - set(engine.features.adapters):
            adapter = min(unknown)
            raise ValueError(f"models.{name}: where is the adapter {adapter}? Say --lora {name}:{adapter}=DIRECTORY")
    content = settings.model_dump()
    for name, engine in engines.items():
        content["models"][name]["adapters"] = tuple(engine.features.adapters)
        if name not in given and (sequences := _sequences(engine.features)):
            # More would wait in the engine, where nobody can refuse them or put them in order.
            content["models"][name]["max_concurrency"] = sequences
    settings = _validate(content)
    launches = [
        Launch(name, replica, named[name], engines[name])
        for name in named
        for replica in range(settings.models[name].replicas)
    ]
    return Plan(settings, tuple(launches), tuple(notes))


def _sequences(features: Features) -> int | None:
    """Requests that an engine computes at once; None: not known before it has been started."""
    found = CPU_SEQUENCES * features.ranks if on_cpu() else None
    arguments = iter(features.vllm_args)
    for argument in arguments:
        option, equals, value = argument.replace("_", "-").partition("=")
        if option.startswith("--data-parallel"):
            return None  # so many times as many
        if option.startswith("--max-num-s") and "--max-num-seqs".startswith(option):
            value = value if equals else next(arguments, "")
            found = int(value) if value.isdecimal() and int(value) else None  # vLLM itself will refuse other values
    return found


def _with_options(settings: Settings, options: Options) -> Settings:
    """The settings with what the command line says in their place."""
    changes = {"host": options.host, "port": options.port, "workers": options.workers, "drain": options.drain_seconds}
    content = settings.model_dump() | {name: value for name, value in changes.items() if value is not None}
    target = {"first_token": options.first_token_target, "total": options.latency_target}
    for model in content["models"].values():
        model["latency_target"] |= {name: value for name, value in target.items() if value is not None}
    return _validate(content)


def _validate(content: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as e:
        raise ValueError("\n".join(explain(e, Settings))) from None


def name_checkpoints(checkpoints: list[Path]) -> dict[str, Path]:
    """Names for checkpoint directories.

    Raises:
        ValueError: not a checkpoint directory, or a name is used twice.
    """
    named: dict[str, Path] = {}
    for given in checkpoints:
        name, equals, path = str(given).rpartition("=")
        directory = Path(path).resolve()
        if not (directory / "config.json").is_file():
            raise ValueError(f"{path} is not a checkpoint directory: it has no config.json")
        if not equals:
            name = directory.parent.name if directory.name == "final" else directory.name
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a model's name (letters, digits, '.', '_', '-'): say NAME={path}")
        if name in named:
            raise ValueError(f"two checkpoints are called {name!r}: name one with NAME={path}")
        named[name] = directory
    return named


def plan(
    named: Mapping[str, Path], options: Options, replicas: Mapping[str, int] | None = None
) -> tuple[dict[str, EngineOptions], list[str]]:
    """How each model's engines are started, and what to tell about it.

    Args:
        replicas: engines of each model; None: one.

    Raises:
        ValueError: a feature that a checkpoint cannot have.
    """
    cpu = on_cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = sum((replicas or dict.fromkeys(named, 1)).values())
    ranks = count * options.tensor_parallel * options.pipeline_parallel
    adapters = assign_adapters(options.adapters, named)
    draft = options.speculative
    engines: dict[str, EngineOptions] = {}
    notes = []
    for model, checkpoint in named.items():
        features = Features(
            tensor_parallel=options.tensor_parallel,
            pipeline_parallel=options.pipeline_parallel,
            expert_parallel=options.expert_parallel,
            adapters=adapters[model],
            speculative=Path(draft).resolve() if draft and draft not in (NGRAM, MTP) else draft,
            speculative_tokens=options.speculative_tokens,
            quantization=options.quantization,
            vllm_args=split_arguments(options.vllm_args),
        )
        notes += [f"{model}: {note}" for note in check(model, checkpoint, features, cpu, options.max_model_len)]
        if cpu and features.adapters and options.eager is False:
            notes.append(f"{model}: not compiled, because vLLM has no adapters on CPUs when it compiles")
        engines[model] = EngineOptions(
            dtype=options.dtype if options.dtype != "auto" else default_dtype(checkpoint, features, cpu),
            eager=cpu if options.eager is None else options.eager,
            threads=options.threads or max(1, (cores - 1) // max(1, ranks)),
            kv_cache_gib=options.kv_cache_gib,
            max_model_len=options.max_model_len,
            features=features,
        )
    if cpu and ranks > cores:
        notes.append(f"WARNING: {ranks} engine ranks share {cores} cores; they will wait for each other")
    return engines, notes
