"""The layout of DeepSeek's files, V3's and V2's, published or saved by transformers: their tensors are called as ours.

Multi-token prediction is in the layers after the last one, with copies of embedding and head.
"""

import re
from collections.abc import Mapping
from typing import Any

from modeling.deepseek.config import MEANINGLESS, MUST_BE, check_fixed, check_v2, merged_rope, published_router
from modeling.importing.layout import Layout, Shapes, side

LAYER = r"model\.layers\.(\d+)\."
PREDICTION = re.compile(LAYER + r"(enorm|hnorm|eh_proj|shared_head\.norm)\.weight")
STACKED = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)")
CONSUMED = ("model_type", "scoring_func", "topk_method", "rope_theta", "rope_scaling", "quantization_config",
            "head_dim", "qk_head_dim")  # fmt: skip


def in_files(shapes: Shapes) -> Shapes:
    """A matrix for each expert, where the module stacks them."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = STACKED.fullmatch(name)
        if not match:
            result[name] = shape
            continue
        for expert in range(shape[0]):
            if match[2] == "down_proj":
                result[f"{match[1]}{expert}.down_proj.weight"] = shape[1:]
            else:
                for part in ("gate_proj", "up_proj"):
                    result[f"{match[1]}{expert}.{part}.weight"] = (shape[1] // 2, shape[2])
    return result


def sizes(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    layers, predictions = _layers(shapes, LAYER), {int(m[1]) for n in shapes if (m := PREDICTION.fullmatch(n))}
    decoders = layers - predictions
    sparse = {layer for layer in decoders if f"model.layers.{layer}.mlp.gate.weight" in shapes}
    first = "model.layers.0"
    told: dict[str, Any] = {
        "vocab_size": side(shapes, "model.embed_tokens.weight", 0),
        "hidden_size": side(shapes, "model.embed_tokens.weight", 1),
        "num_hidden_layers": max(decoders) + 1 if decoders else None,
        "num_nextn_predict_layers": len(predictions),
        "first_k_dense_replace": min(sparse) if sparse else None,
        "intermediate_size": side(shapes, f"{first}.mlp.gate_proj.weight", 0),
        "kv_lora_rank": side(shapes, f"{first}.self_attn.kv_a_layernorm.weight", 0, 1),
        "q_lora_rank": side(shapes, f"{first}.self_attn.q_a_layernorm.weight", 0, 1),
    }
    if (width := side(shapes, f"{first}.self_attn.kv_a_proj_with_mqa.weight", 0)) and told["kv_lora_rank"]:
        told["qk_rope_head_dim"] = max(0, width - told["kv_lora_rank"])
    if sparse:
        mlp = f"model.layers.{min(sparse)}.mlp"
        told["n_routed_experts"] = side(shapes, f"{mlp}.gate.weight", 0)
        told["moe_intermediate_size"] = side(shapes, f"{mlp}.experts.0.gate_proj.weight", 0)
        if told["moe_intermediate_size"]:
            shared = side(shapes, f"{mlp}.shared_experts.gate_proj.weight", 0) or 0
            told["n_shared_experts"] = shared // told["moe_intermediate_size"]
    result = {name: size for name, size in told.items() if size is not None}
    if f"{first}.self_attn.q_proj.weight" in shapes:
        result["q_lora_rank"] = None
    return result


def settle(values: dict[str, Any]) -> dict[str, Any]:
    """Published settings in the fields of ours."""
    check_fixed(values)
    if values.get("quantization_config"):
        raise ValueError(
            "the configuration has quantization_config: weights in 8 or fewer bits cannot be imported; convert them to "
            "bfloat16, as their publisher says how, and remove quantization_config from config.json"
        )
    rotated, plain = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if rotated is not None and plain is not None:  # what transformers writes beside them
        for name, width in (("head_dim", rotated), ("qk_head_dim", rotated + plain)):
            if values.get(name, width) != width:
                raise ValueError(f"{name} follows from the other widths: it is {width}, got {values[name]!r}")
    if values.get("model_type") == "deepseek_v2":
        check_v2(values.get("norm_topk_prob"))
        values["num_nextn_predict_layers"] = 0
        values.setdefault("norm_topk_prob", False)
        values.setdefault("topk_method", "greedy")
    router = published_router(values.get("scoring_func"), values.get("topk_method"))
    if router and values.setdefault("router", router) != router:
        raise ValueError(
            f"router {values['router']!r} contradicts scoring_func and topk_method, which say {router!r}: leave one out"
        )
    if values.get("topk_method") == "greedy":
        values["n_group"] = values["topk_group"] = 1
    rope = merged_rope(values.get("rope_parameters"), values.get("rope_scaling"), values.get("rope_theta"))
    if rope:
        values["rope_parameters"] = rope
    return {name: value for name, value in values.items() if name not in (*CONSUMED, *MEANINGLESS, *MUST_BE)}


def _layers(shapes: Shapes, pattern: str) -> set[int]:
    # Longer numbers are no layers of anything, and would take long to convert.
    return {int(m[1]) for name in shapes if (m := re.match(pattern, name)) and len(m[1]) < 10}


LAYOUT = Layout(
    signature=LAYER + r"self_attn\.kv_a_proj_with_mqa\.weight",
    tensors=lambda config: {},
    sizes=sizes,
    own_names=True,
    in_files=in_files,
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    copies={
        LAYER + r"embed_tokens\.weight": "model.embed_tokens.weight",
        LAYER + r"shared_head\.head\.weight": "lm_head.weight",
    },
    model_types=(
        "medassist_deepseek", "MedAssistDeepseekForCausalLM", "deepseek_v3", "DeepseekV3ForCausalLM", "deepseek_v2",
        "DeepseekV2ForCausalLM",
    ),
    aliases={name: name for name in (*CONSUMED, *MEANINGLESS, *MUST_BE)},
    settle=settle,
    # Transformers writes of a DeepSeek-V3 that it has such layers, and leaves them out.
    doubtful=lambda given: ("num_nextn_predict_layers",),
    refused={
        r".+_scale_inv": "its weights are in 8 bits, with a factor for each block; convert them to bfloat16, as their "
        "publisher says how",
    },
)  # fmt: skip
