"""The arithmetic of the engine benchmark, and its report. Nothing here runs or times anything.

DEFINITIONS below says what each figure is; the Markdown report repeats it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from loadtest.engine_plan import Cell

OURS, LLAMA, GENERATE = "ours", "Llama", "generate()"

DEFINITIONS = """\
- Contenders, all in one process, in the same dtype, with the same number of threads and random weights: `ours` is this
  project's vLLM class; `Llama` is vLLM's own `LlamaForCausalLM` in an engine with the same settings; `generate()` is
  that of `transformers` on this project's torch module, with its KV cache.
- Equal sizes: the Llama has the same layers, hidden size, vocabulary and head (tied or not); its heads cover the same
  query and key widths in a size that vLLM's attention kernels take; its MLP is as wide as it takes for the matrices of
  a layer to have as many parameters.
- Decode N: prompts of 16 tokens, N new tokens each, greedy, the end of text ignored. The clock starts when the last
  sequence has its first token and stops with the last token, so that prefill is not in it.
- Prefill N: prompts of N tokens, one new token each, from adding the requests to the last sequence's token. All prompts
  differ, and there is no prefix cache. tokens/s counts the prompts' tokens.
- Memory: on CPUs the process asks for huge pages, so that the engine that was loaded first has no worse memory than
  the second. `medassist bench engine --control` puts Llama beside itself and shows what a run cannot tell apart.
- Turn: one contender playing one cell, repeated within the turn where the cell is over in less than a second.
- Pair: neighbouring turns of `ours` and `Llama` in a cell; the order alternates (ABBA), and a cell's pairs are spread
  over the whole run, so that a machine that drifts does so for both. `generate()` follows every other pair, starting
  with the first.
- Ratio: tokens/s of `ours` over that of the other, of the two turns of a pair; the table has the median of the pairs,
  and in brackets their least and greatest.
- CPU ratio: the same with CPU seconds (user + system, all threads of the process) in place of wall-clock seconds. It
  does not count the time in which somebody else had the cores, so it is the steadier one on a shared machine."""


@dataclass(frozen=True)
class Turn:
    """One contender's turn in pair number ``pair`` of a cell: ``tokens`` in ``seconds`` and ``cpu`` seconds."""

    contender: str
    pair: int
    tokens: int
    seconds: float
    cpu: float

    def rate(self, cpu: bool = False) -> float:
        """Tokens a second, of the wall clock or of CPU time."""
        return self.tokens / (self.cpu if cpu else self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Of the pairs of a cell: the middle, the least, the greatest."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f}..{self.greatest:.3f})"


@dataclass(frozen=True)
class Measured:
    """A cell and the turns played in it, in the order of time."""

    cell: Cell
    turns: list[Turn]

    def of(self, contender: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.contender == contender]

    def tokens_per_second(self, contender: str) -> float | None:
        """The median of the turns; None where it had none."""
        rates = [turn.rate() for turn in self.of(contender)]
        return median(rates) if rates else None

    def ratio(self, other: str, cpu: bool = False) -> Ratio | None:
        """``ours`` over the other, of the pairs in which both played; None where there are none."""
        rates = {turn.pair: turn.rate(cpu) for turn in self.of(other)}
        ratios = [turn.rate(cpu) / rates[turn.pair] for turn in self.of(OURS) if turn.pair in rates]
        return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None

    def below_one(self) -> bool:
        """Whether ours was slower than Llama, by the clock or by CPU time."""
        ratios = [self.ratio(LLAMA, cpu) for cpu in (False, True)]
        return any(ratio is not None and ratio.median < 1 for ratio in ratios)


@dataclass(frozen=True)
class Operator:
    """CPU milliseconds of the calling thread in one operator itself, and its calls, of ours and of Llama."""

    name: str
    ours_ms: float
    ours_calls: int
    llama_ms: float
    llama_calls: int


@dataclass(frozen=True)
class Profile:
    """Where the time of one cell goes: every operator of either contender."""

    cell: Cell
    operators: list[Operator]


@dataclass(frozen=True)
class Model:
    """What was measured of one preset.

    Attributes:
        title: architecture and preset.
        sizes: rows (what, ours, Llama).
        notes: sentences on what was measured otherwise than asked for.
    """

    title: str
    sizes: list[tuple[str, str, str]]
    notes: list[str]
    cells: list[Measured]
    profiles: list[Profile] = field(default_factory=list)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Model":
        """The opposite of ``dataclasses.asdict``."""
        return Model(
            title=data["title"],
            sizes=[(name, ours, llama) for name, ours, llama in data["sizes"]],
            notes=data["notes"],
            cells=[Measured(Cell(**m["cell"]), [Turn(**turn) for turn in m["turns"]]) for m in data["cells"]],
            profiles=[
                Profile(Cell(**p["cell"]), [Operator(**operator) for operator in p["operators"]])
                for p in data["profiles"]
            ],
        )


@dataclass(frozen=True)
class Result:
    """A whole run. ``environment`` and ``settings`` are printed as they are, in their order."""

    environment: dict[str, str]
    settings: dict[str, Any]
    models: list[Model]

    def to_dict(self) -> dict[str, Any]:
        """All figures, with the ratios worked out."""
        data = asdict(self)
        for model, model_data in zip(self.models, data["models"], strict=True):
            for cell, cell_data in zip(model.cells, model_data["cells"], strict=True):
                cell_data["name"] = cell.cell.name
                for other in (LLAMA, GENERATE):
                    for cpu in (False, True):
                        ratio = cell.ratio(other, cpu)
                        cell_data[f"ours / {other}, {'CPU' if cpu else 'wall'}"] = asdict(ratio) if ratio else None
        return data


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the head, and columns but the first are aligned to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    padded = [
        [line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def table(model: Model) -> str:
    """A line for each cell; what was not measured has no column."""
    generated = any(cell.of(GENERATE) for cell in model.cells)
    head = ["cell", "pairs", "ours tok/s", "Llama tok/s", "ours / Llama", "ours / Llama, CPU"]
    lines = [head + (["generate() tok/s", "ours / generate()", "ours / generate(), CPU"] if generated else [])]
    for cell in model.cells:
        line = [cell.cell.name, str(len(cell.of(OURS))), _rate(cell, OURS), _rate(cell, LLAMA)]
        line += [_cell(cell.ratio(LLAMA)), _cell(cell.ratio(LLAMA, cpu=True))]
        if generated:
            line += [_rate(cell, GENERATE), _cell(cell.ratio(GENERATE)), _cell(cell.ratio(GENERATE, cpu=True))]
        lines.append(line)
    return aligned(lines)


def _rate(cell: Measured, contender: str) -> str:
    rate = cell.tokens_per_second(contender)
    return _cell(None if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def reading(model: Model) -> str:
    """Which cells are below 1.0 of Llama, and which of these the pairs do not tell apart from it."""
    below, unresolved, lowest = [], [], []
    for cell in model.cells:
        wall, cpu = cell.ratio(LLAMA), cell.ratio(LLAMA, cpu=True)
        assert wall is not None
        assert cpu is not None
        lowest.append((wall.median, cell.cell.name))
        if cell.below_one():
            below.append(f"{cell.cell.name} ({wall.median:.3f} by the clock, {cpu.median:.3f} in CPU time)")
            if wall.greatest >= 1 and cpu.greatest >= 1:
                unresolved.append(cell.cell.name)
    if not below:
        text = f"No cell is below 1.0 of Llama; the lowest is {min(lowest)[1]} at {min(lowest)[0]:.3f}."
    else:
        text = f"Below 1.0 of Llama: {'; '.join(below)}."
    if unresolved:
        text += f" Pairs on both sides of 1.0, so that this run does not resolve a difference: {'; '.join(unresolved)}."
    return text


def operators(profile: Profile, most: int = 14) -> str:
    """A table of the operators in which the two differ or spend most, with the rest summed up."""
    rows = sorted(profile.operators, key=lambda o: -max(o.ours_ms, o.llama_ms))
    shown, rest = rows[:most], rows[most:]
    if rest:
        sums = [sum(getattr(o, name) for o in rest) for name in ("ours_ms", "ours_calls", "llama_ms", "llama_calls")]
        shown = [*shown, Operator(f"{len(rest)} others", sums[0], int(sums[1]), sums[2], int(sums[3]))]
    total = Operator(
        "all",
        sum(o.ours_ms for o in rows),
        sum(o.ours_calls for o in rows),
        sum(o.llama_ms for o in rows),
        sum(o.llama_calls for o in rows),
    )
    lines = [["operator", "ours ms", "calls", "Llama ms", "calls", "difference ms"]]
    lines += [
        [
            f"`{o.name}`" if o in rows else o.name,
            f"{o.ours_ms:.1f}",
            str(o.ours_calls),
            f"{o.llama_ms:.1f}",
            str(o.llama_calls),
            f"{o.ours_ms - o.llama_ms:+.1f}",
        ]
        for o in [*shown, total]
    ]
    return aligned(lines)


def section(model: Model) -> str:
    """One model: figures, notes, sizes, profiles."""
    parts = [f"## {model.title}", table(model)]
    parts += [f"- {note}" for note in model.notes]
    parts.append(aligned([("", "ours", "Llama"), *model.sizes]))
    for profile in model.profiles:
        text = "CPU time of the calling thread in each operator itself, a play of the cell under torch's profiler:"
        parts += [f"### Where the time goes: {profile.cell.name}", text, operators(profile)]
    return "\n\n".join(parts)


def markdown(result: Result) -> str:
    """The report, every figure of which was measured in this run."""
    facts = [f"- {name}: {value}" for name, value in result.environment.items()]
    settings = [f"- {name}: {value}" for name, value in result.settings.items()]
    sections = [
        "# Our vLLM classes beside vLLM's Llama",
        "\n".join(f"- {model.title}: {reading(model)}" for model in result.models),
        *[section(model) for model in result.models],
        "## Where and how",
        "\n".join(facts),
        "Settings:",
        "\n".join(settings),
        "## Definitions",
        DEFINITIONS,
    ]
    return "\n\n".join(sections) + "\n"
