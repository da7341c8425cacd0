"""Least-squares refits against numpy-style oracles in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plprune.compensate import LeastSquares, refit
from plprune.errors import ConfigError, PlanError
from plprune.stats.base import fold
from plprune.stats.gram import Gram

ROWS, COLS, TOKENS = 5, 12, 200


def inputs(tokens: int = TOKENS, mean: float = 0.0) -> Tensor:
    """[N, C] correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, COLS, generator=generator, dtype=torch.float64) @ mix + mean


def matrix() -> Tensor:
    """[R, C] weights."""
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEEP = torch.arange(COLS) % 3 != 1


def seen(x: Tensor) -> Any:
    """Statistic of all rows."""
    return fold(Gram.zero(COLS), x)


def test_without_ridge_it_is_the_least_squares_solution():
    x, w = inputs(), matrix()
    new = refit(w, x.T @ x, KEEP, 1e-14)
    best = torch.linalg.lstsq(x[:, KEEP], x @ w.T).solution.T
    torch.testing.assert_close(new[:, KEEP], best, rtol=1e-9, atol=1e-9)
    assert torch.equal(new[:, ~KEEP], w[:, ~KEEP])


def test_it_is_the_surgeon_s_formula():
    """W - W_P [(H^-1)_PP]^-1 (H^-1)_P,: for all removed inputs at once."""
    x, w = inputs(), matrix()
    inverse = torch.linalg.inv(x.T @ x)
    go = ~KEEP
    surgeon = w - w[:, go] @ torch.linalg.inv(inverse[go][:, go]) @ inverse[go]
    assert float(surgeon[:, go].abs().max()) < 1e-9
    new = refit(w, x.T @ x, KEEP, 1e-14)
    torch.testing.assert_close(new[:, KEEP], surgeon[:, KEEP], rtol=1e-9, atol=1e-9)


def test_with_ridge_it_is_least_squares_with_more_rows():
    x, w, ridge = inputs(), matrix(), 0.3
    d = ridge * float((x.T @ x).diagonal()[KEEP].mean())
    extra = torch.eye(int(KEEP.sum()), dtype=torch.float64) * d**0.5
    rows = torch.cat([x[:, KEEP], extra])
    wanted = torch.cat([x @ w.T, extra @ w[:, KEEP].T])
    best = torch.linalg.lstsq(rows, wanted).solution.T
    new = refit(w, x.T @ x, KEEP, ridge)
    torch.testing.assert_close(new[:, KEEP], best, rtol=1e-9, atol=1e-9)


def error(x: Tensor, w: Tensor, new: Tensor, bias: Tensor | float = 0.0) -> float:
    """Squared change of the output."""
    return float((x @ w.T - (x[:, KEEP] @ new[:, KEEP].T + bias)).square().sum())


def test_every_other_weight_is_worse():
    x, w = inputs(), matrix()
    best = error(x, w, refit(w, x.T @ x, KEEP, 1e-12))
    assert best < 0.9 * error(x, w, w)
    for seed in range(20):
        nudge = torch.randn(
            ROWS, COLS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert error(x, w, refit(w, x.T @ x, KEEP, 1e-12) + 1e-3 * nudge) > best


def test_weight_and_bias_are_optimal_together():
    x, w = inputs(mean=2.0), matrix()
    bias = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    new, new_bias = LeastSquares(ridge=1e-14).solve(w, bias, seen(x), KEEP)
    assert new_bias is not None
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x[:, KEEP], ones], 1), x @ w.T + bias).solution.T
    torch.testing.assert_close(new[:, KEEP], best[:, :-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(new_bias, best[:, -1], rtol=1e-8, atol=1e-8)
    shifted = error(x, w, new, new_bias - bias)
    assert shifted < error(x, w, refit(w, x.T @ x, KEEP, 1e-14))


def test_a_strong_ridge_leaves_the_bias_of_flap():
    """With weights that may not move, what is left is W_D mean(x_D)."""
    x, w = inputs(mean=2.0), matrix()
    new, bias = LeastSquares(ridge=1e12).solve(w, torch.zeros(ROWS), seen(x), KEEP)
    torch.testing.assert_close(new[:, KEEP], w[:, KEEP], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, w[:, ~KEEP] @ x.mean(0)[~KEEP], rtol=1e-6, atol=1e-6)


def test_a_linear_without_bias_gets_none():
    new, bias = LeastSquares().solve(matrix(), None, seen(inputs(mean=2.0)), KEEP)
    assert bias is None
    assert new.shape == (ROWS, COLS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:3],  # fewer tokens than inputs
        lambda x: x * (torch.arange(COLS) > 6),  # dead inputs
        lambda x: torch.ones_like(x),  # constant ones
        lambda x: x * 0,  # nothing ever speaks
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_poor_statistics_give_finite_weights(spoil: Any, biased: bool):
    x, w = spoil(inputs()), matrix()
    new, bias = LeastSquares().solve(w, torch.zeros(ROWS) if biased else None, seen(x), KEEP)
    assert bool(torch.isfinite(new).all())
    assert error(x, w, new, 0.0 if bias is None else bias) <= error(x, w, w) * (1 + 1e-9)


def test_what_cannot_be_solved_is_refused():
    wrong = -torch.eye(COLS, dtype=torch.float64)
    wrong[0, 0] = 100.0
    with pytest.raises(
        PlanError, match=r"not positive definite.*8 inputs.*raise compensation.ridge"
    ):
        refit(matrix(), wrong, KEEP, 0.01)


@pytest.mark.parametrize("ridge", [0, -1.0, float("inf"), float("nan"), "0.1"])
def test_a_ridge_out_of_range_is_refused(ridge: Any):
    with pytest.raises(ConfigError, match="ridge"):
        LeastSquares(ridge=ridge)
