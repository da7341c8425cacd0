"""When to cut and how far: TransAct's published numbers, and schedules as functions of the step."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

import tiny
from plprune.allocate import sizes_of
from plprune.budget import Budget
from plprune.count import count_params
from plprune.cuts import cuts, missed, step_widths, table
from plprune.describe import describe
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import Method
from plprune.methods.transact import TransAct
from plprune.plan import Keep, Plan
from plprune.schedule import (
    Cubic,
    Explicit,
    Length,
    Linear,
    OneShot,
    Phase,
    Schedule,
    TransActRamp,
    learning_rate,
)
from plprune.surgery.lower import lower

RAMP = TransActRamp(cuts=8, tokens=1e9, tokens_per_step=262_144)
LONG = Length(steps=10_000, steps_per_epoch=1000)
# arXiv 2407.05690: LLaMA2-7B cut to 768 attention entries and 1536 MLP channels, and to 2048 and
# 3072.
HEADS_A, MLP_A = [29, 26, 23, 20, 17, 14, 10, 6], [9824, 8640, 7456, 6272, 5088, 3904, 2720, 1536]
HEADS_B, MLP_B = [30, 28, 26, 24, 22, 20, 18, 16], [10016, 9024, 8032, 7040, 6048, 5056, 4064, 3072]
PARAMS_A = [6.072, 5.405, 4.738, 4.071, 3.404, 2.737, 2.003, 1.269]
TOKENS_A = [62.5, 80.4, 98.2, 116.1, 133.9, 151.8, 169.6, 187.5]
STEPS_A = [238, 306, 374, 442, 510, 579, 647, 715]
RATES_A = [1.25e-5, 2.5e-5, 3.75e-5, 5e-5, 6.25e-5, 7.5e-5, 8.75e-5, 1e-4]


@pytest.mark.parametrize(
    ("heads", "mlp", "target"), [(HEADS_A, MLP_A, (6, 1536)), (HEADS_B, MLP_B, (16, 3072))]
)
def test_published_widths(heads: list[int], mlp: list[int], target: tuple[int, int]) -> None:
    spec = describe(tiny.llama2_7b())
    budget = Budget(widths={"kv_group": target[0], "mlp": target[1]})
    planned = cuts(spec, TransAct(), budget, RAMP, LONG)
    assert [cut.budget.widths["kv_group"] for cut in planned] == [[n] * 32 for n in heads]
    assert [cut.budget.widths["mlp"] for cut in planned] == [[n] * 32 for n in mlp]
    assert [cut.step for cut in planned] == [0, *_running(STEPS_A)[:-1]]


def _running(numbers: list[int]) -> list[int]:
    return [sum(numbers[: n + 1]) for n in range(len(numbers))]


def test_published_parameters_tokens_steps_and_rates() -> None:
    spec = describe(tiny.llama2_7b())
    assert round(count_params(spec).model / 1e9, 3) == 6.738
    for heads, mlp, expected in zip(HEADS_A, MLP_A, PARAMS_A, strict=True):
        sizes = sizes_of(spec, {"kv_group": [heads] * 32, "mlp": [mlp] * 32})
        edits = tuple(Keep(axis=name, kept=torch.arange(n)) for name, n in sizes.items())
        plan = Plan(edits=edits, fingerprint=spec.fingerprint, method="test")
        cut = spec.cut(lower(plan, spec), physical=True)
        assert round(count_params(cut).model / 1e9, 3) == expected
    tokens = [RAMP.tokens_of(cut) for cut in range(1, 9)]
    assert [round(n / 1e6, 1) for n in tokens] == pytest.approx(TOKENS_A, abs=0.051)
    assert sum(tokens) == pytest.approx(1e9)
    assert [RAMP.steps_of(cut) for cut in range(1, 9)] == STEPS_A
    phases = RAMP.phases(LONG)
    assert [phase.steps for phase in phases[:8]] == STEPS_A
    assert [5e-5 * phase.peak for phase in phases[:8]] == pytest.approx(RATES_A)
    recovery = LONG.steps - sum(STEPS_A)
    assert phases[8] == Phase(start=sum(STEPS_A), steps=recovery, peak=1.0)


def test_one_and_two_cuts_of_the_ramp() -> None:
    """The release divides by zero for one cut and stops half-way for two."""
    one = TransActRamp(cuts=1, tokens=1000, tokens_per_step=10)
    assert one.steps_of(1) == 100
    assert [p.progress for p in one.points(LONG)] == [1]
    two = TransActRamp(cuts=2, tokens=1000, tokens_per_step=10)
    assert [two.tokens_of(cut) for cut in (1, 2)] == [250, 750]
    assert [p.progress for p in two.points(LONG)] == [Fraction(1, 2), 1]


def test_a_ramp_that_is_cut_short_ends_with_the_run() -> None:
    ramp = TransActRamp(cuts=3, tokens=24, tokens_per_step=2)
    phases = ramp.phases(Length(steps=9, steps_per_epoch=9))
    assert [(p.start, p.steps) for p in phases] == [(0, 2), (2, 4), (6, 3)]


# --- learning rates ------------------------------------------------------------------------------


def test_rates_within_one_phase() -> None:
    phase = (Phase(start=0, steps=100, peak=2.0),)
    rates = [learning_rate(step, phase, warmup=0.1, floor=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_rates_start_over_in_every_phase() -> None:
    phases = RAMP.phases(LONG)
    for phase in phases:
        rise = max(1, round(0.1 * phase.steps))
        within = [learning_rate(s, phases) for s in range(phase.start, phase.start + phase.steps)]
        assert within[0] == pytest.approx(phase.peak / rise)
        assert max(within) == pytest.approx(phase.peak)
        assert within.index(max(within)) in (rise - 1, rise)
        ends = (
            phase.peak
            * (1 + math.cos(math.pi * (phase.steps - 1 - rise) / (phase.steps - rise)))
            / 2
        )
        assert within[-1] == pytest.approx(ends)


def test_rates_without_warmup_and_after_the_end() -> None:
    phases = (Phase(start=0, steps=4, peak=1.0),)
    assert learning_rate(0, phases, warmup=0.0) == 1.0
    assert learning_rate(9, phases, warmup=0.0, floor=0.25) == pytest.approx(0.25)
    assert learning_rate(0, (Phase(start=0, steps=1, peak=1.0),)) == 1.0


# --- schedules -----------------------------------------------------------------------------------

SHORT = Length(steps=20, steps_per_epoch=8)


@pytest.mark.parametrize(
    ("schedule", "steps", "progress"),
    [
        (OneShot(), [0], [1]),
        (OneShot(at=0.5, unit="fraction"), [10], [1]),
        (OneShot(at=1.5, unit="epoch"), [12], [1]),
        (Linear(cuts=4, begin=0, end=9, unit="step"), [0, 3, 6, 9], [0.25, 0.5, 0.75, 1]),
        (Linear(cuts=1, begin=3, end=9, unit="step"), [3], [1]),
        (Linear(cuts=3, begin=0.1, end=0.5), [2, 6, 10], [1 / 3, 2 / 3, 1]),
        (Cubic(cuts=2, begin=0, end=1, unit="epoch"), [0, 8], [0.875, 1]),
        (Explicit(at=[1, 2, 19]), [1, 2, 19], [1 / 3, 2 / 3, 1]),
        (Explicit(at=[0.0, 0.5], progress=[0.9, 1.0], unit="fraction"), [0, 10], [0.9, 1]),
    ],
)
def test_points(schedule: Schedule, steps: list[int], progress: list[float]) -> None:
    points = schedule.points(SHORT)
    assert [point.step for point in points] == steps
    assert [float(point.progress) for point in points] == pytest.approx(progress)
    assert points[-1].progress == 1
    phases = schedule.phases(SHORT)
    assert [p.start for p in phases] == sorted({0, *steps})
    assert sum(p.steps for p in phases) == SHORT.steps
    assert {p.peak for p in phases} == {1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OneShot(at=20).points(SHORT),
            "a cut at step 20 lies outside the run: given optimizer step 20; allowed 0..19; fix: "
            "train longer "
            "(trainer.max_steps) or cut earlier",
        ),
        (
            lambda: OneShot(at=-1).points(SHORT),
            "a cut at step -1 lies outside the run: given optimizer step -1; allowed 0..19; fix: "
            "train longer "
            "(trainer.max_steps) or cut earlier",
        ),
        (
            lambda: OneShot(unit="day").points(SHORT),  # type: ignore[arg-type]
            "unknown schedule.unit: given 'day'; allowed step, fraction, epoch",
        ),
        (
            lambda: Linear(cuts=0),
            "impossible schedule: given 0 cuts from 0 to 0.5; allowed at least 1 cut, 0 <= begin "
            "<= end",
        ),
        (
            lambda: Linear(begin=0.5, end=0.2),
            "impossible schedule: given 8 cuts from 0.5 to 0.2; allowed at least 1 cut, 0 <= begin "
            "<= end",
        ),
        (
            lambda: Explicit(at=[1, 2], progress=[0.5, 0.9]),
            "impossible explicit schedule: given at [1, 2], progress [0.5, 0.9]; allowed as many "
            "places as shares, "
            "both ascending, the last share 1",
        ),
        (
            lambda: Explicit(at=[]),
            "impossible explicit schedule: given at [], progress []; allowed as many places as "
            "shares, both "
            "ascending, the last share 1",
        ),
        (
            lambda: Explicit(at=[2, 2]),
            "impossible explicit schedule: given at [2, 2], progress [0.5, 1.0]; allowed as many "
            "places as shares, "
            "both ascending, the last share 1",
        ),
        (
            lambda: TransActRamp(tokens=0),
            "impossible TransAct ramp: given 8 cuts, 0 tokens, 262144 a step; allowed positive "
            "numbers",
        ),
        (
            lambda: Linear(cuts="4"),  # type: ignore[arg-type]
            "schedule.cuts is not a whole number: given '4'; allowed a whole number; fix: in "
            "Python, give a number without quotes",
        ),
        (
            lambda: Cubic(end=None),  # type: ignore[arg-type]
            "schedule.end is not a number: given None; allowed a number; fix: in Python, give a "
            "number without quotes",
        ),
        (
            lambda: OneShot(at="2"),  # type: ignore[arg-type]
            "schedule.at is not a number: given '2'; allowed a number; fix: in Python, give a "
            "number without quotes",
        ),
        (
            lambda: Explicit(at=3),  # type: ignore[arg-type]
            "schedule.at is not a list of numbers: given 3; allowed a list of numbers; fix: in "
            "Python, give a number without quotes",
        ),
        (
            lambda: TransActRamp(tokens="1e9"),  # type: ignore[arg-type]
            "schedule.tokens is not a number: given '1e9'; allowed a number; fix: in Python, give "
            "a number without quotes",
        ),
    ],
)
def test_impossible_schedules(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


# --- cuts ----------------------------------------------------------------------------------------


def test_the_last_cut_meets_the_budget_whatever_the_path() -> None:
    for progress in (
        [Fraction(1)],
        [Fraction(7, 8), Fraction(1)],
        [Fraction(i, 5) for i in range(1, 6)],
    ):
        widths = step_widths(40, 17, progress)
        assert widths[-1] == 17
        assert widths == sorted(widths, reverse=True)
    assert step_widths(40, 16, [Fraction(7, 8), Fraction(1)]) == [19, 16]


def test_widths_of_every_block_move_alone() -> None:
    spec = describe(tiny.model())
    budget = Budget(widths={"mlp": [20, 30]})
    planned = cuts(
        spec, TransAct(attention="none"), budget, Linear(cuts=2, end=5, unit="step"), SHORT
    )
    assert [cut.budget.widths for cut in planned] == [{"mlp": [30, 35]}, {"mlp": [20, 30]}]


class Free(Method):
    """A method whose widths depend on what it sees."""

    def taps(self, spec: Any) -> tuple[Any, ...]:
        """None."""
        return ()

    def plan(self, view: Any, budget: Any) -> Any:
        """Never called."""
        raise NotImplementedError

    def hyper(self) -> dict[str, Any]:
        """None."""
        return {}


def test_shares_move_for_methods_without_fixed_widths() -> None:
    spec = describe(tiny.model())
    planned = cuts(spec, Free(), Budget(keep=0.6), Linear(cuts=4, end=6, unit="step"), SHORT)
    assert [cut.budget.keep for cut in planned] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert table(planned) == [
        ("cut", "step", "target"),
        ("1", "0", "keep 0.9000"),
        ("2", "2", "keep 0.8000"),
        ("3", "4", "keep 0.7000"),
        ("4", "6", "keep 0.6000"),
    ]


def test_the_table_shows_widths() -> None:
    spec = describe(tiny.model())
    budget = Budget(widths={"mlp": [20, 30], "kv_group": 2})
    planned = cuts(spec, TransAct(), budget, OneShot(at=3), SHORT)
    assert table(planned)[1] == ("1", "3", "kv_group 2, mlp 20..30") or table(planned)[1] == (
        "1",
        "3",
        "mlp 20..30, kv_group 2",
    )


def test_cuts_that_cannot_be() -> None:
    spec = describe(tiny.model())
    method = TransAct()
    with pytest.raises(
        ConfigError, match=r"two cuts fall on one optimizer step: given 8 cuts in a run of 20 steps"
    ):
        cuts(spec, method, Budget(widths={"mlp": 8}), Linear(end=0.2), SHORT)
    with pytest.raises(BudgetError) as caught:
        cuts(
            spec,
            method,
            Budget(widths={"mlp": 38, "kv_group": 3}),
            Linear(cuts=5, end=8, unit="step"),
            SHORT,
        )
    assert str(caught.value).startswith("cut 1 of 5 would change nothing: given ")
    assert str(caught.value).endswith("fix: use fewer cuts or a smaller budget")
    # A single cut that keeps everything is legal.
    (one,) = cuts(spec, method, Budget(keep=1.0), OneShot(), SHORT)
    assert one.budget.widths["mlp"] == [40, 40]


@pytest.mark.parametrize(("multiple", "says"), [(32, True), (1, False)])
def test_a_budget_that_multiples_miss_by_far_is_said(multiple: int, says: bool) -> None:
    spec = describe(tiny.meta())
    budget = Budget(keep=0.97, multiple_of={"mlp": multiple})
    note = missed(spec, budget, cuts(spec, TransAct(attention="none"), budget, OneShot(), LONG))
    assert bool(note) == says
    if says:
        assert note.startswith("widths in multiples (mlp: 32) leave ")
        assert "where 97.0% was asked for" in note


def test_widths_that_were_asked_for_miss_nothing() -> None:
    spec = describe(tiny.meta())
    budget = Budget(keep=0.99, widths={"mlp": 8})
    planned = cuts(spec, TransAct(attention="none"), budget, OneShot(), LONG)
    assert missed(spec, budget, planned) == ""
