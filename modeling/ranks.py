"""Whether parallel ranks divide a model, by its ``config.json``. Standard library only."""

from collections.abc import Mapping
from typing import Any


def check(config: Mapping[str, Any], tensor_parallel: int, expert_parallel: int | None = None) -> None:
    """Refuses ranks that cannot share a model's layers.

    Args:
        config: as in ``config.json``.
        tensor_parallel: ranks that share every layer.
        expert_parallel: ranks that hold whole experts; None: experts are split like other layers.

    Raises:
        ValueError: the message names the field, its value and the ranks.
    """
    ranks = tensor_parallel
    heads = config.get("num_attention_heads", ranks)
    kv_heads = config.get("num_key_value_heads") or heads
    experts, width = config.get("n_routed_experts"), config.get("moe_intermediate_size", ranks)
    sizes = {
        "num_attention_heads": heads,
        "intermediate_size": config.get("intermediate_size") or 4 * config.get("hidden_size", ranks),
    }
    if experts:
        if expert_parallel is None:
            sizes["moe_intermediate_size"] = width
        elif experts % expert_parallel:
            raise ValueError(
                f"n_routed_experts ({experts}) cannot be shared by {expert_parallel} expert-parallel ranks"
            )
        sizes["n_shared_experts * moe_intermediate_size"] = (config.get("n_shared_experts") or 0) * width
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"{name} ({size}) cannot be shared by {ranks} tensor-parallel ranks")
    if kv_heads % ranks and ranks % kv_heads:  # a head may have copies on several ranks
        raise ValueError(f"num_key_value_heads ({kv_heads}) cannot be shared by {ranks} tensor-parallel ranks")
