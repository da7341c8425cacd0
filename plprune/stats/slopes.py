"""How fast the loss changes with the weights of a linear, summed up by row and by column.

With g = (1/N) sum_n g_n the gradient of the mean loss of N sequences and F = (1/N) sum_n g_n^2, the
diagonal Fisher approximation of the Hessian (Ma, Fang and Wang, "LLM-Pruner", NeurIPS 2023):

    vector    sum_j w_j g_j
    first     sum_j |w_j g_j|
    mixed     sum_j |w_j g_j - w_j^2 F_j / 2|
    second    sum_j w_j^2 F_j

over the weights j of a row or a column. Gradients add over sequences, these sums do not: they are
made when all of them have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from plprune.stats.base import Stat, zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class Slopes(Stat):
    """Sums of the rows (R) and columns (C) of one linear; `n` counts sequences."""

    vector_R: Tensor
    vector_C: Tensor
    first_R: Tensor
    first_C: Tensor
    mixed_R: Tensor
    mixed_C: Tensor
    second_R: Tensor
    second_C: Tensor

    backward: ClassVar[bool] = True

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """Sums of C columns and no row, for their size alone."""
        empty = {
            f"{kind}_{side}": zeros(channels if side == "C" else 0, device=device)
            for kind in ("vector", "first", "mixed", "second")
            for side in "RC"
        }
        return cls(n=zeros(device=device), **empty)

    def update(self, x_NC: Tensor) -> Self:
        """Not from activations alone."""
        raise NotImplementedError("made by `of`, from gradients")

    @classmethod
    def of(cls, weight_RC: Tensor, gradient_RC: Tensor, squares_RC: Tensor, count: int) -> Self:
        """Sum up.

        Args:
            weight_RC: [R, C].
            gradient_RC: [R, C], sum of the gradients of all sequences.
            squares_RC: [R, C], sum of their squares.
            count: number of sequences.

        Returns:
            The sums in float64, on the device of the weight.
        """
        weight = weight_RC.double()
        slope = weight * gradient_RC.double() / count
        curve = weight.square() * squares_RC.double() / count
        values = {
            "vector": slope,
            "first": slope.abs(),
            "mixed": (slope - curve / 2).abs(),
            "second": curve,
        }
        sums = {}
        for kind, value in values.items():
            sums[f"{kind}_R"], sums[f"{kind}_C"] = value.sum(1), value.sum(0)
        return cls(n=torch.tensor(float(count), dtype=torch.float64, device=weight.device), **sums)
