"""Published files become checkpoints of ours that compute the published models' numbers."""

import copy
import fcntl
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling import registry
from modeling.importing import import_checkpoint
from modeling.importing.importer import staging
from serving.fingerprint import verify_files
from tests.modeling.importing import published
from tests.modeling.importing.published import Sizes, State

IDS = [1, 5, 2, 9, 3, 7, 0]
SIZES = Sizes()


def logits(directory: Path, ids: list[int] = IDS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def check(source: Path, out: Path, want: torch.Tensor, settings: dict[str, Any] | None = None) -> Any:
    """Imports without a tokenizer and compares logits; returns the import's result."""
    result = import_checkpoint(source, out, tokenizer="none", settings=settings)
    torch.testing.assert_close(logits(out), want, atol=1e-5, rtol=0)
    verify_files(out)
    assert not [p for p in out.parent.iterdir() if ".partial" in p.name]
    return result


@pytest.fixture(scope="module")
def state() -> State:
    return published.medassist(SIZES)


@pytest.fixture(scope="module")
def want(state: State) -> torch.Tensor:
    return published.medassist_logits(state, SIZES, IDS)


GOLDEN = [(arch, n) for arch in registry.REGISTRY.values() for n in range(len(arch.reference().golden))]


@pytest.mark.parametrize(("arch", "number"), GOLDEN, ids=lambda value: getattr(value, "model_type", value))
def test_published_logits_come_out_of_published_files(arch: registry.Architecture, number: int, tmp_path: Path) -> None:
    golden = arch.reference().golden[number]
    c = golden.config
    if arch.model_type == "gpt":
        sizes = Sizes(vocab=11, d=c["emb_dim"], heads=c["n_heads"], layers=c["n_layers"], ctx=c["context_length"])
        state = published.gpt(sizes)
    else:
        sizes = Sizes(
            11, c["d_model"], c["n_heads"], c["n_heads"] // c["gqa_groups"], c["d_ff"], c["blocks"], c["max_len"]
        )
        state = published.medassist(sizes, head="unembed" if arch.model_type == "gatorgpt" else "lm_head")
    state = published.fill_with_sines(state, golden.gains, arch.layout().ignored)
    path = published.write_training_dictionary(tmp_path / "step.pt", published.prefixed(state), dict(c))
    result = import_checkpoint(path, tmp_path / "out", tokenizer="none", settings=golden.settings)
    assert result.model_type == arch.model_type
    computed = logits(tmp_path / "out", list(golden.token_ids))
    for position, row in golden.logits.items():
        torch.testing.assert_close(computed[position], torch.tensor(row).double(), atol=1e-5, rtol=0)


def training(folder: Path, state: State, config: Any) -> Path:
    folder.mkdir()
    return published.write_training_dictionary(folder / "checkpoint_step_5.pt", state, config, loss=2.5)


def beside(folder: Path, state: State, config: Any) -> Path:
    """The configuration beside the file and not in it."""
    folder.mkdir()
    published.write_json(folder / "config.json", config)
    return published.write_training_dictionary(folder / "step.pt", state, None)


def tied_in_metadata(folder: Path, state: State, config: Any) -> Path:
    folder.mkdir()
    published.write_json(folder / "config.json", config)
    head = next((n for n in state if n.endswith("lm_head.weight")), None)
    embed = next(n for n in state if n.endswith("embed.weight"))
    kept = {n: t.clone() for n, t in state.items() if n != head}
    metadata = {head: embed, "format": "pt"} if head else None
    save_file(kept, folder / "model.safetensors", metadata)
    return folder


def head_only(folder: Path, state: State, config: Any) -> Path:
    head = any(n.endswith("lm_head.weight") for n in state)
    return published.write_folder(folder, {n: t for n, t in state.items() if not (head and "embed." in n)}, config)


def old_format(folder: Path, state: State, config: Any) -> Path:
    """What torch wrote before version 1.6: no archive."""
    published.write_folder(folder, {}, config, "pytorch_model.bin")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


FORMATS = {
    "training": training,
    "beside": beside,
    "bin": lambda f, s, c: published.write_folder(f, s, c, "pytorch_model.bin"),
    "pth": lambda f, s, c: published.write_folder(f, s, c, "model.pth") / "model.pth",
    "old": old_format,
    "safetensors": lambda f, s, c: published.write_folder(f, s, c),
    "metadata": tied_in_metadata,
    "head-only": head_only,
    "sharded-safetensors": lambda f, s, c: published.write_shards(f, s, c, "safetensors"),
    "sharded-bin": lambda f, s, c: published.write_shards(f, s, c, "bin"),
}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("variant", ["compiled", "plain", "bare", "headless"])
def test_every_format_and_variant_computes_the_same(
    file: str, variant: str, state: State, want: torch.Tensor, tmp_path: Path
) -> None:
    kept = dict(state)
    if variant in ("bare", "headless"):
        kept = {n: t for n, t in kept.items() if "rope" not in n}
    if variant == "headless":
        kept.pop("lm_head.weight")
    config = published.native(SIZES) if variant in ("compiled", "bare") else published.hugging(SIZES)
    source = FORMATS[file](tmp_path / "source", published.prefixed(kept) if variant == "compiled" else kept, config)
    result = check(source, tmp_path / "out", want)
    assert (result.model_type, result.warnings) == ("medassist_gpt", ())
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sum(t.numel() for t in tensors.values()) == result.parameters
    assert result.parameters == sum(t.numel() for n, t in state.items() if "rope" not in n and n != "lm_head.weight")


@pytest.mark.parametrize("sizes", [
    Sizes(vocab=11, d=16, heads=4, kv=4, ff=8, layers=1, ctx=8),
    Sizes(vocab=67, d=96, heads=2, kv=1, ff=40, layers=2, ctx=32),
    Sizes(vocab=300, d=56, heads=4, kv=2, ff=112, layers=4, ctx=256, eps=1e-3),
], ids=str)  # fmt: skip
def test_other_sizes_compute_what_the_formulas_say(sizes: Sizes, tmp_path: Path) -> None:
    state = published.medassist(sizes, seed=sizes.d)
    source = published.write_folder(tmp_path / "source", published.prefixed(state), published.native(sizes))
    check(source, tmp_path / "out", published.medassist_logits(state, sizes, IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_written_in_float32(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    rounded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    source = published.write_folder(tmp_path / "source", rounded, published.hugging(SIZES), "pytorch_model.bin")
    check(source, tmp_path / "out", published.medassist_logits(rounded, SIZES, IDS))


def test_strided_tensors_are_read_in_their_order(state: State, want: torch.Tensor, tmp_path: Path) -> None:
    strided = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in state.items()}
    source = published.write_folder(tmp_path / "source", strided, published.hugging(SIZES), "pytorch_model.bin")
    check(source, tmp_path / "out", want)


def gator_v1(s: Sizes) -> dict[str, Any]:
    return dict(
        architectures=["GatorGPT"], model_type="gator-transformer", hidden_size=s.d, num_attention_heads=s.heads,
        num_hidden_layers=s.layers, vocab_size=s.vocab, max_position_embeddings=s.ctx,
    )  # fmt: skip


def gator_v2(s: Sizes) -> dict[str, Any]:
    """Its vocabulary is counted without the runs of spaces, and its program is another network's."""
    remote = {"AutoConfig": "configuration_gator.GatorConfig", "AutoModel": "modeling_gator.GatorModel"}
    return gator_v1(s) | dict(architectures=["GatorModel"], model_type="gator", vocab_size=s.vocab - 4, auto_map=remote)


@pytest.mark.parametrize("config", [gator_v1, gator_v2])
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("head", ["unembed", None])
def test_gator_configurations_are_completed_from_the_tensors(
    config: Any, buffers: bool, head: str | None, tmp_path: Path
) -> None:
    state = published.medassist(SIZES, buffers=buffers, head=head)
    source = published.write_folder(tmp_path / "s", published.prefixed(state), config(SIZES), "pytorch_model.bin")
    result = check(source, tmp_path / "out", published.medassist_logits(state, SIZES, IDS))
    assert result.model_type == "gatorgpt"
    assert (result.config.num_key_value_heads, result.config.intermediate_size) == (SIZES.kv, SIZES.ff)
    assert (result.config.rms_norm_eps, result.config.max_position_embeddings) == (1e-5, SIZES.ctx)
    assert [w for w in result.warnings if "vocab_size" in w] if config is gator_v2 else not result.warnings


def test_gator_tied_in_metadata_alone_is_recognised_by_it(tmp_path: Path) -> None:
    state = published.prefixed(published.medassist(SIZES, head=None))
    metadata = {"_orig_mod.unembed.weight": "_orig_mod.embed.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata)
    result = import_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "out", tokenizer="none", settings={"n_heads": SIZES.heads}
    )
    assert result.model_type == "gatorgpt"
    torch.testing.assert_close(
        logits(tmp_path / "out"), published.medassist_logits(published.medassist(SIZES), SIZES, IDS), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("causal", [None, False, True])
@pytest.mark.parametrize("where", ["config", "settings"])
def test_gpt_is_bidirectional_unless_told_otherwise(causal: bool | None, where: str, tmp_path: Path) -> None:
    sizes = replace(SIZES, d=15, heads=3, layers=2)
    state = published.gpt(sizes)
    choice = {} if causal is None else {"causal": causal}
    config = published.gpt_config(sizes, **(choice if where == "config" else {}))
    source = published.write_folder(tmp_path / "source", state, config, "GPT2_211M.pth")
    result = check(
        source, tmp_path / "out", published.gpt_logits(state, sizes, IDS, bool(causal)),
        choice if where == "settings" else None,
    )  # fmt: skip
    assert bool(result.notes) == (causal is None)


@pytest.mark.parametrize("buffers", [True, False])
def test_gpt_has_as_many_positions_as_were_trained(buffers: bool, tmp_path: Path) -> None:
    state = published.gpt(SIZES, buffers=buffers)
    config = published.gpt_config(SIZES, context_length=SIZES.ctx * 2)
    source = published.write_folder(tmp_path / "source", state, config, "GPT2_211M.pth")
    result = check(source, tmp_path / "out", published.gpt_logits(state, SIZES, IDS, False))
    assert result.config.max_position_embeddings == SIZES.ctx
    assert any("max_position_embeddings" in warning for warning in result.warnings)


def test_without_a_configuration_the_head_count_is_asked_for(state: State, want: torch.Tensor, tmp_path: Path) -> None:
    path = published.write_folder(tmp_path / "s", published.prefixed(state), None, "weights.bin") / "weights.bin"
    with pytest.raises(ValueError, match=r"--set num_attention_heads=\.\.\.") as refusal:
        import_checkpoint(path, tmp_path / "out", tokenizer="none")
    assert str(refusal.value).count("--set") == 1
    assert "num_key_value_heads" not in str(refusal.value)
    result = check(path, tmp_path / "out", want, {"n_heads": SIZES.heads})
    assert (result.config.num_key_value_heads, result.origins["num_key_value_heads"]) == (SIZES.kv, "the tensors")


@pytest.mark.parametrize("prefix", ["_orig_mod._orig_mod.", "module._orig_mod.module.", "model.", "_orig_mod.model.",
                                    "model.module."])  # fmt: skip
def test_prefixes_of_wrappers_in_wrappers_are_taken_off(
    prefix: str, state: State, want: torch.Tensor, tmp_path: Path
) -> None:
    source = published.write_folder(tmp_path / "s", published.prefixed(state, prefix), published.native(SIZES))
    assert check(source, tmp_path / "out", want).model_type == "medassist_gpt"


def test_configuration_of_a_training_dictionary_may_be_called_model_config(
    state: State, want: torch.Tensor, tmp_path: Path
) -> None:
    config = published.native(SIZES) | {"eos_token_id": (3, SIZES.vocab)}
    path = published.write_training_dictionary(tmp_path / "step.pt", state, None, model_config=config)
    assert check(path, tmp_path / "out", want).config.eos_token_id == [3]


def test_gpt_configuration_in_the_names_of_gpt2(tmp_path: Path) -> None:
    sizes = replace(SIZES, d=15, heads=3, layers=2)
    state = published.gpt(sizes)
    config = dict(vocab_size=sizes.vocab, n_embd=15, n_head=3, n_layer=2, n_positions=sizes.ctx, n_ctx=sizes.ctx)
    source = published.write_folder(tmp_path / "s", state, config, "GPT2.pth")
    assert check(source, tmp_path / "out", published.gpt_logits(state, sizes, IDS, False)).warnings == ()


def test_rotary_base_is_what_the_files_table_says(tmp_path: Path) -> None:
    state = published.medassist(SIZES)
    for name in [n for n in state if n.endswith("div_term")]:
        state[name] = state[name] ** 1.25  # base 100000
    source = published.write_folder(tmp_path / "source", state, published.native(SIZES))
    with pytest.raises(ValueError, match="rope_theta"):
        import_checkpoint(source, tmp_path / "out", tokenizer="none")
    result = import_checkpoint(source, tmp_path / "out", tokenizer="none", settings={"rope_theta": 100000})
    assert result.config.rope_parameters["rope_theta"] == 100000


@pytest.mark.parametrize("arch", registry.REGISTRY.values(), ids=list(registry.REGISTRY))
@pytest.mark.parametrize("head", [True, False])
def test_directories_of_ours_are_imported_with_their_tokenizer(
    arch: registry.Architecture, head: bool, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = arch.model_class()(arch.config_class().tiny(vocab_size=300)).eval()
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    if head and model._tied_weights_keys:
        file = tmp_path / "source/model.safetensors"
        save_file(load_file(file) | {n: model.state_dict()[n].clone() for n in model._tied_weights_keys}, file)
    result = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert result.model_type == arch.model_type
    with torch.no_grad():
        want = model(torch.tensor([IDS])).logits[0].double()
    torch.testing.assert_close(logits(tmp_path / "out"), want, atol=1e-5, rtol=0)
    verify_files(tmp_path / "out")
    copied = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert copied.get_vocab() == tokenizer.get_vocab()
    assert copied.chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_token_ids_beyond_the_vocabulary_are_left_out(state: State, tmp_path: Path) -> None:
    config = published.hugging(SIZES, eos_token_id=50256, pad_token_id=SIZES.vocab)
    import_checkpoint(published.write_folder(tmp_path / "s", state, config), tmp_path / "out", tokenizer="none")
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] is None
    assert json.loads((tmp_path / "out/generation_config.json").read_text()).get("eos_token_id") is None


def test_published_vocabularies_end_at_the_end_of_text(tmp_path: Path) -> None:
    sizes = Sizes(vocab=50281, d=8, heads=2, kv=1, ff=8, layers=1)
    source = published.write_folder(tmp_path / "s", published.medassist(sizes), published.native(sizes))
    import_checkpoint(source, tmp_path / "out", tokenizer="none")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 50256


def test_tokenizer_that_does_not_fit_is_refused_if_asked_for_and_left_out_if_found(
    state: State, tokenizer: Any, tmp_path: Path
) -> None:
    source = published.write_folder(tmp_path / "s", state, published.hugging(SIZES))
    tokenizer.save_pretrained(source)  # 300 tokens for a vocabulary of 29
    with pytest.raises(ValueError, match="300 tokens"):
        import_checkpoint(source, tmp_path / "out", tokenizer=str(source / "tokenizer.json"))
    result = import_checkpoint(source, tmp_path / "out")
    assert any("300 tokens" in warning for warning in result.warnings)
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_empty_directory_is_filled_and_left_overs_of_dead_imports_are_removed(state: State, tmp_path: Path) -> None:
    source = published.write_folder(tmp_path / "s", state, published.hugging(SIZES))
    (tmp_path / "out").mkdir()
    names = ("out.partial-dead", f"out.partial-{os.getpid()}", "out.partial-alive", "x.partial-dead")
    dead, same_process, alive, other = folders = [tmp_path / f".{name}" for name in names]
    for folder in folders:
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "lock").touch()
    with (alive / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        import_checkpoint(source, tmp_path / "out", tokenizer="none")
    assert (tmp_path / "out/model.safetensors").exists()
    assert [folder.exists() for folder in (dead, same_process, alive, other)] == [False, False, True, True]


def test_folders_of_imports_that_are_starting_are_left_alone_for_a_minute(tmp_path: Path) -> None:
    starting, old = tmp_path / ".out.partial-a", tmp_path / ".out.partial-b"
    for folder in (starting, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    with staging(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial-a", "out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_imports_of_one_name_do_not_meet_and_directories_have_the_usual_mode(mask: int, tmp_path: Path) -> None:
    def twice() -> None:
        with staging(tmp_path / "out") as first:
            (first / "a").touch()
            with staging(tmp_path / "out") as second:
                (second / "b").touch()

    before = os.umask(mask)
    try:
        with pytest.raises(ValueError, match="appeared"):
            twice()
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("given", ["source", "file", "folder"])
@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_special_tokens_in_prompts_are_text_unless_there_is_a_chat_template(
    given: str, template: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    sizes = Sizes(vocab=300, d=8, heads=2, kv=1, ff=8, layers=1)
    source = published.write_folder(tmp_path / "s", published.medassist(sizes), published.hugging(sizes))
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    folder = source if given == "source" else tmp_path / "other"
    changed.save_pretrained(folder)
    wanted = {"source": None, "file": str(folder / "tokenizer.json"), "folder": str(folder)}[given]
    import_checkpoint(source, tmp_path / "out", tokenizer=wanted)
    copied = AutoTokenizer.from_pretrained(tmp_path / "out")
    special = tokenizer.all_special_tokens[0]
    ids = copied(f"a {special} b", add_special_tokens=False)["input_ids"]
    kept = template is not None and given != "file"  # the file alone has no template
    assert (copied.convert_tokens_to_ids(special) in ids) == kept


def test_a_tokenizer_that_is_not_read_is_mentioned(state: State, tmp_path: Path) -> None:
    source = published.write_folder(tmp_path / "s", state, published.hugging(SIZES))
    for name in ("vocab.json", "merges.txt"):
        (source / name).write_text("{}")
    result = import_checkpoint(source, tmp_path / "out")
    assert [w for w in result.warnings if "vocab.json and merges.txt" in w]


def test_file_of_the_standard_name_is_preferred_and_others_must_be_chosen(
    state: State, want: torch.Tensor, tmp_path: Path
) -> None:
    folder = published.write_folder(
        tmp_path / "s", published.medassist(SIZES, seed=9), published.hugging(SIZES), "step_1.pt"
    )
    published.write_folder(folder, published.medassist(SIZES, seed=8), None, "step_2.pt")
    with pytest.raises(ValueError, match=r"step_1\.pt, step_2\.pt"):
        import_checkpoint(folder, tmp_path / "out", tokenizer="none")
    published.write_folder(folder, published.medassist(SIZES, seed=7), None, "pytorch_model.bin")
    published.write_folder(folder, state, None)
    check(folder, tmp_path / "out", want)
