"""A first look over the dense model, for allocations that divide single weights.

Methods that go block by block see what pruned blocks make of the text. How much of each block goes
must be known before the first: a number of every block of the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from plprune import dist
from plprune.allocation import Allocation
from plprune.drivers.blocks import Stream
from plprune.progress import Shown
from plprune.streaming.work import Work


def look(stream: Stream, allocation: Allocation, start: int = 0) -> Iterator[tuple[int, float]]:
    """What an allocation notes of the model as it is, one block at a time.

    Args:
        stream: in front of block `start`; afterwards in front of the last one.
        allocation: says what to look at, and makes a number of it.
        start: first block to look at.

    Yields:
        Number of a block and what was noted; equal on all ranks.
    """
    source = stream.source
    for number in range(start, len(source)):
        part = source.spec.of_block(number)
        with source.block(number) as block:
            last = number + 1 == len(source)
            seen = stream.observe(number, block, allocation.taps(part), forward=not last)
            # All take part where the weights are divided; one number counts.
            own = allocation.notes(stream.view(part, seen))[number]
        yield number, float(dist.sent(torch.tensor(own, dtype=torch.float64), 0))


def noted(
    work: Work,
    allocation: Allocation,
    blocks: int,
    stream: Callable[[int], Stream],
    shown: Shown,
) -> dict[int, float]:
    """What an allocation notes of every block of a folder; a killed run goes on where it was.

    Args:
        work: keeps the numbers.
        allocation: as in `look`.
        blocks: how many there are.
        stream: makes the stream in front of a block of the dense model.
        shown: shows progress.

    Returns:
        By block; empty if the allocation looks at nothing.
    """
    notes = dict(enumerate(work.notes()))
    if not allocation.needs_data or len(notes) == blocks:
        return notes
    start = len(notes)
    at_start, told = stream(start), shown("a first look over the dense model")
    for number, note in look(at_start, allocation, start):
        notes[number] = note
        with dist.together():
            if dist.rank() == 0:
                work.keep_note(number, note)
        told(number + 1, blocks)
    return notes
