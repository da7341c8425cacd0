"""Gradients of the loss, one block at a time: forward through all blocks, then back again.

What enters every block is kept. On the way back a block is run once more, with the gradient of what
left it; the gradient of a weight is the sum over tokens of the outer products of what its linear
got and what came back to it, so nothing needs to be trainable and no more than one block's
gradients exist.

Legend: T tokens, H residual width, R rows, C columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from plprune import dist
from plprune.errors import DataError, PlanError, first_line
from plprune.heap import give_back
from plprune.observe import StatMap
from plprune.progress import Progress, silent
from plprune.stats.base import Tap
from plprune.stats.slopes import Slopes
from plprune.streaming.blocks import Blocks
from plprune.streaming.calls import Batch, Call, Known, finish, record
from plprune.surgery.linear_like import shape_of
from plprune.surgery.written import weight_of

_TOKENS = 64
"""Whose logits exist at a time."""


def singles(batches: Sequence[Batch]) -> list[Batch]:
    """The sequences of batches one by one, without padding: squares are of single gradients.

    Args:
        batches: `input_ids` [B, T] and, with padding, `attention_mask` [B, T].
    """
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids_T, mask_T in zip(batch["input_ids"], mask, strict=True):
            rows.append({"input_ids": ids_T[mask_T.bool()][None]})
    return [row for row in rows if row["input_ids"].shape[1] > 1]


def slopes(
    source: Blocks,
    batches: Sequence[Batch],
    taps: Sequence[Tap],
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> StatMap:
    """Sums of gradients; collective on all ranks.

    Args:
        source: the model, as it computes.
        batches: of this rank.
        taps: with `Slopes`, in blocks.
        folder: existing, for what enters the blocks; None keeps it in memory.
        progress: told of blocks passed, forward and back.

    Returns:
        `Slopes` of every tap, on the CPU.

    Raises:
        PlanError: if a gradient is not finite.
    """
    rows, total = singles(batches), len(source)
    trail = _Trail(folder)
    calls, hidden = _embedded(source, rows)
    for number in range(total):
        trail.keep(number, hidden)
        with source.block(number) as block, torch.no_grad():
            hidden = [c[number].run(block, h) for c, h in zip(calls, hidden, strict=True)]
        progress(number + 1, 2 * total)
    coming = _losses(source, rows, hidden)
    count = int(dist.summed(torch.tensor(len(rows))))
    found: StatMap = {}
    for number in reversed(range(total)):
        own = [tap for tap in taps if source.spec.linears[tap.module].block == number]
        with source.block(number) as block:
            one = [call[number] for call in calls]
            coming, sums = _back(source.model, block, one, trail.read(number), coming, own)
            for tap in own:
                found[tap] = _summed_up(source.model, tap, sums[tap.module], count)
        progress(2 * total - number, 2 * total)
    trail.remove()
    return {tap: found[tap] for tap in taps}


def _embedded(source: Blocks, rows: Sequence[Batch]) -> tuple[list[tuple[Call, ...]], list[Tensor]]:
    known = Known()
    with source.outside():
        recorded = [record(source.model, row, known) for row in rows]
    return [calls for _, calls in recorded], [hidden for hidden, _ in recorded]


def _losses(source: Blocks, rows: Sequence[Batch], hidden: Sequence[Tensor]) -> list[Tensor]:
    """[1, T, H] gradients of each sequence's mean loss by what left the last block.

    A few tokens at a time: logits of a large vocabulary would outweigh everything else.
    """
    found = []
    with source.outside():
        for row, last in zip(rows, hidden, strict=True):
            leaf = last.detach().requires_grad_()
            grad, targets_T = torch.zeros_like(last), row["input_ids"][0, 1:].to(last.device)
            places_T = torch.arange(len(targets_T), device=last.device)
            for at_K in torch.split(places_T, _TOKENS):
                with torch.enable_grad():
                    logits_KV = finish(source.model, row, leaf, at_K)[0]
                    loss = nn.functional.cross_entropy(
                        logits_KV.to(_precise(logits_KV.dtype)), targets_T[at_K], reduction="sum"
                    )
                    grad += torch.autograd.grad(loss / len(targets_T), leaf)[0]
            found.append(grad)
            give_back()
    return found


Sums = tuple[Tensor, Tensor]


def _back(
    model: nn.Module,
    block: nn.Module,
    calls: Sequence[Call],
    entered: Iterator[Tensor],
    coming: Sequence[Tensor],
    taps: Sequence[Tap],
) -> tuple[list[Tensor], dict[str, Sums]]:
    """Gradients by what entered a block, and sums over sequences of those of its weights."""
    sums: dict[str, Sums] = {}
    for name in (tap.module for tap in taps):
        module = model.get_submodule(name)
        like = next(module.parameters())
        empty = torch.zeros(shape_of(module), dtype=_precise(like.dtype), device=like.device)
        sums[name] = (empty, empty.clone())
    gone = []
    with _paired(model, sums):
        for call, hidden, grad in zip(calls, entered, coming, strict=True):
            leaf = hidden.to(grad.device).requires_grad_()
            with torch.enable_grad():
                out = call.run(block, leaf)
                gone.append(torch.autograd.grad(out, leaf, grad)[0])
    return gone, sums


@contextlib.contextmanager
def _paired(model: nn.Module, sums: Mapping[str, Sums]) -> Iterator[None]:
    """Add the product of what linears get and what comes back to them, and its square."""

    def pair(name: str) -> Any:
        def forward(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            x_TC = cast(Tensor, args[0]).detach().flatten(0, -2)

            def back(grad: Tensor) -> None:
                total, squares = sums[name]
                grad_TR = grad.flatten(0, -2).to(total.dtype)
                product = grad_TR.T @ x_TC.to(total.dtype)
                total += product
                squares += product.square()

            out.register_hook(back)  # type: ignore[no-untyped-call]

        return forward

    handles = [model.get_submodule(name).register_forward_hook(pair(name)) for name in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summed_up(model: nn.Module, tap: Tap, sums: Sums, count: int) -> Slopes:
    total, squares = (dist.summed(value) for value in sums)
    if not bool(torch.isfinite(squares).all()):
        raise PlanError(
            "gradients are not finite",
            given=f"NaN or infinity at {tap.module}",
            allowed="finite weights and activations",
            fix="check the weights for NaN, or compute in float32 or bfloat16",
        )
    weight = weight_of(model.get_submodule(tap.module)).detach()
    return Slopes.of(weight, total, squares, count).mapped(lambda _, value: value.cpu())


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Trail:
    """What entered every block, in memory or in one file a block."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._held = folder, dict[int, list[Tensor]]()
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []

    def keep(self, block: int, hidden: list[Tensor]) -> None:
        if self._folder is None:
            self._held[block] = hidden
            return
        self._shapes = [(one.shape, one.dtype) for one in hidden]
        try:
            with self._path(block).open("wb") as file:
                for one in hidden:
                    one.cpu().contiguous().view(torch.uint8).numpy().tofile(file)
        except OSError as error:
            raise DataError(
                "hidden states cannot be stored",
                given=f"{self._path(block)} ({first_line(error)})",
                fix="free some space, or keep them in memory",
            ) from error

    def read(self, block: int) -> Iterator[Tensor]:
        if self._folder is None:
            yield from self._held.pop(block)
            return
        with self._path(block).open("rb") as file:
            for shape, dtype in self._shapes:
                raw = np.fromfile(file, dtype=np.uint8, count=shape.numel() * dtype.itemsize)
                yield torch.from_numpy(raw).view(dtype).reshape(shape)
        self._path(block).unlink()

    def remove(self) -> None:
        self._held.clear()

    def _path(self, block: int) -> Path:
        assert self._folder is not None, "only with a folder"
        return self._folder / f"entered-{block:05d}.bin"
