"""Pruning of a folder that ends in the middle, before something is written into its work folder."""

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from plprune.streaming.work import Work


class Killed(BaseException):
    """Nothing that anybody catches."""


def killed() -> NoReturn:
    raise Killed


def killed_at(
    monkeypatch: pytest.MonkeyPatch, what: str, number: int, how: Callable[[], Any] = killed
) -> None:
    """End a run before a method of `Work` writes what belongs to a block."""
    own = getattr(Work, what)

    def keep(work: Work, block: int, *args: Any) -> Any:
        if block == number:
            how()
        return own(work, block, *args)

    monkeypatch.setattr(Work, what, keep)
