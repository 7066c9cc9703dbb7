"""Files in the layout of DeepSeek and of transformers become checkpoints that compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.deepseek.reference import YARN, twin
from modeling.importing import import_checkpoint
from modeling.importing.describe import describe
from serving.fingerprint import verify_files
from tests.modeling.deepseek.models import assert_close, ids, logprobs, module

V2 = {"router": "softmax", "norm_topk_prob": False, "n_shared_experts": 2}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3-long": {"q_lora_rank": None, "rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": True},
    "v3-llama-rope": {"rope_interleave": False, "rms_norm_eps": 1e-5, "norm_topk_prob": False},
    "v2": V2 | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    "v2-groups": V2 | {"routed_scaling_factor": 16.0, "rope_parameters": YARN},
}
TOKENS = ids(2, 70)


def loaded(path: Path) -> Any:
    return MedAssistDeepseekForCausalLM.from_pretrained(path).eval()


def import_(source: Path, out: Path, **settings: Any) -> Any:
    result = import_checkpoint(source, out, tokenizer="none", settings=settings)
    verify_files(out)
    return result


def published(folder: Path, model: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """Writes the model as DeepSeek does, in two files, with copies of embedding and head in the layers of multi-token
    prediction, and returns the tensors as they are there."""
    c = model.config
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "all")
    tensors = load_file(folder / "all")
    (folder / "all").unlink()
    for layer in range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    for layer in range(c.num_hidden_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(c.qk_rope_head_dim // 2)
    tensors = {n: t if n.endswith("e_score_correction_bias") else t.to(dtype) for n, t in tensors.items()}
    write(folder, tensors)
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
        "num_experts_per_tok n_shared_experts n_group topk_group norm_topk_prob routed_scaling_factor "
        "first_k_dense_replace num_nextn_predict_layers max_position_embeddings rms_norm_eps tie_word_embeddings "
        "attention_bias attention_dropout initializer_range"
    )
    settings = {name: getattr(c, name) for name in names.split()} | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
        "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
        "rope_theta": 10000, "use_cache": True, "transformers_version": "4.33.1",
        "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return tensors


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """In two parts with an index."""
    parts: list[dict[str, Tensor]] = [{}, {}]
    for number, name in enumerate(sorted(tensors)):
        parts[number % 2][name] = tensors[name].contiguous()
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


PUBLISHED_ROPE = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MedAssistDeepseekForCausalLM:
    return module(rope_parameters=PUBLISHED_ROPE)


@pytest.fixture
def source(model: Any, tmp_path: Path) -> Path:
    published(tmp_path / "source", model)
    return tmp_path / "source"


@pytest.mark.parametrize("kind", KINDS)
def test_directories_saved_by_transformers_compute_the_same_imported_and_directly(kind: str, tmp_path: Path) -> None:
    theirs = twin(module(**KINDS[kind])).eval()
    theirs.save_pretrained(tmp_path / "source")
    want = logprobs(theirs, TOKENS)
    result = import_(tmp_path / "source", tmp_path / "out")
    assert result.model_type == "medassist_deepseek"
    assert result.config.num_nextn_predict_layers == 0  # transformers leaves them out, and says that they are there
    told = [warning for warning in result.warnings if "num_nextn_predict_layers" in warning]
    assert len(told) == len(result.warnings) == kind.startswith("v3")
    assert_close(logprobs(loaded(tmp_path / "out"), TOKENS), want)
    direct = loaded(tmp_path / "source")
    assert_close(logprobs(direct, TOKENS), want)
    direct.save_pretrained(tmp_path / "again")  # as one of ours
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "medassist_deepseek"
    assert_close(logprobs(loaded(tmp_path / "again"), TOKENS), want)


def test_untrained_predictions_are_not_silent_when_loaded_directly(tmp_path: Path) -> None:
    twin(module()).save_pretrained(tmp_path)
    _, report = MedAssistDeepseekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = report["missing_keys"]
    assert missing
    assert all(name.startswith("model.layers.2.") for name in missing)
    assert not report["unexpected_keys"]


def test_published_directories_are_imported_whole(model: Any, source: Path, tmp_path: Path) -> None:
    result = import_(source, tmp_path / "out")
    assert result.warnings == ()
    imported = loaded(tmp_path / "out")
    assert_close(logprobs(imported, TOKENS), logprobs(model, TOKENS))
    for name, tensor in model.state_dict().items():  # those of multi-token prediction too
        assert torch.equal(imported.state_dict()[name], tensor), name
    assert result.parameters == sum(t.numel() for t in model.state_dict().values())
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_published_directories_load_directly(model: Any, source: Path) -> None:
    direct, report = MedAssistDeepseekForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(direct.state_dict()[name], tensor), name
    assert_close(logprobs(direct.eval(), TOKENS), logprobs(model, TOKENS))


def test_bfloat16_keeps_its_values_and_the_bias_its_own(tmp_path: Path) -> None:
    tensors = published(tmp_path / "source", module(rope_parameters=PUBLISHED_ROPE), torch.bfloat16)
    import_(tmp_path / "source", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].float()), name


def test_imports_are_written_as_training_writes_checkpoints(model: Any, source: Path, tmp_path: Path) -> None:
    import_(source, tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    written, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "saved"))
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in saved.items())


def test_description_counts_active_parameters_and_the_cache(model: Any, source: Path) -> None:
    lines = dict(describe(source).lines)
    assert lines["import"] == "possible"
    total, active = (int(part.rpartition(" ")[2].replace(",", "")) for part in lines["parameters"].split(", of which"))
    prediction = sum(t.numel() for n, t in model.state_dict().items() if n.startswith("model.layers.2."))
    assert active == total - prediction - 6 * 3 * 32 * 64  # six experts of three matrices are left out
    # 64 numbers of the latent and 16 of the key, against 4 heads of 48 and 24, in 2 layers of 2 bytes a number.
    assert lines["cache"].startswith("320 bytes a token")
    assert lines["cache"].endswith("1,152")


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("model.layers.2.embed_tokens.weight", lambda t: t + 1, ["model.layers.2.embed_tokens.weight", "differ"]),
        ("model.layers.2.shared_head.head.weight", lambda t: t + 1, ["model.layers.2.shared_head.head.weight"]),
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, ["model.layers.1.mlp.experts.3.up_proj.weight", "miss"]),
        ("model.layers.1.mlp.experts.3.up_proj.weight", lambda t: t.T, ["model.layers.1.mlp.experts.3.up_proj", "(64"]),
        ("model.layers.1.mlp.gate.e_score_correction_bias", None, ["model.layers.1.mlp.gate.e_score_correction_bias"]),
        ("model.layers.2.eh_proj.weight", None, ["model.layers.2.eh_proj.weight"]),
        ("model.layers.1.mlp.experts.8.up_proj.weight", torch.zeros(32, 64), ["mlp.experts.8.up_proj", "unexpected"]),
        ("model.layers.1.self_attn.indexer.wk.weight", torch.zeros(4, 4), ["indexer.wk", "unexpected"]),
        ("model.layers.1.self_attn.o_proj.weight_scale_inv", torch.ones(1, 1), ["o_proj.weight_scale_inv", "bfloat16"]),
        ("model.layers.0.mlp.up_proj.weight", lambda t: t.to(torch.float8_e4m3fn), ["model.layers.0.mlp.up_proj.weight",
                                                                                     "bfloat16"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    name: str, changed: Any, named: list[str], model: Any, tmp_path: Path
) -> None:
    tensors = published(tmp_path / "source", model)
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed(tensors[name]) if callable(changed) else changed
    write(tmp_path / "source", tensors)
    with pytest.raises(ValueError, match=r"tensor|differ|cannot|shape|quantised") as error:
        import_checkpoint(tmp_path / "source", tmp_path / "out", tokenizer="none")
    assert all(part in str(error.value) for part in named), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"head_dim": 128}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "something"}, "topk_method"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "rope_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta": 32}}, r"rope_parameters\.beta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quantization_config"),
        ({"kv_lora_rank": 32}, "kv_lora_rank"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}, "deepseek_v32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_are_not_supported_are_refused_by_name(
    changes: dict[str, Any], named: str, model: Any, tmp_path: Path
) -> None:
    published(tmp_path / "source", model, **changes)
    with pytest.raises(ValueError, match=named):
        import_checkpoint(tmp_path / "source", tmp_path / "out", tokenizer="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [
    {"qk_rope_head_dim": 0}, {"n_shared_experts": 0, "first_k_dense_replace": 0}, {"first_k_dense_replace": 2},
    {"router": "noisy_top_k"}, {"q_lora_rank": None, "num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": 0},
], ids=str)  # fmt: skip
def test_directories_of_ours_with_other_settings_are_imported(changes: dict[str, Any], tmp_path: Path) -> None:
    model = module(**changes)
    model.save_pretrained(tmp_path / "source")
    result = import_(tmp_path / "source", tmp_path / "out")
    assert result.warnings == ()
    imported = loaded(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], tensor), name
    assert_close(logprobs(imported, TOKENS), logprobs(model, TOKENS))
