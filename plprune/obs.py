"""Optimal brain surgery on one linear: drop weights column by column, let the rest make up for it.

With H = sum x x^T + damping and U the upper Cholesky factor of its inverse, U^T U = H^-1, the row
U_i / U_ii is what the columns after i must move by for every unit by which column i is changed,
when all columns before i are settled; the loss of the output is the sum of the squares of

    e_i = (w_i - q_i) / U_ii

(Frantar and Alistarh, SparseGPT, arXiv 2301.00774, section 3.3, after Hassibi and Stork 1993).

Legend: R rows, C columns of a linear, B columns that are settled together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plprune.errors import PlanError
from plprune.select import lowest_of_all, n_of_m

Choose = Callable[[Tensor, int], Tensor]
"""([R, B] scores of columns, number of the first one) -> [R, B] bool, True for what stays."""
_MOST = 1.0
"""Largest damping that is tried, as a share of the mean diagonal."""


def inverse_factor(gram_CC: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of a damped Gram matrix.

    Columns that never speak get a diagonal of their own, so that nothing moves with them. Where the
    matrix is not positive definite the damping is raised tenfold, up to 1.

    Args:
        gram_CC: [C, C] sums of x x^T; any scale.
        damping: share of the mean diagonal that is added to it, above 0.

    Returns:
        [C, C] float64, and the damping that was enough.

    Raises:
        PlanError: if none was.
    """
    H = gram_CC.double()
    diagonal = H.diagonal()
    scale = float(diagonal.mean()) or 1.0
    fill = torch.where(diagonal == 0, scale, 0.0)
    tried = damping
    while True:
        damped = H + torch.diag(fill + tried * scale)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0:
                return upper, tried
        if tried >= _MOST:
            raise PlanError(
                "second moments of the inputs cannot be inverted",
                given=f"{len(H)} inputs, damping up to {tried:g} of the mean diagonal",
                allowed="finite activations",
                fix="use more calibration tokens, or observe in float32",
            )
        tried = min(_MOST, 10 * tried)


def sweep(
    weight_RC: Tensor, upper_CC: Tensor, choose: Choose, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Settle the columns of a linear from left to right.

    Inside a block of columns every change is passed on at once, to the columns after the block as
    one product; the result is that of passing on each column to all.

    Args:
        weight_RC: [R, C].
        upper_CC: [C, C] from `inverse_factor`.
        choose: decides block by block what stays, from w^2 / U_jj^2 of the weights as they are.
        block: columns B.

    Returns:
        [R, C] float32 (float64 for float64 weights), and [R, C] bool, True for what stays. What
        goes is exactly 0.
    """
    exact = torch.promote_types(weight_RC.dtype, torch.float32)
    W, U = weight_RC.to(exact, copy=True), upper_CC.to(weight_RC.device, exact)
    keep_RC = torch.ones(W.shape, dtype=torch.bool, device=W.device)
    cols = W.shape[1]
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        part = slice(start, stop)
        errors_RB = _settle(W[:, part], U[part, part], keep_RC[:, part], start, choose)
        W[:, stop:] -= errors_RB @ U[part, stop:]
    return W, keep_RC


def _settle(W_RB: Tensor, U_BB: Tensor, keep_RB: Tensor, start: int, choose: Choose) -> Tensor:
    """Settle the columns of one block in place and return what is passed on."""
    scale_B = U_BB.diagonal()
    errors_RB = torch.empty_like(W_RB)
    width = W_RB.shape[1]
    step = getattr(choose, "step", width)
    for i in range(width):
        if i % step == 0:
            ahead = slice(i, min(i + step, width))
            keep_RB[:, ahead] = choose((W_RB[:, ahead] / scale_B[ahead]).square(), start + i)
        settled = torch.where(keep_RB[:, i], W_RB[:, i], 0.0)
        errors_RB[:, i] = (W_RB[:, i] - settled) / scale_B[i]
        W_RB[:, i] = settled
        W_RB[:, i + 1 :] -= torch.outer(errors_RB[:, i], U_BB[i, i + 1 :])
    return errors_RB


class Share:
    """Drop an equal share of every block of columns, whichever rows it falls on."""

    def __init__(self, rows: int, drop: float) -> None:
        """Set up.

        Args:
            rows: R.
            drop: share of the weights that goes.
        """
        self.rows, self.drop, self.gone = rows, drop, 0

    def __call__(self, score_RB: Tensor, first: int) -> Tensor:
        """Drop the lowest, so many that the count is exact up to here."""
        due = round(self.drop * self.rows * (first + score_RB.shape[1])) - self.gone
        self.gone += due
        return lowest_of_all(score_RB, due)


class Groups:
    """Keep N of every M neighbours in a row."""

    def __init__(self, n: int, m: int) -> None:
        """Set up.

        Args:
            n: how many stay.
            m: of how many; must divide the columns of a block.
        """
        self.n, self.step = n, m

    def __call__(self, score_RM: Tensor, first: int) -> Tensor:
        """Keep the highest of each group."""
        del first
        return n_of_m(score_RM, self.n, self.step)
