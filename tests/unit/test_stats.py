"""Streamed statistics = two passes over everything."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from plprune.stats import Energy, Gram, Moments
from plprune.stats.base import fold

every_stat = pytest.mark.parametrize("stat", [Energy, Moments, Gram])


def stream(stat: type, xs, masks=None):
    total = stat.zero(xs[0].shape[-1])
    for number, x in enumerate(xs):
        total = fold(total, x, None if masks is None else masks[number])
    return total


def draw(count: int = 4, length: int = 7, channels: int = 5, dtype=torch.float64):
    # A large mean makes cancelling formulas visible.
    return [torch.randn(3, length, channels, dtype=dtype) * 2 + 5 for _ in range(count)]


@every_stat
def test_streamed_equals_two_pass(stat: type):
    xs = draw()
    oracles.assert_two_pass(stream(stat, xs), xs)


@every_stat
def test_pads_are_ignored_whatever_they_hold(stat: type):
    xs, masks = draw(), [torch.rand(3, 7) < 0.6 for _ in range(4)]
    dirty = [x.masked_fill(~m[..., None], float("nan")) for x, m in zip(xs, masks, strict=True)]
    streamed = stream(stat, dirty, masks)
    oracles.assert_two_pass(streamed, xs, masks)
    assert float(streamed.n) == sum(int(mask.sum()) for mask in masks)
    # Negative control: without the masks the NaN arrives.
    assert torch.isnan(stream(stat, dirty).tensors()[-1]).any()


@every_stat
def test_flat_and_int_masks(stat: type):
    (x,), mask = draw(1), torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1] * 7, [0] * 7])
    oracles.assert_two_pass(fold(stat.zero(5), x.flatten(0, 1), mask), [x], [mask])
    nothing = fold(stat.zero(5), x, torch.zeros(3, 7))
    assert all(not tensor.any() for tensor in nothing.tensors())


@every_stat
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_order_and_split_do_not_matter(stat: type, data: st.DataObject):
    torch.manual_seed(data.draw(st.integers(0, 100)))
    rows = torch.randn(24, 5, dtype=torch.float64) + 3
    expected = stream(stat, [rows])
    order = data.draw(st.permutations(range(24)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=5)))
    pieces = torch.tensor_split(rows[list(order)], cuts)
    halves = (
        stream(stat, pieces[: len(pieces) // 2] or [rows[:0]]),
        stream(stat, pieces[len(pieces) // 2 :]),
    )
    for merged in (stream(stat, pieces), halves[0] + halves[1], halves[1] + halves[0]):
        for a, b in zip(merged.tensors(), expected.tensors(), strict=True):
            oracles.close(a, b)


@every_stat
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_in_high_precision(stat: type, dtype: torch.dtype):
    xs = draw(8, 64, dtype=dtype)
    streamed = stream(stat, xs)
    assert all(tensor.dtype == torch.float64 for tensor in streamed.tensors())
    # Sums of one batch are float32; of all batches float64. Variance cancels two digits.
    oracles.assert_two_pass(streamed, xs, rtol=1e-4)


def test_half_precision_does_not_overflow():
    x = torch.full((1, 1000, 1), 300.0, dtype=torch.float16)
    assert float(fold(Energy.zero(1), x).xx_C) == 1000 * 300.0**2
    assert torch.isinf(x.square().sum())


def test_moments_of_a_constant():
    constant = fold(Moments.zero(2), torch.full((2, 50, 2), 0.1))
    assert bool((constant.variance_C >= 0).all())
    assert float(constant.variance_C.max()) < 1e-8
    torch.testing.assert_close(
        constant.mean_C, torch.full((2,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0
    )


def zipped(one: Any, two: Any) -> list[tuple[str, Any, Any]]:
    return [(name, value, vars(two)[name]) for name, value in vars(one).items()]


@every_stat
def test_folding_makes_a_new_value(stat: type):
    zero = stat.zero(3)
    made = fold(zero, torch.ones(2, 2, 3))
    # The one exception: a Gram matrix is too large to have twice.
    assert all(not t.any() for name, t in vars(zero).items() if name != "xx_CC")
    assert all(a is not b for n, a, b in zipped(zero, made) if n != "xx_CC")
    assert all(a is b for n, a, b in zipped(zero, made) if n == "xx_CC")
    needs_grad = torch.ones(2, 2, 3, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in fold(zero, needs_grad).tensors())
