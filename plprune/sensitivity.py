"""What it costs to cut one axis alone: the loss of the whole model, measured.

The calibration set is carried along in front of the block in question, so that only it and what
follows it are run again. Units are masked on the inputs of the linear that reads them, which equals
cutting them; with a compensation that linear computes what it will after the cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.compensate import Compensation
from plprune.drivers.batches import some
from plprune.drivers.blocks import Stream, begin
from plprune.observe import StatMap
from plprune.progress import Progress, silent
from plprune.select import top_units
from plprune.spec import Axis
from plprune.stats.base import Tap
from plprune.stats.losses import SHARES, LossCurve
from plprune.streaming.blocks import Blocks, Held
from plprune.streaming.calls import Batch, blocks_of, finish
from plprune.streaming.hidden import InMemory

Repair = Callable[[str, Tensor], tuple[Tensor, Tensor | None]]
"""From a linear and [C] bool, inputs that stay, to its weights and bias."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How losses of single cuts are measured."""

    compensation: Compensation | None = None
    """What follows every cut."""
    skip_first: int = 0
    """Tokens at the start of each sequence that its statistics leave out."""
    sequences: int | None = None
    """How many of the calibration set losses are measured on; None: all."""


PLAIN = Setting()
"""Nothing follows a cut, and all sequences count."""


def curves(
    source: Held,
    batches: Sequence[Batch],
    scores: Mapping[str, Tensor],
    shares: Sequence[float] = SHARES,
    progress: Progress = silent,
    setting: Setting = PLAIN,
) -> dict[str, LossCurve]:
    """Measure every axis alone; collective on all ranks.

    Args:
        source: the model with its weights, in evaluation mode.
        batches: calibration batches of this rank.
        scores: axis name -> [U], higher stays; these axes are measured.
        shares: of the units of an axis that stay at each measurement.
        progress: told after every block.
        setting: on how many sequences, and what follows a cut.

    Returns:
        Axis name -> losses, summed over ranks, on the CPU.
    """
    few = some(batches, setting.sequences)
    stream = begin(source, few, 0, InMemory, "")
    streams, compensation = [stream], setting.compensation
    if compensation is not None:  # it looks at all sequences
        streams.append(begin(source, batches, setting.skip_first, InMemory, ""))
    found: dict[str, LossCurve] = {}
    dense: tuple[Tensor, Tensor] | None = None
    with torch.no_grad():
        for number, block in enumerate(blocks_of(source.model)):
            axes = [a for a in source.spec.axes.values() if a.block == number and a.name in scores]
            repair = None
            if compensation is not None and axes:
                repair = _repair(streams[1], number, axes, compensation)
            for axis in axes:
                dense = dense or loss_from(stream, few, number)
                cut = partial(_losses, stream, few, axis, repair)
                found[axis.name] = _curve(axis, scores[axis.name], shares, dense, cut)
            if number + 1 < len(source):
                for one in streams:
                    one.forward(number, block)
            progress(number + 1, len(source))
    return found


def measured(
    source: Held,
    batches: Sequence[Batch],
    taps: Sequence[Tap],
    scores: Mapping[str, Tensor],
    progress: Progress = silent,
    setting: Setting = PLAIN,
) -> StatMap:
    """Curves as statistics of the linears that read the axes.

    Args:
        source: as in `curves`.
        batches: of this rank.
        taps: with `LossCurve`.
        scores: of every axis that such a linear reads.
        progress: told after every block.
        setting: see `curves`.
    """
    wanted = {tap.module: tap for tap in taps}
    read = {name: source.spec.axes[name].reader.module for name in scores}
    chosen = {name: scores[name] for name, module in read.items() if module in wanted}
    found = curves(source, batches, chosen, progress=progress, setting=setting)
    return {wanted[read[name]]: curve for name, curve in found.items()}


def _curve(
    axis: Axis,
    score_U: Tensor,
    shares: Sequence[float],
    dense: tuple[Tensor, Tensor],
    cut: Callable[[Tensor], Tensor],
) -> LossCurve:
    per_group = axis.size // axis.groups
    kept = [max(1, round(share * per_group)) * axis.groups for share in shares]
    losses = {axis.size: dense[0]}
    for count in set(kept) - losses.keys():  # of few units several shares are the same
        stays = torch.zeros(axis.size, dtype=torch.bool)
        stays[top_units(score_U, count, axis.group)] = True
        losses[count] = cut(stays)
    return LossCurve(
        n=dense[1],
        dense=dense[0],
        loss_G=torch.stack([losses[count] for count in kept]),
        units_G=torch.tensor(kept, dtype=torch.float64),
    )


def _losses(
    stream: Stream, batches: Sequence[Batch], axis: Axis, repair: Repair | None, stays_U: Tensor
) -> Tensor:
    """[] sum of losses with some units of one axis left."""
    with _without(stream.source, axis, stays_U, repair):
        return loss_from(stream, batches, axis.block)[0]


def _repair(whole: Stream, number: int, axes: Sequence[Axis], compensation: Compensation) -> Repair:
    """What solves for the weights of the linears that read some axes of one block."""
    spec = whole.source.spec
    taps = {
        axis.reader.module: Tap(module=axis.reader.module, stat=compensation.stat) for axis in axes
    }
    seen = whole.observe(number, blocks_of(whole.source.model)[number], tuple(taps.values()))
    view = whole.view(spec, seen)

    def solve(module: str, keep_C: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = view.weight(module), view.bias(module)
        return compensation.solve(weight, bias, seen[taps[module]], keep_C)

    return solve


@contextlib.contextmanager
def _without(source: Blocks, axis: Axis, stays_U: Tensor, repair: Repair | None) -> Iterator[None]:
    """Mask units at the linear that reads them, and let it compute with other weights."""
    name = axis.reader.module
    module = source.model.get_submodule(name)
    gone = axis.reader.index[~stays_U].flatten()

    def masked(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., gone.to(x.device)] = 0
        return (x, *args[1:])

    handles = [module.register_forward_pre_hook(masked)]
    if repair is not None:
        dead_C = source.spec.dead.get((name, "in"))
        keep_C = torch.ones(source.spec.linears[name].cols, dtype=torch.bool)
        keep_C[gone] = False
        if dead_C is not None:
            keep_C &= ~dead_C
        weight_RC, bias_R = repair(name, keep_C)

        def refitted(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            bias = None if bias_R is None else bias_R.to(out)
            return nn.functional.linear(args[0], weight_RC.to(out), bias)

        handles.append(module.register_forward_hook(refitted))
    try:
        yield
    finally:
        for handle in handles:
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
