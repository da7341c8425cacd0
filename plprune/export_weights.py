"""The tensors of an export: collected, checked, written as safetensors shards with an index."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plprune.dist import together
from plprune.errors import ExportError
from plprune.export_config import Shapes
from plprune.safetensors_stream import StreamWriter
from plprune.sharded import any_sharded, full_shape, part, state_of, whole
from plprune.surgery.linear_like import is_adapter_parameter
from plprune.unwrap import family_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def is_tied(model: nn.Module) -> bool:
    """Whether the output head shares the embedding's tensor.

    Args:
        model: plain Hugging Face model.

    Returns:
        True when both are one parameter.
    """
    family = family_of(model)
    head, embed = (model.get_submodule(path) for path in (family.head, family.embed))
    return head.weight is embed.weight


def tensors_of(
    model: nn.Module,
    *,
    dtype: torch.dtype | None,
    elsewhere: bool = False,
    base_only: bool = False,
) -> dict[str, Tensor]:
    """Every tensor to be written, checked; a tied output head appears once, as the embedding.

    Args:
        model: plain Hugging Face model.
        dtype: number format of floating-point tensors in the files; `None` keeps each tensor's own.
        elsewhere: the weights of a model on the meta device are looked at when they are read.
        base_only: leave LoRA adapters out; without them they are refused.

    Returns:
        Tensors by name, not copied and not converted yet.

    Raises:
        ExportError: for LoRA adapters, tensors without data, and numbers that are not finite.
    """
    adapters = [name for name, _ in model.named_parameters() if is_adapter_parameter(name)]
    if adapters and not base_only:
        raise ExportError(
            "the model still has adapters",
            given=f"{adapters[0]} and {len(adapters) - 1} more",
            allowed="merged weights",
            fix="merge them first: model = model.merge_and_unload()",
        )
    skipped = f"{family_of(model).head}.weight" if is_tied(model) else ""
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state_of(model).items()
        if not is_adapter_parameter(name)
    }
    tensors.pop(skipped, None)
    for name, tensor in tensors.items():
        if not (elsewhere and tensor.is_meta and tensor.numel()):
            _check(name, tensor, dtype)
    return tensors


def _check(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    if tensor.is_meta or full_shape(tensor).numel() == 0:
        kind = "on the meta device" if tensor.is_meta else "of size 0"
        raise ExportError(
            f"{name} has no data to write",
            given=f"a tensor {kind}, shape {tuple(full_shape(tensor))}",
            allowed="tensors with data",
            fix="load the weights first, and keep at least one unit in every layer",
        )
    # Of a divided tensor every rank looks at its own part, which may be empty.
    cast = _cast(part(tensor).detach(), dtype)
    if not tensor.is_floating_point() or cast.numel() == 0:
        return
    # nan and inf both reach the extremes; one pass without temporaries, where isfinite is slow.
    if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(cast)):
        bad = int((~torch.isfinite(cast)).sum())
        raise ExportError(
            f"{name} is not finite",
            given=f"{bad} of {tensor.numel()} entries are nan or inf"
            + (f" as {dtype}" if dtype else ""),
            allowed="finite weights",
            fix="train with a lower learning rate, or take the last good checkpoint"
            + (", or keep the number format" if dtype not in (None, tensor.dtype) else ""),
        )


def dtype_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """Number format that holds every weight: the given one, or the widest that occurs.

    Args:
        tensors: from `tensors_of`.
        dtype: requested format.

    Returns:
        A floating-point dtype.

    Raises:
        ExportError: if the requested one holds no fractions.
    """
    if dtype is not None:
        if not dtype.is_floating_point:
            raise ExportError(
                "cannot export in this number format", given=str(dtype), allowed="a float format"
            )
        return dtype
    found = [t.dtype for t in tensors.values() if t.is_floating_point()]
    return functools.reduce(torch.promote_types, found)


def bytes_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """Bytes the tensors take on disk.

    Args:
        tensors: from `tensors_of`.
        dtype: number format on disk, `None` for each tensor's own.

    Returns:
        Bytes without headers.
    """
    return sum(_bytes(tensor, dtype) for tensor in tensors.values())


def write_shards(
    directory: Path | None,
    tensors: Mapping[str, Tensor],
    zeros: Shapes,
    dtype: torch.dtype | None,
    max_shard_bytes: float,
    *,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write safetensors files, one tensor in memory at a time, and an index for several of them.

    Args:
        directory: existing folder; None on ranks that only help to put divided tensors together.
        tensors: from `tensors_of`.
        zeros: biases to add, all zero.
        dtype: number format of floating-point tensors, `None` for their own.
        max_shard_bytes: bound for one file; a larger single tensor gets a file of its own.
        read: complete tensors by name, of those on the meta device.

    Raises:
        ExportError: for tensors read now whose numbers are not finite.
    """
    fill = {n: torch.zeros(shape, dtype=dtype_of(tensors, dtype)) for n, shape in zeros.items()}
    everything = dict(tensors) | fill
    groups = list(_groups(everything, dtype, max_shard_bytes))
    shared = any_sharded(everything.values())
    where: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = (
            WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        group = {name: everything[name] for name in names}
        target = None if directory is None else directory / file
        failed = _write(group, target, dtype, read)
        with together() if shared else contextlib.nullcontext():
            if failed is not None:
                raise failed
        where.update(dict.fromkeys(names, file))
    if len(groups) > 1 and directory is not None:
        index: dict[str, Any] = {
            "metadata": {"total_size": bytes_of(everything, dtype)},
            "weight_map": where,
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _write(
    tensors: Mapping[str, Tensor],
    path: Path | None,
    dtype: torch.dtype | None,
    read: Callable[[str], Tensor] | None,
) -> Exception | None:
    """Put tensors together and write them, one at a time.

    A process that cannot write goes on putting together: the others wait for it. Its error is
    returned.
    """
    failed: Exception | None = None
    entries = {n: (_kind(tensor, dtype), full_shape(tensor)) for n, tensor in tensors.items()}
    with contextlib.ExitStack() as stack:
        file = None
        try:
            if path is not None:
                file = stack.enter_context(StreamWriter(path, entries))
        except OSError as error:
            failed = error
        for name, tensor in tensors.items():
            complete = _complete(name, tensor, dtype, read)
            if file is None or file.given_up:
                continue
            try:
                file.add(name, _cast(complete, dtype).to("cpu"))
            except OSError as error:
                failed, file.given_up = error, True
    return failed


def _complete(
    name: str, tensor: Tensor, dtype: torch.dtype | None, read: Callable[[str], Tensor] | None
) -> Tensor:
    if not tensor.is_meta or read is None:
        return whole(tensor).detach()
    found = read(name).detach().to(tensor.dtype)
    _check(name, found, dtype)
    return found


def _groups(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: float
) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor, dtype)
        if names and used + size > limit:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    yield names


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return _kind(tensor, dtype).itemsize * full_shape(tensor).numel()


def _kind(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Number format a tensor has in the file."""
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
