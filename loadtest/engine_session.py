"""Measures one model in a process of its own, which :mod:`loadtest.engine_benchmark` starts.

    python -m loadtest.engine_session SPECIFICATION.json

The environment is set by the parent, since vLLM reads it while it is imported. Two engines and a torch module live in
this process, so that they share its threads and its memory and nothing but the model differs.
"""

import gc
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loadtest import engine_plan, engine_sizes
from loadtest.engine_contenders import Engine, Generator, ProfilerClock, StopWatch
from loadtest.engine_plan import PREFILL, Cell, Options
from loadtest.engine_report import GENERATE, LLAMA, OURS, Measured, Model, Operator, Profile, Turn
from modeling.registry import get


class Session:
    """All contenders of one model. ``say`` is given lines on the progress."""

    def __init__(
        self, model_type: str, preset: str, options: Options, on_cpu: bool, say: Callable[[str], None]
    ) -> None:
        self.options, self.say, self.preset, self.title = options, say, preset, f"{model_type} {preset}"
        if options.control:
            self.title += ", control"
        self.config = engine_sizes.configuration(model_type, preset)
        self.llama = engine_sizes.equal_llama(self.config)
        self.cells = engine_plan.cells(options, self.config.max_position_embeddings)
        rng = random.Random(options.seed)
        self.prompts = {
            cell: [rng.choices(range(self.config.vocab_size), k=cell.prompt) for _ in range(cell.sequences)]
            for cell in self.cells
        }
        longest = max(cell.prompt + cell.new_tokens for cell in self.cells)
        torch.manual_seed(options.seed)
        eager = on_cpu if options.eager is None else options.eager
        self.contenders: dict[str, Engine | Generator] = {}
        for name, config in ((OURS, self.llama if options.control else self.config), (LLAMA, self.llama)):
            say(f"{self.title}: starting the engine of {name}")
            kv_bytes = max(self._kv_bytes(c, longest) for c in (self.config, self.llama))
            self.contenders[name] = Engine(config, options, longest, kv_bytes, eager)
        if options.transformers:
            self.contenders[GENERATE] = Generator(self.config, options, "cpu" if on_cpu else "cuda")

    def _kv_bytes(self, config: Any, longest: int) -> int:
        """Room for all sequences at once, in blocks of 128 tokens, and a few blocks: nobody ever waits for memory."""
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        size = next((s for s in engine_sizes.HEAD_SIZES if s >= config.head_dim), config.head_dim)  # padded up to this
        token = 2 * config.num_hidden_layers * heads * size * getattr(torch, self.options.dtype).itemsize
        blocks = max(self.options.sequences) * -(-longest // 128) + 8
        return 128 * blocks * token

    def _turn(self, contender: str, cell: Cell, pair: int, times: int) -> Turn:
        gc.collect()
        tokens, seconds, cpu = 0, 0.0, 0.0
        for _ in range(times):
            watch = StopWatch()
            counted = self.contenders[contender].play(cell, self.prompts[cell], watch)
            if counted != cell.tokens:
                raise RuntimeError(f"{contender} made {counted} tokens in {cell.name}, not {cell.tokens}")
            tokens, seconds, cpu = tokens + counted, seconds + watch.seconds, cpu + watch.cpu
        return Turn(contender, pair, tokens, seconds, cpu)

    def _warm_up(self, contender: str, cell: Cell) -> tuple[float, int]:
        """Seconds that a turn will take, uncounted parts too, and how often it plays the cell."""
        for last in (False, True):
            started = time.perf_counter()
            turn = self._turn(contender, cell, 0, 1)
            whole = time.perf_counter() - started
            if last or whole > 2:  # the first play of a short cell is mostly set-up
                break
        times = engine_plan.repeats(turn.seconds)
        return whole * times, times

    def measure(self) -> list[Measured]:
        """Plays all pairs, as many as the time allows."""
        self.say(f"{self.title}: warming up")
        warm = {(name, cell): self._warm_up(name, cell) for cell in self.cells for name in self.contenders}
        costs = []
        for cell in self.cells:
            generate = warm[GENERATE, cell][0] / 2 if self.options.transformers else 0
            costs.append(warm[OURS, cell][0] + warm[LLAMA, cell][0] + generate)
        budget = 60 * self.options.minutes
        pairs = engine_plan.plan(costs, budget, self.options.rounds)
        expected = sum(cost * count for cost, count in zip(costs, pairs, strict=True))
        self.say(f"{self.title}: {sum(pairs)} pairs of turns in {len(self.cells)} cells, about {expected / 60:.1f} min")
        measured = [Measured(cell, []) for cell in self.cells]
        deadline = time.monotonic() + budget
        for number, playing in enumerate(engine_plan.schedule(pairs), 1):
            for index in playing:
                cell, turns = self.cells[index], measured[index].turns
                pair = len(measured[index].of(OURS))
                # A machine that became slower than in the warm-up; no cell ends with an odd number of pairs.
                if time.monotonic() > deadline and pair >= engine_plan.LEAST_PAIRS and pair % 2 == 0:
                    continue
                # The same for both, or the shorter turn would be the noisier one.
                times = max(warm[OURS, cell][1], warm[LLAMA, cell][1])
                for name in (LLAMA, OURS) if pair % 2 else (OURS, LLAMA):
                    turns.append(self._turn(name, cell, pair, times))
                if self.options.transformers and pair % 2 == 0:
                    turns.append(self._turn(GENERATE, cell, pair, warm[GENERATE, cell][1]))
            self.say(f"{self.title}: round {number} of {max(pairs)}")
        return measured

    def profile(self, cell: Cell) -> Profile:
        """Each engine under torch's profiler, in the order ours, Llama, Llama, ours; the mean of the two plays."""
        spent: dict[tuple[str, str], float] = defaultdict(float)
        calls: dict[tuple[str, str], int] = defaultdict(int)
        for name in (OURS, LLAMA, LLAMA, OURS):
            clock = ProfilerClock()
            self.contenders[name].play(cell, self.prompts[cell], clock)
            for operator, milliseconds, count in clock.operators():
                spent[operator, name] += milliseconds / 2
                calls[operator, name] = count
        rows = [
            Operator(o, spent[o, OURS], calls[o, OURS], spent[o, LLAMA], calls[o, LLAMA])
            for o in sorted({operator for operator, _ in spent})
        ]
        return Profile(cell, rows)

    def run(self) -> Model:
        measured = self.measure()
        profiles = [
            self.profile(cell.cell)
            for cell in measured
            if self.options.profile == "all" or (self.options.profile == "below" and cell.below_one())
        ]
        return Model(self.title, self._sizes(), self._notes(), measured, profiles)

    def _sizes(self) -> list[tuple[str, str, str]]:
        def column(config: Any) -> list[str]:
            sizes, kv = engine_sizes.count(config), getattr(config, "num_key_value_heads", config.num_attention_heads)
            return [
                f"{sizes.total:,}",
                f"{sizes.layers:,}",
                f"{sizes.vocabulary:,}",
                f"{config.num_hidden_layers} x {config.hidden_size}",
                f"{config.num_attention_heads} / {kv} of {config.head_dim}",
                f"{config.intermediate_size}",
            ]

        names = ["parameters", "of these in the layers' matrices", "in the vocabulary's", "layers x hidden size",
                 "query / key-value heads of size", "MLP width"]  # fmt: skip
        return list(zip(names, column(self.config), column(self.llama), strict=True))

    def _notes(self) -> list[str]:
        notes = []
        if self.options.control:
            notes.append("A control run: what is called ours is a second engine of the same Llama.")
        prompt = next(cell.prompt for cell in self.cells if cell.phase == PREFILL)
        if prompt < self.options.prompt:
            notes.append(
                f"Prompts of {prompt} tokens in place of {self.options.prompt}: the model has "
                f"{self.config.max_position_embeddings} positions, one of which the answer takes."
            )
        preset = get(self.config.model_type).presets()[self.preset]()
        if getattr(preset, "causal", True) is False:
            notes.append(
                "Measured with `causal: true`. The preset's `causal: false` keeps no cache and computes the whole "
                "window for every token, which compares with no Llama."
            )
        return notes


def main(specification: Path) -> None:
    given = json.loads(specification.read_text())
    for name in ("architectures", "presets", "sequences"):
        given["options"][name] = tuple(given["options"][name])
    options = Options(**given["options"])

    def say(line: str) -> None:
        os.write(given["progress"], f"{line}\n".encode())

    session = Session(given["model_type"], given["preset"], options, given["on_cpu"], say)
    Path(given["out"]).write_text(json.dumps(asdict(session.run())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
