"""Checks and reading that all strategies share when they take over another one's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from plprune.errors import CheckpointError
from plprune.lit.saved.state import SavedState
from plprune.sharded import extent, full_shape, state_of


def described(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer group as plain values: names instead of tensors."""
    return {**{key: value for key, value in group.items() if key != "params"}, "names": names}


def require_same_tensors(module: nn.Module, saved: SavedState) -> None:
    """Refuse a checkpoint that lacks tensors of a model, or has others.

    Args:
        module: the LightningModule, at the size of the checkpoint.
        saved: the checkpoint.

    Raises:
        CheckpointError: naming the first tensor.
    """
    asked = {n: tuple(full_shape(t)) for n, t in state_of(module).items()}
    name = next((n for n in asked if saved.shapes.get(n) != asked[n]), None)
    name = name or next((n for n in saved.shapes if n not in asked), None)
    if name is not None:
        raise CheckpointError(
            "the checkpoint does not fit the model",
            given=f"{name} {saved.shapes.get(name, 'missing')} in {saved.where}",
            allowed=str(asked.get(name, "no such tensor")),
            fix="resume with the config of the run",
        )


def fill_part(
    mine: Tensor, like: Tensor, saved: SavedState, name: str, key: str | None = None
) -> None:
    """Read this process's part of a saved tensor.

    Args:
        mine: takes the entries, flat or not; what it has beyond them becomes zero.
        like: the complete tensor or a divided one, to know which entries these are.
        saved: the checkpoint.
        name: of the parameter.
        key: of the optimizer's state; None: the weight.
    """
    start, stop = extent(like)
    flat = mine.view(-1)
    if stop > start:
        flat[: stop - start].copy_(saved.read(name, key, start, stop))
    flat[stop - start :].zero_()


def require_same_optimizer(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Refuse an optimizer of another kind than that of a checkpoint.

    Args:
        groups: of the optimizer, described.
        saved: of the checkpoint.

    Raises:
        CheckpointError: naming what differs.
    """
    counts = [len(group["names"]) for group in groups], [len(group["names"]) for group in saved]
    # Schedulers leave marks of their own in groups.
    kinds = [{key for group in gs for key in group if "lr" not in key} for gs in (groups, saved)]
    if counts[0] != counts[1] or kinds[0] != kinds[1]:
        given, allowed = (
            f"groups of {', '.join(map(str, count))} tensors with {', '.join(sorted(kind))}"
            for count, kind in zip(counts, kinds, strict=True)
        )
        raise CheckpointError(
            "the checkpoint was written with another optimizer",
            given=given,
            allowed=allowed,
            fix="resume with the optimizer and the base model of the run",
        )


def fill_groups(groups: list[dict[str, Any]], saved: SavedState) -> None:
    """Give optimizer groups the hyperparameters of a checkpoint.

    Args:
        groups: of the optimizer.
        saved: the checkpoint.

    Raises:
        CheckpointError: if it has another number of groups.
    """
    count = len(groups)
    if count != len(saved.groups):
        raise CheckpointError(
            "the optimizer has other groups than that of the checkpoint",
            given=f"{count} groups",
            allowed=f"{len(saved.groups)}, as in {saved.where}",
            fix="resume with the optimizer of the run",
        )
    for group, there in zip(groups, saved.groups, strict=True):
        group.update({key: value for key, value in there.items() if key != "names"})
