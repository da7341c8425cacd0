"""How long work tells how far it is, and to nobody unless asked."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, in all) after every step of some work."""
Shown = Callable[[str], Progress]
"""Makes one, from a title."""


def silent(done: int, total: int) -> None:
    """Tell nobody.

    Args:
        done: steps so far.
        total: steps in all.
    """
    del done, total


def unseen(title: str) -> Progress:
    """Show nothing.

    Args:
        title: of what is not shown.
    """
    del title
    return silent
