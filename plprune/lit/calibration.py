"""Where calibration batches come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch import Trainer

from plprune.drivers.whole import Batch
from plprune.errors import DataError


def batches_of(
    trainer: Trainer, given: Iterable[Batch] | None, cut: int, *, fixed: bool
) -> Sequence[Batch]:
    """Calibration batches of one cut.

    Args:
        trainer: its data module may offer `calibration_batches(step, fixed)`.
        given: batches the user handed to the callback; they win.
        cut: number of the cut, seeds a fresh draw.
        fixed: the same batches at every cut.

    Returns:
        Batches with `input_ids` and, if there is padding, `attention_mask`.

    Raises:
        DataError: if there is neither, or the set is empty.
    """
    if given is not None:
        batches = list(given)
    elif has_source(trainer):
        # The whole set, equal everywhere; each rank runs its share and sums are reduced.
        whole = list(trainer.datamodule.calibration_batches(cut, fixed))  # type: ignore[attr-defined]
        batches = whole[trainer.global_rank :: trainer.world_size]
    else:
        batches = []
    if not batches or not all("input_ids" in batch for batch in batches):
        raise DataError(
            "no calibration batches",
            given=f"{len(batches)} batches from the "
            f"{'callback' if given is not None else 'data module'}",
            allowed="dicts with input_ids [B, T]",
            fix="use plprune.lit.data.LitTokens, or pass Statistics(batches=[...]) to Prune",
        )
    return batches


def has_source(trainer: Trainer) -> bool:
    """True if the data module offers calibration batches."""
    return hasattr(getattr(trainer, "datamodule", None), "calibration_batches")
