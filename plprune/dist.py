"""Collectives the engine needs; on one process they are the identity."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from plprune.errors import PlanError, PlpruneError
from plprune.observe import StatMap
from plprune.plan import Plan

_PATIENCE = 3.0
"""Seconds in which processes that found the same mistake come to say it."""


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def summed(tensor: Tensor) -> Tensor:
    """Sum of a tensor over ranks, on its device."""
    if world_size() == 1:
        return tensor
    total = tensor.to(_reachable(tensor.device), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def sent(tensor: Tensor, owner: int) -> Tensor:
    """What one rank holds, on all of them.

    Args:
        tensor: on `owner` the values, elsewhere any of the same shape and dtype.
        owner: rank.

    Returns:
        Its values, on the device of `tensor`.
    """
    if world_size() == 1:
        return tensor
    moved = tensor.to(_reachable(tensor.device), copy=True).contiguous()
    dist.broadcast(moved, owner)
    return moved.to(tensor.device)


def joined(numbers_N: Tensor) -> Tensor:
    """Numbers of all ranks, one rank's after the other's. Collective.

    Args:
        numbers_N: [N] int64 on the CPU, as many as this rank has.

    Returns:
        [M] int64, M the sum of all N.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(numbers_N)
    counts = summed(counts)
    every = torch.zeros(int(counts.sum()), dtype=torch.int64)
    first = int(counts[: rank()].sum())
    every[first : first + len(numbers_N)] = numbers_N
    return summed(every)


def all_alike(number: int) -> int | None:
    """A number that is the same on every rank; None if it is not. Collective.

    Args:
        number: this rank's.
    """
    everyone = torch.zeros(world_size(), dtype=torch.int64)
    everyone[rank()] = number
    everyone = summed(everyone)
    return number if bool((everyone == number).all()) else None


def _reachable(device: torch.device) -> torch.device:
    """Where a collective can meet a tensor: NCCL moves no CPU tensors."""
    only_cuda = dist.get_backend() == "nccl" and device.type == "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if only_cuda else device


def reduce(stats: StatMap) -> StatMap:
    """Sum statistics over ranks, in a fixed order of taps.

    Args:
        stats: the same taps on every rank.

    Returns:
        Sums over all ranks, equal everywhere.
    """
    if world_size() == 1:
        return stats
    reduced: StatMap = {}
    for tap in sorted(stats, key=lambda tap: (tap.module, tap.until, tap.stat.__name__)):
        reduced[tap] = stats[tap].mapped(lambda _, value: summed(value))
    return reduced


@contextmanager
def together() -> Iterator[None]:
    """Work without collectives in which an error of one rank becomes an error of all.

    Without it the others would wait for the rank that gave up until the time-out of the group.

    Raises:
        PlpruneError: on the ranks that did well, naming the first that did not and why; on the
            others their own error goes on.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if world_size() == 1:
        if own is not None:
            raise own
        return
    failed = torch.tensor(0 if own is None else 1, device=_reachable(torch.device("cpu")))
    dist.all_reduce(failed)
    if not int(failed):
        return
    said: list[str | None] = [None] * world_size()
    dist.all_gather_object(said, None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
    heard = PlpruneError(f"another process stopped this run: rank {rank} says {text}")
    heard.repeats = text.partition(": ")[2]
    raise heard


def first_to_say(text: str) -> bool:
    """Whether no other process of the group has said the same before, so that logs hold it once.

    Args:
        text: of an error that several processes may find.
    """
    if world_size() == 1:
        return True
    key = "plprune/said/" + hashlib.sha256(text.encode()).hexdigest()
    try:
        store = dist.distributed_c10d._get_default_store()
        first = int(store.add(key, 1)) == 1
        until = time.monotonic() + _PATIENCE
        # The store lives in rank 0, which is about to end: the others may come and ask a bit later.
        while rank() == 0 and store.add(key, 0) < world_size() and time.monotonic() < until:
            time.sleep(0.05)
    except (AttributeError, RuntimeError):  # rank 0 is gone
        return True
    return first


def agree(plan: Plan) -> Plan:
    """Refuse plans that differ between ranks.

    Args:
        plan: this rank's plan.

    Returns:
        The plan.

    Raises:
        PlanError: on every rank, if any rank decided differently.
    """
    if world_size() > 1:
        number = int(plan.hash, 16) % (1 << 62)
        value = torch.tensor(number, device=_reachable(torch.device("cpu")))
        least, most = value.clone(), value.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if int(least) != int(most):
            raise PlanError(
                "ranks made different plans",
                given=f"hash {plan.hash} here",
                allowed="one plan on all ranks",
                fix="use the same seed, data and library versions on every rank",
            )
    return plan
