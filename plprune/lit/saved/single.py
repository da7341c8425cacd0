"""Checkpoints of strategies with whole weights: one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune.errors import CheckpointError
from plprune.lit.saved.state import GROUPS, PARTS, SavedState, unpickled


def read(path: Path) -> SavedState:
    """Open a file without unpickling anything but tensors and plain values.

    Args:
        path: a single file.

    Returns:
        Its content; tensors stay on disk until they are used.

    Raises:
        CheckpointError: for a damaged file, or one without weights.
    """
    content = unpickled(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            "the file holds no weights", given=str(path), allowed="a Lightning checkpoint"
        )
    weights: dict[str, Tensor] = content["state_dict"]
    rest = {k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")}
    state = _state_by_name(content)

    def entries(name: str, key: str | None, start: int, stop: int) -> Tensor:
        tensor = weights[name] if key is None else state[name][key]
        return tensor.reshape(-1)[start:stop]

    shaped = {
        name: {k for k, v in own.items() if torch.is_tensor(v) and v.shape == weights[name].shape}
        for name, own in state.items()
    }
    return SavedState(
        where=str(path),
        rest=rest,
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        read=entries,
        keys={name: tuple(sorted(keys)) for name, keys in shaped.items()},
        scalars={
            n: {k: v for k, v in state[n].items() if k not in keys} for n, keys in shaped.items()
        },
    )


def _state_by_name(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """State of the only optimizer; its numbers count the parameters of its groups."""
    optimizers = content.get("optimizer_states") or []
    groups = (content.get(PARTS) or {}).get(GROUPS) or []
    if len(optimizers) != 1:
        return {}
    names = [name for group in groups for name in group["names"]]
    return {name: optimizers[0]["state"].get(number, {}) for number, name in enumerate(names)}
