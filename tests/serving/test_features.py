"""What a checkpoint cannot do is refused before anything is loaded, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling.registry import REGISTRY
from serving.engine import Engine
from serving.features import RESERVED, default_dtype, read_config, split_arguments
from serving.gateway.errors import from_engine
from serving.plan import Options, plan
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
        ("gpt", {"causal": False}, {"speculative": "ngram"}, "m is not causal.*--speculative"),
        ("gpt", {"causal": False}, {"pipeline_parallel": 2}, "m is not causal.*--tensor-parallel-size"),
        ("medassist_gpt", {}, {"tensor_parallel": 3}, r"m: its num_attention_heads \(4\) cannot be shared by 3"),
        ("gatorgpt", {"num_key_value_heads": 4, "intermediate_size": 130}, {"tensor_parallel": 4},
         r"m: its intermediate_size \(130\)"),
        ("tinymorfer", {}, {"pipeline_parallel": 3}, "m: its 2 layers cannot make 3"),
        ("medassist_gpt", {}, {"pipeline_parallel": 2, "speculative": "ngram"},
         "m: .*speculation across pipeline stages"),
        ("medassist_gpt", {}, {"speculative": "nowhere"}, "--speculative must be ngram, mtp or a checkpoint directory"),
        ("medassist_gpt", {}, {"speculative": "mtp"},
         r"--speculative mtp: m has no layer of multi-token prediction \(num_nextn_predict_layers\)"),
        ("medassist_deepseek", {"num_nextn_predict_layers": 0}, {"speculative": "mtp"},
         r"--speculative mtp: m has no layer of multi-token prediction \(num_nextn_predict_layers\)"),
        ("medassist_deepseek", {}, {"pipeline_parallel": 2, "speculative": "mtp"},
         "m: .*speculation across pipeline stages"),
        ("medassist_gpt", {}, {"expert_parallel": True, "tensor_parallel": 2}, "--expert-parallel: m has no experts"),
        ("medassist_deepseek", {"n_routed_experts": 7, "n_group": 1, "topk_group": 1},
         {"expert_parallel": True, "tensor_parallel": 2},
         r"m: its n_routed_experts \(7\) cannot be shared by 2 expert-parallel"),
        ("medassist_deepseek", {"moe_intermediate_size": 33}, {"tensor_parallel": 2},
         r"m: its moe_intermediate_size \(33\) cannot be shared by 2"),
        # Whole experts are kept together, but the shared ones are always split.
        ("medassist_deepseek", {"moe_intermediate_size": 33}, {"tensor_parallel": 2, "expert_parallel": True},
         r"m: its n_shared_experts \* moe_intermediate_size \(33\) cannot be shared by 2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_refused(make: Make, model_type: str, changes: dict, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
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


def test_a_draft_is_shared_by_the_ranks_too(make: Make) -> None:
    base = make("base")
    narrow = make("narrow", intermediate_size=130)
    assert plan({"m": base}, Options(speculative=str(narrow), tensor_parallel=2))
    with pytest.raises(ValueError, match=r"^narrow: its intermediate_size \(130\) cannot be shared by 4"):
        plan({"m": base}, Options(speculative=str(narrow), tensor_parallel=4))
    lonely = make("lonely", num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"^lonely: its num_attention_heads \(1\) cannot be shared by 2"):
        plan({"m": base}, Options(speculative=str(lonely), tensor_parallel=2))


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


def test_whole_experts_need_not_be_divisible(make: Make) -> None:
    base = make("base", "medassist_deepseek", moe_intermediate_size=33, n_shared_experts=2)
    with pytest.raises(ValueError, match=r"its moe_intermediate_size \(33\)"):
        plan({"m": base}, Options(tensor_parallel=2))
    assert "--enable-expert-parallel" in arguments(base, tensor_parallel=2, expert_parallel=True)
    assert "--enable-expert-parallel" not in arguments(base)


def test_a_model_drafts_for_itself(make: Make) -> None:
    base = make("base", "medassist_deepseek")
    given = value(arguments(base, speculative="mtp", speculative_tokens=2), "--speculative-config")
    assert json.loads(given) == {"method": "mtp", "num_speculative_tokens": 2}


def test_adapters_are_refused_where_vllm_folds_what_they_adapt(make: Make, tmp_path: Path) -> None:
    base = make("base", "medassist_deepseek")
    write_adapter(tmp_path / "a", base, ["o_proj"])
    with pytest.raises(ValueError, match=r"^m: no adapters can be served for it: its keys and values are .*Merge mine"):
        plan({"m": base}, Options(adapters=(f"mine={tmp_path / 'a'}",)))


def test_the_size_of_the_cache_is_told(make: Make, tmp_path: Path) -> None:
    """From lines of a log, of which stages of a pipeline have one each."""
    base = make("base", "medassist_deepseek")
    engines, _ = plan({"m": base}, Options())
    engine = Engine("m", base, engines["m"], tmp_path)
    assert engine._cache_report() == ""
    for line in (
        "INFO KV cache: 640 bytes a token, in 2 layers",
        "INFO KV cache: 1280 bytes a token, in 4 layers",
        "INFO KV cache: 320 bytes a token for drafting, in 1 layers",
    ):
        engine._note_cache(line)
    assert engine._cache_report() == "", "how many tokens fit is not known yet"
    engine._note_cache("INFO CPU KV cache size: 1,048,576 tokens")
    assert engine._cache_report() == "KV cache for 1,048,576 tokens, 1,280 bytes a token and 320 for drafting"


def test_vllm_is_given_room_for_adapters_and_no_more(make: Make, tmp_path: Path) -> None:
    base = make("base")
    write_adapter(tmp_path / "a", base, ["q_proj"], rank=9)
    write_adapter(tmp_path / "b", base, ["down_proj"], rank=2)
    given = arguments(base, adapters=(f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"))
    assert value(given, "--max-lora-rank") == "16"
    assert value(given, "--max-loras") == value(given, "--max-cpu-loras") == "2"


def test_vllm_is_given_room_for_the_configured_rank_where_no_matrix_has_it(make: Make, tmp_path: Path) -> None:
    base = make("base")
    write_adapter(tmp_path / "a", base, ["q_proj"], rank=8)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 64, "rank_pattern": {"q_proj": 8}}))
    assert value(arguments(base, adapters=(f"a={tmp_path / 'a'}",)), "--max-lora-rank") == "64"


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--port 1", "--port is set by medassist; say --port to medassist serve instead"),
        ("--uds=/x", "--uds is set by medassist and cannot"),
        ("--lora_modules x", "--lora-modules, which .* say --lora to"),
        ("--max-num-seqs '1", "No closing quotation"),
        ("--enable-log-req", "--enable-log-requests, which could write down or pass on prompts"),
        ("--enable-log", "--enable-log-requests, which"),
        ("--no-enable-log-outputs", "--enable-log-outputs, which"),
        ("--no_enable_log_o", "--enable-log-outputs, which"),
        ("--max-num-seqs 3 --otlp http://127.0.0.1:1", "--otlp-traces-endpoint, which"),
        ("--log-config-file=x", "--log-config-file could write"),
        ("--conf x.yaml", "--config, which is set"),
        ("--toke x", "--tokenizer, which"),
        ("--max-model-l 9", "say --max-model-len to"),
        ("--enforce", "say --eager to"),
        ("--kv-cache-mem 9", "say --kv-cache-gib to"),
        ("-tp 2", "say --tensor-parallel-size to"),
        ("-t=2", "-tp, which"),
        ("--enable-expert-parallel", "say --expert-parallel to"),
        ("--no-enable-expert-parallel", "say --expert-parallel to"),
        ("--enable-expert-p", "--enable-expert-parallel, which"),
        ("-ep", "say --expert-parallel to"),
        ("-qfp8", "say --quantization to"),
        ("--speculative-config.method ngram", "say --speculative to"),
        ("-sc.method=ngram", "say --speculative to"),
        ("--spec-m ngram", "say --speculative to"),
        ("--", "--model, which"),
        ("x=/adapter --max-num-seqs 3", "must begin with an option"),
    ],
)
def test_arguments_that_medassist_relies_on_stay(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^--vllm-args.*{reason}"):
        split_arguments(text)


@pytest.mark.parametrize(
    "text",
    ["", "--max-model-len-foo 3", "--max-num-seqs 3", "--no-enable-prefix-caching", "--kv-cache-dtype fp8", "-dp 1",
     "-cc.mode=0", "-O1", "--seed -1", "--watermark 0.1", "--tokenizer-mode-of-ours"],
)  # fmt: skip
def test_options_that_only_begin_like_reserved_ones_can_be_given(text: str) -> None:
    assert " ".join(split_arguments(text)) == text


def test_no_option_is_refused_by_accident() -> None:
    """Every option of the installed vLLM is either reserved by its own name or can be given."""
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = cli_args.make_arg_parser(FlexibleArgumentParser())._actions
    names = {name for action in actions for name in action.option_strings}
    # An option without its own line would be a typing error, or gone from this vLLM.
    assert set(RESERVED) <= names
    for name in names:
        bare = "--" + name.removeprefix("--no-") if name.startswith("--no-") else name
        if bare not in RESERVED and name != "-h":
            assert split_arguments(name) == (name,)


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
    error = from_engine(400, body, "/v1/completions", "m")
    assert error.code == code
    assert "(parameter=" not in error.message
