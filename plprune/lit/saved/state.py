"""A checkpoint as data: weights and moments by name, and all that is no tensor."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune.errors import CheckpointError, first_line

PARTS = "plprune"
"""Key of what plprune adds to a checkpoint."""
GROUPS = "optimizer"
"""The part that says which parameters each optimizer group has."""

Read = Callable[[str, str | None, int, int], Tensor]
"""(parameter, key of the optimizer's state or None for the weight, first entry, one after the last)
-> those entries of the complete tensor, counted row after row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedState:
    """Content of a checkpoint; nothing large is read before it is asked for."""

    where: str
    """For messages."""
    rest: dict[str, Any]
    """What Lightning saved besides weights and optimizers: loops, callbacks, schedulers, parts."""
    shapes: Mapping[str, tuple[int, ...]]
    """Weights by their name in the LightningModule; tied ones under each name."""
    read: Read
    """Of a weight that is trained in more precision than it computes in, the precise one."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameter -> names of the tensors an optimizer keeps for it, all of its shape."""
    scalars: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Parameter -> numbers an optimizer keeps for it, such as the step."""

    @property
    def parts(self) -> dict[str, Any]:
        """What plprune added."""
        return dict(self.rest.get(PARTS) or {})

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: `names` of their parameters, and hyperparameters.

        Raises:
            CheckpointError: for a checkpoint of another program.
        """
        part = self.parts.get(GROUPS)
        if part is None:
            raise CheckpointError(
                "the checkpoint does not say which parameters its optimizer has",
                given=self.where,
                allowed="a checkpoint of a run with plprune callbacks",
                fix="resume with the strategy and the number of processes that wrote it",
            )
        return list(part)

    def numbers(self, name: str) -> dict[str, Any]:
        """Copies of the scalars of a parameter: optimizers count in place.

        Args:
            name: of the parameter.
        """
        own = self.scalars.get(name, {})
        return {key: v.clone() if isinstance(v, Tensor) else v for key, v in own.items()}

    def tensor(self, name: str, key: str | None = None) -> Tensor:
        """A complete weight, or a complete tensor of an optimizer's state.

        Args:
            name: of the parameter.
            key: of the state; None: the weight.
        """
        shape = self.shapes[name]
        return self.read(name, key, 0, math.prod(shape)).reshape(shape)


def as_checkpoint(state: SavedState) -> dict[str, Any]:
    """The dictionary that a strategy with whole weights saves in one file.

    Args:
        state: of any strategy.

    Returns:
        What Lightning restores a run from.
    """
    groups, moments, params = state.groups, dict[int, Any](), []
    for group in groups:
        numbers = range(len(moments), len(moments) + len(group["names"]))
        for number, name in zip(numbers, group["names"], strict=True):
            tensors = {key: state.tensor(name, key) for key in state.keys.get(name, ())}
            moments[number] = {**state.numbers(name), **tensors}
        hyper = {key: value for key, value in group.items() if key != "names"}
        params.append({**hyper, "params": list(numbers)})
    return {
        **state.rest,
        "state_dict": {name: state.tensor(name) for name in state.shapes},
        "optimizer_states": [
            {"state": {n: value for n, value in moments.items() if value}, "param_groups": params}
        ],
    }


def unpickled(file: Path, known: Iterable[Any] = ()) -> Any:
    """Read a file of torch without running what it may bring; tensors stay on disk until used.

    Args:
        file: written by `torch.save`.
        known: classes that may occur in it besides tensors and plain values.

    Returns:
        Its content.

    Raises:
        CheckpointError: for a damaged file, or one with other classes in it.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "the checkpoint cannot be read",
            given=f"{file} ({first_line(error)})",
            allowed="complete, as Lightning or DeepSpeed 0.19 wrote it, with plain values only",
            fix="take the checkpoint before it",
        ) from error
