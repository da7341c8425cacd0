"""Tensors of which every process holds a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a `DTensor`, as FSDP2 makes them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor; collective on all ranks for one that is sharded.

    Args:
        tensor: any tensor.

    Returns:
        The tensor itself, or what all ranks hold together.
    """
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return full


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; all of it if it is not divided."""
    sharded: Any = tensor
    local: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return local


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Divide a complete tensor as another one is divided; no communication.

    Args:
        full: equal on all ranks, any size.
        like: any tensor; if it is sharded, its mesh, placements and device are used.

    Returns:
        `full`, or a `DTensor` of which this rank keeps its part.
    """
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    model: Any = like
    made = distribute_tensor(full, model.device_mesh, model.placements, src_data_rank=None)
    local = made.to_local()
    # The part is a view: without a copy the complete tensor would stay alive.
    local = local.to(model.to_local().device, copy=True)
    return DTensor.from_local(
        local,
        model.device_mesh,
        model.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )
