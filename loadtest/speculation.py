"""What a model's own drafts are worth: decoding with multi-token prediction beside the same engine without.

``medassist bench speculation`` runs this; :mod:`loadtest.speculation_session` holds the engines. Figures are those of
greedy answers to questions, one sequence at a time:

    speed-up           tokens per second with drafts over those without, of the same round; the median of rounds
    tokens a step      tokens that a pass over the model gives, those of prompts left out
    accepted           tokens a step beyond the first, over those drafted; what an answer's end cuts off is not counted
    at each place      share of passes in which the first drafted token was accepted, the second, ...
    step               seconds of a turn over its passes, next to that without drafts
    if memory decides  the speed-up on a device whose passes take as long as their weights are read (most GPUs at one
                       sequence): tokens a step over the bytes of a step with drafts, relative to one without
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loadtest import engine_benchmark
from loadtest.engine_plan import Options as EngineOptions
from loadtest.engine_report import aligned
from serving.engine import on_cpu


@dataclass(frozen=True)
class Options:
    """``drafted``: tokens drafted at a time, one engine each. ``questions``: how many of the evaluation file."""

    checkpoint: Path
    drafted: tuple[int, ...] = (1, 2, 3, 4)
    rounds: int = 8
    questions: int = 24
    new_tokens: int = 128
    threads: int | None = None
    dtype: str = "float32"
    eager: bool | None = None

    def __post_init__(self) -> None:
        if not self.drafted or min(self.drafted) < 1:
            raise ValueError(f"--drafted must be numbers of at least 1, got {self.drafted}")
        for name in ("rounds", "questions", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One engine's figures, over all rounds.

    Attributes:
        drafted: tokens drafted at a time; 0: none.
        tokens_per_second, cpu_per_token: medians of rounds; the second in milliseconds.
        speed_up: of each round, against the engine without drafts.
        tokens_per_step: tokens a pass over the model gives.
        by_place: the share of drafts accepted at each place, the first drafted token first.
        same: whether every answer is that of the engine without drafts.
    """

    drafted: int
    tokens_per_second: float
    cpu_per_token: float
    speed_up: list[float]
    tokens_per_step: float
    by_place: list[float] = field(default_factory=list)
    same: bool = True

    @property
    def accepted(self) -> float:
        return sum(self.by_place) / len(self.by_place) if self.by_place else 0.0

    @property
    def milliseconds_per_step(self) -> float:
        return 1e3 * self.tokens_per_step / self.tokens_per_second


def summarise(turns: list[dict[str, Any]]) -> list[Row]:
    """A row for each engine; ``turns`` are those of :mod:`loadtest.speculation_session`."""
    rows = []
    plain = {turn["round"]: turn for turn in turns if not turn["drafted"]}
    for drafted in sorted({turn["drafted"] for turn in turns}):
        own = [turn for turn in turns if turn["drafted"] == drafted]
        tokens = [sum(map(len, turn["answers"])) for turn in own]
        rates = [count / turn["seconds"] for count, turn in zip(tokens, own, strict=True)]
        base = [sum(map(len, plain[t["round"]]["answers"])) / plain[t["round"]]["seconds"] for t in own]
        gained = [count for turn in own for count in turn["gained"]]
        by_place = [sum(count > place for count in gained) / len(gained) for place in range(1, drafted + 1)]
        rows.append(
            Row(
                drafted,
                median(rates),
                median(1e3 * turn["cpu"] / count for turn, count in zip(own, tokens, strict=True)),
                [rate / other for rate, other in zip(rates, base, strict=True)],
                sum(gained) / len(gained),
                by_place,
                all(turn["answers"] == plain[turn["round"]]["answers"] for turn in own),
            )
        )
    return rows


def memory_bound(config: Any, tokens_per_step: float, drafted: int) -> float:
    """The speed-up where a pass takes as long as its weights are read, the caches and everything else being free.

    A pass over the model reads its dense weights once, and of the experts as many as several tokens choose, if they
    chose independently: ``E (1 - (1 - k / E) ^ tokens)`` of E. A drafted token reads the prediction layer and the head.
    """
    c = config
    attention = c.hidden_size * c.cached_width + c.kv_lora_rank * c.num_attention_heads * (
        c.qk_nope_head_dim + c.v_head_dim
    )
    attention += c.num_attention_heads * c.v_head_dim * c.hidden_size
    query = c.num_attention_heads * c.qk_head_dim
    attention += c.hidden_size * query if c.q_lora_rank is None else c.q_lora_rank * (c.hidden_size + query)
    expert = 3 * c.hidden_size * c.moe_intermediate_size

    def experts(tokens: int) -> float:
        chosen = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens)
        return (chosen + c.n_shared_experts) * expert + c.n_routed_experts * c.hidden_size

    dense, sparse = c.first_k_dense_replace, c.num_hidden_layers - c.first_k_dense_replace
    head = c.vocab_size * c.hidden_size

    def model(tokens: int) -> float:
        mlps = dense * 3 * c.hidden_size * c.intermediate_size + sparse * experts(tokens)
        return c.num_hidden_layers * attention + mlps + head

    feed_forward = experts(1) if c.is_sparse(c.num_hidden_layers) else 3 * c.hidden_size * c.intermediate_size
    draft = attention + feed_forward + 2 * c.hidden_size**2 + head
    return tokens_per_step * model(1) / (model(1 + drafted) + drafted * draft)


def table(rows: list[Row], config: Any) -> str:
    lines = [
        ["drafted", "tokens/s", "CPU ms a token", "tokens a step", "step, ms", "accepted", "at each place", "speed-up",
         "of rounds", "same answers", "if memory decides"]
    ]  # fmt: skip
    for row in rows:
        lines.append(
            [
                str(row.drafted or "none"), f"{row.tokens_per_second:.0f}", f"{row.cpu_per_token:.2f}",
                f"{row.tokens_per_step:.2f}", f"{row.milliseconds_per_step:.2f}",
                f"{row.accepted:.0%}" if row.drafted else "", " ".join(f"{share:.0%}" for share in row.by_place),
                f"{median(row.speed_up):.2f}", f"{min(row.speed_up):.2f} to {max(row.speed_up):.2f}",
                "yes" if row.same else "NO",
                f"{memory_bound(config, row.tokens_per_step, row.drafted):.2f}" if row.drafted else "",
            ]
        )  # fmt: skip
    return aligned(lines)


def markdown(rows: list[Row], config: Any, facts: dict[str, str], settings: dict[str, Any]) -> str:
    """The report."""
    both = [["", ""], *([name, str(value)] for name, value in (facts | settings).items())]
    best = max(rows, key=lambda row: median(row.speed_up))
    reading = "No number of drafts made the engine faster."
    if best.drafted:
        reading = (
            f"Best: {best.drafted} drafted at a time, {median(best.speed_up):.2f} times the tokens per second of the "
            "engine without drafts."
        )
    definitions = (__doc__ or "").partition("Figures are")[2]
    return "\n\n".join(
        ["# Multi-token prediction as drafts", aligned(both), reading, table(rows, config),
         "Figures are" + definitions.rstrip()]
    ) + "\n"  # fmt: skip


def run(options: Options) -> list[Row]:
    """Measures; the engines run in a process of their own.

    Raises:
        ValueError: the checkpoint has no layer of multi-token prediction, or no tokenizer.
        RuntimeError: the measurement failed; the message has the end of its log.
    """
    from serving.features import MTP, Features, check, has_tokenizer
    from training.corpus import read_evaluation, read_facts, resolve
    from training.evaluate import FACTS, QUESTIONS

    name = options.checkpoint.name
    check(name, options.checkpoint, Features(speculative=MTP), on_cpu(), None)
    if not has_tokenizer(options.checkpoint):
        raise ValueError(f"{options.checkpoint} has no tokenizer.json: there is nothing to ask it")
    questions = [question for question, _ in read_evaluation(resolve(QUESTIONS), read_facts(resolve(FACTS)))]
    chosen = questions[:: max(1, len(questions) // options.questions)][: options.questions]
    specification = {
        "checkpoint": str(options.checkpoint), "drafted": options.drafted, "rounds": options.rounds,
        "questions": chosen, "new_tokens": options.new_tokens, "dtype": options.dtype,
        "eager": on_cpu() if options.eager is None else options.eager,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as directory:
        folder = Path(directory)
        (folder / "in.json").write_text(json.dumps(specification))
        done = subprocess.run(
            [sys.executable, "-m", "loadtest.speculation_session", str(folder / "in.json"), str(folder / "out.json")],
            env=engine_benchmark.session_environment(EngineOptions(threads=options.threads)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            end = "\n".join(done.stdout.splitlines()[-25:])
            raise RuntimeError(f"the measurement failed with exit code {done.returncode}:\n{end}")
        return summarise(json.loads((folder / "out.json").read_text()))


def main(options: Options, command: str, report: Path | None = None) -> int:
    """Runs, prints the table and writes the report where asked to. Returns the exit code."""
    from transformers import AutoConfig

    facts = engine_benchmark.environment(command)  # the load of the machine is that before the run
    try:
        rows = run(options)
    except RuntimeError as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    config = AutoConfig.from_pretrained(options.checkpoint)
    print(table(rows, config))
    if report:
        settings = {
            "checkpoint": f"{options.checkpoint.name}, {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"{config.num_experts_per_tok} of {config.n_routed_experts} experts",
            "dtype": options.dtype, "threads": options.threads or "all cores", "rounds": options.rounds,
            "questions": options.questions, "new tokens at most": options.new_tokens,
        }  # fmt: skip
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(markdown(rows, config, facts, settings))
    return 0
