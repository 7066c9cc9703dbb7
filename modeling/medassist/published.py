"""The layout of published MedAssistGPT files: training checkpoints and uploads of kunjcr2's trainer."""

import itertools
from collections.abc import Mapping
from typing import Any

from modeling.importing.layout import Layout, Read, Shapes, layer_count, side, told


def tensors(config: Any) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {
        "embed.weight": ("model.embed_tokens.weight",),
        "final_rms.weight": ("model.norm.weight",),
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{layer}", f"model.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names[f"{theirs}.attn.{projection}.weight"] = (f"{ours}.self_attn.{projection}.weight",)
        names |= {
            f"{theirs}.rms1.weight": (f"{ours}.input_layernorm.weight",),
            f"{theirs}.rms2.weight": (f"{ours}.post_attention_layernorm.weight",),
            # One matrix of twice the width, with the gate in its second half: most others have it in the first.
            f"{theirs}.mlp.w1.weight": (f"{ours}.mlp.up_proj.weight", f"{ours}.mlp.gate_proj.weight"),
            f"{theirs}.mlp.w2.weight": (f"{ours}.mlp.down_proj.weight",),
        }
    return names


def sizes(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, int]:
    fused, kv_rows = side(shapes, "blocks.0.mlp.w1.weight", 0), side(shapes, "blocks.0.attn.k_proj.weight", 0)
    hidden, heads = side(shapes, "embed.weight", 1), known.get("num_attention_heads")
    kv_heads = None
    if kv_rows and hidden and heads and hidden % heads == 0 and kv_rows % (hidden // heads) == 0:
        kv_heads = kv_rows // (hidden // heads)
    return told(
        vocab_size=side(shapes, "embed.weight", 0),
        hidden_size=hidden,
        intermediate_size=None if fused is None else fused // 2,
        num_hidden_layers=layer_count(shapes, r"blocks\.(\d+)\."),
        num_key_value_heads=kv_heads,
        max_position_embeddings=side(shapes, "blocks.0.attn.rope_q.position_ids", 0),
    )


def settle(values: dict[str, Any]) -> dict[str, Any]:
    """``gqa_groups`` is the number of query heads that share a key/value head, not the number of groups."""
    if values.pop("rope_scaling", None) is not None:
        raise ValueError(
            "the configuration has rope_scaling, which this architecture cannot have: its scores depend on absolute "
            "positions; remove it from the configuration if the model was trained without"
        )
    if (theta := values.pop("rope_theta", None)) is not None:
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e12:
            raise ValueError(f"rope_theta must be a number above 1, got {theta!r}")
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    groups, heads = values.pop("gqa_groups", None), values.get("num_attention_heads")
    if groups is None or heads is None:
        return values
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or heads % groups:
        raise ValueError(
            f"gqa_groups is the number of query heads for each key/value head, so it must divide num_attention_heads "
            f"({heads}); got {groups!r}"
        )
    if values.setdefault("num_key_value_heads", heads // groups) != heads // groups:
        raise ValueError(
            f"the configuration contradicts itself: {heads} query heads in groups of {groups} (gqa_groups) make "
            f"{heads // groups} key/value heads, but num_key_value_heads is {values['num_key_value_heads']}"
        )
    return values


def check(config: Any, read: Read) -> None:
    """Compares every layer's rotary tables with those that the configuration leads to."""
    import torch

    from modeling.layers.rope import inverse_frequencies

    theta = config.rope_parameters["rope_theta"]
    kinds = (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
    wanted = {letter: inverse_frequencies(heads * config.head_dim, theta) for letter, heads in kinds}
    for layer, (letter, heads) in itertools.product(range(config.num_hidden_layers), kinds):
        rope = f"blocks.{layer}.attn.rope_{letter}"
        name, want = f"{rope}.div_term", wanted[letter]
        table, positions = read(name), read(f"{rope}.position_ids")
        if positions is not None and positions.ndim and positions.shape[0] != config.max_position_embeddings:
            raise ValueError(
                f"{rope}.position_ids has {positions.shape[0]} rows, but max_position_embeddings "
                f"(max_len) is {config.max_position_embeddings}: the model was trained for as many positions as the "
                f"table has; give it with --set max_position_embeddings={positions.shape[0]}"
            )
        if table is None or config.rope_layout != "flattened":
            continue
        # Loose, for tables that were rounded to 16 bits; another base is off by far more.
        if table.shape != want.shape or not torch.allclose(table.float(), want, rtol=0.02, atol=0):
            raise ValueError(
                f"{name} {tuple(table.shape)} is not the rotary table of {heads} heads of {config.head_dim} with base "
                f"{theta:g}, {tuple(want.shape)}: the model was trained with another base (give it with --set "
                f"rope_theta=...) or another number of heads, or the file is damaged"
            )


LAYOUT = Layout(
    signature=r"blocks\.\d+\.attn\.q_proj\.weight|final_rms\.weight",
    tensors=tensors,
    sizes=sizes,
    tied={"lm_head.weight": "embed.weight"},
    ignored=r"blocks\.\d+\.attn\.rope_[qk]\.(position_ids|div_term)",
    model_types=("medassist_gpt", "MedAssistGPTForCausalLM"),
    aliases={
        "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_kv": "num_key_value_heads",
        "n_kv_heads": "num_key_value_heads", "d_ff": "intermediate_size", "blocks": "num_hidden_layers",
        "n_blocks": "num_hidden_layers", "n_layers": "num_hidden_layers", "max_len": "max_position_embeddings",
        "max_seq_len": "max_position_embeddings", "eps": "rms_norm_eps", "layer_norm_eps": "rms_norm_eps",
        "dropout_p": "residual_dropout", "dropout": "residual_dropout", "hidden_dropout": "residual_dropout",
        "hidden_dropout_prob": "residual_dropout", "gqa_groups": "gqa_groups", "rope_theta": "rope_theta",
        "rope_scaling": "rope_scaling",
    },
    settle=settle,
    check=check,
    asked={
        "num_attention_heads": "the number of query heads (n_heads); the published models have 8, 16 or 32",
        "max_position_embeddings": "the longest sequence (max_len); the published models have 1024",
    },
    derived={"num_key_value_heads": "num_attention_heads"},
    defaults={"rms_norm_eps": 1e-5, "rope_layout": "flattened"},
    tokenizers={50281: "p50k_base", 50257: "gpt2"},
)  # fmt: skip
