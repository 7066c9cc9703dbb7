"""What a training step costs: this project's beside Hugging Face's Trainer and a minimal loop, on the same work.

``medassist bench train`` runs this; :mod:`loadtest.training_contenders` holds the contenders, which take turns of some
steps each in one process. The first round warms up and is not counted. Figures:

    tokens/s      tokens of the windows per CPU-second of the process, all threads; on a GPU per second of it
    medassist /   seconds of the other over ours in the same round: above 1 ours is faster; median, and the range
    same loss     largest relative difference of a step's loss from ours, over all rounds and the warm-up
    loader        seconds in which our batches are made over those of our whole steps
    MFU           model FLOPs utilisation by :mod:`training.flops`, of the GPU's dense bfloat16 peak

Where losses differ by more than ``TOLERANCE``, the contenders did not do the same work, and no figures are given.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from loadtest import training_report
from loadtest.engine_benchmark import environment
from loadtest.engine_sizes import configuration
from loadtest.training_contenders import OURS, Choice, Minimal, Ours, Turn, Work, loading_seconds, with_trainer
from modeling import registry
from training import acceleration, flops
from training.data import Windows
from training.shards import Shard, open_shards, read_manifest, write_shard

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
ALL_ROWS = 2**31 - 1  # of logits at a time: what there is without a chunked loss
SYNTHETIC_TOKENS = 1_000_000


@dataclass(frozen=True)
class Options:
    """``steps``: of a turn. ``options``: of our step, a table row each, see :func:`choice`."""

    architecture: str = "medassist_gpt"
    preset: str = "demo"
    data: Path | None = None
    window: int = 256
    batch_size: int = 8
    rounds: int = 12
    steps: int = 10
    threads: int = 1
    precision: str = "auto"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("batch_size", 1), ("rounds", 1), ("steps", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for text in self.options:
            choice(text)


def choice(text: str) -> Choice:
    """What one of ``--options`` stands for: ``plain``, or parts joined by ``+``, such as ``bfloat16+compile``.

    Raises:
        ValueError: no such option; the message lists those there are.
    """
    known: dict[str, dict[str, Any]] = {
        "plain": {},
        "float32": {"precision": torch.float32},
        "bfloat16": {"precision": torch.bfloat16},
        "compile": {"compile": True},
        "recompute": {"activation_checkpointing": True},
        "unfused": {"fused": False},
        "whole_logits": {"loss_chunk": ALL_ROWS},
    }
    made: dict[str, Any] = {"name": text}
    for part in text.split("+"):
        name, _, number = part.partition("=")
        if name in ("loss_chunk", "batch_size") and number.isdecimal() and int(number):
            made[name] = int(number)
        elif part in known:
            made |= known[part]
        else:
            raise ValueError(
                f"--options: {part!r} is none of {', '.join(known)}, loss_chunk=N and batch_size=N, joined by '+'"
            )
    return Choice(**made)


@dataclass(frozen=True)
class Row:
    """A contender's figures, over all rounds but the first.

    Attributes:
        rate, passed_rate: tokens a second, CPU-second or of a GPU, and a second passed; medians.
        ratios: its seconds a token over those of the first contender, of each round.
        difference: largest relative difference of a loss from the first contender's.
        loading: share of its seconds in which batches were made; medians.
        memory: bytes of GPU memory that a step takes, at most.
    """

    who: str
    rate: float
    passed_rate: float
    ratios: list[float]
    difference: float
    loading: float
    memory: int


@dataclass(frozen=True)
class Result:
    """All that a report is made of.

    Attributes:
        rows, choices: the contenders, ours first; and our step with each of the options, the plain one first.
        settings: as the report prints them.
        documents_loading: share of our step that batches of whole documents would take.
        peak: FLOP/s of the GPU; None: not known, or none.
    """

    rows: list[Row]
    choices: list[Row]
    settings: dict[str, Any]
    documents_loading: float
    flops_per_token: float
    peak: float | None
    on_gpu: bool


def summarise(rounds: list[list[Turn]], tokens: dict[str, int]) -> list[Row]:
    """A row for each contender.

    Args:
        rounds: the turns of each, in any order; the first is the warm-up.
        tokens: of a turn, by contender; the first is what the others are compared with.
    """
    base, *_ = tokens
    by_round = [{turn.who: turn for turn in turns} for turns in rounds]
    rows = []
    for who, count in tokens.items():
        own = [turns[who] for turns in by_round]
        counted = own[1:]
        ratios = [
            (turn.seconds / count) / (turns[base].seconds / tokens[base])
            for turn, turns in zip(counted, by_round[1:], strict=True)
        ]
        differences = [
            abs(x - y) / abs(y)
            for turn, turns in zip(own, by_round, strict=True)
            for x, y in zip(turn.losses, turns[base].losses, strict=True)
        ]
        rows.append(
            Row(
                who,
                median(count / turn.seconds for turn in counted),
                median(count / turn.passed for turn in counted),
                ratios,
                # A loss that is not a number is a difference, which max() would overlook.
                max(differences) if np.isfinite(differences).all() else float("inf"),
                median(turn.loading / turn.seconds for turn in counted),
                max(turn.memory for turn in counted),
            )
        )
    return rows


@contextmanager
def _windows(options: Options, vocab_size: int) -> Iterator[tuple[Windows, Windows, str]]:
    """Windows of the data set's text as a stream, the same in documents, and what the text is.

    Raises:
        ValueError: no such data set, or its tokens are not the model's.
    """
    if options.data is not None:
        manifest = read_manifest(options.data / "train")
        if manifest["vocab_size"] > vocab_size:
            raise ValueError(f"--data has a vocabulary of {manifest['vocab_size']}, the model one of {vocab_size}")
        shards = open_shards(options.data / "train", options.data / "tokenizer", verify=False)
        yield *_both(shards, options), f"{options.data.name}, {manifest['tokens']:,} tokens"
        return
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder:
        drawn = np.random.default_rng(0)
        lengths = drawn.integers(40, 700, SYNTHETIC_TOKENS // 370)
        # Frequencies as of words: the n-th most frequent has 1 / n.
        share = 1 / np.arange(1, vocab_size + 1)
        documents = (drawn.choice(vocab_size, n, p=share / share.sum()).tolist() for n in lengths)
        write_shard(Path(folder) / "00000.shard", documents, vocab_size, bytes(32))
        yield *_both([Shard(Path(folder) / "00000.shard")], options), f"drawn at random, {lengths.sum():,} tokens"


def _both(shards: list[Shard], options: Options) -> tuple[Windows, Windows]:
    return Windows(shards, options.window, 0, stream=True), Windows(shards, options.window, 0)


def build(options: Options) -> Any:
    """The model, with new weights.

    Raises:
        ValueError: no such architecture or preset, or one that ``forward(labels=...)`` does not train as we do.
    """
    from transformers import AutoModelForCausalLM

    presets = registry.get(options.architecture).presets()
    if options.preset not in presets:
        raise ValueError(f"{options.architecture} has the presets {', '.join(presets)}, not {options.preset!r}")
    config = configuration(options.architecture, options.preset)
    if options.window > config.max_position_embeddings:
        raise ValueError(f"--window {options.window} is above the model's {config.max_position_embeddings} positions")
    for name in vars(config):
        if name.endswith("dropout"):  # random numbers are not drawn in the same order by all contenders
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if set(model.loss_weights) != {"loss"}:
        raise ValueError(
            f"{options.architecture} has losses ({', '.join(model.loss_weights)}) that a loop over forward() does not "
            "know: the contenders would not train the same"
        )
    return model


def run(options: Options) -> Result:
    """Measures, on the GPU if there is one.

    Raises:
        ValueError: options that do not fit together, several GPUs, or contenders whose losses differ.
    """
    if torch.cuda.device_count() > 1:
        raise ValueError("several GPUs are visible, of which one is measured: set CUDA_VISIBLE_DEVICES=0")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        model = build(options)
        with _windows(options, model.config.vocab_size) as (stream, documents, text):
            device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
            precision = acceleration.resolve_precision(options.precision, device)
            work = Work(stream, options.batch_size, precision, device)
            rows = _compare(model, work, options)
            choices = _compare_choices(model, work, options)
            loading = loading_seconds(documents, options.batch_size, options.steps, device)
    finally:
        torch.set_num_threads(threads)
    of_step = options.batch_size * options.window
    settings = {
        "model": f"{options.architecture} {options.preset}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"vocabulary {model.config.vocab_size:,}",
        "text": text,
        "step": f"{options.batch_size} windows of {options.window} tokens",
        "precision": str(precision).removeprefix("torch."),
        "threads": options.threads,
        "rounds": f"{options.rounds} of {options.steps} steps each, after one that warms up",
    }
    return Result(
        rows, choices, settings, loading * rows[0].rate / of_step, flops.flops_per_token(model, options.window),
        flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
        device.type == "cuda",
    )  # fmt: skip


def _compare(model: Any, work: Work, options: Options) -> list[Row]:
    """The three contenders, in turns; ours and the minimal loop change places after each round.

    Raises:
        ValueError: their losses differ.
    """
    others: list[Ours | Minimal] = [Ours(model, work), Minimal(model, work)]
    rounds: list[list[Turn]] = []

    def between(number: int) -> None:
        for contender in others if number % 2 else others[::-1]:
            rounds[-1].append(contender.turn(number * options.steps, options.steps))

    with_trainer(model, work, options.rounds + 1, options.steps, between, lambda turn: rounds.append([turn]))
    tokens = options.steps * options.batch_size * options.window
    names = [contender.name for contender in others] + [rounds[0][0].who]
    rows = summarise(rounds, dict.fromkeys(names, tokens))
    for row in rows:
        if not row.difference <= TOLERANCE[work.precision]:
            raise ValueError(
                f"the losses of {row.who} differ from those of {OURS} by up to {row.difference:.1e} of their size: the "
                "contenders did not do the same work, and their speeds are not compared"
            )
    return rows


def _compare_choices(model: Any, work: Work, options: Options) -> list[Row]:
    """Our step with each of ``options``, in turns; all of them are in memory together."""
    if not options.options:
        return []
    contenders = [Ours(model, work, choice(text)) for text in dict.fromkeys(("plain", *options.options))]
    rounds = []
    for number in range(options.rounds + 1):
        rounds.append([c.turn(number * options.steps, options.steps) for c in contenders])
    return summarise(rounds, {c.name: options.steps * c.batch_size * options.window for c in contenders})


def main(options: Options, command: str, report: Path | None = None) -> int:
    """Runs, prints the tables and writes the report where asked to. Returns the exit code."""
    facts = environment(command)  # the load of the machine is that before the run
    result = run(options)
    print(training_report.reading(result), training_report.tables(result), sep="\n\n")
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        definitions = (__doc__ or "").partition("\n\n")[2]
        report.write_text(training_report.markdown(result, facts, definitions))
    return 0
