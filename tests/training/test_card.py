"""The model card says what was measured, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling import checkpoint
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from training.card import count_parameters, write_card

RECIPE = {
    "name": "tiny",
    "data": {"path": "/home/somebody/private/corpus"},
    "train": {"batch_size": 4, "accumulation": 2, "window": 128, "seed": 3, "loss_on": "all"},
    "optimizer": {"name": "muon", "lr": 3e-3, "schedule": "wsd"},
}
ENVIRONMENT = {"cpu": "A CPU", "gpus": [], "code": "0.1.0+g0123456789ab", "packages": {"torch": "2.13.0"}}
MANIFESTS = {"train": {"documents": 1200, "tokens": 34567, "bytes": 100000, "fingerprint": "f" * 64}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(vocab_size=300))
    folder = tmp_path_factory.mktemp("run") / "final"
    checkpoint.write(folder, model, tokenizer)
    assert count_parameters(folder) == sum(p.numel() for p in model.parameters())
    return folder


def metrics(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_card_states_sizes_data_and_last_figures(tmp_path: Path, directory: Path) -> None:
    import yaml

    path = metrics(
        tmp_path,
        {"step": 100, "held_out_loss": 3.0, "held_out_bits_per_byte": 1.9},
        {"step": 200, "held_out_loss": 2.0, "held_out_bits_per_byte": 1.25},
        {"step": 200, "loss": 1.5},
    )
    (directory / "curves.png").write_bytes(b"")
    card = write_card(
        directory, RECIPE, ENVIRONMENT, path, MANIFESTS, ["PubMed abstracts"], {"pubmedqa acc": 0.5512},
        license="apache-2.0", repo="me/tiny",
    ).read_text()  # fmt: skip
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0",
        "tags": ["medassist", "medassist_gpt", "vllm"],
    }  # fmt: skip
    for text in (
        "| parameters | 105,536 |", "1,200 documents, 34,567 tokens", "f" * 64, "2.0000", "7.39", "1.2500",
        "| measured at step | 200 |", "204,800 in all", "muon", "curves.png", "PubMed abstracts", "0.5512",
        'from_pretrained("me/tiny")', "not medical advice", "A CPU", "0.1.0+g0123456789ab",
    ):  # fmt: skip
        assert text in card, text
    assert "/home/somebody" not in card  # paths are the machine's own business
    assert "3.0000" not in card


def test_what_was_not_measured_has_no_line(tmp_path: Path, directory: Path) -> None:
    (directory / "curves.png").unlink(missing_ok=True)
    card = write_card(directory, {}, {}, metrics(tmp_path)).read_text()
    for word in ("held-out", "perplexity", "license", "curves.png", "None", "## Data", "## Measured", "nan"):
        assert word not in card, word
    assert "not medical advice" in card
