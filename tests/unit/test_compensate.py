"""Least-squares refits against numpy-style oracles in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plprune.compensate import LeastSquares, refit
from plprune.errors import ConfigError, PlanError
from plprune.stats.base import fold
from plprune.stats.gram import Gram
from plprune.stats.toward import Toward

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


# --- towards another model -----------------------------------------------------------------------


def wanted(x: Tensor) -> Tensor:
    """[N, R] what another model would say: part of it linear in the inputs, part of it not."""
    noise = torch.randn(len(x), ROWS, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return 1.5 * x @ matrix().T + (x[:, :1] * x[:, 1:2]).tanh() + 0.3 * noise + 1.0


def toward(x: Tensor, y: Tensor) -> Any:
    """Statistic of all rows."""
    return fold(Toward.zero(COLS, rows=ROWS), torch.cat([x, y], 1))


@pytest.mark.parametrize("drift", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("ridge", [1e-13, 0.3])
def test_drift_is_least_squares_to_a_blend(drift: float, ridge: float):
    x, w = inputs(), matrix()
    aim = (1 - drift) * x @ w.T + drift * wanted(x)
    d = ridge * float((x.T @ x).diagonal()[KEEP].mean())
    extra = torch.eye(int(KEEP.sum()), dtype=torch.float64) * d**0.5
    rows, said = torch.cat([x[:, KEEP], extra]), torch.cat([aim, extra @ w[:, KEEP].T])
    best = torch.linalg.lstsq(rows, said).solution.T
    repair = LeastSquares(ridge=ridge, drift=drift)
    new, bias = repair.solve(w, None, toward(x, wanted(x)), KEEP)
    assert bias is None
    torch.testing.assert_close(new[:, KEEP], best, rtol=1e-8, atol=1e-8)
    if drift:
        plain = refit(w, x.T @ x, KEEP, ridge)
        assert not torch.allclose(plain[:, KEEP], best, rtol=0.01), "the control"


@pytest.mark.parametrize("drift", [0.35, 1.0])
@pytest.mark.parametrize("biased", [True, False])
def test_drift_finds_weight_and_bias_together(drift: float, biased: bool):
    x, w = inputs(mean=2.0), matrix()
    own = torch.linspace(-1, 1, ROWS, dtype=torch.float64) if biased else None
    aim = (1 - drift) * (x @ w.T + (0 if own is None else own)) + drift * wanted(x)
    repair = LeastSquares(ridge=1e-14, drift=drift, add_bias=True)
    new, bias = repair.solve(w, own, toward(x, wanted(x)), KEEP)
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x[:, KEEP], ones], 1), aim).solution.T
    assert bias is not None
    torch.testing.assert_close(new[:, KEEP], best[:, :-1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(bias, best[:, -1], rtol=1e-7, atol=1e-7)


def test_a_linear_that_loses_nothing_can_drift():
    x, w, every = inputs(), matrix(), torch.ones(COLS, dtype=torch.bool)
    new, _ = LeastSquares(ridge=1e-14, drift=1.0).solve(w, None, toward(x, wanted(x)), every)
    best = torch.linalg.lstsq(x, wanted(x)).solution.T
    torch.testing.assert_close(new, best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("biased", [True, False])
def test_where_nothing_drifted_nothing_more_is_refitted(biased: bool):
    x, w = inputs(mean=1.0), matrix()
    own = torch.linspace(-1, 1, ROWS, dtype=torch.float64) if biased else None
    y = x @ w.T + (0 if own is None else own)
    plain, moved = (
        LeastSquares(drift=drift).solve(w, own, toward(x, y), KEEP) for drift in (0.0, 1.0)
    )
    torch.testing.assert_close(plain, moved, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain, LeastSquares().solve(w, own, seen(x), KEEP))


def test_rows_of_two_statistics_add():
    x = inputs()
    y = wanted(x)
    whole, parts = toward(x, y), toward(x[:50], y[:50]) + toward(x[50:], y[50:])
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value)


@pytest.mark.parametrize("drift", [-0.1, 1.1, float("nan"), "0.3"])
def test_a_drift_out_of_range_is_refused(drift: Any):
    with pytest.raises(ConfigError, match="drift"):
        LeastSquares(drift=drift)
