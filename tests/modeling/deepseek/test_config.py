"""Configurations: what is refused, whichever way they are made, and what presets and published sizes come to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.deepseek.published import settle
from modeling.deepseek.reference import YARN

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "n_routed_experts"]),
    ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "topk_group"]),
    ({"num_experts_per_tok": 0}, ["num_experts_per_tok"]),
    ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim"]),
    ({"qk_rope_head_dim": -2}, ["qk_rope_head_dim"]),
    ({"qk_rope_head_dim": 0, "rope_parameters": YARN}, ["qk_rope_head_dim", "rope_type"]),
    ({"qk_nope_head_dim": 0}, ["qk_nope_head_dim"]),
    ({"v_head_dim": 0}, ["v_head_dim"]),
    ({"head_dim": 7}, ["head_dim"]),
    ({"qk_head_dim": 7}, ["qk_head_dim"]),
    ({"n_group": 3}, ["n_routed_experts", "n_group"]),
    ({"n_group": -1}, ["n_group must"]),
    ({"n_group": 0}, ["n_group must"]),
    ({"topk_group": 0}, ["topk_group must"]),
    ({"n_group": 8, "topk_group": 4}, ["n_group", "n_routed_experts"]),
    ({"topk_group": 5}, ["topk_group", "n_group"]),
    ({"num_key_value_heads": 2}, ["num_key_value_heads", "num_attention_heads"]),
    ({"first_k_dense_replace": 3}, ["first_k_dense_replace", "num_hidden_layers"]),
    ({"first_k_dense_replace": -1}, ["first_k_dense_replace"]),
    ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers"]),
    ({"n_shared_experts": -1}, ["n_shared_experts"]),
    ({"mtp_depth": 0}, ["mtp_depth", "num_nextn_predict_layers"]),
    ({"mtp_depth": -1}, ["mtp_depth"]),
    ({"mtp_depth": 1, "num_nextn_predict_layers": 0}, ["mtp_depth", "num_nextn_predict_layers"]),
    ({"eos_token_id": "0"}, ["eos_token_id", "whole number"]),
    ({"eos_token_id": True}, ["eos_token_id", "whole number"]),
    ({"eos_token_id": [0, "1"]}, ["eos_token_id", "whole number"]),
    ({"eos_token_id": []}, ["eos_token_id", "whole number"]),
    ({"bos_token_id": 1.5}, ["bos_token_id", "whole number"]),
    ({"q_lora_rank": 0}, ["q_lora_rank"]),
    ({"kv_lora_rank": 0}, ["kv_lora_rank"]),
    ({"kv_lora_rank": -64}, ["kv_lora_rank"]),
    ({"hidden_size": 0}, ["hidden_size"]),
    ({"hidden_size": 64.0}, ["hidden_size", "whole number"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "whole number"]),
    ({"kv_lora_rank": "64"}, ["kv_lora_rank", "whole number"]),
    ({"q_lora_rank": "48"}, ["q_lora_rank", "whole number"]),
    ({"vocab_size": None}, ["vocab_size"]),
    ({"norm_topk_prob": 1}, ["norm_topk_prob", "true or false"]),
    ({"rope_interleave": "yes"}, ["rope_interleave", "true or false"]),
    ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "true or false"]),
    ({"routed_scaling_factor": "2.5"}, ["routed_scaling_factor", "number"]),
    ({"routed_scaling_factor": 0}, ["routed_scaling_factor"]),
    ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor", "finite number"]),
    ({"rms_norm_eps": 0.0}, ["rms_norm_eps"]),
    ({"attention_dropout": 1.0}, ["attention_dropout"]),
    ({"mtp_loss_weight": -0.1}, ["mtp_loss_weight"]),
    ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef"]),
    ({"router_bias_update_rate": -0.1}, ["router_bias_update_rate"]),
    ({"router": "sinkhorn"}, ["router", "aux_free", "softmax", "noisy_top_k"]),
    ({"router": 3}, ["router"]),
    ({"router": ""}, ["router", "aux_free"]),
    ({"router": "softmax", "scoring_func": "sigmoid"}, ["router", "scoring_func"]),
    ({"router": "aux_free", "topk_method": "greedy"}, ["router", "topk_method"]),
    ({"scoring_func": "softmax", "topk_method": "noaux_tc"}, ["scoring_func", "topk_method"]),
    ({"topk_method": "group_limited"}, ["topk_method"]),
    ({"router": "noisy_top_k", "n_group": 4, "topk_group": 2}, ["n_group"]),
    ({"router": "noisy_top_k", "norm_topk_prob": False}, ["norm_topk_prob"]),
    ({"hidden_act": "gelu"}, ["hidden_act"]),
    ({"moe_layer_freq": 2}, ["moe_layer_freq"]),
    ({"mlp_bias": True}, ["mlp_bias"]),
    ({"pretraining_tp": 2}, ["pretraining_tp"]),
    ({"rope_parameters": 5}, ["rope_parameters"]),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type"]),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters.factor"]),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, ["rope_parameters.factor"]),
    ({"rope_parameters": YARN | {"factor": "8"}}, ["rope_parameters.factor"]),
    ({"rope_parameters": YARN | {"mscale": "1"}}, ["rope_parameters.mscale"]),
    ({"rope_parameters": YARN | {"factor": 10**400}}, ["rope_parameters.factor"]),
    ({"rope_parameters": YARN | {"type": "linear"}}, ["rope_parameters.rope_type", "type"]),
    ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, ["rope_parameters.rope_type"]),
    ({"rope_parameters": YARN | {"beta_fats": 32}}, ["rope_parameters.beta_fats", "beta_fast"]),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}},
     ["rope_parameters.original_max_position_embeddings"]),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": None}},
     ["rope_parameters.original_max_position_embeddings"]),
    ({"rope_parameters": YARN | {"beta_fast": 0}}, ["rope_parameters.beta_fast"]),
    ({"rope_parameters": YARN | {"beta_slow": -1}}, ["rope_parameters.beta_slow"]),
    ({"rope_parameters": YARN | {"beta_slow": 32}}, ["rope_parameters.beta_fast", "rope_parameters.beta_slow"]),
    ({"rope_parameters": YARN | {"beta_fast": 1}}, ["rope_parameters.beta_fast", "rope_parameters.beta_slow"]),
    ({"rope_parameters": YARN | {"attention_factor": 0}}, ["rope_parameters.attention_factor"]),
    ({"rope_parameters": YARN | {"mscale": -1.0}}, ["rope_parameters.mscale"]),
    ({"rope_parameters": YARN | {"truncate": 1}}, ["rope_parameters.truncate"]),
    ({"rope_parameters": {"rope_theta": 0}}, ["rope_theta"]),
    ({"rope_parameters": {"rope_theta": None}}, ["rope_parameters.rope_theta"]),
    ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, ["rope_theta", "rope_parameters.rope_theta"]),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ({"rope_theta": "10000"}, ["rope_theta"]),
    ({"rope_scaling": "yarn"}, ["rope_scaling"]),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["rope_type"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_settings_are_refused_by_name_when_built_and_when_loaded(
    changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named[0]) as built:
        MedAssistDeepseekConfig.tiny(**changes)
    assert all(name in str(built.value) for name in named)
    good = MedAssistDeepseekConfig.tiny(**({"router": "noisy_top_k"} if changes.get("router") == "noisy_top_k" else {}))
    good.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    if "scoring_func" in changes or "topk_method" in changes or "rope_theta" in changes or "rope_scaling" in changes:
        content = {k: v for k, v in content.items() if k not in ("router", "rope_parameters")}
    file.write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=named[0]) as loaded:
        AutoConfig.from_pretrained(tmp_path)
    assert str(loaded.value) == str(built.value)


@pytest.mark.parametrize(
    ("settings", "router", "groups"),
    [
        ({}, "aux_free", 4),
        ({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, "aux_free", 4),
        ({"topk_method": "noaux_tc"}, "aux_free", 4),
        ({"scoring_func": "softmax"}, "softmax", 4),
        ({"topk_method": "group_limited_greedy"}, "softmax", 4),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, "softmax", 1),
    ],
)
def test_published_names_of_routers(settings: dict[str, Any], router: str, groups: int) -> None:
    config = MedAssistDeepseekConfig.tiny(**settings)
    assert (config.router, config.n_group) == (router, groups)
    assert "scoring_func" not in config.to_dict()


OLD_YARN = {("type" if k == "rope_type" else k): v for k, v in YARN.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": OLD_YARN, "rope_theta": 10000},
        {"rope_parameters": OLD_YARN},
        {"rope_parameters": OLD_YARN | YARN | {"rope_theta": 10000}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 10000}, "rope_scaling": OLD_YARN},
    ],
)
def test_other_forms_of_rope_parameters_mean_the_same_when_built_and_when_imported(settings: dict[str, Any]) -> None:
    want = MedAssistDeepseekConfig.tiny(rope_parameters=YARN).rope_parameters
    assert want is not None
    assert want["rope_type"] == "yarn"
    assert MedAssistDeepseekConfig.tiny(**settings).rope_parameters == want
    assert MedAssistDeepseekConfig.tiny(**settle(dict(settings))).rope_parameters == want


def test_imports_refuse_two_bases_of_the_rotation() -> None:
    with pytest.raises(ValueError, match=r"rope_theta 10000\.0 contradicts rope_parameters\.rope_theta"):
        settle({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 1e6}})


def test_one_base_of_the_rotation_may_stand_beside_the_rest() -> None:
    config = MedAssistDeepseekConfig.tiny(rope_parameters=YARN, rope_theta=500000)
    assert config.rope_parameters is not None
    assert config.rope_parameters["rope_theta"] == 500000


@pytest.mark.parametrize("layers", [0, 2])
def test_predictions_changed_when_loaded_are_what_runs_and_what_is_saved(layers: int, tmp_path: Path) -> None:
    MedAssistDeepseekConfig.tiny().save_pretrained(tmp_path / "one")
    changed = MedAssistDeepseekConfig.from_pretrained(tmp_path / "one", num_nextn_predict_layers=layers)
    changed.check()
    assert changed.prediction_depth == layers
    changed.save_pretrained(tmp_path / "other")
    again = MedAssistDeepseekConfig.from_pretrained(tmp_path / "other")
    assert (again.num_nextn_predict_layers, again.prediction_depth) == (layers, layers)


def test_depth_of_prediction_that_is_given_stays() -> None:
    config = MedAssistDeepseekConfig.tiny(mtp_depth=3)
    assert (config.num_nextn_predict_layers, config.prediction_depth) == (1, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"router": "bogus"}, "router"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_attention_heads": 8}, "num_key_value_heads"),
        ({"kv_lora_rank": "64"}, "kv_lora_rank"),
        ({"rope_parameters": OLD_YARN | {"factor": 0.5}}, r"rope_parameters\.factor"),
        ({"mtp_depth": 0}, "mtp_depth"),
    ],
    ids=str,
)
def test_check_refuses_fields_that_were_set_later(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    MedAssistDeepseekConfig.tiny().save_pretrained(tmp_path)
    config = MedAssistDeepseekConfig.from_pretrained(tmp_path, **changes)
    with pytest.raises(ValueError, match=named):
        config.check()


def test_check_settles_fields_that_were_set_later_and_then_changes_nothing() -> None:
    config = MedAssistDeepseekConfig.tiny()
    config.check()
    assert config.to_dict() == MedAssistDeepseekConfig.tiny().to_dict()
    config.n_group = config.topk_group = config.n_shared_experts = config.num_key_value_heads = None
    config.rope_parameters = dict(OLD_YARN)
    config.check()
    want = MedAssistDeepseekConfig.tiny(n_group=1, topk_group=1, n_shared_experts=0, rope_parameters=YARN)
    assert config.to_dict() == want.to_dict()


@pytest.mark.parametrize("tokens", [None, 3, [3, 4]])
def test_one_token_or_several_may_end_an_answer(tokens: int | list[int] | None) -> None:
    assert MedAssistDeepseekConfig.tiny(eos_token_id=tokens).eos_token_id == tokens


def test_configurations_of_others_do_not_leave_their_names_behind(tmp_path: Path) -> None:
    config = MedAssistDeepseekConfig.tiny(
        model_type="deepseek_v2", norm_topk_prob=False, topk_method="greedy", auto_map={"AutoConfig": "x.Y"}, ep_size=1
    )
    assert config.model_type == "medassist_deepseek"
    assert config.num_nextn_predict_layers == 0  # a DeepSeek-V2 has none
    assert not {"auto_map", "ep_size", "topk_method"} & set(config.to_dict())
    with pytest.raises(ValueError, match="norm_topk_prob"):
        MedAssistDeepseekConfig.tiny(model_type="deepseek_v2", topk_method="greedy", norm_topk_prob=True)


def counted(config: MedAssistDeepseekConfig) -> tuple[int, int]:
    """Parameters of the model without multi-token prediction, and of those the active ones."""
    with torch.device("meta"):
        model = MedAssistDeepseekForCausalLM(config)
    elements = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"model.layers.{config.num_hidden_layers + n}.") for n in range(4))
    }
    return sum(elements.values()), config.active_parameters(elements)


def test_defaults_are_deepseek_v3_and_it_has_the_published_size() -> None:
    """671 billion parameters, of which 37 billion are active (DeepSeek-V3, section 1)."""
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    expert = 3 * 7168 * 2048
    sparse = 58 * ((256 + 1) * expert + 256 * 7168)
    matrices = 2 * 129280 * 7168 + 61 * attention + 3 * 3 * 7168 * 18432 + sparse
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    total, active = counted(MedAssistDeepseekConfig())
    assert total == matrices + norms
    assert active == total - 58 * (256 - 8) * expert
    assert round(total / 1e9) == 671
    assert round(active / 1e9) in (37, 38)


@pytest.mark.parametrize("preset", ["demo", "base_382m"])
def test_parameters_of_presets_are_those_of_their_descriptions(preset: str) -> None:
    total, active = counted(getattr(MedAssistDeepseekConfig, preset)())
    described = getattr(MedAssistDeepseekConfig, preset).__doc__
    assert f"{active:,} " in described
    assert f"{total:,}" in described
