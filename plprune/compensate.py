"""Repair what reads from units that go, so that it gives what it gave before, without training.

Legend: R rows, C columns of a consumer (attention output, down projection), K columns that stay,
D columns that go. Sums run over N calibration tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from plprune.budget import require_numbers
from plprune.errors import ConfigError, PlanError
from plprune.stats.base import Stat
from plprune.stats.gram import Gram
from plprune.stats.moments import Moments
from plprune.stats.toward import Toward


class Compensation(ABC):
    """What follows a structured selection. Subclasses are frozen dataclasses."""

    stat: ClassVar[type[Stat]]
    """What it must know of the inputs of a linear that loses some of them."""
    of_dense: ClassVar[bool] = False
    """Whether these are inputs in the model as it was, not behind earlier cuts."""

    @property
    def gives_biases(self) -> bool:
        """Whether linears without bias get one, which a model that is trained cannot take."""
        return False

    @property
    def follows_dense(self) -> bool:
        """Whether it also looks at the model as it was (`Toward`), which `plprune prune` can."""
        return False

    @abstractmethod
    def solve(
        self, weight_RC: Tensor, bias_R: Tensor | None, seen: Stat, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """New weights of one linear.

        Args:
            weight_RC: [R, C] as it is.
            bias_R: [R], or None without one.
            seen: of class `stat`, sums over calibration tokens; a `Toward` where the model as it
                was runs beside the one that is cut.
            keep_C: [C] bool, inputs that stay; at least one goes, or `seen` is a `Toward`.

        Returns:
            [R, C] and [R] or None, any float dtype; what columns that go hold does not matter.

        Raises:
            PlanError: if there is no solution.
        """

    def hyper(self) -> dict[str, Any]:
        """Settings as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}


def refit(
    weight_RC: Tensor,
    second_CC: Tensor,
    keep_C: Tensor,
    ridge: float,
    missed_RC: Tensor | None = None,
) -> Tensor:
    """Weights on the inputs that stay, so that the output changes least.

    Minimises, over W', the sum over tokens of |W x + e - W' x_K|^2 plus d |W' - W_K|^2 with
    d = ridge * mean(diag G_KK); e is what the output lacks already:

        W' = W_K + (W_D G_DK + E_K) (G_KK + d I)^-1,    G = sum x x^T,    E = sum e x^T

    Without ridge and e this is W G_{:,K} G_KK^-1, the optimum of optimal brain surgery for the
    whole set of inputs at once (Hassibi and Stork 1993; for structures: SlimGPT, arXiv
    2412.18110).

    Args:
        weight_RC: [R, C] as it is.
        second_CC: [C, C] sums of x x^T, or of the centred x, over tokens.
        keep_C: [C] bool.
        ridge: > 0, share of the mean diagonal.
        missed_RC: [R, C] sums of e x^T over tokens; None: nothing is lacking.

    Returns:
        [R, C] float64; columns that go are as they were.

    Raises:
        PlanError: if the system cannot be solved.
    """
    W, G = weight_RC.double(), second_CC.double()
    stay, go = torch.nonzero(keep_C)[:, 0], torch.nonzero(~keep_C)[:, 0]
    G_DK, G_KK = G[go][:, stay], G[stay][:, stay]
    scale = G_KK.diagonal().mean()
    new = W.clone()
    if float(scale) > 0:  # otherwise nothing that stays ever speaks: there is nothing to lean on
        G_KK.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(G_KK)
        if int(failed) != 0:
            raise PlanError(
                "the least-squares system is not positive definite",
                given=f"{len(stay)} inputs, ridge {ridge}",
                fix="raise compensation.ridge, or use more calibration tokens",
            )
        lost_RK = W[:, go] @ G_DK
        if missed_RC is not None:
            lost_RK += missed_RC[:, stay]
        new[:, stay] += torch.cholesky_solve(lost_RK.T, factor).T
    return new


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Compensation):
    """Refit every consumer on the inputs that stay; the bias, where there is one, with it.

    A linear with bias is refitted on centred inputs and its bias takes up the mean that is lost,
    b' = b + W mean(x) - W' mean(x_K), which contains the bias compensation of FLAP (arXiv
    2312.11983) and is optimal together with W'. A linear without bias stays one.
    """

    stat: ClassVar[type[Stat]] = Gram
    ridge: float = 0.01
    """Pull towards the weights as they were, as a share of the mean squared input."""
    add_bias: bool = False
    """Also give a bias to linears that have none; not while a model is trained."""
    drift: float = 0.0
    """In [0, 1]: also undo this share of what earlier cuts did to the residual stream. From the
    first cut on every consumer is refitted, cut or not, to

        y = (1 - drift) W x + drift (dense stream behind it - pruned stream in front of it),

    x being its inputs in the pruned model. The dense model's hidden states run beside the pruned
    one's, so only `plprune prune` can; correcting everything fits what the calibration tokens
    happen to hold, a third has been best."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: unless the ridge is above 0 and the drift in [0, 1].
        """
        require_numbers(self, "compensation")
        if not 0 <= self.drift <= 1:
            raise ConfigError(
                "compensation.drift is out of range", given=str(self.drift), allowed="0 to 1"
            )
        if not 0 < self.ridge < float("inf"):
            raise ConfigError(
                "compensation.ridge is out of range", given=str(self.ridge), allowed="above 0"
            )

    @property
    def gives_biases(self) -> bool:
        """See `add_bias`."""
        return self.add_bias

    @property
    def follows_dense(self) -> bool:
        """See `drift`."""
        return self.drift > 0

    def solve(
        self, weight_RC: Tensor, bias_R: Tensor | None, seen: Stat, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `refit` and `drift`; float64 values."""
        gram = cast(Gram, seen)
        # Small beside the solving, and the sums are kept on the CPU.
        weight_RC = weight_RC.to(gram.n.device).double()
        aim = gram if isinstance(gram, Toward) else None
        missed_RC: Tensor | None = None
        if bias_R is None and not self.add_bias:
            if aim is not None:
                missed_RC = self.drift * (aim.yx_RC - weight_RC @ gram.xx_CC)
            return refit(weight_RC, gram.xx_CC, keep_C, self.ridge, missed_RC), None
        mean_C = gram.x_C / gram.n
        centred_CC = gram.xx_CC - gram.n * torch.outer(mean_C, mean_C)
        lost_R = weight_RC @ mean_C
        if aim is not None:
            mean_R = aim.y_R / aim.n
            centred_RC = aim.yx_RC - aim.n * torch.outer(mean_R, mean_C)
            missed_RC = self.drift * (centred_RC - weight_RC @ centred_CC)
            lost_R = lost_R + self.drift * (mean_R - _plus(bias_R, lost_R))
        new_RC = refit(weight_RC, centred_CC, keep_C, self.ridge, missed_RC)
        return new_RC, _plus(bias_R, lost_R - new_RC[:, keep_C] @ mean_C[keep_C])


@dataclass(frozen=True, kw_only=True)
class MeanBias(Compensation):
    """What goes is replaced by its mean, in the bias of what reads it (FLAP, arXiv 2312.11983).

    b' = b + W_D mean(x_D); weights stay. Means are of the model as it was, as published: behind
    cuts that leave little of a model they are worse. Linears without bias get one, which a model
    that is trained cannot take.
    """

    stat: ClassVar[type[Stat]] = Moments
    of_dense: ClassVar[bool] = True

    @property
    def gives_biases(self) -> bool:
        """Always: the mean has to go somewhere."""
        return True

    def solve(
        self, weight_RC: Tensor, bias_R: Tensor | None, seen: Stat, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The weights as they are, and the new bias in float64."""
        mean_C = cast(Moments, seen).mean_C
        gone_C = ~keep_C
        lost_R = weight_RC.to(mean_C.device).double()[:, gone_C] @ mean_C[gone_C]
        return weight_RC, _plus(bias_R, lost_R)


def _plus(bias_R: Tensor | None, more_R: Tensor) -> Tensor:
    """A bias, new or not, and more."""
    return more_R if bias_R is None else bias_R.to(more_R.device).double() + more_R
