"""Logical pruning: multiply the inputs of the consuming linears by 0/1 instead of cutting them.

Exact for forward, gradients and element-wise optimizers (SGD, Adam family): the removed units
contribute nothing and their weights get zero gradients. Not for optimizers that mix entries, such
as Muon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plprune.spec import Spec
from plprune.unwrap import unwrap


class LogicalMasks:
    """Masks of one model; they live in hooks, never in parameters or buffers."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __len__(self) -> int:
        """Number of masked module inputs."""
        return len(self._handles)

    def attach(self, model: nn.Module, spec: Spec) -> None:
        """Mask the entries a spec lists as dead; earlier masks of this object are taken off first.

        Args:
            model: plain or wrapped model in the coordinates of `spec`.
            spec: after `Spec.cut(..., physical=False)`.
        """
        self.remove()
        plain = unwrap(model)
        for (path, side), dead in spec.dead.items():
            if side == "out" and bool(dead.all()) and (path, "in") in spec.dead:
                # The last linear of a removed sublayer: its bias goes too. All stays in the graph,
                # because DDP waits for the gradient of every parameter.
                self._handles.append(
                    plain.get_submodule(path).register_forward_hook(_silent, prepend=True)
                )
            if side == "in":
                hook = _multiply(~dead)
                self._handles.append(
                    plain.get_submodule(path).register_forward_pre_hook(hook, prepend=True)
                )
        _recompile()

    def remove(self) -> None:
        """Take all masks off."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            _recompile()


def _multiply(keep_C: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal keep_C
        x = args[0]
        if keep_C.device != x.device:
            keep_C = keep_C.to(x.device)
        return (x * keep_C.to(x.dtype), *args[1:])

    return hook


def _silent(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out * 0


def _recompile() -> None:
    # Compiled graphs are not guarded on hooks: without this they would run without the new masks.
    torch.compiler.reset()
