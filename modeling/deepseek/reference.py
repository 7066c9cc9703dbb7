"""What DeepSeek-style models are checked against: DeepseekV3 and DeepseekV2 of stock transformers."""

from typing import Any

from modeling.reference import Reference

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
}


def twin(model: Any) -> Any:
    """``DeepseekV3ForCausalLM`` or ``DeepseekV2ForCausalLM`` with the same weights, or None.

    V3 has the router "aux_free"; V2 has "softmax", with weights that are not normalised and neighbours rotated. Both
    need a rotary embedding and leave multi-token prediction out.
    """
    c = model.config
    if not c.qk_rope_head_dim:
        return None
    if c.router == "aux_free":
        theirs = deepseek_v3(c)
    elif c.router == "softmax" and not c.norm_topk_prob and c.rope_interleave:
        theirs = deepseek_v2(c)
    else:
        return None
    state = model.state_dict()
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict() if name in state}, strict=False)
    missing = [name for name in theirs.state_dict() if name not in state and ".shared_experts." not in name]
    assert not missing, missing
    return theirs


def deepseek_v3(config: Any) -> Any:
    """A ``DeepseekV3ForCausalLM`` of the sizes of a configuration of ours."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope = dict(config.rope_parameters)
    return _without_shared(
        DeepseekV3ForCausalLM(
            DeepseekV3Config(**_sizes(config), rope_interleave=config.rope_interleave,
                             norm_topk_prob=config.norm_topk_prob, rope_parameters=rope)
        ),
        config,
    )  # fmt: skip


def deepseek_v2(config: Any) -> Any:
    """A ``DeepseekV2ForCausalLM`` of the sizes of a configuration of ours."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    method = "group_limited_greedy" if config.n_group > 1 else "greedy"
    rope = dict(config.rope_parameters)
    return _without_shared(
        DeepseekV2ForCausalLM(DeepseekV2Config(**_sizes(config), topk_method=method, rope_parameters=rope)), config
    )


def _sizes(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
        "routed_scaling_factor", "first_k_dense_replace", "max_position_embeddings", "rms_norm_eps", "attention_bias",
        "tie_word_embeddings", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    # A model of theirs always has shared experts.
    return {name: getattr(config, name) for name in names} | {"n_shared_experts": config.n_shared_experts or 1}


def _without_shared(theirs: Any, config: Any) -> Any:
    """Shared experts that add nothing, where ours has none."""
    import torch

    if not config.n_shared_experts:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".shared_experts." in name:
                    parameter.zero_()
    return theirs


REFERENCE = Reference(
    variants=(
        # Query latent, groups, one shared expert, sigmoid affinities with a bias.
        {},
        {"router": "softmax", "norm_topk_prob": False, "q_lora_rank": None, "n_shared_experts": 2},
        {"router": "noisy_top_k"},
        {"qk_rope_head_dim": 0},
        {"kv_lora_rank": 128, "rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True,
         "n_shared_experts": 0},
        # The sizes that vLLM's own latent attention takes on CPUs.
        {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rope_parameters": YARN},
    ),
    twin=twin,
)  # fmt: skip
