"""Zeros that stay zero while a model is trained: their gradients are cleared.

Weights without gradient and without momentum do not move: not by SGD and the Adam family, nor by
weight decay. Nothing needs to be stored; the zeros themselves say which entries they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from plprune.describe import describe
from plprune.errors import PlanError
from plprune.lit.strategies import adapter_for
from plprune.sharded import part, whole
from plprune.surgery.linear_like import base_of
from plprune.unwrap import unwrap


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and weights of the linears in the blocks; adapters left out.

    Args:
        model: plain or wrapped.
    """
    plain = unwrap(model)
    for name in describe(plain).linears:
        yield name, cast(nn.Parameter, base_of(plain.get_submodule(name)).weight)


def count_zeros(model: nn.Module) -> dict[str, int]:
    """Zeros of every linear in the blocks; collective for divided weights.

    Args:
        model: plain or wrapped.

    Returns:
        Zeros by module path.
    """
    return {name: int((whole(weight) == 0).sum()) for name, weight in weights(model)}


def share_of_zeros(model: nn.Module, counts: Mapping[str, int]) -> float:
    """Zeros over all weights of the linears in the blocks.

    Args:
        model: plain or wrapped.
        counts: from `count_zeros`.
    """
    linears = describe(unwrap(model)).linears.values()
    return sum(counts.values()) / sum(one.rows * one.cols for one in linears)


class KeptZeros:
    """The zeros of one model in one run."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        """Count them; collective.

        Args:
            trainer: running, at an optimizer-step boundary.
            model: the language model as it hangs in the LightningModule.
        """
        self.model = model
        """The language model."""
        self._sees = adapter_for(trainer.strategy).gradients_in_module
        self._hooked: dict[int, Any] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self.counts: dict[str, int] = {}
        """Zeros by module path, at the last look."""
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Count again, after the weights were changed by something else than training; collective.

        Args:
            trainer: running.
        """
        adapter_for(trainer.strategy).rest(trainer)
        self._weights = dict(weights(self.model))
        self.counts = count_zeros(self.model)
        if not self._sees:
            self._hook()

    def _hook(self) -> None:
        """Clear gradients on their way to an engine that hides them."""
        for parameter in self._weights.values():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                handle = parameter.register_hook(_clear(parameter))  # type: ignore[no-untyped-call]
                self._hooked[id(parameter)] = handle

    def changed(self) -> bool:
        """Whether a cut has put other tensors in the place of those that were counted."""
        return any(
            known is not now
            for known, now in zip(
                self._weights.values(), (weight for _, weight in weights(self.model)), strict=True
            )
        )

    def clear(self) -> None:
        """Clear the gradients of zeros, where the modules have them; before clipping."""
        if not self._sees:
            return
        for parameter in self._weights.values():
            if parameter.grad is not None:
                with torch.no_grad():
                    part(parameter.grad).masked_fill_(part(parameter) == 0, 0)

    def require_kept(self, trainer: Trainer) -> None:
        """Count again and compare; collective.

        Args:
            trainer: running, at an optimizer-step boundary.

        Raises:
            PlanError: naming a linear that has fewer zeros than before.
        """
        before = self.counts
        self.look(trainer)
        for name, count in self.counts.items():
            if count < before[name]:
                raise PlanError(
                    "zeros did not stay",
                    given=f"{count} in {name}, {before[name]} before",
                    allowed="optimizers that leave weights alone that have no gradient and no "
                    "moments (SGD, Adam, AdamW)",
                    fix="use one of those, or leave plprune.callbacks.KeepMasks out",
                )

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()


def _clear(parameter: nn.Parameter) -> Any:
    def hook(grad: Tensor) -> Tensor:
        values = parameter.data
        if values.shape != grad.shape:
            raise PlanError(
                "a gradient has another shape than its weight",
                given=f"{tuple(grad.shape)} for {tuple(values.shape)}",
                allowed="weights that are complete during the backward pass",
                fix="report this with the strategy you use",
            )
        return grad.masked_fill(values == 0, 0)

    return hook
