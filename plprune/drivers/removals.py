"""The loss of a model without some of its sublayers, measured on the calibration set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.drivers.batches import Batch
from plprune.drivers.blocks import begin
from plprune.methods.base import Losses
from plprune.progress import Progress, Shown, unseen
from plprune.sensitivity import loss_from, summed_loss
from plprune.sharded import any_sharded
from plprune.spec import Axis, Spec
from plprune.streaming.blocks import Held
from plprune.streaming.calls import blocks_of, inputs_of
from plprune.streaming.hidden import InMemory
from plprune.surgery.removal import skipped
from plprune.unwrap import evaluating, family_of, unwrap


def losses_of(
    model: nn.Module,
    spec: Spec,
    batches: Sequence[Batch],
    idle: Sequence[Batch] = (),
    shown: Shown = unseen,
) -> Losses:
    """How `View.losses` of a model is measured.

    Weights that are whole are run from the candidate's block on: what enters it is carried along
    and shared by all that follow. Divided ones are gathered by their strategy, for whole passes.

    Args:
        model: plain or wrapped, with its weights; its training mode is put back.
        spec: its spec; what is masked stays masked.
        batches: of this rank.
        idle: run without looking: ranks that share tensors must all make the same number of passes.
        shown: makes what is told of every candidate, from a title.

    Returns:
        A function; collective on all ranks. A candidate without axes is the model as it is.
    """
    plain = unwrap(model)

    def measured(gone: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[float]:
        removed = [spec.axes[name] for name in gone]
        tried = [[spec.axes[name] for name in names] for names in candidates]
        progress = shown(f"losses without {len(gone)} sublayers and one unit more")
        run = _whole if any_sharded(plain.parameters()) else _from_blocks
        with (
            evaluating(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            skipped(plain, family_of(plain), removed),
        ):
            found = run(plain, tried, (batches, idle), progress)
        return [float(total / count) for total, count in found]

    return measured


Found = list[tuple[Tensor, Tensor]]
"""[] sum of losses and [] number of tokens of all ranks, for each candidate."""
Share = tuple[Sequence[Batch], Sequence[Batch]]
"""Batches of this rank to look at, and to run only."""


def _from_blocks(
    model: nn.Module, tried: Sequence[Sequence[Axis]], share: Share, progress: Progress
) -> Found:
    batches = share[0]
    source, family = Held(model), family_of(model)
    stream = begin(source, batches, 0, InMemory, "")
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number in range(len(source)):
        here = [place for place, axes in enumerate(tried) if _first_block(axes) == number]
        for place in here:
            with skipped(model, family, tried[place]):
                found[place] = loss_from(stream, batches, number)
            progress(len(found), len(tried))
        if len(found) == len(tried):
            break
        stream.forward(number, blocks_of(model)[number])
    return [found[place] for place in range(len(tried))]


def _first_block(axes: Sequence[Axis]) -> int:
    return axes[0].block if axes else 0


def _whole(
    model: nn.Module, tried: Sequence[Sequence[Axis]], share: Share, progress: Progress
) -> Found:
    batches, idle = share
    device = next(model.parameters()).device
    found = []
    for axes in tried:
        total = count = torch.zeros((), dtype=torch.float64)
        with skipped(model, family_of(model), axes):
            for number, batch in enumerate((*batches, *idle)):
                out = model(**inputs_of(batch, device), use_cache=False)
                if number < len(batches):
                    loss, tokens = summed_loss(out.logits, batch)
                    total, count = total + loss, count + tokens
        found.append((dist.summed(total), dist.summed(count)))
        progress(len(found), len(tried))
    return found
