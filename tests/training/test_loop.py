"""The training loop from corpus to checkpoint directory, on a corpus of six facts."""

import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling.layers.objective import count
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from tests.training.things import write_corpus
from training import dry, loop, parallel, state
from training import recipe as recipes
from training.data import Windows
from training.optimizer import Optimizers
from training.recipe import Model, Recipe, Tokenizer, Train
from training.shards import Shard, write_shard

# What of a row of metrics.jsonl differs between two runs of the same steps.
MEASURED = {"tokens_per_second", "seconds", "peak_memory"}


def run(recipe: Recipe, out: Path, resume: str = "auto") -> Path:
    return loop.train(recipe, out, Console(file=io.StringIO()), resume)


def said(recipe: Recipe, out: Path, resume: str = "auto") -> str:
    """What a run prints."""
    console = Console(file=io.StringIO())
    loop.train(recipe, out, console, resume)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    """The recipe with other settings, each ``section.field=value`` in YAML."""
    values = recipe.to_dict()
    for override in overrides:
        name, _, value = override.partition("=")
        section, _, field = name.partition(".")
        values[section][field] = recipes.parse(value, name)
    return recipes.build(values)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    # Dropout, so that a resumed run must also restore the random numbers.
    return Recipe(
        name="six",
        corpus=write_corpus(tmp_path_factory.mktemp("corpus") / "things"),
        tokenizer=Tokenizer(vocab_size=300),
        model=Model(preset="tiny", changes={"residual_dropout": 0.1}),
        train=Train(steps=6, window=192, batch_size=1, accumulation=2, threads=1, loss_on="answers", log_every=1,
                    eval_every=2, checkpoint_every=3, precision="float32"),
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
    out = tmp_path / "interrupted"
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("final", "step-00000006"))
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out: Path) -> list[dict[str, float]]:
    """The metrics that depend on nothing but the recipe."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in metrics(out)]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "final/model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_run_leaves_a_checkpoint_directory_that_loads(straight: Path) -> None:
    final = straight / "final"
    assert {"config.json", "model.safetensors", "tokenizer.json", "fingerprint.json", "recipe.yaml", "README.md"} <= {
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


def test_run_leaves_what_is_needed_to_know_it(recipe: Recipe, straight: Path) -> None:
    assert recipes.load(str(straight / "recipe.yaml")) == recipe
    assert json.loads((straight / "environment.json").read_text())
    assert "Training" in (straight / "train.log").read_text()
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_run_logs_every_step_and_evaluation(straight: Path) -> None:
    rows = metrics(straight)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4, 6]
    assert all(row["held_out_bits_per_byte"] > 0 for row in rows if "held_out_loss" in row)


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    recipe: Recipe, straight: Path, interrupted: Path
) -> None:
    torch.manual_seed(999)  # another process starts with other random numbers
    torch.rand(7)
    assert "from step 3" in said(recipe, interrupted)
    assert same_weights(interrupted, straight)
    assert numbers(interrupted) == numbers(straight)


def test_finished_run_repeated_changes_nothing(recipe: Recipe, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    assert "from step 6" in said(recipe, tmp_path / "run")
    assert same_weights(tmp_path / "run", straight)
    assert metrics(tmp_path / "run") == metrics(straight)
    before, after = files(straight), files(tmp_path / "run")
    assert {path.relative_to(straight) for path in before} == {path.relative_to(tmp_path / "run") for path in after}


def test_folder_of_another_recipe_is_refused_by_name_and_left_alone(recipe: Recipe, interrupted: Path) -> None:
    before = files(interrupted)
    with pytest.raises(ValueError, match=r"another recipe \(optimizer\.lr, train\.steps\).*--out"):
        run(changed(recipe, "train.steps=7", "optimizer.lr=1e-4"), interrupted)
    assert files(interrupted) == before


def test_a_step_cut_otherwise_continues_the_run(recipe: Recipe, straight: Path, interrupted: Path) -> None:
    other = changed(recipe, "train.batch_size=2", "train.accumulation=1", "train.eval_every=6", "train.keep=1")
    assert "from step 3" in said(other, interrupted)
    rows = [{r["step"]: r["loss"] for r in metrics(out) if "loss" in r} for out in (interrupted, straight)]
    assert rows[0].keys() == rows[1].keys()
    assert {step: rows[0][step] for step in (1, 2, 3)} == {step: rows[1][step] for step in (1, 2, 3)}
    assert rows[0][4] == pytest.approx(rows[1][4], rel=0.05)  # dropout is drawn in other portions


def test_other_text_is_refused(recipe: Recipe, interrupted: Path) -> None:
    facts = Path(recipe.corpus.facts)
    text = facts.read_text()
    try:
        facts.write_text(text.replace("round", "a ball"))
        shutil.rmtree(interrupted / "data")
        with pytest.raises(ValueError, match=r"step-00000003 was trained on other text.*--out"):
            run(recipe, interrupted)
    finally:
        facts.write_text(text)


def test_other_configuration_is_refused(recipe: Recipe, interrupted: Path) -> None:
    path = interrupted / "checkpoints/step-00000003/state.json"
    saved: dict[str, Any] = json.loads(path.read_text())
    saved["facts"]["config"]["rms_norm_eps"] = 0.5  # as if the preset had been changed since
    path.write_text(json.dumps(saved))
    sums = json.loads(path.with_name("checksums.json").read_text())
    sums["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    with pytest.raises(ValueError, match=r"step-00000003 is of another model: rms_norm_eps differ"):
        run(recipe, interrupted)


def test_resume_never_takes_no_folder_with_a_checkpoint(recipe: Recipe, interrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run already \(step 3\).*--resume auto"):
        run(recipe, interrupted, "never")


def test_resume_from_a_named_checkpoint_of_another_folder(
    recipe: Recipe, straight: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "branch"
    assert "from step 3" in said(recipe, out, str(interrupted / "checkpoints/step-00000003"))
    assert same_weights(out, straight)
    with pytest.raises(ValueError, match=r"--resume: .*step-00000009 is not a checkpoint"):
        run(recipe, out, str(interrupted / "checkpoints/step-00000009"))
    other = changed(recipe, "train.window=96")
    with pytest.raises(ValueError, match=r"another recipe \(train\.window\)"):
        run(other, tmp_path / "other", str(interrupted / "checkpoints/step-00000003"))


def test_branch_has_a_rate_and_a_number_of_steps_of_its_own(recipe: Recipe, interrupted: Path, tmp_path: Path) -> None:
    other = changed(recipe, "optimizer.lr=1e-4", "train.steps=8")
    text = said(other, tmp_path / "branch", str(interrupted / "checkpoints/step-00000003"))
    assert "Branching off" in text
    assert "optimizer.lr, train.steps" in text
    assert metrics(tmp_path / "branch")[-1]["step"] == 8


def test_refused_recipe_leaves_the_folder_free_for_another(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.window"):
        run(changed(recipe, "train.window=5000"), tmp_path / "out")
    run(changed(recipe, "train.steps=1"), tmp_path / "out")


def test_changed_corpus_is_not_trained_on_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    facts = tmp_path / "things/facts.jsonl"
    shutil.copytree(Path(recipe.corpus.facts).parent, facts.parent)
    own = changed(
        recipe, "train.steps=1", f"corpus.facts={facts}", f"corpus.evaluation={facts.parent}/evaluation.jsonl"
    )
    run(own, tmp_path / "out")
    before = (tmp_path / "out/data/train/manifest.json").read_text()
    facts.write_text(facts.read_text().replace("yellow", "violet"))
    with pytest.raises(ValueError, match=r"corpus\.facts changed"):
        run(own, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoints")
    run(own, tmp_path / "out")
    assert (tmp_path / "out/data/train/manifest.json").read_text() != before


def test_resume_from_before_the_newest_checkpoint_is_refused(recipe: Recipe, straight: Path, tmp_path: Path) -> None:
    """Its own checkpoints would be older than those that are there, and the first to be removed."""
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--resume: .*step-00000006.*--out"):
        run(recipe, tmp_path / "run", str(tmp_path / "run/checkpoints/step-00000003"))


def test_run_ends_after_too_many_steps_without_a_finite_gradient(recipe: Recipe, tmp_path: Path) -> None:
    broken = changed(recipe, "train.steps=9", "train.max_skipped=3", "model.changes={initializer_range: 1.0e+30}")
    with pytest.raises(ValueError, match=r"3 steps in a row \(train\.max_skipped\).*optimizer\.lr"):
        run(broken, tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 2]  # the second evaluated, too
    assert rows[1]["skipped"] == 2


def test_run_that_is_told_to_end_saves_and_says_where_it_stands(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "six.yaml").write_text(
        changed(recipe, "train.steps=100000", "train.eval_every=100000", "train.checkpoint_every=100000").to_yaml()
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-m", "clients.cli", "train", str(tmp_path / "six.yaml"), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").exists() and metrics(out)):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 128 + signal.SIGTERM
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name[5:])
    assert f"stopped by SIGTERM after step {step}" in " ".join(error.split())
    assert state.read_facts(saved)["step"] == step == metrics(out)[-1]["step"]
    assert not (out / "final").exists()


def test_dry_run_shows_sizes_and_the_first_batch_and_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    dry.show(recipe, tmp_path / "out", console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loss_on: answers" in shown
    parameters = sum(p.numel() for p in loop.build(recipe, 300, None).parameters())
    assert re.search(rf"^parameters +{parameters:,} *$", shown, re.MULTILINE)
    assert re.search(r"^FLOPs a token +[\d.e+]+", shown, re.MULTILINE)
    assert re.search(r"^memory, weights +[\d.]+ MiB", shown, re.MULTILINE)
    assert "window 1 of the first batch" in shown
    assert "It is " in shown  # an answer of the corpus
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_the_text_that_the_run_has(recipe: Recipe, straight: Path) -> None:
    before = files(straight)
    dry.show(recipe, straight, Console(file=io.StringIO()))
    assert files(straight) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.changes={vocab_size: 299}"], r"model\.changes\.vocab_size \(299\)"),
        (["model.changes={max_position_embeddings: 128}"], r"train\.window \(192\)"),
        (["train.window=20"], r"raise train\.window"),
        (["data.windows=stream"], r"train\.loss_on.*data\.windows"),
        (["model.changes={hidden_sise: 8}"], r"model\.changes\.hidden_sise"),
        (["model.preset=huge"], r"model\.preset.*'huge'"),
        (["model.architecture=gtp"], r"gtp"),
        (["corpus.facts=/nowhere/facts.jsonl"], r"corpus.*/nowhere/facts\.jsonl"),
        (["data.path=/nowhere"], r"data\.path.*/nowhere"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_name(
    recipe: Recipe, straight: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    for name in ("tokenizer", "data"):
        shutil.copytree(straight / name, tmp_path / "out" / name)
    with pytest.raises(ValueError, match=message):
        run(changed(recipe, *overrides), tmp_path / "out")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world", "fits"),
    [(2, 4, 1, True), (2, 4, 4, True), (8, 1, 4, True), (2, 4, 3, False), (3, 2, 2, True), (4, 3, 2, False)],
)
def test_steps_that_ranks_cannot_share_are_refused(
    recipe: Recipe, batch_size: int, accumulation: int, world: int, fits: bool
) -> None:
    cut = changed(recipe, f"train.batch_size={batch_size}", f"train.accumulation={accumulation}")
    if fits:
        loop.check_ranks(cut, world)
        return
    with pytest.raises(ValueError, match=rf"train\.batch_size {batch_size} .*train\.accumulation {accumulation}"):
        loop.check_ranks(cut, world)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Documents whose answers, after id 1 and up to id 2, have from 1 to 12 tokens."""
    documents = [[3, 4 + i, 1, *(20 + (i * k) % 90 for k in range(i % 12)), 2, 0] for i in range(60)]
    write_shard(tmp_path / "00000.shard", documents, 160, bytes(32))
    return [Shard(tmp_path / "00000.shard")]


def whole(model: MedAssistGPTForCausalLM) -> parallel.Trainable:
    return parallel.distribute(model, parallel.start(), "auto", torch.float32)


def test_cutting_a_step_into_micro_batches_changes_neither_gradient_nor_weights(shards: list[Shard]) -> None:
    torch.manual_seed(0)
    start = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(initializer_range=0.1)).double().train()
    data = Windows(shards, 24, seed=0, answer_span=(1, 2))
    results = []
    for batch_size in (8, 4, 1):
        parts = data.micro_batches(0, 8, batch_size)
        assert len(parts) == 8 // batch_size
        assert len(parts) == 1 or len({count(part.labels) for part in parts}) > 1
        model = copy.deepcopy(start)
        # Without momentum, AdamW's first average is the gradient itself.
        optimizers = Optimizers(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.0, 0.95))
        step = loop.train_step(whole(model), optimizers, parts, clip=1e9)
        gradients = [optimizers.all[0].state[p]["exp_avg"] for p in model.parameters()]
        results.append((torch.tensor([step.losses["loss"], step.norm]), gradients, list(model.parameters())))
    first, *others = results
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


def test_step_whose_gradient_is_not_finite_changes_nothing(shards: list[Shard]) -> None:
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny())
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    parts = Windows(shards, 24, seed=0).micro_batches(0, 2, 2)
    step = loop.train_step(whole(model), Optimizers(model, "muon", 0.1, 0.1, (0.9, 0.95)), parts, clip=1.0)
    assert step.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_loss_of_packed_documents_is_that_of_single_ones(shards: list[Shard]) -> None:
    torch.manual_seed(0)
    model = MedAssistGPTForCausalLM(MedAssistGPTConfig.tiny(initializer_range=0.1)).eval()
    data = Windows(shards, 24, seed=0)

    def losses() -> Iterator[float]:
        shard = shards[0]
        for a, b in zip(shard.offsets, shard.offsets[1:], strict=False):
            ids = torch.tensor(shard.tokens[int(a) : int(b)].astype("int64"))[None]
            yield float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)

    with torch.no_grad():
        alone = sum(losses())
    tokens = len(shards[0].tokens) - 60
    sizes = torch.full((160,), 3)  # bytes of each token
    for batch_size in (1, 7):  # the last batch is filled up with padding
        measured = loop.evaluate(whole(model), data, batch_size, sizes)
        assert measured["loss"] == pytest.approx(alone / tokens, abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(alone / tokens), rel=1e-4)
        assert measured["bits_per_byte"] == pytest.approx(alone / tokens / math.log(2) / 3, abs=1e-5)
    assert loop.evaluate(whole(model), data, 3, limit=3) == loop.evaluate(whole(model), data, 1, limit=3)
