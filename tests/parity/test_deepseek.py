"""What is special about serving DeepSeek-style models: ties between experts, idle experts, the size of the cache, and
that the engine drafts what the module predicts. ``test_parity`` has their log-probabilities in all kinds of engines.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.deepseek.attention import rope_cos_sin
from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from tests.parity.harness import KINDS, TOLERANCE, Case, Engines, Variant, differences, run_jobs, save, variants

pytestmark = pytest.mark.engine

NEW_TOKENS = 24
DRAFTED = 3
ALPHABET = 40


def job(checkpoint: Path, kind: str = "eager", **job: Any) -> dict[str, Any]:
    return {"checkpoint": str(checkpoint), "options": KINDS[kind][0], "new_tokens": NEW_TOKENS} | job


def model_with(router: str, **changes: Any) -> MedAssistDeepseekForCausalLM:
    """With weights large enough that another choice of experts shows."""
    torch.manual_seed(0)
    model = MedAssistDeepseekForCausalLM(MedAssistDeepseekConfig.tiny(router=router, **changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    return model


@torch.no_grad()
def with_ties(model: MedAssistDeepseekForCausalLM) -> MedAssistDeepseekForCausalLM:
    """Experts 1 and 6 have the router's row of expert 3: where these are the best, two of three equals are chosen."""
    for gate in model.routers():
        gate.weight[[1, 6]] = gate.weight[3].clone()
    return model


@torch.no_grad()
def with_nothing_but_ties(model: MedAssistDeepseekForCausalLM) -> MedAssistDeepseekForCausalLM:
    for gate in model.routers():
        gate.weight.zero_()
    return model


@torch.no_grad()
def with_idle_experts(model: MedAssistDeepseekForCausalLM) -> MedAssistDeepseekForCausalLM:
    """One expert a token, and 2 to 7 never fire: the best of opposite rows is always above nothing."""
    for gate in model.routers():
        gate.weight[1] = -gate.weight[0]
        gate.weight[2:] = 0
    return model


WORLDS = {"ties": with_ties, "nothing but ties": with_nothing_but_ties, "idle experts": with_idle_experts}
ONE_EXPERT = {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}


def model_of(router: str, world: str) -> MedAssistDeepseekForCausalLM:
    return WORLDS[world](model_with(router, **(ONE_EXPERT if world == "idle experts" else {})))


@functools.cache
def routed(directory: Path) -> dict[tuple[str, str], Any]:
    """Every router in every world, served in one process."""
    cases = [(router, world) for router in ("aux_free", "softmax", "noisy_top_k") for world in WORLDS]
    ids = random_prompts(160)
    for router, world in cases:
        save(model_of(router, world), directory / router / world)
    jobs = [job(directory / router / world, prompts=ids) for router, world in cases]
    return dict(zip(cases, run_jobs(directory, jobs, "eager"), strict=True))


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in (1, 7, 40, 150)]


@pytest.fixture(scope="module")
def routed_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routed")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("router", ["aux_free", "softmax", "noisy_top_k"])
def test_routers_choose_as_in_training(router: str, world: str, routed_directory: Path) -> None:
    model = model_of(router, world)
    with torch.no_grad():
        out = model.model(torch.tensor(random_prompts(160)[-1:]))
    chosen = {int(e) for routing in out.routing.values() for e in routing.experts.unique()}
    if world != "ties":
        assert chosen == {0, 1}
    result = routed(routed_directory)[router, world]
    assert "error" not in result, result["error"]
    worst, others = differences(model, random_prompts(160), result)
    assert worst < TOLERANCE
    assert others == 0


@pytest.mark.parametrize(
    "kind", ["mtp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("eager", "no-latents", "padded-latents"))]
)
def test_cache_is_as_small_as_the_formula_says(kind: str, engines: Engines) -> None:
    variant = next((v for v in variants() if v.latent and not v.number), None)
    if variant is None:
        pytest.skip("another architecture was selected")
    engines.cases.append(Case(kind, variant))
    cache, config = engines.result(Case(kind, variant))["cache"], variant.config()
    layers = config.num_hidden_layers + (kind == "mtp")
    numbers = {
        "no-latents": 2 * config.num_attention_heads * config.qk_head_dim,  # 48 wide, which CPU kernels pad to 64
        "padded-latents": 512 + 64,
    }.get(kind, config.kv_lora_rank + config.qk_rope_head_dim)
    if kind == "no-latents":
        numbers = numbers * 64 // 48
    assert cache["bytes"] == cache["tokens"] * layers * numbers * 4


@torch.no_grad()
def test_published_files_are_served_as_they_are(tmp_path: Path) -> None:
    """Files of Hugging Face's class, not imported: only the class is named."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = MedAssistDeepseekConfig.tiny(num_nextn_predict_layers=0)
    torch.manual_seed(0)
    names = DeepseekV3Config().to_dict().keys() & ours.to_dict().keys() - {"architectures", "model_type", "head_dim"}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**{name: getattr(ours, name) for name in names})).float().eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    theirs.save_pretrained(tmp_path / "published")
    options = KINDS["eager"][0] | {"hf_overrides": {"architectures": ["MedAssistDeepseekForCausalLM"]}}
    ids = random_prompts(160)
    (result,) = run_jobs(tmp_path, [job(tmp_path / "published", prompts=ids) | {"options": options}], "eager")
    assert "error" not in result, result["error"]
    worst, others = differences(theirs, ids, result)
    assert worst < TOLERANCE
    assert others == 0


def test_ranks_that_do_not_divide_a_model_are_refused_by_name(tmp_path: Path) -> None:
    options = {"enforce_eager": True, "tensor_parallel_size": 2}
    cases = [
        ({"num_attention_heads": 3}, options, "num_attention_heads (3)"),
        ({"moe_intermediate_size": 33}, options, "moe_intermediate_size (33)"),
        ({"n_routed_experts": 7, "n_group": 1, "topk_group": 1}, options | {"enable_expert_parallel": True},
         "n_routed_experts (7)"),
        ({"hidden_size": 80}, {"enforce_eager": True}, "hidden_size (80)"),
        ({}, {"enforce_eager": True, "enable_lora": True}, "LoRA"),
    ]  # fmt: skip
    jobs = []
    for number, (changes, settings, _) in enumerate(cases):
        save(model_with("aux_free", **changes), tmp_path / str(number))
        jobs.append({"checkpoint": str(tmp_path / str(number)), "options": settings, "prompts": [[1]], "new_tokens": 1})
    for (_, _, words), result in zip(cases, run_jobs(tmp_path, jobs, "eager"), strict=True):
        assert words in result["error"].splitlines()[0] or words in result["error"].partition("\n\n")[0]


def trained(steps: int = 80) -> MedAssistDeepseekForCausalLM:
    """Learns which of 40 tokens follows which; its prediction layer is then spoilt a little: some drafts fail."""
    torch.manual_seed(0)
    model = MedAssistDeepseekForCausalLM(MedAssistDeepseekConfig.tiny(max_position_embeddings=128))
    follows = torch.randperm(ALPHABET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        token, rows = torch.randint(ALPHABET, (16,)), []
        for _ in range(33):
            rows.append(token)
            token = torch.where(torch.rand(16) < 0.1, torch.randint(ALPHABET, (16,)), follows[token])
        ids = torch.stack(rows, 1)
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        positions = torch.arange(32).expand(16, -1)
        (predicted,), _ = model.model.predict(hidden, ids[:, :-1], positions, None)
        loss = model.summed_loss(hidden, ids[:, 1:]) + 0.3 * model.summed_loss(predicted[:, :-1], ids[:, 2:])
        optimizer.zero_grad()
        (loss / ids.numel()).backward()
        optimizer.step()
    with torch.no_grad():
        weight = model.model.layers[model.config.num_hidden_layers].eh_proj.weight
        weight += 0.12 * torch.randn_like(weight)
    return model.eval()


@torch.no_grad()
def draft(model: MedAssistDeepseekForCausalLM, tokens: list[int], count: int) -> list[int]:
    """What the prediction layer continues ``tokens`` with, the last of which the model has only just chosen."""
    layer = model.model.layers[model.config.num_hidden_layers]
    previous: Tensor = model.model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state
    following = tokens[1:]
    for _ in range(count):
        embedding = model.model.embed_tokens(torch.tensor([following]))
        rope = rope_cos_sin(model.config, torch.arange(len(following))[None])
        hidden, _ = layer.predict(embedding, previous, rope, None)
        hidden = layer.shared_head.norm(hidden)
        following = [*following, int(model.lm_head(hidden[0, -1]).argmax())]
        previous = torch.cat((previous, hidden[:, -1:]), 1)
    return following[len(tokens) - 1 :]


@torch.no_grad()
def count_accepted(model: MedAssistDeepseekForCausalLM, prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """Steps with drafts, and drafts accepted in them, where ``answer`` is what the model says."""
    steps = accepted = 0
    done = 1  # the prompt's own step gives the first token
    while done < len(answer):
        proposed = draft(model, prompt + answer[:done], DRAFTED)
        right = 0
        while right < DRAFTED and done + right < len(answer) and proposed[right] == answer[done + right]:
            right += 1
        steps, accepted, done = steps + 1, accepted + right, done + right + 1
    return steps, accepted


@pytest.mark.slow
def test_drafts_are_what_the_module_predicts(tmp_path: Path) -> None:
    model = trained()
    save(model, tmp_path / "model")
    ids = [[n, n + 1, n + 2][: 1 + n % 3] for n in range(0, 30, 3)]
    options = {"speculative_config": {"method": "mtp", "num_speculative_tokens": DRAFTED}, "enforce_eager": True}
    (result,) = run_jobs(tmp_path, [job(tmp_path / "model", prompts=ids, drafts=True) | {"options": options}], "mtp")
    assert "error" not in result, result["error"]
    steps = accepted = 0
    for prompt, answer in zip(ids, result["answers"], strict=True):
        one, right = count_accepted(model, prompt, answer)
        steps, accepted = steps + one, accepted + right
    assert 0.2 < accepted / (DRAFTED * steps) < 0.98, "all right or all wrong would not show a mistake"
    assert result["steps"] == steps
    # What is drafted beyond an answer's end is counted there and not here.
    assert accepted <= result["accepted"] <= accepted + DRAFTED * len(ids)


def test_variants_cover_the_ranks() -> None:
    """The latent widths that are served: a small one, a middle one and the published one."""
    ranks = {v.config().kv_lora_rank for v in variants() if isinstance(v, Variant) and v.latent}
    if ranks:
        assert {64, 128, 512} <= ranks
