"""Errors for users: what was given, what is allowed, how to fix it."""

from __future__ import annotations


class PlpruneError(ValueError):
    """Base of every error a user of plprune can cause.

    Args:
        what: what is wrong, one line.
        given: what was found.
        allowed: what would have been accepted.
        fix: what to change.
    """

    def __init__(self, what: str, *, given: str = "", allowed: str = "", fix: str = "") -> None:
        self.what, self.given, self.allowed, self.fix = what, given, allowed, fix
        self.repeats = ""
        """Text of another process's error that this one only passes on."""
        details = [
            f"{name} {text}" for name, text in (("given", given), ("allowed", allowed)) if text
        ]
        if fix:
            details.append(f"fix: {fix}")
        super().__init__(what + (": " + "; ".join(details) if details else ""))


class BudgetError(PlpruneError):
    """A budget or width that cannot be met."""


class FamilyError(PlpruneError):
    """An architecture that is not described, or a module that does not fit its description."""


class PlanError(PlpruneError):
    """A plan that cannot be made or does not fit the model."""


class StructureError(PlpruneError):
    """A saved structure that does not fit the model or is damaged."""


class DataError(PlpruneError):
    """Text, tokens or calibration data that cannot be used."""


class ModelError(PlpruneError):
    """A model that cannot be read or found."""


class ConfigError(PlpruneError):
    """A setting out of its range."""


class ExportError(PlpruneError):
    """An export that cannot be written."""


class CheckpointError(PlpruneError):
    """A checkpoint that is damaged or belongs to another structure."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, short enough for a message of ours.

    Args:
        error: any exception.

    Returns:
        Its first line (two when the first announces the second), or its type.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
