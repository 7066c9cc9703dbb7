"""The Llama beside each preset has the same size, and heads that vLLM's kernels take."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from loadtest import engine_sizes
from loadtest.engine_plan import Options
from loadtest.engine_sizes import HEAD_SIZES, configuration, count, equal_llama
from modeling.registry import REGISTRY

DENSE = [model_type for model_type, arch in REGISTRY.items() if not hasattr(arch.config_class(), "n_routed_experts")]
PRESETS = [(model_type, preset) for model_type in DENSE for preset in REGISTRY[model_type].presets()]
every_preset = pytest.mark.parametrize(("model_type", "preset"), PRESETS, ids=["-".join(names) for names in PRESETS])


@every_preset
def test_llama_of_equal_size(model_type: str, preset: str) -> None:
    config = configuration(model_type, preset)
    llama = equal_llama(config)
    ours, theirs = count(config), count(llama)
    assert theirs.layers == pytest.approx(ours.layers, rel=0.01)
    assert theirs.matrices == pytest.approx(ours.matrices, rel=0.01)
    assert theirs.vocabulary == ours.vocabulary
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(llama, name) == getattr(config, name), name


@every_preset
def test_heads_of_the_llama_cover_the_same_widths_in_a_size_that_kernels_take(model_type: str, preset: str) -> None:
    config = configuration(model_type, preset)
    llama = equal_llama(config)
    assert llama.head_dim in HEAD_SIZES
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert llama.num_attention_heads * kv_heads == config.num_attention_heads * llama.num_key_value_heads
    width, theirs = kv_heads * config.head_dim, llama.num_key_value_heads * llama.head_dim
    assert theirs == width or all(width % size for size in HEAD_SIZES)
    if preset != "tiny":  # which may have any heads
        assert theirs == pytest.approx(width, rel=0.015)
    if config.head_dim in HEAD_SIZES:
        assert llama.head_dim == config.head_dim


@pytest.mark.parametrize(
    ("model_type", "preset", "head_dim", "heads", "kv_heads", "mlp"),
    [
        ("medassist_gpt", "published_303m", 64, 16, 4, 2560),
        ("gatorgpt", "published_v1", 64, 6, 3, 768),
        ("gatorgpt", "published_v2", 32, 14, 7, 896),
        ("gpt", "published_155m", 64, 12, 12, 1792),  # 3 d + 8 d = 4 d + 3 f: f = 7/3 d
    ],
)
def test_published_sizes(model_type: str, preset: str, head_dim: int, heads: int, kv_heads: int, mlp: int) -> None:
    llama = equal_llama(configuration(model_type, preset))
    assert (llama.head_dim, llama.num_attention_heads, llama.num_key_value_heads) == (head_dim, heads, kv_heads)
    assert llama.intermediate_size == mlp


def test_published_totals_are_within_one_percent() -> None:
    for model_type, preset in PRESETS:
        if preset.startswith(("published", "base")):
            config = configuration(model_type, preset)
            assert count(equal_llama(config)).total == pytest.approx(count(config).total, rel=0.01), preset


@pytest.mark.parametrize("model_type", DENSE)
def test_count_is_that_of_the_real_module(model_type: str) -> None:
    config = configuration(model_type, "tiny")
    module = REGISTRY[model_type].model_class()(config)
    assert count(config).total == sum(p.numel() for p in module.parameters())
    llama = equal_llama(config)
    assert count(llama).total == sum(p.numel() for p in LlamaForCausalLM(llama).parameters())


def test_counting_takes_no_memory() -> None:
    config = configuration("medassist_gpt", "published_303m")
    assert count(config).total == 303_196_160
    assert torch.get_default_device().type == "cpu"


@pytest.mark.engine
def test_head_sizes_are_those_of_the_attention_backend() -> None:
    program = (
        "from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as B; print(B.get_supported_head_sizes())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(HEAD_SIZES) <= set(map(int, done.stdout.strip().splitlines()[-1].strip("[]").split(",")))


def test_bidirectional_presets_are_measured_causal() -> None:
    assert REGISTRY["gpt"].presets()["published_155m"]().causal is False
    assert configuration("gpt", "published_155m").causal is True


def test_every_architecture_is_measured_at_its_largest_preset_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [model_type for model_type, _ in engine_sizes.choose()] == DENSE
    assert engine_sizes.choose(["medassist_gpt"]) == [("medassist_gpt", "published_303m")]
    monkeypatch.setattr(engine_sizes, "PARAMETER_LIMIT", 100_000_000)
    assert engine_sizes.choose(["medassist_gpt"]) == [("medassist_gpt", "published_86m")]
    monkeypatch.setattr(engine_sizes, "PARAMETER_LIMIT", 1)
    assert engine_sizes.choose(["medassist_gpt"]) == [("medassist_gpt", "tiny")]


def test_named_presets_are_taken_of_every_architecture_that_has_them() -> None:
    assert engine_sizes.choose((), ["tiny"]) == [(model_type, "tiny") for model_type in DENSE]
    assert engine_sizes.choose((), ["published_v2", "published_v1"]) == [
        ("gatorgpt", "published_v2"),
        ("gatorgpt", "published_v1"),
    ]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="published_303m"):
        engine_sizes.choose(["medassist_gpt"], ["published_v1"])
    with pytest.raises(ValueError, match="tinymorfer"):
        engine_sizes.choose(["llama"])


def test_options_that_do_not_fit_a_model_are_refused_with_its_name() -> None:
    engine_sizes.check("gpt", "published_155m", Options(new_tokens=255))
    with pytest.raises(ValueError, match="gpt published_155m: --new-tokens 256"):
        engine_sizes.check("gpt", "published_155m", Options(new_tokens=256))
