"""What a run was asked to do, in plain values, so that a resumed run can be compared with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


def recipe_of(pruner: Any) -> dict[str, Any]:
    """Settings that decide what is cut, and when.

    Args:
        pruner: the `Prune` callback, its cuts planned.

    Returns:
        Texts and plain values by name.
    """
    method, budget = pruner.method, pruner.budget
    return {
        "method": f"{method.label} {method.hyper()}" if method is not None else "none",
        "budget": budget.to_dict() if budget is not None else None,
        "schedule": repr(pruner.schedule),
        "commit": str(pruner.commit),
        "optimizer_state": pruner.optimizer_state,
        "steps": [cut.step for cut in pruner.cuts],
    }


def warn_changed(saved: Mapping[str, Any] | None, pruner: Any) -> None:
    """Say which settings a resumed run changes; cuts that were made stay as they are.

    Args:
        saved: from `recipe_of`, in the checkpoint; None in checkpoints that do not say.
        pruner: of the resumed run, its cuts planned.
    """
    now = recipe_of(pruner)
    for name, value in (saved or {}).items():
        if name in now and now[name] != value:
            log.warning(
                "%s not that of the checkpoint: %s now, %s then; the cuts that are left follow "
                "the new one",
                "the timing of the cuts is" if name == "steps" else f"prune.{name} is",
                now[name],
                value,
            )
