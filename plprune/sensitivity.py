"""What it costs to cut one axis alone: the loss of the whole model, measured.

The calibration set is carried along in front of the block in question, so that only it and what
follows it are run again. Units are masked on the inputs of the linear that reads them, which equals
cutting them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.drivers.blocks import Stream, begin
from plprune.observe import StatMap
from plprune.select import top_units
from plprune.spec import Axis
from plprune.stats.base import Tap
from plprune.stats.losses import SHARES, LossCurve
from plprune.streaming.blocks import Held
from plprune.streaming.calls import Batch, blocks_of, finish
from plprune.streaming.hidden import InMemory

Progress = Callable[[int, int], None]


def curves(
    source: Held,
    batches: Sequence[Batch],
    scores: Mapping[str, Tensor],
    shares: Sequence[float] = SHARES,
    progress: Progress = lambda done, total: None,
) -> dict[str, LossCurve]:
    """Measure every axis alone; collective on all ranks.

    Args:
        source: the model with its weights, in evaluation mode.
        batches: calibration batches of this rank.
        scores: axis name -> [U], higher stays; these axes are measured.
        shares: of the units of an axis that stay at each measurement.
        progress: told after every block.

    Returns:
        Axis name -> losses, summed over ranks, on the CPU.
    """
    stream = begin(source, batches, 0, InMemory, "")
    found: dict[str, LossCurve] = {}
    dense: tuple[Tensor, Tensor] | None = None
    with torch.no_grad():
        for number in range(len(source)):
            for axis in source.spec.axes.values():
                if axis.block == number and axis.name in scores:
                    dense = dense or loss_from(stream, batches, number)
                    found[axis.name] = _curve(
                        stream, batches, number, axis, scores[axis.name], shares, dense
                    )
            if number + 1 < len(source):
                stream.forward(number, blocks_of(source.model)[number])
            progress(number + 1, len(source))
    return found


def measured(
    source: Held,
    batches: Sequence[Batch],
    taps: Sequence[Tap],
    scores: Mapping[str, Tensor],
    progress: Progress = lambda done, total: None,
) -> StatMap:
    """Curves as statistics of the linears that read the axes.

    Args:
        source: as in `curves`.
        batches: of this rank.
        taps: with `LossCurve`.
        scores: of every axis that such a linear reads.
        progress: told after every block.
    """
    wanted = {tap.module: tap for tap in taps}
    read = {name: source.spec.axes[name].reader.module for name in scores}
    chosen = {name: scores[name] for name, module in read.items() if module in wanted}
    found = curves(source, batches, chosen, progress=progress)
    return {wanted[read[name]]: curve for name, curve in found.items()}


def _curve(
    stream: Stream,
    batches: Sequence[Batch],
    number: int,
    axis: Axis,
    score_U: Tensor,
    shares: Sequence[float],
    dense: tuple[Tensor, Tensor],
) -> LossCurve:
    per_group = axis.size // axis.groups
    kept = [max(1, round(share * per_group)) * axis.groups for share in shares]
    losses = []
    for count in kept:
        stays = torch.zeros(axis.size, dtype=torch.bool)
        stays[top_units(score_U, count, axis.group)] = True
        with _without(stream.source.model, axis, stays):
            losses.append(loss_from(stream, batches, number)[0])
    return LossCurve(
        n=dense[1],
        dense=dense[0],
        loss_G=torch.stack(losses),
        units_G=torch.tensor(kept, dtype=torch.float64),
    )


@contextlib.contextmanager
def _without(model: nn.Module, axis: Axis, stays_U: Tensor) -> Iterator[None]:
    """Mask units at the linear that reads them."""
    module = model.get_submodule(axis.reader.module)
    gone = axis.reader.index[~stays_U].flatten()

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., gone.to(x.device)] = 0
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def loss_from(stream: Stream, batches: Sequence[Batch], start: int) -> tuple[Tensor, Tensor]:
    """Run what is left of the model, and measure; collective on all ranks.

    Args:
        stream: in front of a block.
        batches: of this rank.
        start: number of that block.

    Returns:
        [] float64 sum of the losses of all tokens of all ranks, and their number.
    """
    model = stream.source.model
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(batches):
        hidden = stream.hidden[number]
        for call, block in list(zip(stream.calls[number], blocks_of(model), strict=True))[start:]:
            hidden = call.run(block, hidden)
        loss, tokens = summed_loss(finish(model, batch, hidden), batch)
        total, count = total + loss, count + tokens
    return dist.summed(total), dist.summed(count)


def summed_loss(logits_BTV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of one batch.

    Args:
        logits_BTV: [B, T, V] of the model.
        batch: what went into it; what padding predicts, and what predicts padding, does not count.

    Returns:
        [] float64 sum of the losses of all tokens, and their number, on the CPU.
    """
    logits = logits_BTV[:, :-1]
    ids = batch["input_ids"][:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids.flatten(), reduction="none"
    )
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    counts = (mask[:, 1:] & mask[:, :-1]).flatten().bool().to(losses.device)
    return losses[counts].double().sum().cpu(), counts.sum().double().cpu()
