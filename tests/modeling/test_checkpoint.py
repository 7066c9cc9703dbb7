"""Checkpoint directories: complete, loadable by name, and never half written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling import checkpoint
from modeling.fingerprint import checksums
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM

CONVERSATION = [{"role": "user", "content": "What helps with a cold?"}]


def build(seed: int = 0) -> MedAssistGPTForCausalLM:
    torch.manual_seed(seed)
    return MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(vocab_size=300)).eval()


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Any) -> Path:
    checkpoint.write(tmp_path / "final", build(), tokenizer, {"temperature": 0.2, "top_p": 0.9})
    return tmp_path / "final"


def test_directory_holds_the_documented_files_and_nothing_lies_beside_it(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "fingerprint.json",
    }  # fmt: skip
    assert list(directory.parent.iterdir()) == [directory]


def test_model_loads_through_the_auto_class_with_equal_logits(directory: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, build()(ids).logits)
    assert loaded.config.architectures == ["MedAssistGPTForCausalLM"]
    assert loaded.config.dtype == torch.float32


def test_tokenizer_loads_through_the_auto_class_with_the_chat_template(directory: Path, tokenizer: Any) -> None:
    loaded = AutoTokenizer.from_pretrained(directory)
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = loaded.apply_chat_template(CONVERSATION, **options)
    assert ids == tokenizer.apply_chat_template(CONVERSATION, **options)
    assert loaded.decode(ids) == "<|user|>what helps with a cold?<|assistant|>"


def test_generation_stops_at_the_end_of_a_turn_and_samples_as_asked(directory: Path, tokenizer: Any) -> None:
    generation = GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.2, 0.9)


def test_failure_while_writing_leaves_the_old_directory_intact(directory: Path, tokenizer: Any) -> None:
    class FullDisk:
        eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

        def save_pretrained(self, directory: Path) -> None:
            tokenizer.save_pretrained(directory)
            raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(OSError, match="no space"):
        checkpoint.write(directory, build(seed=1), FullDisk())
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_writing_again_replaces_the_directory_even_after_a_failed_try(directory: Path, tokenizer: Any) -> None:
    names, before = {path.name for path in directory.iterdir()}, checksums(directory)
    left_over = directory.with_name("final.partial")
    left_over.mkdir()
    for folder in (left_over, directory):
        (folder / "stale.safetensors").write_bytes(b"half")
        (folder / "stale.json").write_bytes(b"{")
    checkpoint.write(directory, build(seed=1), tokenizer)
    assert {path.name for path in directory.iterdir()} == names
    assert list(directory.parent.iterdir()) == [directory]
    assert checksums(directory)["model.safetensors"] != before["model.safetensors"]
    assert checksums(directory)["tokenizer.json"] == before["tokenizer.json"]
