"""What an engine does beyond serving one checkpoint on one device: parallelism, adapters, speculation, quantisation.

Everything that can be known to fail is refused here, before anything is loaded, from ``config.json``, the headers of
the weights and the adapters' own files. Standard library only.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.adapter import Adapter
from modeling.adapter import read as read_adapter
from modeling.ranks import check as check_ranks
from modeling.registry import REGISTRY

NGRAM, MTP = "ngram", "mtp"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
# The largest ranks that vLLM can be told to make room for.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Options of vLLM 0.32 that --vllm-args may not hold. Those that an option of `medassist serve` stands for:
_OURS = {
    "--model": "CHECKPOINT", "--served-model-name": "NAME=CHECKPOINT", "--host": "--host", "--port": "--port",
    "--dtype": "--dtype", "--max-model-len": "--max-model-len", "--enforce-eager": "--eager",
    "--kv-cache-memory-bytes": "--kv-cache-gib", "--lora-modules": "--lora", "--enable-lora": "--lora",
    "--quantization": "--quantization", "-q": "--quantization", "--quantization-config": "--quantization",
    "--tensor-parallel-size": "--tensor-parallel-size", "-tp": "--tensor-parallel-size",
    "--pipeline-parallel-size": "--pipeline-parallel-size", "-pp": "--pipeline-parallel-size",
    "--enable-expert-parallel": "--expert-parallel", "-ep": "--expert-parallel",
    "--speculative-config": "--speculative", "-sc": "--speculative", "--spec-method": "--speculative",
    "--spec-model": "--speculative", "--spec-tokens": "--speculative-tokens",
}  # fmt: skip
# Those that could write prompts or answers somewhere, or hand them on.
_TELLING = (
    "--enable-log-requests", "--enable-log-outputs", "--enable-log-deltas", "--max-log-len", "--log-config-file",
    "--logging-config", "--log-level", "--log-error-stack", "--otlp-traces-endpoint",
    "--collect-detailed-traces", "--middleware", "--tool-server", "--kv-events-config", "--kv-transfer-config",
    "--ec-transfer-config", "--kv-offloading-backend",
)  # fmt: skip
# Those that the gateway or the checks of this file rely on.
_FIXED = (
    "--config", "--uds", "--grpc", "--grpc-port", "--headless", "--api-key", "--root-path", "--ssl-keyfile",
    "--ssl-certfile", "--tokenizer", "--tokenizer-mode", "--tokenizer-revision", "--skip-tokenizer-init",
    "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--lora-target-modules", "--distributed-executor-backend",
    "--trust-remote-code", "--config-format", "--hf-config-path", "--hf-overrides", "--model-class-overrides",
    "--model-impl", "--runner", "--convert", "--disable-uvicorn-access-log",
)  # fmt: skip
RESERVED = (*_OURS, *_TELLING, *_FIXED)


@dataclass(frozen=True)
class Features:
    """One engine's features.

    Attributes:
        tensor_parallel: ranks that share every layer.
        pipeline_parallel: stages of layers.
        adapters: LoRA adapters, by the names they are served under.
        expert_parallel: each rank holds whole experts of a mixture, instead of a part of each.
        speculative: "ngram", "mtp" (the model's own multi-token prediction), or the directory of a smaller checkpoint
            that drafts; None: no speculation.
        speculative_tokens: drafted at a time.
        quantization: vLLM's name of a method that quantises the weights while they are loaded.
        vllm_args: further arguments of ``vllm serve``, after all of ours.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    speculative: str | Path | None = None
    speculative_tokens: int = 4
    quantization: str | None = None
    vllm_args: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def arguments(self, on_cpu: bool) -> list[str]:
        """Arguments of ``vllm serve``."""
        arguments = []
        if self.tensor_parallel > 1:
            arguments += ["--tensor-parallel-size", str(self.tensor_parallel)]
        if self.pipeline_parallel > 1:
            arguments += ["--pipeline-parallel-size", str(self.pipeline_parallel)]
        if self.expert_parallel:
            arguments.append("--enable-expert-parallel")
        if on_cpu:
            arguments += ["--distributed-executor-backend", "mp" if self.ranks > 1 else "uni"]
        if self.adapters:
            arguments += self._adapter_arguments()
        if self.speculative:
            speculation: dict[str, Any] = {"num_speculative_tokens": self.speculative_tokens}
            if self.speculative == NGRAM:
                speculation |= {"method": NGRAM, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
            elif self.speculative == MTP:
                speculation |= {"method": MTP}
            else:
                speculation |= {"method": "draft_model", "model": str(self.speculative)}
            arguments += ["--speculative-config", json.dumps(speculation)]
        if self.quantization:
            arguments += ["--quantization", self.quantization]
        return [*arguments, *self.vllm_args]

    def _adapter_arguments(self) -> list[str]:
        slots = str(len(self.adapters))
        rank = max(adapter.rank for adapter in self.adapters.values())
        return [
            "--enable-lora",
            "--max-loras", slots, "--max-cpu-loras", slots,
            "--max-lora-rank", str(next(r for r in RANKS if r >= rank)),
            "--lora-modules",
            *(json.dumps({"name": name, "path": str(a.directory)}) for name, a in self.adapters.items()),
        ]  # fmt: skip


def read_config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} is not a checkpoint directory: it has no config.json") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ValueError(f"{path} must hold a JSON object with a vocab_size")
    return config


def assign_adapters(given: Sequence[str], checkpoints: Mapping[str, Path]) -> dict[str, dict[str, Adapter]]:
    """Reads ``NAME=DIRECTORY`` and ``MODEL:NAME=DIRECTORY`` options: model -> name -> adapter.

    Raises:
        ValueError: malformed, a name used twice, no such model, several models and none named, or an adapter that does
            not fit its model.
    """
    assigned: dict[str, dict[str, Adapter]] = {model: {} for model in checkpoints}
    taken = set(checkpoints)
    for option in given:
        names, equals, path = option.partition("=")
        model, colon, name = names.rpartition(":")
        if not equals or not path:
            raise ValueError(f"--lora needs NAME=DIRECTORY (or MODEL:NAME=DIRECTORY), got {option!r}")
        if not colon and len(checkpoints) > 1:
            raise ValueError(f"--lora {option}: which of {', '.join(checkpoints)} does it adapt? Say MODEL:{option}")
        model = model if colon else next(iter(checkpoints))
        if model not in checkpoints:
            raise ValueError(f"--lora {option}: there is no model {model!r}; there are: {', '.join(checkpoints)}")
        if not NAME.fullmatch(name):
            raise ValueError(f"--lora {option}: {name!r} cannot be a model's name (letters, digits, '.', '_', '-')")
        if name in taken:
            raise ValueError(f"--lora {option}: the name {name!r} is taken")
        taken.add(name)
        assigned[model][name] = read_adapter(Path(path).resolve(), checkpoints[model])
    return assigned


def split_arguments(text: str) -> tuple[str, ...]:
    """``--vllm-args`` as a shell would split it.

    Raises:
        ValueError: unbalanced quotes, no option in front, or an option that is reserved or could abbreviate one.
    """
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as e:
        raise ValueError(f"--vllm-args {text!r}: {e}") from None
    if arguments and not arguments[0].startswith("-"):
        # It would be read as one more value of the last option of ours, such as another adapter.
        raise ValueError(f"--vllm-args must begin with an option of vllm serve, got {arguments[0]!r}")
    for argument in arguments:
        if argument.startswith("-"):
            _check_argument(argument)
    return arguments


def _check_argument(argument: str) -> None:
    # As vLLM's parser reads them: --a_b is --a-b, --a.b sets a part of --a, --no-a unsets it, -qX is -q X, and any
    # beginning of a name stands for the name.
    name = argument.partition("=")[0].partition(".")[0]
    option = name.replace("_", "-")
    if option.startswith("--no-"):
        option = "--" + option.removeprefix("--no-")
    elif option.startswith("-q"):
        option = "-q"
    meant = [reserved for reserved in RESERVED if reserved.startswith(option)]
    if not meant:
        return
    full = option if option in meant else meant[0]
    subject = f"--vllm-args: {name}" if full == name else f"--vllm-args: {name} can stand for {full}, which"
    if full in _OURS:
        raise ValueError(f"{subject} is set by medassist; say {_OURS[full]} to medassist serve instead")
    if full in _TELLING:
        raise ValueError(f"{subject} could write down or pass on prompts and answers, which medassist never does")
    raise ValueError(f"{subject} is set by medassist and cannot be changed")


def check(model: str, checkpoint: Path, features: Features, on_cpu: bool, max_model_len: int | None) -> list[str]:
    """Refuses what cannot work; returns what the person who starts the server should know, a line each.

    Raises:
        ValueError: the message names the model, the setting and the reason.
    """
    config = read_config(checkpoint)
    notes = []
    longest = min(config.get("max_position_embeddings") or 2**31, max_model_len or 2**31)
    if config.get("causal") is False:
        _check_bidirectional(model, features)
        notes.append(f"not causal: every new token computes its whole sequence again (up to {longest} positions)")
    _check_parallel(model, config, features, on_cpu)
    if features.speculative == MTP and not config.get("num_nextn_predict_layers"):
        raise ValueError(
            f"--speculative mtp: {model} has no layer of multi-token prediction (num_nextn_predict_layers); use ngram "
            "or the directory of a smaller checkpoint"
        )
    if isinstance(features.speculative, Path):
        _check_draft(model, checkpoint, config, features.speculative, longest)
        _check_ranks(features.speculative.name, read_config(features.speculative), features.tensor_parallel)
    why = REGISTRY[config["model_type"]].no_adapters if config.get("model_type") in REGISTRY else ""
    if features.adapters and why:
        raise ValueError(f"{model}: no adapters can be served for it: {why}. Merge {next(iter(features.adapters))}")
    for name, adapter in features.adapters.items():
        if adapter.rank > RANKS[-1]:
            raise ValueError(f"{name}: its rank is {adapter.rank}; vLLM serves up to {RANKS[-1]}")
        if not adapter.changes:
            notes.append(f"WARNING: adapter {name} changes nothing: all its B matrices are zero (was it ever trained?)")
        elif adapter.silent:
            count = len(adapter.silent)
            notes.append(f"WARNING: adapter {name} changes nothing in {count} modules, such as {adapter.silent[0]}")
    _check_tokenizer(model, checkpoint, config)
    if not has_tokenizer(checkpoint):
        notes.append("no tokenizer: it takes token ids through /v1/completions, and no chat")
    return notes


def has_tokenizer(checkpoint: Path) -> bool:
    return (checkpoint / "tokenizer.json").exists()


def weights_are_quantised(checkpoint: Path, features: Features) -> bool:
    """Whether the engine computes with other weights than those that were trained."""
    return bool(features.quantization or read_config(checkpoint).get("quantization_config"))


def default_dtype(checkpoint: Path, features: Features, on_cpu: bool) -> str:
    """The dtype for ``--dtype auto``: float32 on CPUs, but for quantised weights whose kernels lack it."""
    if not on_cpu:
        return "bfloat16"
    if features.quantization:
        return "bfloat16"
    quantisation = read_config(checkpoint).get("quantization_config")
    if not quantisation:
        return "float32"
    # vLLM's 8-bit kernel takes float32 activations, which it rounds itself; those for 4 bits do not.
    groups = quantisation.get("config_groups") or {}
    eight_bits = groups and all(
        (group.get("input_activations") or {}).get("num_bits") == 8 for group in groups.values()
    )
    return "float32" if eight_bits else "bfloat16"


def _check_bidirectional(model: str, features: Features) -> None:
    why = f"{model} is not causal (config.json): every new token changes all earlier ones"
    if features.speculative:
        raise ValueError(f"{why}, drafted ones too, so --speculative would change its answers; leave it out")
    if features.pipeline_parallel > 1:
        raise ValueError(f"{why}, which pipeline stages cannot pass on; use --tensor-parallel-size instead")
    if features.adapters:
        raise ValueError(f"{why}, which vLLM's LoRA kernels cannot follow; merge {next(iter(features.adapters))}")


def _check_parallel(model: str, config: Mapping[str, Any], features: Features, on_cpu: bool) -> None:
    _check_ranks(model, config, features.tensor_parallel, features.expert_parallel)
    stages = features.pipeline_parallel
    layers = config.get("num_hidden_layers", stages)
    if stages > layers:
        raise ValueError(f"{model}: its {layers} layers cannot make {stages} pipeline stages")
    if stages > 1 and features.speculative and on_cpu:
        raise ValueError(
            f"{model}: on CPUs vLLM has no speculation across pipeline stages; use --tensor-parallel-size instead of "
            "--pipeline-parallel-size, or leave --speculative out"
        )


def _check_ranks(model: str, config: Mapping[str, Any], ranks: int, expert_parallel: bool = False) -> None:
    """Whether the ranks divide a model; vLLM splits a draft by as many as the model it drafts for."""
    if expert_parallel and not config.get("n_routed_experts"):
        raise ValueError(f"--expert-parallel: {model} has no experts")
    try:
        check_ranks(config, ranks, ranks if expert_parallel else None)
    except ValueError as e:
        raise ValueError(f"{model}: its {e}") from None


def _check_draft(model: str, checkpoint: Path, config: Mapping[str, Any], draft: Path, longest: int) -> None:
    if not (draft / "config.json").is_file():
        raise ValueError(f"--speculative must be ngram, mtp or a checkpoint directory; {draft} has no config.json")
    other = read_config(draft)
    if other.get("model_type") not in REGISTRY:
        raise ValueError(f"--speculative {draft}: unknown model_type {other.get('model_type')!r}")
    if other.get("causal") is False:
        raise ValueError(f"--speculative {draft}: it is not causal, so every drafted token would cost a whole sequence")
    mine, its = config.get("vocab_size"), other.get("vocab_size")
    if mine != its:
        raise ValueError(
            f"--speculative: {draft.name} cannot draft for {model}: their vocabularies differ ({its} and {mine} tokens)"
        )
    if has_tokenizer(draft) and has_tokenizer(checkpoint) and _vocabulary(draft) != _vocabulary(checkpoint):
        raise ValueError(f"--speculative: {draft.name} cannot draft for {model}: the same ids mean other tokens")
    positions = other.get("max_position_embeddings") or 0
    if positions < longest:
        raise ValueError(
            f"--speculative: {draft.name} has {positions} positions, {model} is served with {longest}: set "
            f"--max-model-len {positions}, or choose another draft"
        )


def _vocabulary(checkpoint: Path) -> dict[str, int]:
    """Token -> id, of ``tokenizer.json``."""
    path = checkpoint / "tokenizer.json"
    try:
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        pairs = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, *_) in enumerate(vocabulary)}
        return pairs | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from None


def _check_tokenizer(model: str, checkpoint: Path, config: Mapping[str, Any]) -> None:
    """An id that the model lacks ends vLLM's engine, so a tokenizer must not produce any."""
    size = config.get("vocab_size")
    if not has_tokenizer(checkpoint) or not isinstance(size, int):
        return
    largest = max(_vocabulary(checkpoint).values(), default=0)
    if largest >= size:
        raise ValueError(
            f"{model}: its tokenizer.json has ids up to {largest}, its weights a vocabulary of {size}: text could give "
            "ids that the model lacks. They do not belong together"
        )
