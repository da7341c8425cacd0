"""Carry out a plan for the whole model block by block: observe densely first, refit as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from plprune import dist
from plprune.compensate import Compensation
from plprune.drivers.beside import Beside
from plprune.drivers.blocks import Stream, apply_part
from plprune.observe import StatMap
from plprune.plan import Keep, Plan, Write
from plprune.spec import Spec
from plprune.stats.base import Stat, Tap
from plprune.streaming.blocks import Blocks
from plprune.surgery.lower import lower
from plprune.surgery.written import bias_of, weight_of


def observe_whole(
    stream: Stream, taps: Sequence[Tap], start: int = 0
) -> Iterator[tuple[int, StatMap]]:
    """Statistics of the whole model, one block at a time.

    Args:
        stream: in front of block `start`; afterwards in front of the last one.
        taps: anywhere in blocks.
        start: first block to look at.

    Yields:
        Number of a block and its sums over all ranks, on the CPU.
    """
    source = stream.source
    for number in range(start, len(source)):
        place = f"{source.spec.stack}.{number}"
        own = [tap for tap in taps if f"{tap.module}.".startswith(f"{place}.")]
        with source.block(number) as block:
            last = number + 1 == len(source)
            yield number, stream.observe(number, block, own, forward=not last)


def by_block(plan: Plan, spec: Spec) -> dict[int, tuple[Keep, ...]]:
    """Edits of a plan for the whole model, by block.

    Args:
        plan: of `Keep` edits.
        spec: it was made for.
    """
    found: dict[int, list[Keep]] = {}
    for edit in plan.edits:
        assert isinstance(edit, Keep), "methods of order whole keep units"
        found.setdefault(spec.axes[edit.axis].block, []).append(edit)
    return {block: tuple(edits) for block, edits in found.items()}


def carry_out(
    stream: Stream,
    number: int,
    block: nn.Module,
    plan: Plan,
    compensation: Compensation | None,
    beside: Beside | None = None,
    known: StatMap | None = None,
) -> list[Plan]:
    """Do what a plan for the whole model says of one block.

    Units are taken away consumer by consumer: a later one is refitted on what earlier ones left.
    Beside a dense model, linears that lose nothing are refitted too.

    Args:
        stream: at this block; nothing is run without a compensation.
        number: of the block.
        block: with its weights; changed in place.
        plan: made for the model as it was; `Keep` edits.
        compensation: new weights for what reads from units that go.
        beside: the dense model at this block, for a compensation that follows it.
        known: what was seen in this block of the dense model; None: `stream` is looked at.

    Returns:
        What was done; `stream.source.spec` is up to date.
    """
    source, done = stream.source, []
    cuts = _by_consumer(source.spec, plan, number)
    for consumer in beside.look(number, block) if beside is not None else cuts:
        part = replace(plan, edits=tuple(cuts.get(consumer, ())))
        if beside is not None and not beside.parted(cut=bool(part.edits)):
            continue
        if compensation is not None:
            tap = Tap(module=consumer, stat=compensation.stat)
            seen: Stat
            if beside is not None:
                seen = beside.toward(stream, number, block, consumer)
            else:
                there = stream.observe(number, block, (tap,)) if known is None else known
                seen = there[tap]
            part = refitted(source, part, consumer, compensation, seen)
        apply_part(source, part)
        done.append(dist.agree(part))
    return done


def _by_consumer(spec: Spec, plan: Plan, number: int) -> dict[str, list[Keep]]:
    """Edits of a block by the linear that reads the units, in the order of the block."""
    found: dict[str, list[Keep]] = {}
    for edit in plan.edits:
        assert isinstance(edit, Keep), "methods of order whole keep units"
        axis = spec.axes[edit.axis]
        if axis.block == number:
            found.setdefault(axis.reader.module, []).append(edit)
    return {name: found[name] for name in spec.consumers() if name in found}


def refitted(
    source: Blocks, plan: Plan, consumer: str, compensation: Compensation, seen: Stat
) -> Plan:
    """Add what a compensation writes into one consumer.

    Args:
        source: the model, with the consumer's weights.
        plan: takes units away from it, or none.
        consumer: module path.
        compensation: decides.
        seen: of its inputs.
    """
    spec, module = source.spec, source.model.get_submodule(consumer)
    lowered = lower(replace(plan, fingerprint=spec.fingerprint), spec)
    weight, bias = weight_of(module), bias_of(module)
    every = torch.ones(spec.linears[consumer].cols, dtype=torch.bool)
    keep = lowered.get((consumer, "in"), every)
    weight, bias = compensation.solve(weight, bias, seen, keep)
    write = Write(module=consumer, weight=weight, bias=bias)
    return replace(plan, edits=(*plan.edits, write))
