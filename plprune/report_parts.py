"""What a report is made of: pairs of measurements, scores, cuts, samples."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SizePair:
    """One quantity counted before and after."""

    dense: float | None = None
    """Count of the dense model."""
    pruned: float | None = None
    """Count of the pruned model."""
    note: str = ""
    """What the count depends on, for example "at a context of 1,024 tokens"."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Perplexity on one text, under the protocol of the report; None means not measured."""

    data: str
    """Name of the text."""
    dense: float | None = None
    """The dense model as loaded."""
    dense_trained: float | None = None
    """The dense model after the same training recipe and tokens."""
    cut: float | None = None
    """The pruned model without training."""
    recovered: float | None = None
    """The pruned model after training."""
    seeds: int = 1
    """Runs behind the figures (their mean)."""
    spread: float | None = None
    """Standard deviation of the last figure over the runs."""

    @property
    def final(self) -> float | None:
        """Score of the model the run ended with."""
        return self.cut if self.recovered is None else self.recovered


@dataclass(frozen=True, kw_only=True)
class SpeedPair:
    """Tokens per second of both models, measured side by side in one process."""

    phase: str
    """`prefill` or `decode`."""
    batch: int
    """Sequences at once."""
    dense: float | None = None
    """Tokens per second of the dense model."""
    pruned: float | None = None
    """Tokens per second of the pruned model: the median ratio of the rounds times `dense`."""
    rounds: tuple[float, ...] = ()
    """Speed of the pruned model over that of the dense one in every round."""
    prompt: int | None = None
    """Tokens of a prompt; of `decode`: in the cache when the clock starts."""
    decoded: int | None = None
    """Tokens generated one by one; None for `prefill`."""
    flops_ratio: float | None = None
    """FLOPs of the dense model over those of the pruned one for prompts of this length."""

    @property
    def timed(self) -> str:
        """What was timed, for example `batch 1, prompts of 128 tokens`."""
        if self.prompt is None:
            return f"batch {self.batch}"
        if self.decoded is None:
            return f"batch {self.batch}, prompts of {self.prompt:,} tokens"
        return f"batch {self.batch}, {self.decoded:,} tokens after {self.prompt:,}"

    @property
    def spread(self) -> str:
        """Lowest and highest ratio of the rounds, for example `0.97 to 1.31`."""
        rounds = self.rounds
        return f"{min(rounds):.2f} to {max(rounds):.2f}" if rounds else "not recorded"


@dataclass(frozen=True, kw_only=True)
class CutRecord:
    """One cut."""

    step: int
    """Optimizer step it happened at."""
    before: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis kind -> width per layer before the cut; `query_in_group` counts over all KV groups."""
    after: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis kind -> width per layer after the cut."""
    params: int | None = None
    """Parameters of the whole model after the cut."""
    time_share: float | None = None
    """Seconds of the cut divided by the seconds of the run."""
    plan_hash: str = ""
    """Hash of the plan that was applied."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Greedy continuations of one prompt."""

    prompt: str
    """The text both models continue."""
    dense: str | None = None
    """Continuation by the dense model."""
    pruned: str | None = None
    """Continuation by the pruned model."""
