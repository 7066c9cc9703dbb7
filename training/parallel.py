"""Training on many ranks: data parallelism by DDP or FSDP2, and tensor and expert parallelism by a model's own plan.

    torchrun --nproc-per-node 4 ...      mesh (data, tensor) = (4 / parallel.tensor, parallel.tensor)

Windows of a step are split over the data ranks alone; the ranks of one tensor group see the same windows, and hold
parts of the same layers. They must draw the same random numbers, too: seed by :attr:`Ranks.rank`. (Dropout inside of
GPT's attention is then the same in each rank's heads.) Weights are float32 in every strategy; with a precision of
bfloat16 the computation is under autocast, in each of them.

Gradients are summed over data ranks, not averaged: the loop divides every sum by the counts of the whole step, so that
the loss does not depend on how many ranks a step is cut into (:mod:`modeling.layers.objective`).
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from modeling.layers.objective import Batch, Objective
from training.acceleration import autocast

T = TypeVar("T")
STRATEGIES = ("auto", "ddp", "fsdp")
# Bytes a parameter costs a rank of DDP: weight, gradient and AdamW's two averages, float32 (buckets are the gradients).
REPLICA_BYTES = 16


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run.

    Attributes:
        rank, world: number of this data rank and how many there are: what windows are split over.
        main: the one that logs and writes.
        device: where its model and batches are.
        tensor: ranks that share every layer.
        mesh: dimensions "data" and "tensor"; None for a single process.
    """

    rank: int
    world: int
    main: bool
    device: torch.device
    tensor: int = 1
    mesh: DeviceMesh | None = None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over data ranks of a tensor that all of them have in the same shape."""
        if self.mesh is None or self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.mesh.get_group("data"))
        return total

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers, those of one tensor group included."""
        if self.mesh is None:
            return number
        held = torch.tensor([number])
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.mesh is not None:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def main_first(self, work: Callable[[], T]) -> T:
        """Has the main rank do something, and then the others. What it refuses, all of them do.

        Raises:
            Exception: what ``work`` raised; on the others a ValueError that says the same.
        """
        failure: Exception | None = None
        if self.main:
            try:
                made = work()
            except Exception as error:
                failure = error
        said = [None if failure is None else f"{failure}" or type(failure).__name__]
        if self.mesh is not None:
            dist.broadcast_object_list(said)
        if said[0] is not None:
            raise failure or ValueError(said[0])
        return made if self.main else work()


def start(tensor: int = 1) -> Ranks:
    """This process' place among the ranks that ``torchrun`` started; without ``torchrun`` it is the only one.

    Args:
        tensor: ranks that share every layer (``parallel.tensor``); neighbours, so that they are on one machine.

    Raises:
        ValueError: the ranks are not a multiple of ``tensor``, or a machine has fewer GPUs than ranks.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if tensor < 1 or world % tensor:
        raise ValueError(
            f"parallel.tensor ({tensor}) must divide the number of ranks ({world}); "
            "torchrun --nproc-per-node and --nnodes say how many there are"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} GPUs and a rank number {local}: "
                "lower torchrun's --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        return Ranks(0, 1, True, device)
    # Tensors on the CPU are summed, too, and asynchronous checkpoints need a group there.
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    mesh = init_device_mesh(device.type, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
    return Ranks(mesh.get_local_rank("data"), world // tensor, dist.get_rank() == 0, device, tensor, mesh)


def stop() -> None:
    """Leaves the group that :func:`start` made, if it made one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Part(nn.Module):
    """A model whose ``forward`` is its training objective: what DDP and FSDP call.

    They look for tensors in what ``forward`` returns, which has to be made of tuples and dictionaries for that. And
    FSDP renames the class of the module that it is given, which the model's own class is spared in this way.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        made: Objective = self.model.objective(batch)
        return made.sums, made.statistics

    def measure(self, batch: Batch) -> dict[str, tuple[float, int]]:
        measured: dict[str, tuple[float, int]] = self.model.measure(batch)
        return measured


@dataclass
class Trainable:
    """A model on its ranks. All ranks call all methods, together.

    Attributes:
        model: the model itself. Under FSDP and tensor parallelism its parameters are ``DTensor``: it can neither be
            called nor asked to ``generate()`` outside of the methods here.
        strategy: "ddp" or "fsdp"; "single" with one data rank.
        precision: of the matrix products; float32 or bfloat16.
    """

    model: Any
    ranks: Ranks
    strategy: str
    precision: torch.dtype
    part: nn.Module

    def objective(self, batch: Batch, *, last: bool) -> Objective:
        """The model's objective of this rank's micro-batch.

        Args:
            last: whether this is the step's last micro-batch, in whose backward pass gradients are summed over ranks.
        """
        waiting: Any = nullcontext()
        if isinstance(self.part, FSDPModule):
            self.part.set_requires_gradient_sync(last)
        elif isinstance(self.part, DistributedDataParallel) and not last:
            waiting = self.part.no_sync()
        with waiting, self._autocast():
            return Objective(*self.part(batch))

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, tuple[float, int]]:
        """The model's ``measure`` of this rank's batch. All ranks must have as many batches."""
        part = self.part.module if isinstance(self.part, DistributedDataParallel) else self.part
        with self._autocast():
            measured: dict[str, tuple[float, int]] = part.measure(batch)  # type: ignore[operator]
        return measured

    def _autocast(self) -> Any:
        return autocast(self.ranks.device, self.precision)

    @torch.no_grad()
    def clip(self, norm: float) -> float:
        """Scales the gradient of the whole model down to ``norm``, where it is longer.

        Returns:
            Its length before, the same number on all ranks. Where that is not finite, gradients are left as they are.
        """
        by_sharding: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for p in self.model.parameters():
            if p.grad is not None:
                groups: tuple[dist.ProcessGroup, ...] = ()
                local = p.grad
                if isinstance(p.grad, DTensor):
                    placements = list(enumerate(p.grad.placements))
                    assert not any(placement.is_partial() for _, placement in placements)
                    groups = tuple(
                        p.grad.device_mesh.get_group(i) for i, placement in placements if not placement.is_replicate()
                    )
                    local = p.grad.to_local()
                by_sharding.setdefault(groups, []).append(local)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for over, gradients in by_sharding.items():
            squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
            for group in over:
                dist.all_reduce(squares, group=group)
            total += squares
        length = float(total.sqrt())
        if norm < length < float("inf"):
            for gradients in by_sharding.values():
                torch._foreach_mul_(gradients, norm / length)
        return length

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole weights on the CPU of the main rank, and None on the others.

        Tensors that are whole and on the CPU already are the model's own, not copies.
        """
        whole: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in whole:  # a head that is the embedding is gathered once, and stays one tensor
                full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
                whole[id(tensor)] = full.cpu() if self.ranks.main else full.new_empty(0)
            state[name] = whole[id(tensor)]
        return state if self.ranks.main else None


def distribute(model: Any, ranks: Ranks, strategy: str, precision: torch.dtype) -> Trainable:
    """Puts a model on its ranks, all with the main rank's weights.

    Args:
        model: a ``PreTrainedModel`` of this project in float32, on any device. It is changed in place.
        strategy: "ddp": every data rank has the whole model. "fsdp": each has a part of every parameter, its gradient
            and the optimizer's state, and layers are gathered when they are computed. "auto": DDP where the model takes
            less than half of a GPU's memory, or there is no GPU; FSDP for others and with tensor parallelism.
        precision: float32 or bfloat16, see :class:`Trainable`.

    Raises:
        ValueError: no such strategy, it does not go with tensor parallelism, or the model's layers cannot be shared.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"parallel.strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "ddp" and ranks.tensor > 1 and ranks.world > 1:
        raise ValueError(
            "parallel.strategy 'ddp' does not go with parallel.tensor above 1 on more ranks than those: DDP takes no "
            "parameters that are shared by ranks; use 'fsdp' or 'auto'"
        )
    plan = _plan(model, ranks.tensor) if ranks.tensor > 1 else {}
    model.to(ranks.device)
    if ranks.mesh is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
    if plan:
        assert ranks.mesh is not None
        parallelize_module(model, ranks.mesh["tensor"], plan)
        for module in model.modules():
            if hasattr(module, "tensor_rank"):
                module.tensor_rank = ranks.mesh.get_local_rank("tensor")
    part: nn.Module = _Part(model)
    if ranks.world == 1:
        return Trainable(model, ranks, "single", precision, part)
    assert ranks.mesh is not None
    if strategy == "auto":
        strategy = "ddp" if ranks.tensor == 1 and _replica_fits(model, ranks.device) else "fsdp"
    if strategy == "fsdp":
        _shard(part, ranks.mesh["data"], precision)
    else:
        group = ranks.mesh.get_group("data")
        part = DistributedDataParallel(part, process_group=group, init_sync=False, gradient_as_bucket_view=True)
        part.register_comm_hook(group, _sum_bucket)
    return Trainable(model, ranks, strategy, precision, part)


def _replica_fits(model: nn.Module, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    memory = torch.cuda.get_device_properties(device).total_memory
    return sum(p.numel() for p in model.parameters()) * REPLICA_BYTES < memory / 2


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum of gradients, where DDP alone takes the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _shard(part: nn.Module, mesh: DeviceMesh, precision: torch.dtype) -> None:
    """FSDP2 over the decoder's layers, one group each, and over the rest, which is gathered from beginning to end.

    In bfloat16 layers are gathered in it: autocast alone would keep a copy of every layer until its backward pass. What
    goes into a layer is left in its dtype (the rotary angles are float32), and gradients are summed in float32.
    """
    model: Any = part.model
    as_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Layers of multi-token prediction are used by parts, not called as a whole: they stay with the rest.
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        fully_shard(layer, mesh=mesh, mp_policy=narrow if precision == torch.bfloat16 else as_is)
    fully_shard(part, mesh=mesh, mp_policy=as_is)
    register_fsdp_forward_method(part, "measure")
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


class _Experts(ParallelStyle):
    """Each rank has some experts, computes them for all tokens, and the results are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # torch's annotations say that hooks return nothing; its documentation, what takes their place.
        return distribute_module(module, device_mesh, self._divide, self._take, self._give)  # type: ignore[arg-type]

    @staticmethod
    def _divide(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, p in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    @staticmethod
    def _take(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
        """All ranks have the inputs; their gradients are the sum of what each rank's experts add."""
        return tuple(
            DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
            if x.is_floating_point()
            else x
            for x in inputs
        )

    @staticmethod
    def _give(module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        return (
            DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
        )


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "gather": lambda: PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate()),
    "expert": _Experts,
}


def _plan(model: Any, ranks: int) -> dict[str, ParallelStyle]:
    """How ``ranks`` ranks share the model's layers: name of a module -> torch's style.

    Raises:
        ValueError: the model declares no plan, or its sizes are not multiples of the ranks.
    """
    plan = getattr(model, "tensor_plan", None)
    if plan is None:
        raise ValueError(
            f"parallel.tensor is {ranks}, but {type(model).__name__} declares no tensor_plan (how ranks can share its "
            "layers): set it to 1"
        )
    plan.check(model.config, ranks)
    return {
        name: STYLES[style]()
        for name, _ in model.named_modules()
        for pattern, style in plan.modules.items()
        if fnmatchcase(name, pattern)
    }
