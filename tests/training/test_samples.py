"""Samples of a model in training, which must not disturb it."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from modeling import registry
from training.samples import sample

PROMPTS = ["What helps with a cold?", "", "Rest " * 60]


def built(model_type: str) -> Any:
    torch.manual_seed(0)
    architecture = registry.get(model_type)
    return architecture.model_class()(architecture.config_class().tiny(vocab_size=300)).train()


def step(model: Any, optimizer: Any) -> None:
    ids = torch.randint(4, 300, (2, 16))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_with_and_without_sampling_is_bit_equal(tokenizer: Any, temperature: float) -> None:
    from modeling.medassist.config import MedAssistGPTConfig
    from modeling.medassist.model import MedAssistGPTForCausalLM

    torch.manual_seed(0)
    start = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(vocab_size=300, residual_dropout=0.2)).train()
    ends = []
    for watched in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(1)
        for _ in range(3):
            step(model, optimizer)
            if watched:
                sample(model, tokenizer, PROMPTS, 4, temperature)
                assert model.training
        ends.append(model.state_dict() | {"random": torch.get_rng_state()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("model_type", registry.REGISTRY)
def test_greedy_samples_are_those_of_generate(tokenizer: Any, model_type: str) -> None:
    model = built(model_type)
    text = sample(model, tokenizer, PROMPTS[:1], 8)[0]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    made = model.eval().generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_seed_gives_the_same_samples_whatever_the_runs_random_state(tokenizer: Any) -> None:
    model = built("medassist_gpt")
    first = sample(model, tokenizer, PROMPTS, 8, temperature=1.0, seed=3)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert sample(model, tokenizer, PROMPTS, 8, temperature=1.0, seed=3) == first
    assert sample(model, tokenizer, PROMPTS, 8, temperature=1.0, seed=4) != first


def test_a_prompt_longer_than_the_model_is_cut_at_its_start(tokenizer: Any) -> None:
    assert len(sample(built("gpt"), tokenizer, ["Rest and drink. " * 200], 2)) == 1
