"""The layout of GPT-155M's and GPT-211M's files: state dictionaries of the notebooks that train them."""

import re
from collections.abc import Mapping
from typing import Any

from modeling.importing.layout import Layout, Shapes, layer_count, side, told

MASK = r"trf_blocks\.\d+\.att\.mask"


def tensors(config: Any) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {
        "tok_emb.weight": ("model.embed_tokens.weight",),
        "pos_emb.weight": ("model.embed_positions.weight",),
        "final_norm.scale": ("model.norm.weight",),
        "final_norm.shift": ("model.norm.bias",),
        "out_head.weight": ("lm_head.weight",),
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"trf_blocks.{layer}", f"model.layers.{layer}"
        for projection, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            names[f"{theirs}.att.W_{projection}.weight"] = (f"{ours}.self_attn.{letter}_proj.weight",)
        for number, projection in ((0, "up"), (2, "down")):
            for kind in ("weight", "bias"):
                names[f"{theirs}.ff.layers.{number}.{kind}"] = (f"{ours}.mlp.{projection}_proj.{kind}",)
        for number, norm in ((1, "input_layernorm"), (2, "post_attention_layernorm")):
            names[f"{theirs}.norm{number}.scale"] = (f"{ours}.{norm}.weight",)
            names[f"{theirs}.norm{number}.shift"] = (f"{ours}.{norm}.bias",)
    return names


def sizes(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, int]:
    positions = side(shapes, "pos_emb.weight", 0)
    for name in shapes:
        if not re.fullmatch(MASK, name) or positions is None or shapes[name][-2:] == (positions, positions):
            continue
        raise ValueError(
            f"pos_emb.weight {shapes['pos_emb.weight']} has {positions} positions, but the mask {name} is "
            f"{shapes[name]}: the file is damaged, or put together from two models"
        )
    return told(
        vocab_size=side(shapes, "tok_emb.weight", 0),
        hidden_size=side(shapes, "tok_emb.weight", 1),
        intermediate_size=side(shapes, "trf_blocks.0.ff.layers.0.weight", 0),
        num_hidden_layers=layer_count(shapes, r"trf_blocks\.(\d+)\."),
        max_position_embeddings=positions,
    )


def settle(values: dict[str, Any]) -> dict[str, Any]:
    if values.pop("qkv_bias", False) is not False:
        raise ValueError(
            "the configuration has qkv_bias other than false: this architecture has no biases on queries, keys and "
            "values; correct the configuration if the file has none either"
        )
    return values


LAYOUT = Layout(
    signature=r"trf_blocks\.\d+\.att\.W_query\.weight|tok_emb\.weight",
    tensors=tensors,
    sizes=sizes,
    ignored=MASK,
    model_types=("gpt", "GPTForCausalLM", "GPTModel"),
    aliases={
        "context_length": "max_position_embeddings", "emb_dim": "hidden_size", "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers", "drop_rate": "dropout", "qkv_bias": "qkv_bias",
        "d_model": "hidden_size", "eps": "layer_norm_eps", "n_embd": "hidden_size", "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings",
    },
    settle=settle,
    # Two configurations of the 211M go round, of 256 and of 512 positions; there are as many as were trained.
    doubtful=lambda given: ("max_position_embeddings",),
    asked={"num_attention_heads": "the number of heads (n_heads); GPT-155M has 12, GPT-211M has 18"},
    defaults={"causal": False, "layer_norm_eps": 1e-5},
    notes={
        "causal": "every token sees the whole window (causal=false), which is how the published training really ran; "
        "for a file that was trained with a causal mask, import it with --set causal=true"
    },
    tokenizers={50257: "gpt2", 50281: "p50k_base"},
)  # fmt: skip
