"""Statistics from the training passes before a cut, instead of extra calibration passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from plprune.dist import rank, reduce
from plprune.drivers.batches import Batch, token_mask
from plprune.errors import DataError, PlanError
from plprune.observe import Observation, StatMap, check, observe, to_cpu
from plprune.stats.base import Tap

MODEL_KEYS = ("input_ids", "attention_mask")


class Watch:
    """Hooks that collect over the training passes of a window and travel with checkpoints."""

    def __init__(self) -> None:
        self.probe: Batch = {}
        """One row of the batch seen last, on which a commit is checked."""
        self._seen: Observation | None = None
        self._stack = ExitStack()
        self._restored: list[dict[str, Any]] | None = None

    def start(self, model: nn.Module, taps: Sequence[Tap], batch: Any, skip_first: int) -> None:
        """Watch the training pass of one batch; the first call puts the hooks on.

        Args:
            model: the language model.
            taps: what the method looks at.
            batch: a dict with `input_ids` and perhaps `attention_mask`.
            skip_first: tokens at the start of each sequence to leave out.

        Raises:
            DataError: if the batch has no `input_ids`.
        """
        require_observable(batch)
        if self._seen is None:
            self._seen = self._stack.enter_context(observe(model, taps))
            device = next(model.parameters()).device
            self._seen.stats.update(_unpacked(self._restored or [], taps, device))
            self._restored = None
            # Compiled graphs are not guarded on hooks: passes that are watched run eagerly.
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._seen.active, self._seen.token_mask = True, token_mask(batch, skip_first)
        self.probe = {key: batch[key][:1].detach() for key in MODEL_KEYS if key in batch}

    def pause(self) -> None:
        """Stop counting until the next training pass: validation and recomputation do not count."""
        if self._seen is not None:
            self._seen.active = False

    def stop(self) -> None:
        """Take the hooks off and forget what they saw."""
        if self._seen is not None:
            self._stack.close()
            self._seen = None

    def take(self, taps: Sequence[Tap], step: int) -> StatMap:
        """What was seen since the last cut, summed over ranks; the hooks go.

        Args:
            taps: what the method looks at.
            step: optimizer steps done, for the message.

        Returns:
            Statistics on the CPU.

        Raises:
            PlanError: if no training pass came before.
        """
        if self._seen is None:
            raise PlanError(
                "no training pass was observed before this cut",
                given=f"a cut at step {step}",
                allowed="a cut after at least one step",
                fix="use statistics.source: fresh, or cut later",
            )
        stats = reduce(self._seen.stats)
        self.stop()
        check(stats, taps)
        return to_cpu(stats)

    def state(self) -> list[dict[str, Any]]:
        """Sums of all ranks so far, for a checkpoint inside the window; all ranks must call."""
        if self._seen is None:
            return self._restored or []
        return [
            {
                "module": tap.module,
                "until": tap.until,
                "stat": tap.stat.__name__,
                "sums": dict(vars(stat)),
            }
            for tap, stat in reduce(self._seen.stats).items()
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from the sums of a checkpoint: one rank, or they would count once for each."""
        self._restored = state if rank() == 0 else []


def require_observable(batch: Any) -> None:
    """Refuse training batches that say nothing of their tokens.

    Args:
        batch: of the training data.

    Raises:
        DataError: if it is no dict with `input_ids`.
    """
    if not isinstance(batch, dict) or "input_ids" not in batch:
        raise DataError(
            "training batches cannot be observed",
            given=type(batch).__name__,
            allowed="dicts with input_ids [B, T]",
            fix="set statistics.source: fresh",
        )


def _unpacked(state: list[dict[str, Any]], taps: Sequence[Tap], device: torch.device) -> StatMap:
    known = {(tap.module, tap.until, tap.stat.__name__): tap for tap in taps}
    stats: StatMap = {}
    for entry in state:
        tap = known[entry["module"], entry.get("until", ""), entry["stat"]]
        stats[tap] = tap.stat(**{name: value.to(device) for name, value in entry["sums"].items()})
    return stats
