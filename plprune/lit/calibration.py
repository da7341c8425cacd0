"""Where calibration batches come from, and which of them a process works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from plprune.drivers.whole import Batch
from plprune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process runs of a calibration set."""

    batches: Sequence[Batch]
    """Batches it looks at."""
    idle: Sequence[Batch]
    """Batches to run without looking, so that all processes make equally many passes."""
    probe: Batch
    """One row, equal on every process."""


def share_of(trainer: Trainer, given: Iterable[Batch] | None, cut: int, *, fixed: bool) -> Share:
    """Calibration batches of one cut.

    Args:
        trainer: its data module may offer `calibration_batches(step, fixed)`.
        given: batches the user handed to the callback, equal on every process; they win.
        cut: number of the cut, seeds a fresh draw.
        fixed: the same batches at every cut.

    Returns:
        Batches with `input_ids` and, if there is padding, `attention_mask`: the whole set on one
        process, otherwise every n-th; sums are reduced later.

    Raises:
        DataError: if there is neither, or the set is empty.
    """
    if given is not None:
        whole = list(given)
    elif has_source(trainer):
        whole = list(trainer.datamodule.calibration_batches(cut, fixed))  # type: ignore[attr-defined]
    else:
        whole = []
    if not whole or not all("input_ids" in batch for batch in whole):
        raise DataError(
            "no calibration batches",
            given=f"{len(whole)} batches from the "
            f"{'callback' if given is not None else 'data module'}",
            allowed="dicts with input_ids [B, T]",
            fix="use plprune.lit.data.LitTokens, or pass Statistics(batches=[...]) to Prune",
        )
    rank, world = rank_and_world(trainer)
    mine = whole[rank::world]
    missing = -(-len(whole) // world) - len(mine)
    probe = {key: value[:1] for key, value in whole[0].items()}
    return Share(batches=mine, idle=whole[:1] * missing, probe=probe)


def rank_and_world(trainer: Trainer) -> tuple[int, int]:
    """Number of this process among those that share data, and how many there are.

    Args:
        trainer: with its strategy set up.

    Returns:
        Rank and number of ranks.
    """
    share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return int(share["rank"]), int(share["num_replicas"])


def has_source(trainer: Trainer) -> bool:
    """True if the data module offers calibration batches."""
    return hasattr(getattr(trainer, "datamodule", None), "calibration_batches")
