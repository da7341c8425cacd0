"""What the settings of a pruning callback must be, whoever gave them."""

from __future__ import annotations

from plprune.budget import Budget
from plprune.errors import ConfigError
from plprune.methods.base import Method


def require_choices(
    method: Method | None, budget: Budget | None, commit: object, optimizer_state: str
) -> Budget | None:
    """Refuse a method without budget, and choices that do not exist.

    Args:
        method: decides what goes, or None.
        budget: how much stays.
        commit: when tensors become smaller.
        optimizer_state: what a cut does to it.

    Returns:
        The budget, or that of the method.

    Raises:
        ConfigError: naming the setting.
    """
    budget = budget or (None if method is None else method.own_budget())
    if method is not None and budget is None:
        raise ConfigError(
            "a pruning method without a budget", given=method.label, fix="set prune.budget"
        )
    if not (commit in ("every", "last") or (isinstance(commit, int) and commit >= 1)):
        raise ConfigError(
            "unknown prune.commit", given=repr(commit), allowed="every, last, or a number >= 1"
        )
    if optimizer_state not in ("slice", "reset"):
        raise ConfigError(
            "unknown prune.optimizer_state", given=repr(optimizer_state), allowed="slice, reset"
        )
    return budget
