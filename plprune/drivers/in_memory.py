"""Prune a model that is in memory by a method that goes block by block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from plprune.budget import Budget
from plprune.drivers.batches import calibration_hash
from plprune.drivers.blocks import begin, budget_of, prune_block
from plprune.drivers.noted import look
from plprune.methods.base import Method
from plprune.plan import Plan
from plprune.progress import Progress, silent
from plprune.sparse import SparseMethod
from plprune.streaming.blocks import Blocks, Held
from plprune.streaming.calls import Batch
from plprune.streaming.hidden import InMemory
from plprune.unwrap import evaluating


def prune_model(
    model: nn.Module, method: Method, budget: Budget, batches: Sequence[Batch]
) -> list[Plan]:
    """Prune a model that is in memory, by a method of order `blocks`.

    Args:
        model: plain or wrapped; changed in place, its training mode is put back.
        method: sets single weights to zero.
        budget: how much of them stays.
        batches: calibration batches of this rank.

    Returns:
        What was done, in order.
    """
    calibration = calibration_hash(batches)
    with evaluating(model):
        source = Held(model)
        notes = take_notes(source, method, batches, calibration)
        return prune_blocks(source, method, budget, notes, batches, calibration)


def take_notes(
    source: Blocks,
    method: Method,
    batches: Sequence[Batch],
    calibration: str,
    idle: Sequence[Batch] = (),
) -> list[float]:
    """What the allocation of a method notes of every block of the model as it is; see `look`.

    Args:
        source: the model in evaluation mode.
        method: of order `blocks`.
        batches: calibration batches of this rank.
        calibration: hash of the sequences of all ranks.
        idle: as in `begin`.

    Returns:
        Numbers in the order of the blocks; empty if the allocation looks at nothing.
    """
    allocation = _sparse(method).allocation
    if not allocation.needs_data:
        return []
    stream = begin(source, batches, method.skip_first_tokens, InMemory, calibration, idle)
    return [note for _, note in look(stream, allocation)]


def _sparse(method: Method) -> SparseMethod:
    assert isinstance(method, SparseMethod), "methods of order blocks set weights to zero"
    return method


def prune_blocks(
    source: Blocks,
    method: Method,
    budget: Budget,
    notes: Sequence[float],
    batches: Sequence[Batch],
    calibration: str,
    idle: Sequence[Batch] = (),
    progress: Progress = silent,
) -> list[Plan]:
    """Prune block after block of a model that is in memory.

    Args:
        source: the model in evaluation mode.
        method: of order `blocks`.
        budget: how much of the weights stays.
        notes: from `take_notes`.
        batches: calibration batches of this rank.
        calibration: hash of the sequences of all ranks.
        idle: as in `begin`.
        progress: told of blocks done.

    Returns:
        What was done, in order.
    """
    due = _sparse(method).due(source.spec, budget, dict(enumerate(notes)))
    budgets = budget_of(source.spec, due)
    needs = bool(method.taps(source.spec))
    shown, others = (batches, idle) if needs else ((), ())
    stream = begin(source, shown, method.skip_first_tokens, InMemory, calibration, others)
    plans = []
    for number in range(len(source)):
        with source.block(number) as block:
            plans += prune_block(stream, number, block, method, budgets)
            if needs and number + 1 < len(source):
                stream.forward(number, block)
        progress(number + 1, len(source))
    return plans
