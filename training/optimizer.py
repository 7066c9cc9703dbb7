"""Optimizers and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

# Tensors of a mixture of experts: those that hold two matrices for each expert, one above the other, and those that
# have a row for each expert.
GATE_AND_UP = "experts.gate_up_proj"
ROUTERS = ("mlp.gate.weight", "mlp.gate.noise_weight")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by the nearest semi-orthogonal matrix to its momentum.

    Jordan et al. 2024 ("Muon: an optimizer for hidden layers"), with Nesterov momentum, decoupled weight decay, and the
    update scaled by ``0.2 * sqrt(max(rows, columns))`` so that AdamW's learning rates fit (Liu et al. 2025, "Muon is
    scalable for LLM training", section 2.2).

    A parameter of three dimensions is a stack of matrices, each treated as if it were alone. In a group with ``"split":
    n`` the rows of each matrix are ``n`` blocks of one size, and the blocks are what is treated so.

    Why not ``torch.optim.Muon``: it takes no stacks, and orthogonalises in bfloat16, which took three quarters of a
    step on CPUs without bfloat16 units. This one uses float32 there, and works on all matrices of a shape at once.

    Of a parameter that ranks share (a ``DTensor``) each has its part of the momentum. Parts of matrices are gathered,
    one parameter after the other, and every rank orthogonalises the whole; parts that are whole matrices stay apart.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "split": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            at_once: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    at_once.setdefault(id(p) if isinstance(p, DTensor) else p.shape, []).append(p)
            for params in at_once.values():
                directions = [self._directions(p, group) for p in params]
                update = orthogonalise(torch.cat(directions))  # (n, rows, columns)
                scale = 0.2 * max(update.shape[1:]) ** 0.5
                for p, u in zip(params, update.split([len(d) for d in directions]), strict=True):
                    weight = p.to_local() if isinstance(p, DTensor) else p
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(_own_part(u, p).to(p.dtype), alpha=-group["lr"] * scale)

    def _directions(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum of the matrices in ``p``, looking ahead: (matrices, rows, columns)."""
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        rows = p.shape[-2] // group["split"]
        direction = _gathered(p.grad.lerp(buffer, group["momentum"]), p).reshape(-1, rows, p.shape[-1])
        # An expert without tokens stays: its old momentum, however small, would be made as long as any other.
        idle = (_gathered(p.grad.abs().amax(-1), p).reshape(-1, rows) == 0).all(-1)
        return direction.masked_fill(idle[:, None, None], 0.0)


def _has_whole_matrices(p: DTensor) -> bool:
    """Whether every rank's part of ``p`` is made of whole matrices: of some experts, whole."""
    return all(placement.is_replicate() or (p.ndim > 2 and placement.dim == 0) for placement in p.placements)  # type: ignore[attr-defined]


def _gathered(x: Tensor, p: Tensor) -> Tensor:
    """``x``, made of ``p``'s gradient, with every matrix of ``p`` whole that this rank has a part of."""
    if not isinstance(x, DTensor):
        return x
    assert isinstance(p, DTensor)
    return x.to_local() if _has_whole_matrices(p) else x.full_tensor()


def _own_part(update: Tensor, p: Tensor) -> Tensor:
    """This rank's part of ``p``'s update, from what was made of :func:`_gathered`."""
    if not isinstance(p, DTensor):
        return update.reshape(p.shape)
    if _has_whole_matrices(p):
        return update.reshape(p.to_local().shape)
    everywhere = [Replicate()] * p.device_mesh.ndim
    whole = DTensor.from_local(update.reshape(p.shape), p.device_mesh, everywhere, run_check=False)
    return whole.redistribute(placements=p.placements).to_local()


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal matrices nearest to ``x``, roughly: singular values end between about 0.7 and 1.2.

    Newton-Schulz iteration with Jordan's quintic coefficients, chosen for speed near 0 rather than for exactness.

    Args:
        x: (matrices, rows, columns).
    """
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (matrices, n, n), n the smaller side
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizers:
    """AdamW (Loshchilov & Hutter 2019), or Muon on the matrices of the layers and AdamW on the rest.

    Norms are not decayed. Embedding, head and routers are AdamW's in either case: they have a row for each token, or
    expert, and rows that hardly occur must not be moved as far as the others.

    Raises:
        ValueError: no such optimizer.
    """

    def __init__(self, model: nn.Module, name: str, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        if name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name must be 'adamw' or 'muon', got {name!r}")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        # A head that is not the embedding has a row a token too, and is treated alike.
        rows = {n for n, p in named if p.ndim == 2 and ("embed" in n or "lm_head" in n or n.endswith(ROUTERS))}
        pairs = {n for n, p in named if n.endswith(GATE_AND_UP)}
        matrices = [p for n, p in named if p.ndim > 1 and n not in rows | pairs]
        gates_and_ups = [p for n, p in named if n in pairs]
        by_row = [p for n, p in named if n in rows]
        vectors = [p for _, p in named if p.ndim < 2]
        self.lr = lr
        groups = _by_mesh(
            {"params": by_row + (matrices + gates_and_ups if name == "adamw" else []), "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        )
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
        if name == "muon":
            groups = _without_empty({"params": matrices}, {"params": gates_and_ups, "split": 2})
            self.all.append(Muon(groups, lr=lr, weight_decay=weight_decay))

    def set_lr(self, factor: float) -> None:
        """Sets every group's learning rate to ``factor`` times the peak."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def _without_empty(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _by_mesh(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups, each divided by how ranks share its parameters: one fused update takes those of one mesh alone."""
    divided = []
    for group in groups:
        by_mesh: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            by_mesh.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        divided += [group | {"params": params} for params in by_mesh.values()]
    return divided


def warmup_stable_decay(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Factor of the peak learning rate at ``step`` of ``steps``: linear up, flat, linear down to 0 (Hu et al. 2024).

    Args:
        step: 0-based.
        warmup: steps until the peak.
        decay_share: the share of all steps, at the end, in which the rate falls.
    """
    up = (step + 1) / warmup if warmup else 1.0
    down = (steps - step) / max(1.0, steps * decay_share)
    return max(0.0, min(1.0, up, down))


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate at ``step`` of ``steps``: linear up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def rate(schedule: str, step: int, steps: int, warmup: int, decay_share: float, final: float) -> float:
    """The factor at ``step`` of the recipe's schedule ("wsd" or "cosine"), which ends at ``final`` instead of 0."""
    if schedule == "cosine":
        factor = warmup_cosine(step, steps, warmup)
    else:
        factor = warmup_stable_decay(step, steps, warmup, decay_share)
    return factor if step < warmup else final + (1 - final) * factor
