"""One rank of the runs that ``test_parallel`` compares: trains every case and writes what came of it.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 python -m tests.training.rank OUT CASES PORT PORT
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from modeling import registry
from modeling.layers.objective import IGNORED
from training import parallel
from training.data import Batch
from training.optimizer import Optimizers

WINDOWS, MICRO, TOKENS = 8, 2, 24  # of a step; of a micro-batch on two data ranks; of a window


@dataclass
class Case:
    """One model trained in one way.

    Attributes:
        model: its ``model_type``.
        changes: of its tiny configuration.
        tensor: ranks that share a layer.
    """

    model: str
    optimizer: str = "adamw"
    strategy: str = "auto"
    tensor: int = 1
    steps: int = 3
    precision: str = "float32"
    dtype: str = "float64"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return json.dumps(asdict(self))


def tiny(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    arch = registry.get(case.model)
    return arch.model_class()(arch.config_class().tiny(**({"initializer_range": 0.1} | case.changes))).train()


def windows(step: int) -> Batch:
    """The windows of a step: two documents each of random tokens, of which a varying number has labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 150, (WINDOWS, TOKENS), generator=generator)
    cut = int(torch.randint(5, TOKENS - 5, (), generator=generator))
    positions = torch.cat((torch.arange(cut), torch.arange(TOKENS - cut))).expand(WINDOWS, -1)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(WINDOWS, TOKENS, generator=generator) < 0.3, IGNORED)
    labels[:, [cut - 1, -1]] = IGNORED
    return Batch(ids, positions.contiguous(), labels, torch.ones(WINDOWS, TOKENS, dtype=torch.bool))


def share(step: int, ranks: parallel.Ranks) -> list[Batch]:
    """This rank's micro-batches of a step."""
    each = WINDOWS // ranks.world
    whole = windows(step)
    starts = range(ranks.rank * each, (ranks.rank + 1) * each, MICRO)
    return [Batch(*(x[a : a + MICRO] for x in vars(whole).values())) for a in starts]


def train(case: Case, ranks: parallel.Ranks) -> dict[str, Any] | None:
    """What the main rank found: losses and norms of each step, held-out sums, final weights; None on other ranks."""
    model = tiny(case, seed=0 if ranks.main else 1)  # all must start with the main rank's weights
    model.to(getattr(torch, case.dtype))
    it = parallel.distribute(model, ranks, case.strategy, getattr(torch, case.precision))
    optimizers = Optimizers(model, case.optimizer, 1e-2, 0.1, (0.9, 0.95))
    weights = model.loss_weights
    losses, norms = [], []
    for step in range(case.steps):
        parts = share(step, ranks)
        counts = {n: float(ranks.sum(torch.tensor(sum(model.loss_counts(p)[n] for p in parts)))) for n in weights}
        total = torch.zeros(len(weights), dtype=torch.float64)
        statistics: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            made = it.objective(part, last=i == len(parts) - 1)
            means = torch.stack([weights[n] * made.sums[n] / counts[n] for n in weights])
            means.sum().backward()
            total += means.detach()
            statistics = {n: statistics.get(n, 0) + x for n, x in made.statistics.items()}
        losses.append(ranks.sum(total))
        norms.append(it.clip(1.0))
        assert it.clip(1.0) <= 1.0 + 1e-4
        optimizers.step()
        model.after_step({n: ranks.sum(x) for n, x in statistics.items()})
    model.eval()
    measured = [it.measure(part) for part in share(1000, ranks)]
    held_out = {n: ranks.sum(torch.tensor([sum(m[n][0] for m in measured)], dtype=torch.float64)) for n in measured[0]}
    assert_same_everywhere(model, norms)
    state = it.full_state_dict()
    if state is None:
        return None
    shared = sum(isinstance(p, DTensor) for p in model.parameters())
    norm = torch.tensor(norms, dtype=torch.float64)
    return {"losses": torch.stack(losses), "norms": norm, "state": state, "held_out": held_out,
            "strategy": it.strategy, "shared": shared}  # fmt: skip


def assert_same_everywhere(model: Any, norms: list[float]) -> None:
    """What is not shared by ranks is bit for bit the same on all of them."""
    if not torch.distributed.is_initialized():
        return
    plain = [p.detach() for p in (*model.parameters(), *model.buffers()) if not isinstance(p, DTensor)]
    for value in [*plain, torch.tensor(norms, dtype=torch.float64)]:
        mine = value.clone()
        torch.distributed.broadcast(value, 0)
        assert torch.equal(mine, value)


def main(out: Path, cases: list[Case], ports: list[str]) -> None:
    torch.set_num_threads(1)
    results = {}
    for tensor, port in zip(sorted({case.tensor for case in cases}), ports, strict=False):
        os.environ["MASTER_PORT"] = port  # of its own: a rank must not find the store of the group before
        ranks = parallel.start(tensor)
        for case in cases:
            if case.tensor == tensor:
                results[case.name] = train(case, ranks)
        ranks.barrier()
        parallel.stop()
    if results and all(results.values()):
        torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**case) for case in json.loads(Path(sys.argv[2]).read_text())], sys.argv[3:])
