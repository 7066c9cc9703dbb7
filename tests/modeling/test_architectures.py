"""What every architecture must hold, generated from the registry; its engine is compared in ``tests/parity``."""

import ast
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from modeling.layers.objective import IGNORED
from tests.parity.harness import Variant, selected_architectures, variants

every_variant = pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
TOLERANCE = 2e-5  # nats, float32


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logprobs(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits.log_softmax(-1)


def assert_close(got: Tensor, want: Tensor, atol: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("arch", selected_architectures(), ids=lambda arch: arch.model_type)
def test_folder_is_complete(arch: Any) -> None:
    folder = Path(find_spec(arch.package).submodule_search_locations[0])  # type: ignore[union-attr,index]
    assert (folder / "README.md").is_file(), "the card"
    assert {"tiny"} < set(arch.presets())
    assert arch.layout()
    tree = ast.parse((folder / "vllm_model.py").read_text())  # importing it would load vLLM
    assert arch.hf_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@every_variant
def test_configuration_survives_the_round_trip(variant: Variant, tmp_path: Path) -> None:
    config = variant.config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@every_variant
def test_saved_model_loads_through_the_auto_class_unchanged(variant: Variant, tmp_path: Path) -> None:
    model, ids = variant.module(), random_ids(1, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is variant.arch.model_class()
    assert torch.equal(logprobs(loaded, ids), logprobs(model, ids))


@dataclass
class PackedBatch:
    """Two rows of two documents each, the second with padding behind them."""

    input_ids: Tensor = field(default_factory=lambda: random_ids(2, 16))
    position_ids: Tensor = field(default_factory=lambda: torch.cat([torch.arange(7), torch.arange(9)]).repeat(2, 1))
    labels: Tensor = field(init=False)
    is_text: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.is_text = torch.ones(2, 16, dtype=torch.bool)
        self.is_text[1, 12:] = False
        following = self.input_ids.roll(-1, 1)
        has_next = (self.position_ids.roll(-1, 1) == self.position_ids + 1) & self.is_text & self.is_text.roll(-1, 1)
        has_next[:, -1] = False
        self.labels = following.masked_fill(~has_next, IGNORED)


@every_variant
def test_every_parameter_gets_a_gradient(variant: Variant) -> None:
    """From what training minimises, which may have more parts than the language model's loss."""
    model, batch = variant.module().train(), PackedBatch()
    parts, counts = model.objective(batch).sums, model.loss_counts(batch)
    assert set(parts) == set(counts) == set(model.loss_weights)
    torch.stack([weight * parts[name] / counts[name] for name, weight in model.loss_weights.items()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_variant
def test_loss_that_training_reports_is_the_one_of_hugging_faces_labels(variant: Variant) -> None:
    model, batch = variant.module(), PackedBatch()
    batch.position_ids = torch.arange(16).repeat(2, 1)
    batch.labels = torch.cat([batch.input_ids[:, 1:], torch.full((2, 1), IGNORED)], 1)
    loss = model.objective(batch).sums["loss"] / model.loss_counts(batch)["loss"]
    assert_close(loss, model(batch.input_ids, labels=batch.input_ids).loss)


@every_variant
def test_a_step_down_the_gradient_lowers_the_loss(variant: Variant) -> None:
    """The initial weights of the configuration, as training meets them."""
    torch.manual_seed(0)
    model, ids = variant.arch.model_class()(variant.config()), random_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # As likely as the vocabulary is large at first: initial weights must not prefer anything.
    assert losses[0] == pytest.approx(torch.tensor(160.0).log().item(), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


@every_variant
def test_cached_steps_equal_the_whole_sequence(variant: Variant) -> None:
    if not variant.causal:
        pytest.skip("nothing can be cached where every token sees the whole sequence")
    model, ids = variant.module(), random_ids(2, 12)
    for chunks in ((1,) * 12, (5, 4, 3)):
        cache, parts = None, []
        for part in ids.split(chunks, dim=1):
            with torch.no_grad():
                out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.log_softmax(-1))
        assert_close(torch.cat(parts, 1), logprobs(model, ids, use_cache=False))


@every_variant
def test_later_tokens_matter_only_where_the_model_is_not_causal(variant: Variant) -> None:
    model, ids = variant.module(), random_ids(1, 9)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 160
    change = (logprobs(model, ids)[:, :-1] - logprobs(model, other)[:, :-1]).abs().max()
    # Not to the last bit: how many tokens an expert gets at once may change the order in which products are summed.
    assert change < TOLERANCE if variant.causal else change > 1e-2


@every_variant
def test_generate_continues_a_padded_batch_as_each_prompt_alone(variant: Variant) -> None:
    model, ids = variant.module(), random_ids(1, 9)
    model.generation_config.eos_token_id = None
    batch = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), ids[0, :5]]), ids[0]])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    together = model.generate(batch, attention_mask=mask, **greedy)[:, 9:].tolist()
    alone = [model.generate(prompt, **greedy)[0, -8:].tolist() for prompt in (ids[:, :5], ids)]
    assert together == alone
    longest: list[int] = ids[0].tolist()
    for token in alone[1]:  # and greedily means the likeliest after the whole sequence so far
        assert token == logprobs(model, torch.tensor([longest]), use_cache=False)[0, -1].argmax()
        longest.append(token)


@every_variant
def test_packed_documents_do_not_see_each_other(variant: Variant) -> None:
    model, lengths = variant.module(), (5, 1, 7)
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logprobs(model, ids, position_ids=positions, use_cache=False)
    assert_close(packed, torch.cat([logprobs(model, document) for document in ids.split(lengths, dim=1)], 1))


@every_variant
def test_longest_sequence_fits_and_one_more_token_is_refused(variant: Variant) -> None:
    model = variant.module(max_position_embeddings=16)
    assert logprobs(model, random_ids(1, 16)).isfinite().all()
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(random_ids(1, 17))


@every_variant
def test_hugging_face_twin_computes_the_same(variant: Variant) -> None:
    model = variant.module()
    twin = variant.arch.reference().twin(model)
    if twin is None:
        pytest.skip("stock transformers has no such model")
    ids = random_ids(2, 40)
    assert_close(logprobs(model, ids), logprobs(twin.eval(), ids), atol=1e-5)
