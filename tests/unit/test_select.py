"""`top_units`: best, stable, even over groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plprune.errors import PlanError
from plprune.select import top_units


@pytest.mark.parametrize(
    ("score", "keep", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),  # ties to the lower index
        ([0.0, 1.0, 0.0, 1.0, 0.0], 3, [0, 1, 3]),
        ([0.0, -1.0], 1, [0]),
        ([5.0], 1, [0]),
    ],
)
def test_top(score: list[float], keep: int, expected: list[int]):
    assert top_units(torch.tensor(score), keep).tolist() == expected


def test_groups_keep_the_same_count():
    score, group = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert top_units(score, 2, group).tolist() == [0, 4]
    assert top_units(score, 4, group).tolist() == [0, 1, 4, 5]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_kept_are_at_least_as_good_as_dropped(values: list[int], data: st.DataObject):
    score = torch.tensor(values, dtype=torch.float32)
    keep = data.draw(st.integers(1, len(values)))
    kept = top_units(score, keep)
    dropped = [i for i in range(len(values)) if i not in kept.tolist()]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == keep
    for bad in dropped:
        for good in kept.tolist():
            assert (values[good], -good) > (values[bad], -bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_must_be_finite(bad: float):
    with pytest.raises(
        PlanError,
        match=r"scores are not finite: given 1 of 3 are NaN or infinite; .*fix: check the",
    ):
        top_units(torch.tensor([1.0, bad, 2.0]), 1)


@pytest.mark.parametrize(
    ("keep", "group"), [(0, None), (5, None), (3, [0, 0, 1, 1]), (0, [0, 0, 1, 1])]
)
def test_counts_that_do_not_fit(keep: int, group: list[int] | None):
    labels = None if group is None else torch.tensor(group)
    groups = 1 if group is None else 2
    with pytest.raises(
        PlanError,
        match=f"cannot keep that many units: given {keep} of 4 in {groups} groups; allowed",
    ):
        top_units(torch.ones(4), keep, labels)
