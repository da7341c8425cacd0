"""Memory of one rank where a strategy divides what a process holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from plprune.memory_phase import Cutting, Phase

if TYPE_CHECKING:
    from plprune.memory import Setup

SHARDED: Mapping[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp": ("optimizer", "gradients", "weights"),
}
"""What each strategy divides among ranks."""
_LIVE = 10**9
"""Parameters that ZeRO-3 may keep together, and updates at a time, by default
(`stage3_max_live_parameters`, `sub_group_size`)."""


def pieces(model: nn.Module) -> tuple[int, int]:
    """What must be whole at a time.

    Args:
        model: Hugging Face model, on any device.

    Returns:
        Bytes of the largest unit that is gathered (a block, or a tensor outside of the blocks), and
        of the largest tensor.
    """
    units: dict[str, int] = {}
    largest = 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        unit = name if number is None else ".".join(parts[: number + 1])
        size = parameter.numel() * parameter.element_size()
        units[unit] = units.get(unit, 0) + size
        largest = max(largest, size)
    return max(units.values(), default=0), largest


def shared(phase: Phase, setup: Setup, model: nn.Module) -> Phase:
    """A phase as one rank sees it.

    Args:
        phase: of one process alone.
        setup: names the strategy and the number of ranks.
        model: the largest of the run, for the pieces that are gathered.

    Returns:
        Divided parts smaller; with divided weights, what is gathered among the copies.
    """
    parts = SHARDED[setup.strategy]
    world = setup.world_size
    if setup.strategy.startswith("zero") and _half(setup):
        # Masters and moments in float32; the optimizer that was looked at keeps them like weights.
        phase = replace(phase, optimizer=2 * phase.optimizer + 2 * phase.gradients)
    if setup.strategy.startswith("zero") and phase.name.startswith("train"):
        # Its optimizer works on flat tensors: one of gradients, and one of its own beside them.
        trained = phase.gradients // next(model.parameters()).element_size()
        flat = min(trained, _LIVE) if "weights" in parts else trained
        phase = replace(phase, copies=phase.copies + 2 * 4 * (flat // world))
    mine = replace(phase, **{part: -(-getattr(phase, part) // world) for part in parts})
    if phase.step is not None:
        mine = replace(mine, activations=_activations(phase, parts, world))
    if setup.strategy == "ddp" and world > 1:
        # The reducer keeps gradients in buckets, beside those of the parameters.
        mine = replace(mine, copies=mine.copies + phase.gradients)
    if phase.cutting is not None:
        return _cut(phase, phase.cutting, mine, setup, model)
    if "weights" not in parts or world == 1:
        return mine
    gathered = _gathered(phase, setup, model)
    if phase.name == "load":
        return replace(mine, copies=pieces(model)[1])
    if phase.name == "export":
        return mine
    return replace(mine, copies=mine.copies + gathered)


def _half(setup: Setup) -> bool:
    return setup.exact_precision in ("bf16-true", "16-true")


def _gathered(phase: Phase, setup: Setup, model: nn.Module) -> int:
    """Weights that a pass puts together at a time, where they are divided."""
    if "weights" not in SHARDED[setup.strategy] or setup.world_size == 1:
        return 0
    unit, item = pieces(model)[0], next(model.parameters()).element_size()
    # FSDP2 gathers the next block while it works on one.
    most = 2 * unit if setup.strategy == "fsdp" else max(unit, _LIVE * item)
    return min(most, phase.weights)


def _cut(phase: Phase, cutting: Cutting, mine: Phase, setup: Setup, model: nn.Module) -> Phase:
    """A cut as one rank sees it: its check, or what is made while the old tensors are there."""
    parts, world = SHARDED[setup.strategy], setup.world_size
    gradients = cutting.gradients // world if "gradients" in parts else cutting.gradients
    new = cutting.new
    if "weights" in parts and world > 1:
        # A tensor is cut while it is whole; each rank keeps its part.
        new = new // world + 2 * pieces(model)[1]
    if setup.strategy.startswith("zero"):
        # Gradients are used up at the end of a step, but masters stay, in float32. What they and
        # the moments become waits on the host until there is an engine for it.
        trained = cutting.gradients // next(model.parameters()).element_size()
        gradients = 0 if _half(setup) else 4 * trained // world
        new += gradients + round(cutting.left * (gradients + mine.optimizer))
    if setup.strategy == "ddp" and world > 1:
        gradients *= 2
    check = gradients + cutting.check + _gathered(phase, setup, model)
    return replace(mine, activations=max(0, check - new), copies=new)


def _activations(phase: Phase, parts: tuple[str, ...], world: int) -> int:
    """What a step adds to weights, gradients and optimizer state of one rank at its peak."""
    step = phase.step
    assert step is not None
    divided = "gradients" in parts
    gradients = phase.gradients // world if divided else phase.gradients
    # At any time gradients g and the rest a are at most `passes` together, and a at most `alone`.
    passes = step.passes // world + step.alone * (world - 1) // world if divided else step.passes
    update = step.update // world if "optimizer" in parts else step.update
    return max(passes - gradients, update)


def traffic(train: Phase, setup: Setup) -> tuple[int, int]:
    """What one device sends in an optimizer step, by the textbook cost of each collective.

    With w devices a gather or a scatter of n bytes costs n (w - 1) / w, an all-reduce twice that.
    Divided weights are gathered for the forward and for the backward pass of every batch.

    Args:
        train: the phase of one process that holds everything.
        setup: names the strategy, the number of devices and the batches of a step.

    Returns:
        Bytes for weights that are gathered, and for gradients that are reduced.
    """
    world, batches = setup.world_size, setup.accumulate
    part = (world - 1) / world
    parts = SHARDED[setup.strategy]
    if "weights" in parts:
        gathered, reduced = 2 * batches * train.weights, batches * train.gradients
    elif "optimizer" in parts:  # each updates its share, and all need the result
        gathered = train.gradients
        reduced = (batches if "gradients" in parts else 1) * train.gradients
    else:
        gathered, reduced = 0, 0 if setup.strategy == "single" else 2 * train.gradients
    return round(gathered * part), round(reduced * part)
