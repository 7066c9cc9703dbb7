"""Optimizers and the schedule."""

import copy

import pytest
import torch
from torch import nn

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.gpt.config import GPTConfig
from modeling.gpt.model import GPTForCausalLM
from training.optimizer import Muon, Optimizers, orthogonalise, warmup_stable_decay


class TwoParts(nn.Module):
    """An embedding, a matrix and a norm, named as in the models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 6, bias=False)
        self.norm = nn.RMSNorm(4)

    def loss(self) -> torch.Tensor:
        return self.proj(self.norm(self.embed_tokens(torch.arange(5)))).square().sum()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 96), (2, 96, 16), (1, 64, 192), (4, 1, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    """Those down to a hundredth of the largest; five steps do not lift much smaller ones."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = u * torch.logspace(0, -2, s.shape[-1]) @ vh * 1e-3
    y = orthogonalise(x)
    assert y.shape == shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_orthogonalise_keeps_the_singular_vectors() -> None:
    x = torch.randn((1, 8, 24), generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = u.mT @ orthogonalise(x) @ vh.mT
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


def test_orthogonalise_of_zero_is_zero() -> None:
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


def test_muon_moves_every_matrix_by_the_same_root_mean_square() -> None:
    """0.2 times the learning rate, which is about AdamW's, whatever the matrix's shape and gradient."""
    for shape, scale in (((32, 32), 1.0), ((16, 96), 1e-4), ((96, 16), 1e3)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        Muon([p], lr=0.01).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_muon_takes_the_layers_matrices_and_neither_embeddings_nor_an_untied_head() -> None:
    model = GPTForCausalLM(GPTConfig.tiny())
    adamw, muon = Optimizers(model, "muon", lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)).all
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in taken}
    assert names == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert rest + len(names) == len(list(model.parameters()))


@pytest.fixture
def mixture() -> MedAssistDeepseekForCausalLM:
    """A mixture of experts, each parameter with a random gradient."""
    torch.manual_seed(0)
    model = MedAssistDeepseekForCausalLM(MedAssistDeepseekConfig.tiny(router="noisy_top_k"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def test_muon_takes_every_experts_gate_up_and_down_as_matrices_of_their_own(
    mixture: MedAssistDeepseekForCausalLM,
) -> None:
    """Three steps on the stacked tensors, against the same on each matrix alone."""
    lr, width = 0.1, mixture.config.moe_intermediate_size
    experts = mixture.model.layers[1].mlp.experts
    up_and_down = [m for pair in experts.gate_up_proj for m in pair.split(width)] + list(experts.down_proj)
    gradients = [m for pair in experts.gate_up_proj.grad for m in pair.split(width)] + list(experts.down_proj.grad)
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in up_and_down]
    assert [tuple(p.shape) for p in alone] == [(32, 64)] * 16 + [(64, 32)] * 8
    optimizers = [Muon([p], lr) for p in alone]
    _, muon = Optimizers(mixture, "muon", lr, 0.1, (0.9, 0.95)).all
    for _ in range(3):
        for p, gradient, optimizer in zip(alone, gradients, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
        muon.step()
    moved = [m for pair in experts.gate_up_proj for m in pair.split(width)] + list(experts.down_proj)
    for got, want in zip(moved, alone, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_experts_are_decayed_and_routers_are_left_to_adamw(name: str, mixture: MedAssistDeepseekForCausalLM) -> None:
    optimizers = Optimizers(mixture, name, 0.1, 0.5, (0.9, 0.95)).all
    names = {id(p): n for n, p in mixture.named_parameters()}
    of = {
        names[id(p)]: (type(optimizer), group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert of.keys() == set(names.values())
    for layer in (1, 2):
        for router in ("weight", "noise_weight"):
            assert of[f"model.layers.{layer}.mlp.gate.{router}"] == (torch.optim.AdamW, 0.5)
        for matrix in ("gate_up_proj", "down_proj"):
            kind = Muon if name == "muon" else torch.optim.AdamW
            assert of[f"model.layers.{layer}.mlp.experts.{matrix}"] == (kind, 0.5)
        assert of[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"] == (torch.optim.AdamW, 0.0)


def test_an_expert_without_tokens_is_only_decayed(mixture: MedAssistDeepseekForCausalLM) -> None:
    experts = mixture.model.layers[1].mlp.experts
    for p in experts.parameters():
        p.grad[3] = 0.0  # type: ignore[index]
    before = experts.down_proj.detach().clone()
    Optimizers(mixture, "muon", 0.1, 0.5, (0.9, 0.95)).step()
    torch.testing.assert_close(experts.down_proj[3].detach(), before[3] * (1 - 0.1 * 0.5))
    assert (experts.down_proj[2] - before[2]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_norms_are_not_decayed(name: str) -> None:
    model = TwoParts()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = Optimizers(model, name, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    optimizers.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (1.0 if n == "norm.weight" else 1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_goes_on_bit_for_bit(name: str) -> None:
    models = [TwoParts(), TwoParts()]
    together = [Optimizers(model, name, 0.05, 0.1, (0.9, 0.95)) for model in models]
    for step in range(4):
        if step == 2:
            together[1] = Optimizers(models[1], name, 0.05, 0.1, (0.9, 0.95))
            together[1].load_state_dict(copy.deepcopy(together[0].state_dict()))
        for model, optimizers in zip(models, together, strict=True):
            optimizers.set_lr(0.5)
            model.loss().backward()
            optimizers.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_is_a_share_of_the_peak_in_every_group() -> None:
    optimizers = Optimizers(TwoParts(), "muon", 0.2, 0.1, (0.9, 0.95))
    optimizers.set_lr(0.25)
    rates = [group["lr"] for optimizer in optimizers.all for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05] * 3)


def test_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name .*'sgd'"):
        Optimizers(TwoParts(), "sgd", 0.1, 0.1, (0.9, 0.95))


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)]
)
def test_schedule_rises_stays_and_falls(step: int, factor: float) -> None:
    assert warmup_stable_decay(step, steps=100, warmup=10, decay_share=0.2) == pytest.approx(factor)


def test_schedule_without_warmup_and_decay_is_flat() -> None:
    assert [warmup_stable_decay(step, 5, warmup=0, decay_share=0.0) for step in range(5)] == [1.0] * 5


def test_an_expert_without_tokens_stays() -> None:
    """Its momentum would be made as long as any other, however small it has become."""
    torch.manual_seed(0)
    experts = torch.nn.Parameter(torch.randn(2, 6, 4))
    optimizer = Muon([experts], lr=0.1, weight_decay=0.0)
    for step in range(3):
        before = experts.detach().clone()
        experts.grad = torch.randn(2, 6, 4)
        if step:
            experts.grad[1] = 0
        optimizer.step()
        assert not torch.equal(experts[0], before[0])
        assert torch.equal(experts[1], before[1]) == bool(step)
