"""A Llama of the same size as a model of ours, and the presets that are worth a benchmark."""

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

from loadtest.engine_plan import Options, cells
from modeling.registry import REGISTRY, Architecture, get

# What vLLM's attention on CPUs takes (`CPUAttentionBackend.get_supported_head_sizes`); its GPU backends take these too.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# The largest model that is measured unless it is named.
PARAMETER_LIMIT = 400_000_000
# Matrices of odd widths are slower; the Llama gets the roundest width that keeps its layers this close.
TOLERANCE = 0.005


class Sizes(NamedTuple):
    """Parameters: all of them, in the matrices of the layers, and in the vocabulary (embedding, and head if untied)."""

    total: int
    layers: int
    vocabulary: int

    @property
    def matrices(self) -> int:
        """What is multiplied with: without position tables, biases and norms."""
        return self.layers + self.vocabulary


def count(config: Any) -> Sizes:
    """Parameters of a model of ours or of Llama; its module is built without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers]
    layers = sum(p.numel() for p in stacks[0].parameters() if p.ndim > 1)
    rows = config.vocab_size * config.hidden_size
    tied = bool(config.tie_word_embeddings)
    total = sum(p.numel() for name, p in model.named_parameters() if not (tied and name.startswith("lm_head.")))
    return Sizes(total, layers, rows if tied else 2 * rows)


def heads(config: Any) -> tuple[int, int, int]:
    """Head size, query heads and key/value heads of the Llama, in the widths that queries and keys have here.

    A head size that the kernels lack is replaced by the one that comes closest to the same widths; of several, by that
    nearest to the original. transformers wants the number of query heads to divide the hidden size.
    """
    query_heads, original = config.num_attention_heads, config.head_dim
    kv_heads = getattr(config, "num_key_value_heads", query_heads)
    width = kv_heads * original

    def numbers(size: int) -> tuple[int, int]:
        nearest = max(1, round(width / size))
        return nearest * query_heads // kv_heads, nearest

    def distance(size: int) -> tuple[bool, int, float]:
        new_query_heads, new_kv_heads = numbers(size)
        refused = config.hidden_size % new_query_heads > 0
        return refused, abs(new_kv_heads * size - width), abs(log(size / original))

    best = min(HEAD_SIZES, key=distance)
    return best, *numbers(best)


def equal_llama(config: Any) -> Any:
    """The ``LlamaConfig`` with the same layers, hidden size, vocabulary, head (tied or not) and positions.

    Its MLP is as wide as it takes for a layer's matrices to have as many parameters, so that a token costs the same
    arithmetic.
    """
    from transformers import LlamaConfig

    ours = count(config)
    head_dim, query_heads, kv_heads = heads(config)
    hidden = config.hidden_size
    attention = 2 * hidden * head_dim * (query_heads + kv_heads)
    exact = (ours.layers / config.num_hidden_layers - attention) / (3 * hidden)
    width = max(1, round(exact))
    for granule in (64, 32, 16, 8, 4, 2):
        rounded = max(granule, round(exact / granule) * granule)
        if 3 * hidden * config.num_hidden_layers * abs(rounded - exact) <= TOLERANCE * ours.layers:
            width = rounded
            break
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
    )


def configuration(model_type: str, preset: str) -> Any:
    """The preset's configuration, causal where it is not: a model without a KV cache cannot be compared with Llama."""
    arch = get(model_type)
    make = arch.presets()[preset]
    config = make()
    if getattr(config, "causal", True) is False:
        config = make(causal=True)
    config.architectures = [arch.hf_name]
    return config


def choose(architectures: Sequence[str] = (), presets: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The models to measure, as ``model_type`` and preset.

    Args:
        architectures: all of the registry but mixtures of experts if empty.
        presets: those named, of every chosen architecture that has them; if empty, the largest of each architecture
            within PARAMETER_LIMIT.

    Raises:
        ValueError: no such architecture, or one of experts, or a preset that none of them has.
    """
    chosen = [get(name) for name in dict.fromkeys(architectures)] or [a for a in REGISTRY.values() if not _sparse(a)]
    if sparse := [arch.model_type for arch in chosen if _sparse(arch)]:
        raise ValueError(
            f"{sparse[0]} has experts: no Llama has as many parameters and as much arithmetic a token. See "
            "medassist bench speculation and medassist bench cache"
        )
    known = {arch.model_type: list(arch.presets()) for arch in chosen}
    for preset in presets:
        if not any(preset in names for names in known.values()):
            listed = "; ".join(f"{model_type}: {', '.join(names)}" for model_type, names in known.items())
            raise ValueError(f"none of these architectures has a preset {preset!r}; there are {listed}")
    if presets:
        return [(arch.model_type, p) for arch in chosen for p in dict.fromkeys(presets) if p in known[arch.model_type]]
    return [(arch.model_type, _largest(arch)) for arch in chosen]


def _sparse(arch: Architecture) -> bool:
    return hasattr(arch.config_class(), "n_routed_experts")


def check(model_type: str, preset: str, options: Options) -> None:
    """Raises ValueError where the options do not fit the model; the message names both."""
    try:
        cells(options, configuration(model_type, preset).max_position_embeddings)
    except ValueError as e:
        raise ValueError(f"{model_type} {preset}: {e}") from e


def _largest(arch: Architecture) -> str:
    totals = {preset: count(configuration(arch.model_type, preset)).total for preset in arch.presets()}
    small_enough = {preset: total for preset, total in totals.items() if total <= PARAMETER_LIMIT}
    if not small_enough:
        return min(totals, key=lambda preset: totals[preset])
    return max(small_enough, key=lambda preset: small_enough[preset])
