"""When to cut: schedules are functions of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, get_args

from plprune.budget import require_numbers
from plprune.errors import ConfigError

Unit = Literal["step", "fraction", "epoch"]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is."""

    steps: int
    """Optimizer steps in all."""
    steps_per_epoch: int
    """Optimizer steps in one epoch."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cut on the way to the target."""

    step: int
    """Optimizer steps done when it happens; 0 is before the first."""
    progress: Fraction
    """Share of the way from dense to target reached by it, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training between two cuts."""

    start: int
    """First optimizer step."""
    steps: int
    """Optimizer steps, at least 1."""
    peak: float
    """Peak learning rate relative to the base learning rate."""


class Schedule(ABC):
    """When to cut. Subclasses are frozen dataclasses."""

    def __post_init__(self) -> None:
        """Check that numbers are numbers."""
        require_numbers(self, "schedule")

    @abstractmethod
    def points(self, length: Length) -> tuple[Point, ...]:
        """Cuts of a run.

        Args:
            length: of the run.

        Returns:
            Points in order; the last has progress 1.
        """

    def phases(self, length: Length) -> tuple[Phase, ...]:
        """Stretches of training between cuts, with equal peak learning rates.

        Args:
            length: of the run.

        Returns:
            Phases that cover the run from step 0.
        """
        starts = sorted({0, *(point.step for point in self.points(length))})
        return tuple(
            Phase(start=a, steps=b - a, peak=1.0)
            for a, b in pairwise([*starts, length.steps])
            if b > a
        )


def at_step(value: float, unit: Unit, length: Length) -> int:
    """A position in a run as a number of optimizer steps.

    Args:
        value: steps, share of the run in [0, 1], or epochs (1.5 is the middle of the second).
        unit: what `value` counts.
        length: of the run.

    Returns:
        Optimizer steps, rounded to the nearest.

    Raises:
        ConfigError: outside the run.
    """
    scale = {"step": 1, "fraction": length.steps, "epoch": length.steps_per_epoch}
    if unit not in scale:
        raise ConfigError(
            "unknown schedule.unit", given=repr(unit), allowed=", ".join(get_args(Unit))
        )
    step = round(value * scale[unit])
    if not 0 <= step < length.steps:
        raise ConfigError(
            f"a cut at {unit} {value} lies outside the run",
            given=f"optimizer step {step}",
            allowed=f"0..{length.steps - 1}",
            fix="train longer (trainer.max_steps) or cut earlier",
        )
    return step


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """One cut to the target."""

    at: float = 0
    """Where; 0 is before the first step."""
    unit: Unit = "step"
    """What `at` counts: step, fraction of the run, or epoch."""

    def points(self, length: Length) -> tuple[Point, ...]:
        """The one cut."""
        return (Point(step=at_step(self.at, self.unit, length), progress=Fraction(1)),)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Equal cuts at equal distances."""

    cuts: int = 8
    """Number of cuts K."""
    begin: float = 0
    """Where the first cut happens."""
    end: float = 0.5
    """Where the last cut happens."""
    unit: Unit = "fraction"
    """What `begin` and `end` count."""

    def __post_init__(self) -> None:
        """Check numbers.

        Raises:
            ConfigError: if there is no cut or the end lies before the begin.
        """
        super().__post_init__()
        if self.cuts < 1 or self.begin < 0 or self.end < self.begin:
            raise ConfigError(
                "impossible schedule",
                given=f"{self.cuts} cuts from {self.begin} to {self.end}",
                allowed="at least 1 cut, 0 <= begin <= end",
            )

    def points(self, length: Length) -> tuple[Point, ...]:
        """Cut i of K at equal distances, progress i / K."""
        first, last = (at_step(value, self.unit, length) for value in (self.begin, self.end))
        gaps = max(1, self.cuts - 1)
        steps = [first + round((last - first) * i / gaps) for i in range(self.cuts)]
        return tuple(
            Point(step=step, progress=self.shape(Fraction(i + 1, self.cuts)))
            for i, step in enumerate(steps)
        )

    def shape(self, share: Fraction) -> Fraction:
        """Progress at a share of the cuts."""
        return share


@dataclass(frozen=True, kw_only=True)
class Cubic(Linear):
    """Large cuts first: progress 1 - (1 - i/K)^3 (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""

    def shape(self, share: Fraction) -> Fraction:
        """Progress at a share of the cuts."""
        return 1 - (1 - share) ** 3


@dataclass(frozen=True, kw_only=True)
class Explicit(Schedule):
    """Cuts at given places, given shares of the way."""

    at: Sequence[float]
    """Where each cut happens, ascending."""
    progress: Sequence[float] | None = None
    """Share of the way reached by each cut, ascending, last 1; default equal shares."""
    unit: Unit = "step"
    """What `at` counts."""

    def __post_init__(self) -> None:
        """Check the lists.

        Raises:
            ConfigError: if they are empty, of different length, not ascending, or do not end at 1.
        """
        super().__post_init__()
        way = self.shares()
        rising = all(a < b for a, b in pairwise(way)) and all(a < b for a, b in pairwise(self.at))
        if not self.at or len(way) != len(self.at) or not rising or way[0] <= 0 or way[-1] != 1:
            raise ConfigError(
                "impossible explicit schedule",
                given=f"at {list(self.at)}, progress {[float(share) for share in way]}",
                allowed="as many places as shares, both ascending, the last share 1",
            )

    def shares(self) -> tuple[Fraction, ...]:
        """Progress of each cut."""
        if self.progress is None:
            return tuple(Fraction(i + 1, len(self.at)) for i in range(len(self.at)))
        return tuple(Fraction(share).limit_denominator(10**6) for share in self.progress)

    def points(self, length: Length) -> tuple[Point, ...]:
        """The given cuts."""
        return tuple(
            Point(step=at_step(value, self.unit, length), progress=share)
            for value, share in zip(self.at, self.shares(), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class TransActRamp(Schedule):
    """TransAct's outer loop: K cuts, each followed by more tokens and a higher learning rate.

    Step i of K trains `B/(2K) + (B/K) (i-1)/(K-1)` tokens at a peak learning rate of `2i/K` times
    the base; the recovery after the last step is a phase of its own at the base learning rate.
    """

    cuts: int = 8
    """Number of cuts K."""
    tokens: float = 1e9
    """Token budget B of the K steps."""
    tokens_per_step: int = 262_144
    """Tokens of one optimizer step."""

    def __post_init__(self) -> None:
        """Check numbers.

        Raises:
            ConfigError: if a number is not positive.
        """
        super().__post_init__()
        if self.cuts < 1 or self.tokens <= 0 or self.tokens_per_step < 1:
            raise ConfigError(
                "impossible TransAct ramp",
                given=f"{self.cuts} cuts, {self.tokens} tokens, {self.tokens_per_step} a step",
                allowed="positive numbers",
            )

    def tokens_of(self, cut: int) -> float:
        """Tokens trained after cut i (from 1); a single cut gets the whole budget."""
        share = self.tokens / self.cuts
        return self.tokens if self.cuts == 1 else share / 2 + share * (cut - 1) / (self.cuts - 1)

    def steps_of(self, cut: int) -> int:
        """Optimizer steps after cut i (from 1), at least one."""
        return max(1, int(self.tokens_of(cut) // self.tokens_per_step))

    def points(self, length: Length) -> tuple[Point, ...]:
        """Cuts where each stretch of training begins."""
        starts = [sum(self.steps_of(i) for i in range(1, cut)) for cut in range(1, self.cuts + 1)]
        return tuple(
            Point(step=at_step(start, "step", length), progress=Fraction(i + 1, self.cuts))
            for i, start in enumerate(starts)
        )

    def phases(self, length: Length) -> tuple[Phase, ...]:
        """The K steps with rising peaks, then recovery for the rest of the run."""
        phases, start = [], 0
        for cut in range(1, self.cuts + 1):
            steps = min(self.steps_of(cut), length.steps - start)
            phases.append(Phase(start=start, steps=steps, peak=2 * cut / self.cuts))
            start += steps
        if start < length.steps:
            phases.append(Phase(start=start, steps=length.steps - start, peak=1.0))
        return tuple(phase for phase in phases if phase.steps > 0)


def learning_rate(
    step: int, phases: Sequence[Phase], *, warmup: float = 0.1, floor: float = 0.0
) -> float:
    """Learning rate relative to the base: in each phase a linear warm-up, then a cosine.

    Args:
        step: optimizer steps done.
        phases: of the run.
        warmup: share of each phase.
        floor: the cosine ends at this share of the peak.

    Returns:
        A factor.
    """
    phase = next((p for p in reversed(phases) if step >= p.start), phases[0])
    rise = max(1, round(warmup * phase.steps)) if warmup > 0 else 0
    done = min(step - phase.start, phase.steps)
    if done < rise:
        return phase.peak * (done + 1) / rise
    part = (done - rise) / max(1, phase.steps - rise)
    return phase.peak * (floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2)
