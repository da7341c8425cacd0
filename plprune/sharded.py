"""Tensors of which every process holds a part: `DTensor` (FSDP2) and ZeRO-3 parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """True if this process holds a part only."""
    return hasattr(tensor, "full_tensor") or _is_zero(tensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """True if this process holds only a part of one of them."""
    return any(is_sharded(tensor) for tensor in tensors)


def _is_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def is_gathered_late(tensor: Tensor) -> bool:
    """True if a part is put together only for the module that owns it (ZeRO-3)."""
    return _is_zero(tensor)


def full_shape(tensor: Tensor) -> torch.Size:
    """Shape of the complete tensor; that of a ZeRO-3 parameter itself is empty."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, with parameters as they are: detached, ZeRO-3's would be empty.

    Args:
        model: any module.

    Returns:
        Parameters and persistent buffers by name, tied ones under each name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters.get(name, tensor) for name, tensor in model.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor; collective on all ranks for one that is sharded.

    Args:
        tensor: any tensor; ZeRO-3 parameters as they are, not detached.

    Returns:
        The tensor itself, or what all ranks hold together.
    """
    if not is_sharded(tensor):
        return tensor
    if not _divided_evenly(tensor):
        return _as_wrapped(tensor)
    divided: Any = tensor
    group = divided.ds_process_group if _is_zero(tensor) else divided.device_mesh.get_group()
    shape, held = full_shape(tensor), part(tensor).detach()
    # What the last ranks hold beyond the end is filling, or nothing.
    world, width = dist.get_world_size(group), 1 if _is_zero(tensor) else shape[1:].numel()
    length = -(-shape.numel() // width // world) * width
    with torch.no_grad():
        full = held.new_empty(shape.numel(), device=_meeting_place(held.device))
        # Rank by rank into its place: an all-gather holds the tensor twice, gloo's own copy and
        # ours, or that of the wrapper.
        for number, piece in enumerate(torch.split(full, length)):
            if dist.get_rank(group) == number:
                piece.copy_(held.reshape(-1)[: len(piece)])
            dist.broadcast(piece, group=group, group_src=number)
    return full.view(shape).to(held.device)


def _divided_evenly(tensor: Tensor) -> bool:
    """Whether each rank holds equally many rows (FSDP2) or entries (ZeRO-3), the last ones fewer.

    Otherwise (parts kept elsewhere, on a few processes only, or not needed now because the whole
    is there) those who divided it must put it together.
    """
    divided: Any = tensor
    if _is_zero(tensor):
        gone = divided.ds_status.name == "NOT_AVAILABLE"
        world = dist.get_world_size(divided.ds_process_group)
        return bool(gone and divided.ds_tensor.numel() == -(-divided.ds_numel // world))
    return divided.device_mesh.ndim == 1 and all(p.is_shard(0) for p in divided.placements)


def _as_wrapped(tensor: Tensor) -> Tensor:
    """Put together by DeepSpeed or torch."""
    divided: Any = tensor
    if _is_zero(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    full: Tensor = divided.full_tensor()
    return full


def _meeting_place(device: torch.device) -> torch.device:
    """Where broadcasts can work: NCCL moves no CPU tensors, such as offloaded parts."""
    only_cuda = dist.get_backend() == "nccl" and device.type == "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if only_cuda else device


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; all of it if it is not divided."""
    sharded: Any = tensor
    if _is_zero(tensor):
        return sharded.ds_tensor  # type: ignore[no-any-return]
    local: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return local


def extent(tensor: Tensor) -> tuple[int, int]:
    """Which entries of the complete tensor, counted row after row, this process holds.

    Args:
        tensor: complete, a ZeRO-3 parameter, or a `DTensor` that is divided by rows, as by FSDP2.

    Returns:
        First entry, and the one after the last.
    """
    divided: Any = tensor
    if _is_zero(tensor):
        length = -(-divided.ds_numel // dist.get_world_size())
        start, stop = dist.get_rank() * length, (dist.get_rank() + 1) * length
        return min(start, divided.ds_numel), min(stop, divided.ds_numel)
    if not is_sharded(tensor):
        return 0, tensor.numel()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        divided.shape, divided.device_mesh, divided.placements
    )
    width = divided.shape[1:].numel()
    return offset[0] * width, (offset[0] + shape[0]) * width


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Divide a complete tensor as a `DTensor` is divided; no communication.

    Args:
        full: equal on all ranks, any size.
        like: any tensor; of a `DTensor` mesh, placements and device are used.

    Returns:
        `full`, or a `DTensor` of which this rank keeps its part.
    """
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    model: Any = like
    made = distribute_tensor(full, model.device_mesh, model.placements, src_data_rank=None)
    # The part is a view: without a copy the complete tensor would stay alive.
    local = made.to_local().to(model.to_local().device, copy=True)
    return DTensor.from_local(
        local,
        model.device_mesh,
        model.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def parameter_like(data: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter in the place of another; under ZeRO-3 divided at once.

    Args:
        data: from `shard_like`.
        like: the parameter it replaces.

    Returns:
        The new parameter.
    """
    made = nn.Parameter(data, requires_grad=like.requires_grad)
    old: Any = like
    if _is_zero(like):
        old.convert_to_zero_parameters(param_list=[made])
    return made


def write(parameter: nn.Parameter, full: Tensor) -> None:
    """Give a parameter new values, on all ranks.

    Args:
        parameter: any; one that ZeRO trains has a precise copy elsewhere that wins, see
            `Adapter.write`.
        full: complete values, equal on all ranks.
    """
    sharded: Any = parameter
    with torch.no_grad():
        if _is_zero(parameter):
            sharded.ds_tensor.copy_(zero_part(full.to(sharded.ds_tensor.dtype)))
        elif is_sharded(parameter):
            made: Any = shard_like(full, parameter)
            sharded.to_local().copy_(made.to_local())
        else:
            parameter.copy_(full)


def zero_part(full: Tensor) -> Tensor:
    """This rank's part of a tensor as ZeRO-3 divides it: flat, equal lengths, zeros at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    length = -(-full.numel() // world)
    flat = full.reshape(-1)[rank * length : (rank + 1) * length]
    return torch.cat([flat, flat.new_zeros(length - flat.numel())])
