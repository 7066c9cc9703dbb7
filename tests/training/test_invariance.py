"""What must not change what is learned, for every architecture: how a step is cut, packed, recomputed, compiled.

Losses and gradients of a step are compared in float64, where nothing but a mistake is above 1e-6 (rotations and routers
round to float32). In float32 rounding alone can send a token to another expert. DDP and FSDP: ``test_parallel.py``.
"""

import copy
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from modeling.layers.objective import IGNORED
from modeling.registry import REGISTRY, get
from training.acceleration import (
    autocast,
    checkpoint_activations,
    compile_layers,
    out_of_memory,
    resolve_precision,
)
from training.data import Batch, Windows
from training.shards import Shard, write_shard

WINDOW = 24
ATOL = 1e-6
# Where an architecture drops out, under the name it has there; the router's noise is as random.
RANDOM: dict[str, dict[str, Any]] = {
    "medassist_gpt": {"residual_dropout": 0.2},
    "gatorgpt": {"residual_dropout": 0.2},
    "gpt": {"dropout": 0.2},
    "tinymorfer": {"dropout": 0.2},
    "medassist_deepseek": {"router": "noisy_top_k"},
}
COMPILED_IN_CI = ("medassist_gpt",)
every_architecture = pytest.mark.parametrize("name", REGISTRY)

Result = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def build(name: str, **changes: Any) -> Any:
    """A tiny model in float64, in training; with multi-token prediction and a balancing loss where it has them."""
    if name == "medassist_deepseek":
        changes = {"num_nextn_predict_layers": 2, "router_aux_loss_coef": 0.1} | changes
    torch.manual_seed(0)
    return get(name).model_class()(get(name).presets()["tiny"](initializer_range=0.1, **changes)).double().train()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Documents of 4 to 15 tokens, whose answers (after token 1, up to token 2) have 1 to 12."""
    folder = tmp_path_factory.mktemp("shards")
    documents = [[3, 4 + i, 1, *(20 + (i * k) % 90 for k in range(i % 12)), 2] for i in range(60)]
    write_shard(folder / "00000.shard", documents, 160, bytes(32))
    return [Shard(folder / "00000.shard")]


def cut(shards: list[Shard], batch_size: int) -> list[Batch]:
    """The first 8 windows, in batches of so many."""
    return Windows(shards, WINDOW, 0, answer_span=(1, 2)).micro_batches(0, 8, batch_size)


def step(model: Any, batches: list[Batch]) -> Result:
    """Losses, gradients and statistics of a step: as the loop does it."""
    weights, counts = model.loss_weights, Counter[str]()
    for batch in batches:
        counts.update(model.loss_counts(batch))
    losses, statistics = dict.fromkeys(weights, torch.zeros(())), Counter[str]()
    model.zero_grad()
    for batch in batches:
        made = model.objective(batch)
        means = {name: made.sums[name] / counts[name] for name in weights}
        torch.stack([weights[name] * mean for name, mean in means.items()]).sum().backward()
        losses = {name: losses[name] + mean.detach() for name, mean in means.items()}
        statistics.update(made.statistics)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return losses, gradients, dict(statistics)


def assert_same(got: Result, want: Result, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@every_architecture
def test_accumulation(shards: list[Shard], name: str) -> None:
    model = build(name)
    model.z_loss = 0.01
    whole = step(model, cut(shards, 8))
    assert_same(step(model, cut(shards, 1)), whole)
    assert_same(step(model, cut(shards, 2)), whole)


@every_architecture
def test_packing(shards: list[Shard], name: str) -> None:
    """Windows of several documents against each document in a window of its own."""
    # A balancing loss is of a window as a whole.
    model = build(name, **({"router_aux_loss_coef": 0.0} if name == "medassist_deepseek" else {}))
    packed = cut(shards, 8)
    alone = [document for batch in packed for row in range(8) for document in documents(batch, row)]
    assert len(alone) > 8
    (losses, gradients, _), (want, wanted, _) = step(model, alone), step(model, packed)
    # Not statistics: the last tokens of a document, which multi-token prediction has no loss for, are routed there by
    # what comes after them.
    torch.testing.assert_close((losses, gradients), (want, wanted), rtol=0, atol=ATOL)


def documents(batch: Batch, row: int) -> list[Batch]:
    """Each document of a window as a batch of one short window, without the padding."""
    starts = [*(batch.position_ids[row] == 0).nonzero().flatten().tolist(), WINDOW]
    rows = (batch.input_ids, batch.position_ids, batch.labels, batch.is_text)
    spans = [slice(a, b) for a, b in pairwise(starts) if batch.is_text[row, a]]
    return [Batch(*(values[row : row + 1, span] for values in rows)) for span in spans]


@pytest.mark.parametrize("random", [False, True], ids=["plain", "random"])
@every_architecture
def test_activation_checkpointing(shards: list[Shard], name: str, random: bool) -> None:
    model = build(name, **(RANDOM[name] if random else {}))
    saving = copy.deepcopy(model)
    checkpoint_activations(saving)
    assert list(saving.state_dict()) == list(model.state_dict())
    results = []
    for each in (model, saving, copy.deepcopy(saving)):
        torch.manual_seed(1)
        results.append(step(each, cut(shards, 2)))
    assert_same(results[1], results[0], atol=0)
    assert_same(results[2], results[0], atol=0)
    if random:
        assert step(model, cut(shards, 2))[0]["loss"] != results[0][0]["loss"]  # it is


def test_activation_checkpointing_keeps_less(shards: list[Shard]) -> None:
    """Bytes that a forward pass saves for the backward pass."""
    kept = []
    for recompute in (False, True):
        model, total = build("medassist_gpt", num_hidden_layers=4), [0]
        if recompute:
            checkpoint_activations(model)

        def save(tensor: Tensor, total: list[int] = total) -> Tensor:
            total[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model.model(cut(shards, 8)[0].input_ids)
        kept.append(total[0])
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COMPILED_IN_CI else pytest.mark.slow) for n in REGISTRY]
)
def test_compilation(shards: list[Shard], name: str, recompute: bool, tmp_path: Path) -> None:
    torch.compiler.reset()
    counters.clear()
    model = build(name)
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
    if recompute:
        checkpoint_activations(compiled)
    want = step(model, cut(shards, 4))
    with warnings.catch_warnings(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        warnings.simplefilter("ignore")  # the compiler's own
        assert_same(step(compiled, cut(shards, 4)), want)
    assert counters["stats"]["unique_graphs"] > 0
    compiled.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0, check_dtype=False)


@every_architecture
def test_chunks_of_the_loss(shards: list[Shard], name: str) -> None:
    model = build(name)
    model.z_loss = 0.01
    results = []
    for chunk in (1000, 5, 0):
        model.loss_chunk = chunk
        results.append(step(model, cut(shards, 8)))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@every_architecture
def test_z_loss_is_a_part_of_its_own(shards: list[Shard], name: str) -> None:
    """Its mean and its gradient, against whole logits; the language model's loss is reported as without it."""
    model, batch = build(name), cut(shards, 8)[0]
    without, gradients, _ = step(model, [batch])
    hidden = model.model(batch.input_ids, position_ids=batch.position_ids).last_hidden_state
    mean = model.lm_head(hidden)[batch.labels != IGNORED].logsumexp(-1).square().mean()
    expected = torch.autograd.grad(mean, list(model.parameters()), allow_unused=True)
    model.z_loss = 0.3
    losses, sums, _ = step(model, [batch])
    torch.testing.assert_close(losses, without | {"z_loss": mean.detach()}, rtol=0, atol=ATOL)
    for (key, _), add in zip(model.named_parameters(), expected, strict=True):
        want = gradients[key] if add is None else gradients[key] + 0.3 * add
        torch.testing.assert_close(sums[key], want, rtol=0, atol=ATOL)
    measured = model.measure(batch)
    assert measured["z_loss"][0] / measured["z_loss"][1] == pytest.approx(float(mean.detach()))


@every_architecture
def test_bfloat16_is_near_float32(shards: list[Shard], name: str) -> None:
    model, cpu = build(name).float(), torch.device("cpu")
    want = step(model, cut(shards, 8))
    with autocast(cpu, torch.bfloat16):
        got = step(model, cut(shards, 8))
    for part, loss in want[0].items():
        torch.testing.assert_close(got[0][part].float(), loss.float(), rtol=0.02, atol=0)
    assert got[0]["loss"].dtype == torch.float32
    assert got[0]["loss"] != want[0]["loss"]
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for _, gradients, _ in (got, want)]
    assert flat[0].dtype == torch.float32
    assert torch.cosine_similarity(*flat, dim=0) > 0.98
    with autocast(cpu, torch.float32):
        assert_same(step(model, cut(shards, 8)), want, atol=0)


@every_architecture
def test_evaluation_is_not_changed_by_recomputation(shards: list[Shard], name: str) -> None:
    """And a cache is not filled twice where there is a gradient."""
    model = build(name).eval()
    saving = copy.deepcopy(model)
    checkpoint_activations(saving)
    assert saving.measure(cut(shards, 8)[0]) == model.measure(cut(shards, 8)[0])
    ids = cut(shards, 1)[0].input_ids[:, :5]
    assert torch.equal(saving.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


def test_precision_is_resolved_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert resolve_precision("auto", cpu) == torch.float32  # the same numbers on any CPU
        assert resolve_precision("float32", cpu) == torch.float32
        with warnings.catch_warnings() if able else pytest.warns(UserWarning, match="several times slower"):
            warnings.simplefilter("error" if able else "always")
            assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_precision("auto", gpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    assert resolve_precision("auto", gpu) == torch.float32
    with pytest.raises(ValueError, match=r"train\.precision 'bfloat16'.*T4"):
        resolve_precision("bfloat16", gpu)
    with pytest.raises(ValueError, match=r"train\.precision must be one of"):
        resolve_precision("float16", gpu)


def test_out_of_memory_names_the_settings() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    for error in (refused.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        message = out_of_memory(error, batch_size=12, accumulation=2)
        assert message is not None
        assert "train.batch_size=6 with train.accumulation=4" in message
        assert all(f"{name}" in message for name in ("activation_checkpointing", "loss_chunk", "parallel.strategy"))
    assert "train.window" in str(out_of_memory(MemoryError(), batch_size=1, accumulation=8))
    assert out_of_memory(RuntimeError("shapes do not match"), 8, 1) is None
