"""How much to keep, of what: a budget names its quantity and its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from plprune.errors import BudgetError, ConfigError, PlpruneError

Quantity = Literal["params", "flops", "kv_cache"]
Base = Literal["prunable", "blocks", "non_embedding", "model"]
_NUMBERS = {"int": "a whole number", "float": "a number", "Sequence[float]": "a list of numbers"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Target size of a model.

    Give `keep`, or `widths`, or both: then the given kinds are fixed and the others are solved for.
    """

    keep: float | None = None
    """Share of the dense quantity that stays, in (0, 1]."""
    of: Quantity = "params"
    """What the share counts: parameters, forward FLOPs per token, or KV-cache bytes."""
    base: Base = "non_embedding"
    """Of which part: prunable linears, decoder blocks, all but embedding and head, or the whole
    model."""
    widths: Mapping[str, int | list[int]] = field(default_factory=dict)
    """Units to keep by axis kind (kv_group, query_in_group per group, mlp), one number or one per
    block."""
    multiple_of: Mapping[str, int] = field(default_factory=lambda: {"mlp": 64})
    """Widths that are solved for are multiples of this, by axis kind."""
    context: int = 2048
    """Context length in tokens for `of: flops`."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BudgetError: for a share outside (0, 1], unknown names, widths below one unit, or
                values of another type.
        """
        require_numbers(self, "budget", BudgetError)
        if self.keep is None and not self.widths:
            raise BudgetError(
                "empty budget", given="neither keep nor widths", fix="set budget.keep, e.g. 0.8"
            )
        if self.keep is not None and not (math.isfinite(self.keep) and 0 < self.keep <= 1):
            raise BudgetError(
                "budget.keep out of range",
                given=str(self.keep),
                allowed="a share in (0, 1]",
                fix="0.8 keeps 80 % and removes 20 %",
            )
        for name, value, choices in (
            ("of", self.of, get_args(Quantity)),
            ("base", self.base, get_args(Base)),
        ):
            if value not in choices:
                raise BudgetError(
                    f"unknown budget.{name}", given=repr(value), allowed=", ".join(choices)
                )
        if not (is_whole(self.context) and self.context >= 0):
            raise BudgetError(
                "budget.context out of range", given=repr(self.context), allowed="tokens, 0 or more"
            )
        self._check_units()

    def _check_units(self) -> None:
        """Widths and multiples are whole numbers, at least 1."""
        for name, given in (("widths", self.widths), ("multiple_of", self.multiple_of)):
            if not isinstance(given, Mapping):
                raise BudgetError(
                    f"budget.{name} is not a mapping",
                    given=repr(given),
                    allowed="axis kinds with numbers, e.g. {'mlp': 64}",
                )
            for kind, value in given.items():
                many = value if isinstance(value, list) and name == "widths" else [value]
                if not all(is_whole(number) for number in many):
                    raise BudgetError(
                        f"budget.{name}.{kind} is not a whole number",
                        given=repr(value),
                        allowed="units, e.g. 64"
                        + (", or a list with one number for each block" * (name == "widths")),
                    )
        for kind, width in self.widths.items():
            if min(width if isinstance(width, list) else [width], default=0) < 1:
                raise BudgetError(
                    f"budget.widths.{kind} too small",
                    given=str(width),
                    allowed="at least 1 unit in every block",
                    fix="remove blocks with a depth method instead of emptying them",
                )
        for kind, multiple in self.multiple_of.items():
            if multiple < 1:
                raise BudgetError(
                    f"budget.multiple_of.{kind} too small", given=str(multiple), allowed="1 or more"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "keep": self.keep,
            "of": self.of,
            "base": self.base,
            "widths": {
                kind: list(w) if isinstance(w, list) else w for kind, w in self.widths.items()
            },
            "multiple_of": dict(self.multiple_of),
            "context": self.context,
        }


def is_whole(value: object) -> bool:
    """Whether a value is an int; True and False are not.

    Args:
        value: anything.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; True and False are not.

    Args:
        value: anything.
    """
    return isinstance(value, float) or is_whole(value)


def require_numbers(settings: Any, section: str, error: type[PlpruneError] = ConfigError) -> None:
    """Refuse settings that should be numbers and are not; YAML is typed, Python is not.

    Args:
        settings: a dataclass; its fields of type int, float and Sequence[float] are looked at.
        section: of the config, for the message.
        error: to raise.

    Raises:
        PlpruneError: naming the field.
    """
    for one in fields(settings):
        value = getattr(settings, one.name)
        kind, _, optional = str(getattr(one.type, "__name__", one.type)).partition(" | ")
        if kind not in _NUMBERS or (optional and value is None):
            continue
        many = value if kind == "Sequence[float]" else [value]
        fits = is_whole if kind == "int" else is_number
        if not isinstance(many, Sequence) or not all(fits(number) for number in many):
            raise error(
                f"{section}.{one.name} is not {_NUMBERS[kind]}",
                given=repr(value),
                allowed=_NUMBERS[kind] + (" or None" if optional else ""),
                fix="in Python, give a number without quotes",
            )


def require_objects(section: str, given: Mapping[type, object]) -> None:
    """Refuse arguments that are names, or stand in each other's place.

    Args:
        section: of the config, for the message.
        given: value by the class it must have, which names the argument; None is left to the
            caller.

    Raises:
        ConfigError: naming the argument.
    """
    for kind, value in given.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"{section}.{kind.__name__.lower()} is not of class {kind.__name__}",
                given=repr(value),
                allowed=f"an object of {kind.__module__}.{kind.__name__}, or None",
                fix="check the order of the arguments, and pass objects, not names: "
                "Prune(TransAct(), Budget(keep=0.8), Linear())",
            )
