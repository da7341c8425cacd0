"""Optimal brain surgery against the recursion on explicit inverses, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plprune.errors import PlanError
from plprune.obs import Groups, Share, inverse_factor, sweep
from plprune.select import lowest_of_all, n_of_m

ROWS, COLS = 6, 24


def case(cols: int = COLS, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """[R, C] weights and [C, C] Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(ROWS, cols, generator=generator, dtype=torch.float64), x.T @ x


def column_by_column(weight: Tensor, damped: Tensor, block: int, pattern: Any) -> tuple[Any, Any]:
    """Every column: invert what is left of H, drop, move all that follow. No factor, no blocks."""
    W, keep = weight.clone(), torch.ones(weight.shape, dtype=torch.bool)
    rows, cols = W.shape
    gone = 0
    for i in range(cols):
        stretch = pattern if isinstance(pattern, tuple) else None
        width = stretch[1] if stretch else block
        if i % width == 0:
            ahead = slice(i, min(i + width, cols))
            inverses = [torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(i, ahead.stop)]
            score = W[:, ahead] ** 2 / torch.stack(inverses)
            if stretch:
                keep[:, ahead] = n_of_m(score, *stretch)
            else:
                due = round(pattern * rows * ahead.stop) - gone
                gone += due
                keep[:, ahead] = lowest_of_all(score, due)
        inverse = torch.linalg.inv(damped[i:, i:])
        error = torch.where(keep[:, i], 0.0, W[:, i]) / inverse[0, 0]
        W[:, i:] -= torch.outer(error, inverse[0])
        W[:, i] = torch.where(keep[:, i], W[:, i], 0.0)
    return W, keep


@pytest.mark.parametrize("block", [4, 8, 10, 24, 128])
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_it_is_the_recursion_column_by_column(block: int, drop: float):
    weight, gram = case()
    damped = gram + torch.eye(COLS) * 0.01 * gram.diagonal().mean()
    upper, used = inverse_factor(gram)
    new, keep = sweep(weight, upper, Share(ROWS, drop), block)
    expected, kept = column_by_column(weight, damped, block, drop)
    assert used == 0.01
    assert torch.equal(keep, kept)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert int((~keep).sum()) == round(drop * ROWS * COLS)
    assert bool((new[~keep] == 0).all())


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 8)])
def test_groups_are_chosen_when_their_first_column_is_due(pattern: tuple[int, int]):
    weight, gram = case()
    damped = gram + torch.eye(COLS) * 0.01 * gram.diagonal().mean()
    new, keep = sweep(weight, inverse_factor(gram)[0], Groups(*pattern), 8)
    expected, kept = column_by_column(weight, damped, 8, pattern)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert bool((keep.reshape(-1, pattern[1]).sum(1) == pattern[0]).all())


def loss(gram: Tensor, change: Tensor) -> float:
    """Squared change of the output."""
    return float(((change @ gram) * change).sum())


def test_what_is_passed_on_is_the_loss_and_less_than_without():
    weight, gram = case()
    upper, _ = inverse_factor(gram, 1e-9)
    new, keep = sweep(weight, upper, Share(ROWS, 0.5), COLS)
    masked = torch.where(keep, weight, 0.0)
    assert loss(gram, weight - new) < 0.9 * loss(gram, weight - masked)
    # With the mask given, later columns alone may move: what is left is their optimum for the last.
    nudged = new.clone()
    nudged[:, -1] += 1e-3 * keep[:, -1]
    assert loss(gram, weight - nudged) > loss(gram, weight - new)


def test_weights_of_columns_that_never_speak_go_first_and_move_nothing():
    weight, gram = case()
    silent = torch.arange(COLS) % 4 == 1
    gram[silent] = 0
    gram[:, silent] = 0
    upper, used = inverse_factor(gram)
    assert used == 0.01
    new, _ = sweep(weight, upper, Share(ROWS, 0.5), COLS)
    assert bool(torch.isfinite(new).all())
    only = torch.where(silent, weight, 0.0)
    moved, keep = sweep(only, upper, lambda score, _: torch.zeros_like(score, dtype=torch.bool), 8)
    assert not bool(moved.any())
    assert not bool(keep.any())


def test_the_damping_is_raised_until_it_is_enough():
    weight, gram = case(tokens=3)
    torch.manual_seed(0)
    gram = gram - 0.05 * gram.diagonal().mean() * torch.eye(COLS)  # rounding, exaggerated
    upper, used = inverse_factor(gram, 0.01)
    assert used == pytest.approx(0.1)
    assert bool(torch.isfinite(sweep(weight, upper, Share(ROWS, 0.5))[0]).all())
    with pytest.raises(PlanError, match=r"given 24 inputs, damping up to 1 of.*more calibration"):
        inverse_factor(gram - 3 * gram.diagonal().mean() * torch.eye(COLS))
    with pytest.raises(PlanError, match="cannot be inverted"):
        inverse_factor(gram * float("nan"))


def test_nothing_observed_is_magnitude():
    weight, _ = case()
    upper, _ = inverse_factor(torch.zeros(COLS, COLS))
    new, keep = sweep(weight, upper, Share(ROWS, 0.5), COLS)
    assert torch.equal(keep, lowest_of_all(weight.square(), ROWS * COLS // 2))
    assert torch.equal(new, torch.where(keep, weight, 0.0))


def test_bfloat16_weights_are_settled_in_float32():
    weight, gram = case()
    new, _ = sweep(weight.bfloat16(), inverse_factor(gram)[0], Share(ROWS, 0.5))
    assert new.dtype == torch.float32
