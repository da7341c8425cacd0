"""What a DeepSpeed engine knows beyond the weights, kept while the next engine is built.

Tensors are put together one at a time, cut, and kept by one rank each; under stage 3 the flat
tensors they came from go sub-group by sub-group, and come back likewise, so that no rank ever holds
much more than its share. Accelerators keep nothing: the host's memory does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plprune.lit.strategies.zero_state import (
    MASTER,
    complete,
    flats_of,
    is_stage_3,
    link_all,
    make_state,
    members_of,
    put,
    trained,
)
from plprune.surgery.state import Cuts, cut

_COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")


@dataclass
class Snapshot:
    """What training knows beyond the working copy of the weights."""

    counters: dict[str, int]
    """Of the engine."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """State that is one number a tensor, such as the step."""
    keys: tuple[str, ...] = ()
    """Names of state tensors of the parameter's shape."""
    owner: dict[str, int] = field(default_factory=dict)
    """Parameter -> rank that keeps it."""
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(parameter, master or key) -> complete tensor, on its keeper."""
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    """Parameter -> shape after the cut."""


def take(strategy: Any, root: nn.Module, cuts: Mapping[str, Cuts], *, reset: bool) -> Snapshot:
    """Take masters and moments out of an engine that will not be used again; collective.

    Args:
        strategy: `ZeRO` with its engine.
        root: the LightningModule.
        cuts: what will be cut, by name in it.
        reset: leave the optimizer's state behind.

    Returns:
        The snapshot. Masters of float32 weights are not in it: the weights are the same numbers.
    """
    engine, zero = strategy.model, strategy.model.optimizer
    saved = Snapshot(counters={name: getattr(engine, name) for name in _COUNTERS})
    if not reset:
        _note_state(zero, saved)
    names = {parameter: name for name, parameter in trained(root)}
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, members in enumerate(members_of(zero)):
        mine = [(names[parameter], parameter) for parameter in members if parameter in names]
        for name, _ in mine:
            saved.owner[name] = len(saved.owner) % world
        for key in (MASTER, *saved.keys):
            for name, parameter in mine:
                if key in _copies(parameter, saved):
                    smaller = cut(complete(parameter, key), cuts.get(name, ()))
                    saved.shapes[name] = smaller.shape
                    if saved.owner[name] == rank:
                        saved.tensors[name, key] = smaller.cpu()
                    del smaller
            if is_stage_3(zero):
                _let_go(zero, number, key)
    return saved


def put_back(strategy: Any, root: nn.Module, saved: Snapshot) -> None:
    """Give the next engine what the last one knew; collective, empties the snapshot.

    Args:
        strategy: `ZeRO` with its new engine.
        root: the LightningModule.
        saved: from `take`.
    """
    engine, zero = strategy.model, strategy.model.optimizer
    for name, value in saved.counters.items():
        setattr(engine, name, value)
    names = {parameter: name for name, parameter in trained(root)}
    groups = [[names[p] for p in members if p in names] for members in members_of(zero)]
    # One step count serves all tensors of a flat one: those that are new do not start at 0 beside
    # others that go on. Alone they do.
    goes_on = bool(saved.keys) and any(n in saved.owner for group in groups for n in group)
    if goes_on and not is_stage_3(zero):
        make_state(zero, saved.keys, saved.scalars)
    named = dict(root.named_parameters())
    for number, group in enumerate(groups):
        if goes_on and is_stage_3(zero):
            make_state(zero, saved.keys, saved.scalars, only=number)
        for name in group:
            if name in saved.owner:  # otherwise trainable only now
                _send(strategy.root_device, named[name], name, saved)


def _copies(parameter: nn.Parameter, saved: Snapshot) -> tuple[str, ...]:
    """What exists of a parameter beside its working copy."""
    exact = parameter.dtype == torch.float32
    return saved.keys if exact else (MASTER, *saved.keys)


def _send(device: torch.device, parameter: nn.Parameter, name: str, saved: Snapshot) -> None:
    for key in _copies(parameter, saved):
        full = saved.tensors.pop((name, key), None)
        if full is None:
            full = torch.empty(saved.shapes[name], dtype=torch.float32, device=device)
        full = full.to(device)
        dist.broadcast(full, saved.owner[name])
        put(parameter, key, full)


def _note_state(zero: Any, saved: Snapshot) -> None:
    link_all(zero)
    for flat, state in zero.optimizer.state.items():
        same = {k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}
        saved.keys = tuple(sorted(same))
        saved.scalars = {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in state.items()
            if key not in same
        }
        break


def _let_go(zero: Any, number: int, key: str) -> None:
    """Free the flat tensor of a sub-group; nothing reads it any more."""
    flat = flats_of(zero)[number]
    if key == MASTER:
        # Moments are found by their master: it stays, without its values.
        flat.data = flat.data.new_empty(0)
    else:
        zero.optimizer.state[flat].pop(key)
