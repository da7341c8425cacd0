"""What a method looks at when a cut is due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from plprune.budget import require_numbers
from plprune.drivers.batches import Batch
from plprune.errors import ConfigError, DataError
from plprune.lit import calibration

Source = Literal["fresh", "fixed", "training"]


@dataclass(kw_only=True, eq=False)
class Statistics(Callback):
    """Source of the activations a method scores: `Prune(..., statistics=Statistics(...))`.

    A callback only so that one in the trainer's list can say where it belongs.
    """

    source: Source = "fresh"
    """A `fresh` seeded calibration draw at each cut, the same `fixed` one, or the `training` passes
    before the cut."""
    window: int = 8
    """For `training`: optimizer steps before a cut whose forward passes are observed."""
    batches: Iterable[Any] | None = None
    """Calibration batches for a script without a plprune data module: dicts with input_ids [B, T].
    The same list on every process; each takes its share."""
    probe: Batch = field(default_factory=dict, init=False, repr=False)
    """One small batch on which a commit is checked."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for an unknown source, an empty window, or batches that are no list.
        """
        require_numbers(self, "prune.statistics")
        if self.batches is not None and not isinstance(self.batches, Iterable):
            raise ConfigError(
                "prune.statistics.batches is not a list of batches",
                given=type(self.batches).__name__,
                allowed="a list or another iterable of dicts, or None",
            )
        if self.source not in get_args(Source):
            raise ConfigError(
                "unknown prune.statistics.source",
                given=repr(self.source),
                allowed=", ".join(get_args(Source)),
            )
        if self.window < 1:
            raise ConfigError(
                "empty prune.statistics.window", given=str(self.window), allowed="1 or more steps"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a place in the trainer's list.

        Raises:
            ConfigError: always; `Prune` does not call it.
        """
        raise _misplaced()

    def require_source(self, trainer: Trainer) -> None:
        """Refuse a run that could not calibrate, before it starts.

        Args:
            trainer: with its data module.

        Raises:
            ConfigError: if statistics stand in the trainer's list.
            DataError: if neither the data module nor the callback has calibration batches, or
                those of the callback cannot be used.
        """
        if any(isinstance(c, Statistics) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise _misplaced()
        if (
            self.source != "training"
            and self.batches is None
            and not calibration.has_source(trainer)
        ):
            raise DataError(
                "no source of calibration batches",
                given=f"data module {type(getattr(trainer, 'datamodule', None)).__name__}",
                allowed="a data module with calibration_batches(step, fixed), or batches",
                fix="use LitTokens (with calibration_samples above 0), or "
                "Prune(..., statistics=Statistics(batches=[...])), or there source: training",
            )
        self._keep()
        # Other iterables, such as a DataLoader, draw random numbers: they wait for their cut.
        if self.source != "training" and isinstance(self.batches, Sequence):
            calibration.require_usable(self.batches, "callback")

    def require_before(self, step: int) -> None:
        """Refuse training passes as the source of a cut that has none before it.

        Args:
            step: optimizer steps before the first cut.

        Raises:
            ConfigError: for `training` and a cut before the first step.
        """
        if self.source == "training" and step == 0:
            raise ConfigError(
                "no training pass comes before the first cut",
                given="prune.statistics.source: training, and a cut at step 0",
                allowed="a first cut after at least one step",
                fix="let the schedule begin later, or set source: fresh",
            )

    def _keep(self) -> None:
        """An iterator would be empty at the second cut."""
        if isinstance(self.batches, Iterator):
            self.batches = list(self.batches)

    def share_for(self, trainer: Trainer, cut: int) -> calibration.Share:
        """What this process runs of the calibration set of a cut.

        Args:
            trainer: running.
            cut: number of the cut.

        Returns:
            Its share.
        """
        self._keep()
        fixed = self.source == "fixed"
        share = calibration.share_of(trainer, self.batches, cut, fixed=fixed)
        self.probe = share.probe
        return share


def _misplaced() -> ConfigError:
    return ConfigError(
        "Statistics is no callback of its own",
        given="Statistics in trainer.callbacks",
        allowed="an argument of Prune",
        fix="Prune(..., statistics=Statistics(...)); in YAML prune.statistics",
    )
