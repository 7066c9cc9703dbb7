"""A corpus with skewed topics unbalances experts, and the selection bias balances them, in every single step."""

from pathlib import Path

import pytest
import torch

from training.experiments import balance

STEPS, TOKENS = 160, 2048


def worst_layers(folder: Path, router: str) -> torch.Tensor:
    """The coefficient of variation of each step, in the worst layer."""
    load = balance.load_by_step(balance.corpus(folder, seed=0), balance.ROUTERS[router], STEPS, 0, TOKENS)
    return balance.worst_layer(load)


def test_selection_bias_brings_the_load_into_balance(tmp_path: Path) -> None:
    assert worst_layers(tmp_path, "aux_free")[-40:].max() < 0.2


@pytest.mark.slow
def test_without_it_the_load_stays_out_of_balance(tmp_path: Path) -> None:
    assert worst_layers(tmp_path, "none")[-40:].min() > 0.6


def test_topics_of_the_corpus_are_skewed_and_share_no_words() -> None:
    documents = list(balance.documents(2000, seed=1))
    topics = [{(token - 1) // balance.WORDS for token in document} for document in documents]
    assert {len(of) for of in topics} == {1}
    largest = sum(of == {0} for of in topics) / len(topics)
    total = sum((rank + 1) ** -balance.SKEW for rank in range(balance.TOPICS))
    assert largest == pytest.approx(1 / total, abs=0.04)


def test_worst_layer_is_reported() -> None:
    load = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0]]).repeat(balance.WINDOW, 1, 1)  # (steps, layers, E)
    assert balance.worst_layer(load).tolist() == pytest.approx([3**0.5] * balance.WINDOW)
    assert balance.worst_layer_of_windows(load).tolist() == pytest.approx([3**0.5])
