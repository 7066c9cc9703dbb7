"""What the engine benchmark measures, and how often: options, cells, and the turns that fit into the time.

Standard library only, so that ``medassist --help`` stays quick.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

DECODE, PREFILL = "decode", "prefill"
# Of a decode cell. Short, so that the cell times the layers more than attention over a long past.
DECODE_PROMPT = 16
# Pairs of turns that every cell gets, whatever the time limit: the least that shows a spread.
LEAST_PAIRS = 4
PROFILES = ("none", "below", "all")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """One run. ``seed`` draws weights and prompts.

    Attributes:
        architectures: ``model_type`` of the registry; all of it if empty.
        presets: names of presets; the largest of each architecture below a limit if empty.
        rounds: most pairs of turns of a cell; even, so that neither contender comes first more often.
        sequences: running together, one set of cells for each number.
        new_tokens: length of the answers in the decode cells.
        prompt: length of the prompts in the prefill cells, shortened to what the model takes.
        threads: CPU threads; all cores of this process if None.
        dtype: of weights, activations and KV cache of all contenders.
        transformers: whether ``generate()`` takes part.
        minutes: time for one model's turns after the warm-up; each cell's first LEAST_PAIRS are played even beyond.
        eager: without torch.compile; as ``medassist serve`` (eager on CPUs) if None.
        control: Llama takes the place of ours too: what the run shows then is what the machine makes of no difference.
        profile: "below" profiles the cells in which ours is the slower one, "all" every cell, "none" none.

    Raises:
        ValueError: a value that cannot be measured with; the message names the option.
    """

    architectures: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    rounds: int = 10
    sequences: tuple[int, ...] = (1, 8, 32)
    new_tokens: int = 32
    prompt: int = 512
    threads: int | None = None
    dtype: str = "float32"
    transformers: bool = True
    minutes: float = 20.0
    eager: bool | None = None
    control: bool = False
    profile: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.rounds % 2:
            raise ValueError(f"--rounds must be a multiple of 2, got {self.rounds}")
        if not self.sequences or min(self.sequences) < 1 or len(set(self.sequences)) < len(self.sequences):
            raise ValueError(
                f"--sequences must be different numbers from 1, such as 1,8,32, "
                f"got {','.join(map(str, self.sequences)) or 'none'}"
            )
        for name, least in (("new_tokens", 2), ("prompt", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {self.minutes:g}")
        for name, choices in (("dtype", DTYPES), ("profile", PROFILES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Cell:
    """One line of the table: ``sequences`` prompts of ``prompt`` tokens, each continued by ``new_tokens``."""

    phase: str
    sequences: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        length = self.new_tokens if self.phase == DECODE else self.prompt
        return f"{self.phase} {length}, {self.sequences} sequence{'s' * (self.sequences > 1)}"

    @property
    def tokens(self) -> int:
        """Counted: of a decode cell those after the first of each answer, of a prefill cell the prompts'."""
        return self.sequences * (self.new_tokens - 1 if self.phase == DECODE else self.prompt)


def cells(options: Options, positions: int) -> list[Cell]:
    """Decode, then prefill, each at every number of sequences, for a model of that many positions.

    Raises:
        ValueError: the answers do not fit into the positions.
    """
    if options.new_tokens >= positions:
        raise ValueError(f"--new-tokens {options.new_tokens} do not fit into this model's {positions} positions")
    short = min(DECODE_PROMPT, positions - options.new_tokens)
    long = min(options.prompt, positions - 1)
    return [Cell(DECODE, n, short, options.new_tokens) for n in options.sequences] + [
        Cell(PREFILL, n, long, 1) for n in options.sequences
    ]


def plan(costs: Sequence[float], seconds: float, rounds: int) -> list[int]:
    """Pairs of turns for each cell.

    Each cell gets the least; then the cells with the fewest pairs get two more, cheapest first, while that fits.

    Args:
        costs: seconds that a pair of each cell takes.
        seconds: there are.
        rounds: most pairs of a cell, even.
    """
    pairs = [min(LEAST_PAIRS, rounds)] * len(costs)
    left = seconds - sum(cost * count for cost, count in zip(costs, pairs, strict=True))
    while open_cells := [i for i, cost in enumerate(costs) if pairs[i] < rounds and 2 * cost <= left]:
        cell = min(open_cells, key=lambda i: (pairs[i], costs[i]))
        pairs[cell] += 2
        left -= 2 * costs[cell]
    return pairs


def schedule(pairs: Sequence[int]) -> list[list[int]]:
    """For each round the cells that play a pair in it: each cell's pairs are spread evenly over the whole run."""
    rounds = max(pairs)
    return [
        [i for i, count in enumerate(pairs) if (number + 1) * count // rounds > number * count // rounds]
        for number in range(rounds)
    ]


def repeats(seconds: float, least: float = 1.0, most: int = 50) -> int:
    """How often a turn runs its cell, so that a cell of a small model is not over before a clock can tell."""
    return max(1, min(most, math.ceil(least / max(seconds, 1e-6))))
