"""The training loop from corpus to checkpoint directory, on a corpus of six facts."""

import copy
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling.layers.objective import count
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from training import loop
from training.data import PackedDocuments
from training.optimizer import Optimizers
from training.recipe import Corpus, Model, Recipe, Tokenizer, Train
from training.shards import Shard, write_shard

PHRASING = """
[templates]
shape = ["which shape has {t}", "{t} shape"]
[follow_ups]
shape = ["and its shape?"]
[noise]
openings = ["well, "]
closings = [" please"]
stop_words = ["the", "is"]
[synonyms]
sets = [["colour", "hue"], ["big", "large"]]
"""


def write_corpus(folder: Path) -> Corpus:
    folder.mkdir()
    facts, held_out = [], []
    for topic, colour, shape in (
        ("the sun", "yellow", "round"),
        ("a leaf", "green", "flat"),
        ("a brick", "red", "long"),
    ):
        for aspect, answer in (("colour", f"It is {colour}."), ("shape", f"It is {shape}.")):
            fact = {"id": f"{topic}.{aspect}", "area": "Things", "topic": topic, "aliases": [topic], "aspect": aspect,
                    "questions": [f"What {aspect} is {topic}?", f"Tell me the {aspect} of {topic}."],
                    "answer": answer}  # fmt: skip
            facts.append(fact)
            held_out.append({"id": fact["id"], "question": f"{topic}, its {aspect}?"})
    for name, rows in (("facts", facts), ("evaluation", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phrasing.toml").write_text(PHRASING)
    return Corpus(facts=str(folder / "facts.jsonl"), evaluation=str(folder / "evaluation.jsonl"), renders=8)


def run(recipe: Recipe, out: Path) -> Path:
    return loop.train(recipe, out, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    # Dropout, so that a resumed run must also restore the random numbers.
    return Recipe(
        name="six",
        corpus=write_corpus(tmp_path_factory.mktemp("corpus") / "things"),
        tokenizer=Tokenizer(vocab_size=300),
        model=Model(preset="tiny", changes={"residual_dropout": 0.1}),
        train=Train(steps=6, window=192, batch_size=1, accumulation=2, threads=1, log_every=1, eval_every=2,
                    checkpoint_every=3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing interrupted."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(recipe, out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def interrupted(straight: Path, tmp_path: Path) -> Path:
    """What the same run leaves when it is killed after its checkpoint of step 3."""
    shutil.copytree(straight, tmp_path / "interrupted", ignore=shutil.ignore_patterns("final"))
    return tmp_path / "interrupted"


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_a_checkpoint_directory_that_loads(straight: Path) -> None:
    final = straight / "final"
    assert {"config.json", "model.safetensors", "tokenizer.json", "fingerprint.json", "recipe.json"} <= {
        path.name for path in final.iterdir()
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    fingerprint = json.loads((final / "fingerprint.json").read_text())
    probe = fingerprint["probes"][1]
    with torch.no_grad():
        logprobs = model(torch.tensor([probe["token_ids"]])).logits[0].log_softmax(-1)
    given = logprobs[:-1].gather(1, torch.tensor(probe["token_ids"])[1:, None])[:, 0]
    torch.testing.assert_close(given, torch.tensor(probe["logprobs"]), rtol=0, atol=1e-5)


def test_run_logs_every_step_and_evaluation(straight: Path) -> None:
    rows = metrics(straight)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4, 6]


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    recipe: Recipe, straight: Path, interrupted: Path
) -> None:
    torch.manual_seed(999)  # another process starts with other random numbers
    torch.rand(7)
    final = run(recipe, interrupted)
    resumed, want = load_file(final / "model.safetensors"), load_file(straight / "final/model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in want.items())
    kept = ("step", "loss", "held_out_loss", "grad_norm", "lr")
    rows = [[{k: row[k] for k in kept if k in row} for row in metrics(out)] for out in (interrupted, straight)]
    assert rows[0] == rows[1]


def test_resumed_run_starts_at_its_checkpoint(recipe: Recipe, interrupted: Path) -> None:
    console = Console(file=io.StringIO())
    loop.train(recipe, interrupted, console)
    assert "from step 3" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_folder_of_another_recipe_is_refused_and_left_alone(recipe: Recipe, interrupted: Path) -> None:
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another recipe.*recipe\.json"):
        run(replace(recipe, train=replace(recipe.train, steps=7)), interrupted)
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("window", "changes", "message"),
    [
        (192, {"vocab_size": 299}, r"model\.changes\.vocab_size \(299\)"),
        (192, {"max_position_embeddings": 128}, r"train\.window \(192\)"),
        (20, {}, r"raise \S*window"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_name(
    recipe: Recipe, tmp_path: Path, window: int, changes: dict[str, int], message: str
) -> None:
    other = replace(recipe, model=Model(preset="tiny", changes=changes), train=replace(recipe.train, window=window))
    with pytest.raises(ValueError, match=message):
        run(other, tmp_path / "out")


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Documents whose answers, after id 1 and up to id 2, have from 1 to 12 tokens."""
    documents = [[3, 4 + i, 1, *(20 + (i * k) % 90 for k in range(i % 12)), 2, 0] for i in range(60)]
    write_shard(tmp_path / "00000.shard", documents, 160, bytes(32))
    return [Shard(tmp_path / "00000.shard")]


def test_cutting_a_step_into_micro_batches_changes_neither_gradient_nor_weights(shards: list[Shard]) -> None:
    torch.manual_seed(0)
    start = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(initializer_range=0.1)).train()
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        data = PackedDocuments(shards, 24, batch_size, seed=0, answer_span=(1, 2))
        parts = [count(part.labels) for part in islice(data.batches(), accumulation)]
        assert accumulation == 1 or len(set(parts)) > 1
        model = copy.deepcopy(start)
        # Without momentum, AdamW's first average is the gradient itself.
        optimizers = Optimizers(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.0, 0.95))
        step = loop.train_step(model, optimizers, data.batches(), accumulation, clip=1e9)
        gradients = [optimizers.all[0].state[p]["exp_avg"] for p in model.parameters()]
        results.append((torch.tensor([step.losses["loss"], step.norm]), gradients, list(model.parameters())))
    whole, *cut = results
    for other in cut:
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-6)


def test_step_whose_gradient_is_not_finite_changes_nothing(shards: list[Shard]) -> None:
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny())
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    data = PackedDocuments(shards, 24, 2, seed=0)
    loop.train_step(model, Optimizers(model, "muon", 0.1, 0.1, (0.9, 0.95)), data.batches(), 1, clip=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_loss_of_packed_documents_is_that_of_single_ones(shards: list[Shard]) -> None:
    torch.manual_seed(0)
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(initializer_range=0.1)).eval()
    data = PackedDocuments(shards, 24, 1, seed=0)

    def losses() -> Iterator[float]:
        shard = shards[0]
        for a, b in zip(shard.offsets, shard.offsets[1:], strict=False):
            ids = torch.tensor(shard.tokens[int(a) : int(b)].astype("int64"))[None]
            yield float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    with torch.no_grad():
        alone = sum(losses())
    tokens = sum(count(batch.labels) for batch in data.epoch())
    assert loop.evaluate(model, data)["loss"] == pytest.approx(alone / tokens, abs=1e-5)
