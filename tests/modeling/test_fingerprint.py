"""The fingerprint: its numbers are the model's, its checksums are the files'."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling import fingerprint
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from serving.fingerprint import Mismatch, verify_files


@pytest.fixture(scope="module")
def model() -> MedAssistGPTForCausalLM:
    torch.manual_seed(0)
    return MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(initializer_range=0.2, eos_token_id=None)).eval()


@pytest.fixture(scope="module")
def directory(model: MedAssistGPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    fingerprint.record(model, directory)
    return directory


@pytest.fixture(scope="module")
def recorded(directory: Path) -> dict[str, Any]:
    return json.loads((directory / fingerprint.FILE_NAME).read_text())


def next_logprobs(model: MedAssistGPTForCausalLM, ids: list[int]) -> np.ndarray:
    """Log-probabilities after each of ``ids``, token by token through the cache, normalised in float64. (T, V)."""
    cache, rows = None, []
    with torch.no_grad():
        for token in ids:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, 0].double().numpy())
    logits = np.stack(rows)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_probe_ids_are_the_same_for_ever() -> None:
    assert fingerprint.probe_ids(5, 50281) == [22641, 22332, 40608, 25495, 13389]
    assert max(fingerprint.probe_ids(200, 160)) < 160


def test_logprobs_of_the_probes_are_the_models(model: MedAssistGPTForCausalLM, recorded: dict[str, Any]) -> None:
    assert [len(probe["token_ids"]) for probe in recorded["probes"]] == [1, 16, 200]
    for probe in recorded["probes"]:
        ids = probe["token_ids"]
        assert ids == fingerprint.probe_ids(len(ids), 160)
        want = next_logprobs(model, ids)[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(probe["logprobs"], want, atol=2e-5)


def test_continuation_is_the_greedy_one_as_far_as_it_is_certain(
    model: MedAssistGPTForCausalLM, recorded: dict[str, Any]
) -> None:
    assert any(probe["greedy_ids"] for probe in recorded["probes"])
    for probe in recorded["probes"]:
        ids, greedy = probe["token_ids"], probe["greedy_ids"]
        after = next_logprobs(model, ids + greedy)[len(ids) - 1 :]
        assert greedy == after.argmax(-1)[: len(greedy)].tolist()
        np.testing.assert_allclose(probe["greedy_logprobs"], after.max(-1)[: len(greedy)], atol=2e-5)
        second, best = np.sort(after[-1])[-2:]
        assert len(greedy) == fingerprint.GREEDY_TOKENS or best - second < fingerprint.GREEDY_MARGIN + 1e-4


def test_checksums_are_the_files_sha256(directory: Path, recorded: dict[str, Any]) -> None:
    names = ("model.safetensors", "tokenizer.json")
    want = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    assert recorded["sha256"] == want == fingerprint.checksums(directory)


def test_one_flipped_bit_changes_the_checksum_of_that_file_alone(directory: Path, recorded: dict[str, Any]) -> None:
    path = directory / "model.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    try:
        damaged = fingerprint.checksums(directory)
    finally:
        path.write_bytes(intact)
    assert damaged["model.safetensors"] != recorded["sha256"]["model.safetensors"]
    assert damaged["tokenizer.json"] == recorded["sha256"]["tokenizer.json"]


def test_recording_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny()).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint.record(model, tmp_path)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tiny_contexts_and_vocabularies_have_a_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MedAssistGPTConfig.tiny(vocab_size=11, max_position_embeddings=8, initializer_range=0.2, eos_token_id=None)
    fingerprint.record(MedAssistGPTForCausalLM(config), tmp_path)
    probes = json.loads((tmp_path / fingerprint.FILE_NAME).read_text())["probes"]
    assert all(len(probe["token_ids"]) + len(probe["greedy_ids"]) <= 8 for probe in probes)
    assert any(probe["greedy_ids"] for probe in probes)


def test_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny())
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    with pytest.raises(ValueError, match="no finite numbers"):
        fingerprint.record(model, tmp_path)


def test_model_without_a_tokenizer_is_verified_until_one_appears(
    model: MedAssistGPTForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    fingerprint.record(model, tmp_path)
    verify_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Mismatch, match=r"tokenizer\.json is not in fingerprint\.json"):
        verify_files(tmp_path)
