"""Training of mixtures of experts: what is done once a step, from all of the step's micro-batches."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.deepseek.routing import moved
from tests.training.test_loop import MEASURED, metrics, run, write_corpus
from training import loop, parallel
from training.data import Batch, Windows
from training.optimizer import Optimizers
from training.recipe import Model, Recipe, Tokenizer, Train
from training.shards import Shard, write_shard

BETAS = (0.9, 0.95)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Documents of 4 to 15 tokens; windows of 24 tokens have different amounts of padding."""
    documents = [[3, 4 + i % 150, 1, *(20 + (i * k) % 90 for k in range(i % 12)), 2] for i in range(1200)]
    write_shard(tmp_path / "00000.shard", documents, 160, bytes(32))
    return [Shard(tmp_path / "00000.shard")]


def tiny(**changes: Any) -> MedAssistDeepseekForCausalLM:
    torch.manual_seed(0)
    return MedAssistDeepseekForCausalLM(MedAssistDeepseekConfig.tiny(initializer_range=0.1, **changes)).train()


def biases(model: MedAssistDeepseekForCausalLM) -> Tensor:
    return torch.stack([gate.e_score_correction_bias for gate in model.routers()])


def cut(shards: list[Shard], accumulation: int, step: int = 0) -> list[Batch]:
    """The same 8 windows of a step, in so many micro-batches."""
    return Windows(shards, 24, seed=0, answer_span=(1, 2)).micro_batches(step, 8, 8 // accumulation)


def whole(model: MedAssistDeepseekForCausalLM) -> parallel.Trainable:
    return parallel.distribute(model, parallel.start(), "auto", torch.float32)


@pytest.mark.parametrize("router", ["aux_free", "softmax"])
def test_cutting_a_step_into_micro_batches_changes_no_loss_and_no_gradient(shards: list[Shard], router: str) -> None:
    start = tiny(router=router, router_aux_loss_coef=0.1, num_nextn_predict_layers=2)
    results = []
    for accumulation in (1, 2, 8):
        model = copy.deepcopy(start)
        # Without momentum, AdamW's first average is the gradient itself.
        optimizers = Optimizers(model, "adamw", 1e-3, 0.1, (0.0, 0.95))
        step = loop.train_step(whole(model), optimizers, cut(shards, accumulation), clip=1e9)
        assert step.losses.keys() == {"loss", "mtp_loss_1", "mtp_loss_2", "balance_loss"}
        gradients = [optimizers.all[0].state[p]["exp_avg"] for p in model.parameters()]
        results.append(([torch.tensor(list(step.losses.values())), torch.tensor(step.norm)], gradients, step.report))
    (losses, gradients, report), *others = results
    for other_losses, other_gradients, other_report in others:
        torch.testing.assert_close(other_losses, losses, rtol=0, atol=2e-6)
        torch.testing.assert_close(other_gradients, gradients, rtol=0, atol=2e-6)
        assert other_report["expert_load"] == report["expert_load"]
        assert other_report["expert_load_cv"] == report["expert_load_cv"]


def test_accumulation_of_1_and_8_gives_the_same_bias_trajectory(shards: list[Shard]) -> None:
    """In float64: rounding must not decide which of two nearly equal experts a token goes to."""
    trajectories = []
    for accumulation in (1, 8):
        model = tiny(first_k_dense_replace=0).double()
        optimizers, trajectory = Optimizers(model, "adamw", 2e-3, 0.1, BETAS), []
        for number in range(50):
            loop.train_step(whole(model), optimizers, cut(shards, accumulation, number), clip=1.0)
            trajectory.append(biases(model).clone())
        trajectories.append(torch.stack(trajectory))
    assert torch.equal(*trajectories)
    assert trajectories[0].shape == (50, 3, 8)
    # Each step moves every bias by the rate or, at the mean, not at all; and they do not only go one way.
    steps = trajectories[0].diff(dim=0) / 0.001
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.abs().max() < 1.5
    assert bool((steps > 0.5).any(0).any(-1).all())
    assert bool((steps < -0.5).any(0).any(-1).all())


def test_every_layers_bias_moves_against_its_own_load(shards: list[Shard]) -> None:
    """Behind a dense layer, and in the layer of multi-token prediction: counted here from the layers' choices."""
    model = tiny(num_hidden_layers=3, num_nextn_predict_layers=1, first_k_dense_replace=1)
    (batch,) = cut(shards, 1)
    out = model.model(batch.input_ids, position_ids=batch.position_ids)
    _, made = model.model.predict(out.last_hidden_state, batch.input_ids, batch.position_ids, out.mask)
    routings = out.routing | made
    assert sorted(routings) == [1, 2, 3]
    load = torch.zeros(3, 8)
    for layer, routing in routings.items():
        for expert in routing.experts[batch.is_text].flatten().tolist():
            load[layer - 1, expert] += 1
    assert load.sum(-1).tolist() == [2 * int(batch.is_text.sum())] * 3
    loop.train_step(whole(model), Optimizers(model, "adamw", 1e-3, 0.1, BETAS), [batch], clip=1.0)
    expected = 0.001 * torch.sign(load.mean(-1, keepdim=True) - load)
    torch.testing.assert_close(biases(model), expected)
    assert len({tuple(row.tolist()) for row in expected}) == 3


def test_experts_that_no_token_chose_gain_bias_until_they_are_chosen(shards: list[Shard]) -> None:
    model = tiny(router_bias_update_rate=0.05, n_group=1, topk_group=1)
    gate = model.routers()[0]
    with torch.no_grad():
        gate.e_score_correction_bias[5] = -1.5  # affinities are at most 1 apart
    optimizers, shares = Optimizers(model, "adamw", 1e-3, 0.1, BETAS), []
    for number in range(30):
        before = float(gate.e_score_correction_bias[5])
        step = loop.train_step(whole(model), optimizers, cut(shards, 1, number), clip=1.0)
        shares.append(step.report["expert_load"][0][5])
        if shares[-1] == 0:
            assert float(gate.e_score_correction_bias[5]) == pytest.approx(before + 0.05)
    assert shares[0] == 0
    assert shares[-1] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_recomputed_activations_are_not_counted_twice(shards: list[Shard]) -> None:
    plain, saving = tiny(router="noisy_top_k"), tiny(router="noisy_top_k")
    for layer in saving.model.layers:
        layer.forward = partial(recomputed, layer.forward, use_reentrant=False)
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)  # of the routers' noise
        step = loop.train_step(whole(model), Optimizers(model, "muon", 1e-3, 0.1, BETAS), cut(shards, 2), clip=1.0)
        results.append(step)
    assert results[0] == results[1]
    assert sum(results[0].report["expert_load"][0]) == pytest.approx(1.0)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recomputed_activations_move_the_bias_once(shards: list[Shard]) -> None:
    plain, saving = tiny(), tiny()
    for layer in saving.model.layers:
        layer.forward = partial(recomputed, layer.forward, use_reentrant=False)
    for model in (plain, saving):
        optimizers = Optimizers(model, "muon", 1e-3, 0.1, BETAS)
        for number in range(3):
            loop.train_step(whole(model), optimizers, cut(shards, 2, number), clip=1.0)
    assert torch.equal(biases(plain), biases(saving))
    assert biases(plain).abs().max() > 0


def test_step_whose_gradient_is_not_finite_moves_no_bias(shards: list[Shard]) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    step = loop.train_step(whole(model), Optimizers(model, "muon", 0.1, 0.1, BETAS), cut(shards, 1), clip=1.0)
    assert step.report == {}
    assert biases(model).abs().max() == 0


def test_evaluation_moves_no_bias_and_draws_no_noise(shards: list[Shard]) -> None:
    data = Windows(shards, 24, seed=0)
    model = tiny()
    before = loop.evaluate(whole(model), data, 4)
    assert before.keys() == {"loss", "perplexity", "mtp_loss_1", "mtp_agreement_1"}
    assert biases(model).abs().max() == 0
    noisy = tiny(router="noisy_top_k")
    assert loop.evaluate(whole(noisy), data, 4) == loop.evaluate(whole(noisy), data, 4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(
        name="six",
        corpus=write_corpus(tmp_path_factory.mktemp("corpus") / "things"),
        tokenizer=Tokenizer(vocab_size=300),
        model=Model(architecture="medassist_deepseek", preset="tiny", changes={"router_bias_update_rate": 0.003}),
        train=Train(steps=6, window=192, batch_size=1, accumulation=2, threads=1, loss_on="answers", log_every=1,
                    eval_every=3, checkpoint_every=3, precision="float32"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing interrupted."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(recipe, out)
    torch.set_num_threads(threads)
    return out


def test_resumed_run_ends_with_the_weights_and_biases_of_an_uninterrupted_one(
    recipe: Recipe, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "interrupted"  # killed after its checkpoint of step 3
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("final", "step-00000006"))
    torch.manual_seed(999)
    resumed = load_file(run(recipe, out) / "model.safetensors")
    want = load_file(straight / "final/model.safetensors")
    assert resumed.keys() == want.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in want.items())
    bias = [name for name in want if name.endswith("e_score_correction_bias")]
    assert len(bias) == 2  # of the layer with experts, and of the one that predicts
    assert all(want[name].dtype == torch.float32 and want[name].abs().max() > 0 for name in bias)
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in metrics(of)] for of in (out, straight)]
    assert rows[0] == rows[1]


def test_run_logs_every_part_of_the_loss_and_the_use_of_experts(straight: Path) -> None:
    rows = metrics(straight)
    trained, held_out = [r for r in rows if "loss" in r], [r for r in rows if "held_out_loss" in r]
    for row in trained:
        assert row.keys() >= {"loss", "mtp_loss_1", "expert_load_cv", "router_entropy", "expert_load"}
        load: Any = row["expert_load"]
        assert [sum(layer) for layer in load] == pytest.approx([1, 1], abs=1e-4)
    for row in held_out:
        parts = {"loss", "mtp_loss_1", "mtp_agreement_1", "perplexity", "bits_per_byte"}
        assert {name for name in row if name.startswith("held_out")} == {f"held_out_{part}" for part in parts}
    assert json.loads((straight / "final/config.json").read_text())["router_bias_update_rate"] == 0.003


def test_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    """In bfloat16 a step of 0.001 would be lost from a bias of 0.5 on."""
    model = tiny()
    with torch.no_grad():
        for gate in model.routers():
            gate.e_score_correction_bias.fill_(0.501)
    model.save_pretrained(tmp_path)
    loaded = MedAssistDeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    loaded.after_step({
        "load": torch.tensor([[9, 1, 1, 1, 1, 1, 1, 1]] * 2), "entropy": torch.ones(2), "tokens": torch.tensor(8),
    })  # fmt: skip
    loaded.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again/model.safetensors")
    want = moved(torch.full((8,), 0.501), torch.tensor([9, 1, 1, 1, 1, 1, 1, 1]), 0.001)
    for layer in (1, 2):
        bias = saved[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert bias.dtype == torch.float32
        assert torch.equal(bias, want)
