"""`top_units`: best, stable, even over groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plprune import select
from plprune.errors import PlanError
from plprune.select import lowest_of_all, lowest_per_row, n_of_m, top_units


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


# --- single weights ------------------------------------------------------------------------------


def by_definition(score_RC: torch.Tensor, drop: list[int]) -> torch.Tensor:
    """Row by row in plain Python: of equals the last go first."""
    keep = torch.ones(score_RC.shape, dtype=torch.bool)
    for row, (scores, count) in enumerate(zip(score_RC.tolist(), drop, strict=True)):
        order = sorted(range(len(scores)), key=lambda column: (scores[column], -column))
        for column in order[:count]:
            keep[row, column] = False
    return keep


matrices = st.integers(1, 5).flatmap(
    lambda cols: st.lists(
        st.lists(st.integers(-2, 2), min_size=cols, max_size=cols), min_size=1, max_size=6
    )
)


@settings(deadline=None, derandomize=True)
@given(matrices, st.data())
def test_rows_lose_their_lowest(rows: list[list[int]], data: st.DataObject):
    score = torch.tensor(rows, dtype=torch.float32)
    counts = st.integers(0, score.shape[1])
    drop = data.draw(st.lists(counts, min_size=len(rows), max_size=len(rows)))
    assert torch.equal(lowest_per_row(score, torch.tensor(drop)), by_definition(score, drop))
    assert torch.equal(lowest_per_row(score, drop[0]), by_definition(score, drop[:1] * len(rows)))


def test_rows_that_are_sorted_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch):
    score = torch.randint(0, 4, (37, 11), generator=torch.Generator().manual_seed(0)).float()
    drop = torch.arange(37) % 12
    expected = lowest_per_row(score, drop)
    monkeypatch.setattr(select, "_CHUNK", 30)
    assert torch.equal(lowest_per_row(score, drop), expected)


@settings(deadline=None, derandomize=True)
@given(matrices, st.data())
def test_a_matrix_loses_exactly_its_lowest(rows: list[list[int]], data: st.DataObject):
    score = torch.tensor(rows, dtype=torch.float32)
    drop = data.draw(st.integers(0, score.numel()))
    keep = lowest_of_all(score, drop)
    assert torch.equal(keep.flatten(), by_definition(score.reshape(1, -1), [drop])[0])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 1), (4, 4)])
def test_n_of_every_m_stay(n: int, m: int):
    score = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    keep = n_of_m(score, n, m)
    groups, scores = keep.reshape(-1, m), score.reshape(-1, m)
    assert (groups.sum(1) == n).all()
    kept = scores.masked_fill(~groups, float("inf")).amin(1)
    dropped = scores.masked_fill(groups, float("-inf")).amax(1)
    assert (kept > dropped).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 5), (2, 0)])
def test_groups_that_do_not_fit_are_refused(n: int, m: int):
    with pytest.raises(PlanError, match=f"given {n}:{m} of 24 columns"):
        n_of_m(torch.zeros(2, 24), n, m)


def test_counts_and_scores_that_mean_nothing_are_refused():
    with pytest.raises(PlanError, match="given 4 to 4 of 3; allowed 0 to 3"):
        lowest_per_row(torch.zeros(2, 3), 4)
    with pytest.raises(PlanError, match="2 of 6 are NaN"):
        lowest_per_row(torch.tensor([[0.0, float("nan"), 1.0], [float("inf"), 0.0, 1.0]]), 1)
