"""Training checkpoints of DDP and FSDP on two ranks, and of one process that goes on with them."""

import multiprocessing
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.training.rank import Case, share, tiny
from training import parallel, state
from training.optimizer import Optimizers
from training.state import Checkpoints

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not survive")

CASE = Case(
    "medassist_deepseek",
    optimizer="muon",
    changes={"router": "aux_free", "attention_dropout": 0.2, "tie_word_embeddings": True},
)


class Run:
    """A model in training, on the ranks that there are."""

    def __init__(self, ranks: parallel.Ranks, strategy: str, seed: int) -> None:
        self.ranks = ranks
        self.model = tiny(CASE, seed)
        self.it = parallel.distribute(self.model, ranks, strategy, torch.float32)
        self.optimizers = Optimizers(self.model, CASE.optimizer, 1e-2, 0.1, (0.9, 0.95))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            statistics: dict[str, Tensor] = {}
            parts = share(step, self.ranks)
            for i, part in enumerate(parts):
                made = self.it.objective(part, last=i == len(parts) - 1)
                (torch.stack(list(made.sums.values())).sum() / 100).backward()
                statistics = {n: statistics.get(n, 0) + x for n, x in made.statistics.items()}
            self.optimizers.step()
            self.model.after_step({n: self.ranks.sum(x) for n, x in statistics.items()})

    def whole(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizers' states, gathered on every rank."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = dict(self.model.state_dict())
        for optimizer in self.optimizers.all:
            for p, values in optimizer.state.items():
                found |= {f"{names[p]} {key}": value for key, value in values.items()}
        gathered = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}
        return {name: x.detach().clone() for name, x in gathered.items()}

    def load(self, path: Path) -> list[str]:
        said: list[str] = []
        state.load(path, self.model, self.optimizers.all, said.append)
        return said


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def writer(folder: Path, said: list[str]) -> Checkpoints:
    return Checkpoints(folder, keep=9, keep_best=False, keep_every=0, asynchronous=True, say=said.append)


def _rank(work: Callable[..., None], rank: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    work(parallel.start(), *arguments)
    parallel.stop()


def on_two_ranks(work: Callable[..., None], *arguments: Any) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(work, rank, port, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def _go_on(ranks: parallel.Ranks, strategy: str, given: Path, folder: Path) -> None:
    """Takes over a checkpoint of one process, trains, writes its own, and goes on twice from it."""
    run = Run(ranks, strategy, seed=1)
    said = run.load(given / "step-00000002")
    assert_same(run.whole(), torch.load(given / "2.pt"))
    assert ("written by 1 ranks and is continued by 2" in "".join(said)) == ranks.main
    torch.manual_seed(100 + ranks.rank)  # dropout differs between ranks
    run.train(2, 4)
    run.it.measure(share(1000, ranks)[0])
    writing = writer(folder, said := [])
    writing.save(4, run.model, run.optimizers.all, {"strategy": strategy})
    whole = run.whole()
    run.train(4, 6)
    writing.close()
    assert said == []
    expected = run.whole()
    if ranks.main:
        torch.save(whole, folder / "4.pt")

    again = Run(ranks, strategy, seed=2)
    torch.manual_seed(0)
    assert again.load(folder / "step-00000004") == []
    again.train(4, 6)
    assert_same(again.whole(), expected)

    other = Run(ranks, "ddp" if strategy == "fsdp" else "fsdp", seed=3)
    assert other.load(folder / "step-00000004") == []
    assert_same(other.whole(), whole)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process."""
    folder = tmp_path_factory.mktemp("given")
    run = Run(parallel.start(), "auto", seed=0)
    run.train(0, 2)
    writing = writer(folder, [])
    writing.save(2, run.model, run.optimizers.all, {})
    writing.close()
    torch.save(run.whole(), folder / "2.pt")
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_and_one_process_read_each_others(strategy: str, given: Path, tmp_path: Path) -> None:
    on_two_ranks(_go_on, strategy, given, tmp_path)
    run = Run(parallel.start(), "auto", seed=4)
    said = run.load(tmp_path / "step-00000004")
    assert_same(run.whole(), torch.load(tmp_path / "4.pt"))
    assert "written by 2 ranks and is continued by 1" in "".join(said)


def _fail_on_one(ranks: parallel.Ranks, folder: Path) -> None:
    run = Run(ranks, "fsdp", seed=0)
    run.train(0, 1)
    writing = writer(folder, said := [])
    writing.save(1, run.model, run.optimizers.all, {})
    writing.wait()
    if ranks.rank == 1:  # its own file does not fit, the main rank's do
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    writing.save(2, run.model, run.optimizers.all, {})
    writing.wait()
    ranks.barrier()  # until the main rank, which cleans up, is done
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writing.save(3, run.model, run.optimizers.all, {})
    writing.close()
    assert state.newest(folder) == folder / "step-00000003"
    assert ["step 2 could not be written (File too large)" in text for text in said] == [True] * ranks.main
    with (folder / "step-00000003/__1_0.distcp").open("r+b") as f:
        f.write(b"?")
    ranks.barrier()
    with pytest.raises(ValueError, match=r"__1_0\.distcp is not what was written"):  # on both
        run.load(folder / "step-00000003")
    assert run.load(folder / "step-00000001") == []


def test_one_rank_that_cannot_write_ends_no_run(tmp_path: Path) -> None:
    on_two_ranks(_fail_on_one, tmp_path)
