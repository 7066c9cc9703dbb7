"""What a checkpoint cannot do is refused before anything is loaded, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.registry import REGISTRY
from serving.features import default_dtype, read_config, split_arguments
from serving.gateway.errors import from_engine
from serving.serve import Options, plan
from tests.lora import write_adapter
from tests.quantised import write_quantised

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a tiny checkpoint without a tokenizer under a name."""

    def write(name: str, model_type: str = "medassist_gpt", **changes: Any) -> Path:
        torch.manual_seed(0)
        config = REGISTRY[model_type].config_class().tiny(**changes)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def arguments(checkpoint: Path, on_cpu: bool = True, **options: Any) -> list[str]:
    """Arguments for vLLM of the checkpoint's engine."""
    engines, _ = plan({"m": checkpoint}, Options(**options))
    return engines["m"].features.arguments(on_cpu)


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize(
    ("model_type", "changes", "options", "reason"),
    [
        ("gpt", {"causal": False}, {"speculative": "ngram"}, "not causal.*--speculative"),
        ("gpt", {"causal": False}, {"pipeline_parallel": 2}, "not causal.*--tensor-parallel-size"),
        ("medassist_gpt", {}, {"tensor_parallel": 3}, "4 attention heads cannot be shared by 3"),
        ("gatorgpt", {"num_key_value_heads": 4, "intermediate_size": 130}, {"tensor_parallel": 4}, "intermediate_size"),
        ("tinymorfer", {}, {"pipeline_parallel": 3}, "2 layers cannot make 3"),
        ("medassist_gpt", {}, {"pipeline_parallel": 2, "speculative": "ngram"}, "speculation across pipeline stages"),
        ("medassist_gpt", {}, {"speculative": "nowhere"}, "ngram or a checkpoint directory"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(make: Make, model_type: str, changes: dict, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)m?.*{reason}"):
        plan({"m": make("base", model_type, **changes)}, Options(**options))


def test_a_draft_must_speak_the_same_vocabulary(make: Make) -> None:
    base = make("base")
    for draft, reason in (
        (make("words", vocab_size=200), r"words cannot draft for m: their vocabularies differ \(200 and 160 tokens\)"),
        (make("short", max_position_embeddings=128), "short has 128 positions, m is served with 512"),
        (make("both-ways", "gpt", causal=False), "not causal"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan({"m": base}, Options(speculative=str(draft)))
    assert plan({"m": base}, Options(speculative=str(make("short")), max_model_len=128))
    other = make("other")
    for directory, token in ((base, "a"), (other, "b")):
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 0}}}))
    with pytest.raises(ValueError, match="the same ids mean other tokens"):
        plan({"m": base}, Options(speculative=str(other)))


def test_a_tokenizer_that_gives_ids_the_model_lacks_is_refused(make: Make) -> None:
    base = make("base")
    path = base / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<end>", "id": 160}]}))
    with pytest.raises(ValueError, match="ids up to 160"):
        plan({"m": base}, Options())
    path.write_text(json.dumps({"model": {"vocab": {"a": 159}}}))
    plan({"m": base}, Options())


def test_adapters_belong_to_a_model(make: Make, tmp_path: Path) -> None:
    base, other = make("base"), make("other", "tinymorfer")
    write_adapter(tmp_path / "a", base, ["q_proj"], rank=9)
    named = {"m": base, "n": other}
    engines, _ = plan(named, Options(adapters=(f"m:mine={tmp_path / 'a'}",)))
    assert [list(engine.features.adapters) for engine in engines.values()] == [["mine"], []]
    for option, reason in (
        (f"mine={tmp_path / 'a'}", "which of m, n"),
        (f"x:mine={tmp_path / 'a'}", "no model 'x'"),
        (f"n:mine={tmp_path / 'a'}", "names no projection of this model"),
        (f"m:n={tmp_path / 'a'}", "is taken"),
        (f"m:../x={tmp_path / 'a'}", "cannot be a model's name"),
        ("mine", "NAME=DIRECTORY"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(named, Options(adapters=(option,)))


def test_vllm_is_given_room_for_adapters_and_no_more(make: Make, tmp_path: Path) -> None:
    base = make("base")
    write_adapter(tmp_path / "a", base, ["q_proj"], rank=9)
    write_adapter(tmp_path / "b", base, ["down_proj"], rank=2)
    given = arguments(base, adapters=(f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"))
    assert value(given, "--max-lora-rank") == "16"
    assert value(given, "--max-loras") == value(given, "--max-cpu-loras") == "2"


def test_an_adapter_that_changes_nothing_is_said(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make("base")
    write_adapter(tmp_path / "a", base, ["q_proj"])
    path = tmp_path / "a/adapter_model.safetensors"
    save_file({k: v if "lora_A" in k else torch.zeros_like(v) for k, v in load_file(path).items()}, path)
    _, notes = plan({"m": base}, Options(adapters=(f"a={tmp_path / 'a'}",)))
    assert any("adapter a changes nothing" in note for note in notes)


def test_dtype_follows_the_weights(make: Make, tmp_path: Path) -> None:
    base = make("base")
    plain = plan({"m": base}, Options())[0]["m"].features
    assert default_dtype(base, plain, on_cpu=True) == "float32"
    assert default_dtype(base, plain, on_cpu=False) == "bfloat16"
    assert default_dtype(write_quantised(base, tmp_path / "i8", "int8"), plain, on_cpu=True) == "float32"
    assert default_dtype(write_quantised(base, tmp_path / "i4", "int4"), plain, on_cpu=True) == "bfloat16"


@pytest.mark.parametrize("text", ["--port 1", "--uds=/x", "--lora_modules x", "--max-num-seqs '1"])
def test_arguments_that_the_gateway_relies_on_stay(text: str) -> None:
    with pytest.raises(ValueError, match="--vllm-args"):
        split_arguments(text)


def test_other_arguments_reach_vllm_last(make: Make) -> None:
    assert arguments(make("base"), vllm_args="--max-num-seqs 3 --block-size=64")[-3:] == [
        "--max-num-seqs", "3", "--block-size=64",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{}", "{" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("max_tokens=9 cannot be greater than max_model_len=8. Please request fewer output tokens.",
         "context_length_exceeded"),
        ("Input length (9) exceeds model's maximum context length (8).", "context_length_exceeded"),
        ("The decoder prompt (length 9) is longer than the maximum model length of 8.", "context_length_exceeded"),
        ("truncate_prompt_tokens=9 cannot be greater than max_model_len = 8.", None),
        ("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", None),
    ],
)  # fmt: skip
def test_vllms_words_become_openais_code(message: str, code: str | None) -> None:
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()
    error = from_engine(400, body, 1)
    assert error.code == code
    assert "(parameter=" not in error.message
