"""The losses of routers and of multi-token prediction, against closed forms and against brute force."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.experts import Router, Routing
from modeling.deepseek.losses import (
    balance_loss,
    coefficient_of_variation,
    later_labels,
    routing_statistics,
    smooth_load,
)
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.layers.objective import IGNORED
from training.data import Batch

E, K = 8, 2
ALL = torch.ones(1, 16, dtype=torch.bool)


def routing(experts: Tensor, logits: Tensor) -> Routing:
    """Of one window: ``experts`` (T, k) with equal weights, ``logits`` (T, E)."""
    return Routing(experts[None], torch.full((1, *experts.shape), 1 / experts.shape[1]), logits[None])


def in_turn(tokens: int) -> Tensor:
    """Experts (tokens, K) such that all are used alike."""
    return (torch.arange(tokens * K) % E).view(tokens, K)


@pytest.mark.parametrize("router", ["softmax", "aux_free"])
def test_balance_loss_of_uniform_routing_is_one(router: str) -> None:
    even = routing(in_turn(16), torch.zeros(16, E))
    assert balance_loss(even, router, ALL).item() == pytest.approx(1.0, abs=1e-6)


def test_balance_loss_of_collapsed_routing_is_experts_over_top_k() -> None:
    """All tokens to the same k experts, which have all of the probability: k terms of (E / k) * (1 / k)."""
    logits = torch.full((16, E), -1e4).index_fill(1, torch.arange(K), 0.0)
    collapsed = routing(torch.arange(K).expand(16, K), logits)
    assert balance_loss(collapsed, "softmax", ALL).item() == pytest.approx(E / K)


def test_balance_loss_pushes_the_affinity_of_the_busy_expert_down() -> None:
    logits = torch.zeros(16, E, requires_grad=True)
    busy = torch.stack((torch.zeros(16, dtype=torch.long), 1 + torch.arange(16) % (E - 1)), dim=-1)
    balance_loss(routing(busy, logits), "softmax", ALL).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())


def test_noisy_top_k_loss_of_uniform_routing_is_zero_and_of_collapsed_routing_is_known() -> None:
    even = routing(in_turn(16), torch.zeros(16, E))
    assert balance_loss(even, "noisy_top_k", ALL).item() == pytest.approx(0.0, abs=1e-6)
    collapsed = routing(torch.arange(K).expand(16, K), torch.zeros(16, E))
    # k of E values are c and the others 0: variance / mean^2 is E / k - 1, of importance and of load.
    assert balance_loss(collapsed, "noisy_top_k", ALL).item() == pytest.approx(2 * (E / K - 1), rel=1e-5)


def windows(router: str, batch: int, tokens: int) -> tuple[Router, Tensor, Tensor]:
    """A router in training, inputs (batch, tokens, C), and which of them are text."""
    torch.manual_seed(0)
    changes = {"n_group": 1, "topk_group": 1} if router == "noisy_top_k" else {}
    gate = Router(MedAssistDeepseekConfig.tiny(router=router, **changes)).train()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    is_text = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1))
    return gate, torch.randn(batch, tokens, gate.weight.shape[1]), is_text


def window(made: Routing, index: int, is_text: Tensor) -> Routing:
    """One window of a routing, without its padding."""
    parts = (None if part is None else part[index][is_text[index]][None] for part in made)
    return Routing(*parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("router", ["softmax", "aux_free", "noisy_top_k"])
def test_balance_loss_is_a_sum_over_windows_without_their_padding(router: str) -> None:
    gate, x, is_text = windows(router, 5, 12)
    made = gate(x)
    alone = [balance_loss(window(made, i, is_text), router, ALL[:, : is_text[i].sum()]) for i in range(5)]
    torch.testing.assert_close(balance_loss(made, router, is_text), torch.stack(alone).sum())


def test_smooth_load_of_noisy_top_k_is_the_mean_over_noise_drawn_anew() -> None:
    """Monte Carlo: one expert's noise is drawn again, with the others' kept, and its choices are counted."""
    gate, x, _ = windows("noisy_top_k", 1, 6)
    made = gate(x)
    assert made.clean_logits is not None
    assert made.noise_scale is not None
    draws = 40_000
    expected = torch.zeros(E)
    for expert in range(E):
        others = made.logits[0].index_fill(1, torch.tensor([expert]), -torch.inf)
        threshold = others.topk(K, dim=-1).values[:, -1]  # (T,)
        fresh = made.clean_logits[0, :, expert] + torch.randn(draws, 6) * made.noise_scale[0, :, expert]
        expected[expert] = (fresh > threshold).double().mean(0).sum()
    torch.testing.assert_close(smooth_load(made, ALL[:, :6])[0], expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("logit", [-60.0, -120.0])
def test_gradients_stay_finite_where_noise_dies_out(logit: float) -> None:
    gate, x, is_text = windows("noisy_top_k", 3, 6)
    x[..., 0] = 1.0
    with torch.no_grad():
        gate.noise_weight.zero_()[:, 0] = logit
    x.requires_grad_()
    made = gate(x)
    assert made.noise_scale is not None
    assert bool((made.noise_scale > 0).all())
    balance_loss(made, "noisy_top_k", is_text).backward()
    for tensor in (x, gate.weight, gate.noise_weight):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
    assert bool(gate.weight.grad.any())  # type: ignore[union-attr]


def test_statistics_count_text_alone_and_add_up_over_micro_batches() -> None:
    gate, x, is_text = windows("softmax", 4, 12)
    made = gate(x)
    whole = routing_statistics({3: made}, "softmax", is_text)
    parts = [routing_statistics({3: window(made, i, is_text)}, "softmax", ALL[:, : is_text[i].sum()]) for i in range(4)]
    assert torch.equal(whole["load"], sum(part["load"] for part in parts))  # type: ignore[arg-type]
    torch.testing.assert_close(whole["entropy"], sum(part["entropy"] for part in parts))
    assert int(whole["load"].sum()) == 2 * int(is_text.sum())
    assert int(whole["tokens"]) == int(is_text.sum())
    probabilities = made.logits[is_text].softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum()
    assert whole["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)


def test_rows_of_statistics_are_the_layers_in_order() -> None:
    first, second = routing(in_turn(16), torch.zeros(16, E)), routing(in_turn(16) * 0 + 5, torch.zeros(16, E))
    statistics = routing_statistics({7: second, 2: first}, "softmax", ALL)
    assert statistics["load"].tolist() == [[4] * E, [0] * 5 + [32] + [0] * 2]
    assert statistics["entropy"].tolist() == pytest.approx([16 * math.log(E)] * 2)


@pytest.mark.parametrize(("load", "cv"), [([3, 3, 3, 3], 0.0), ([4, 0, 0, 0], math.sqrt(3)), ([0, 0, 0, 0], 0.0)])
def test_coefficient_of_variation(load: list[int], cv: float) -> None:
    assert coefficient_of_variation(torch.tensor(load)).item() == pytest.approx(cv)


def test_later_labels_stay_within_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 1, 2]])
    labels = torch.tensor([[11, 12, 13, 14, 21, 22, 31, 41, 42, 43]])
    _ = IGNORED
    assert later_labels(labels, positions, 1).tolist() == [[12, 13, 14, _, 22, _, _, 42, 43, _]]
    assert later_labels(labels, positions, 2).tolist() == [[13, 14, _, _, _, _, _, 43, _, _]]
    assert later_labels(labels, positions, 9).tolist() == [[_] * 10]
    assert later_labels(labels, positions, 12).tolist() == [[_] * 10]


def test_later_labels_are_ignored_where_labels_are() -> None:
    labels = torch.tensor([[IGNORED, 12, IGNORED, 14]])
    assert later_labels(labels, torch.arange(4)[None], 1).tolist() == [[12, IGNORED, 14, IGNORED]]


def documents() -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(0)
    for length in (9, 2, 5, 3, 7, 12, 4):
        yield torch.randint(1, 160, (length,), generator=generator).tolist()


def packed(documents: list[list[int]], window: int) -> Batch:
    """One window of documents and padding."""
    ids, positions, labels = [], [], []
    for document in documents:
        ids += document[:-1]
        labels += document[1:]
        positions += range(len(document) - 1)
    left = window - len(ids)
    rows = (ids + [0] * left, [*positions, *range(left)], labels + [IGNORED] * left, [True] * len(ids) + [False] * left)
    return Batch(*(torch.tensor([values]) for values in rows))


@torch.no_grad()
def test_multi_token_losses_are_those_of_each_document_alone() -> None:
    """Depth d at position i, from the document alone: cross-entropy of its token i + d + 1."""
    torch.manual_seed(0)
    config = MedAssistDeepseekConfig.tiny(num_nextn_predict_layers=3, initializer_range=0.1)
    model = MedAssistDeepseekForCausalLM(config).eval()
    expected = dict.fromkeys(("mtp_loss_1", "mtp_loss_2", "mtp_loss_3"), 0.0)
    terms = dict.fromkeys(expected, 0)
    for document in documents():
        ids = torch.tensor([document])
        positions = torch.arange(len(document))[None]
        hidden = model.model(ids).last_hidden_state
        predicted, _ = model.model.predict(hidden, ids, positions, None)
        for depth, name in enumerate(expected, 1):
            for i in range(len(document) - depth - 1):
                logits = model.lm_head(predicted[depth - 1][0, i])
                expected[name] += float(F.cross_entropy(logits, ids[0, i + depth + 1]))
                terms[name] += 1
    batch = packed(list(documents()), 48)
    sums, counts = model.objective(batch).sums, model.loss_counts(batch)
    assert {name: counts[name] for name in expected} == terms
    assert {name: float(sums[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {name: model.loss_weights[name] for name in expected} == pytest.approx(dict.fromkeys(expected, 0.1))


@torch.no_grad()
def test_agreement_is_how_often_the_prediction_is_the_models_own_choice() -> None:
    torch.manual_seed(0)
    config = MedAssistDeepseekConfig.tiny(num_nextn_predict_layers=2, initializer_range=0.3, vocab_size=3)
    model = MedAssistDeepseekForCausalLM(config).eval()
    texts = [[token % 3 for token in document] for document in documents()]
    agreed, terms = [0, 0], [0, 0]
    for text in texts:
        ids = torch.tensor([text])
        hidden = model.model(ids).last_hidden_state
        predicted, _ = model.model.predict(hidden, ids, torch.arange(len(text))[None], None)
        own = model.lm_head(hidden)[0].argmax(-1)
        for depth in (1, 2):
            drafts = model.lm_head(predicted[depth - 1])[0].argmax(-1)
            for i in range(len(text) - depth - 1):
                agreed[depth - 1] += int(drafts[i] == own[i + depth])
                terms[depth - 1] += 1
    assert 0 < agreed[0] < terms[0]  # so that always or never would be found out
    measured = model.measure(packed(texts, 48))
    assert [measured[f"mtp_agreement_{depth}"] for depth in (1, 2)] == list(zip(agreed, terms, strict=True))
