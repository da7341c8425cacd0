"""The loss of a model without some of its sublayers, measured on the calibration set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.drivers.batches import Batch
from plprune.drivers.blocks import begin
from plprune.methods.base import Losses
from plprune.sensitivity import loss_from, summed_loss
from plprune.sharded import any_sharded
from plprune.spec import Axis, Spec
from plprune.streaming.blocks import Held
from plprune.streaming.calls import blocks_of, inputs_of
from plprune.streaming.hidden import InMemory
from plprune.surgery.removal import skipped
from plprune.unwrap import evaluating, family_of, unwrap


def losses_of(
    model: nn.Module, spec: Spec, batches: Sequence[Batch], idle: Sequence[Batch] = ()
) -> Losses:
    """How `View.losses` of a model is measured.

    Weights that are whole are run from the candidate's block on: what enters it is carried along
    and shared by all that follow. Divided ones are gathered by their strategy, for whole passes.

    Args:
        model: plain or wrapped, with its weights; its training mode is put back.
        spec: its spec; what is masked stays masked.
        batches: of this rank.
        idle: run without looking: ranks that share tensors must all make the same number of passes.

    Returns:
        A function; collective on all ranks.
    """
    plain = unwrap(model)

    def measured(gone: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[float]:
        removed = [spec.axes[name] for name in gone]
        tried = [[spec.axes[name] for name in names] for names in candidates]
        run = _whole if any_sharded(plain.parameters()) else _from_blocks
        with (
            evaluating(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            skipped(plain, family_of(plain), removed),
        ):
            found = run(plain, tried, batches, idle)
        return [float(total / count) for total, count in found]

    return measured


Found = list[tuple[Tensor, Tensor]]
"""[] sum of losses and [] number of tokens of all ranks, for each candidate."""


def _from_blocks(
    model: nn.Module, tried: Sequence[Sequence[Axis]], batches: Sequence[Batch], _: Sequence[Batch]
) -> Found:
    source, family = Held(model), family_of(model)
    stream = begin(source, batches, 0, InMemory, "")
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number in range(len(source)):
        here = [place for place, axes in enumerate(tried) if axes[0].block == number]
        for place in here:
            with skipped(model, family, tried[place]):
                found[place] = loss_from(stream, batches, number)
        if len(found) == len(tried):
            break
        stream.forward(number, blocks_of(model)[number])
    return [found[place] for place in range(len(tried))]


def _whole(
    model: nn.Module,
    tried: Sequence[Sequence[Axis]],
    batches: Sequence[Batch],
    idle: Sequence[Batch],
) -> Found:
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
    return found
