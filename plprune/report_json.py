"""Dataclasses as plain JSON values and back, exactly."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from plprune.errors import ExportError


def encode(value: Any, at: list[Any], odd: list[list[Any]]) -> Any:
    """Turn dataclasses, lists and numbers into what JSON holds.

    Args:
        value: what to turn.
        at: keys and indices that lead to it.
        odd: takes [place, text] of every number that is not finite; it becomes null.

    Raises:
        ExportError: for an object that JSON cannot hold.
    """
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): encode(item, [*at, str(key)], odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, [*at, place], odd) for place, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        odd.append([at, str(value)])
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise ExportError(
        f"JSON cannot hold the value at {'.'.join(map(str, at))}",
        given=type(value).__name__,
        allowed="text, numbers, true/false, null, lists, dictionaries",
        fix="convert it with str(), float() or int() first",
    )


def decode(kind: Any, value: Any, at: tuple[Any, ...], odd: dict[tuple[Any, ...], float]) -> Any:
    """Rebuild what `encode` turned.

    Args:
        kind: type to rebuild.
        value: JSON value.
        at: keys and indices that lead to it.
        odd: place -> number that is not finite.

    Raises:
        ExportError: for keys or values that do not fit the type.
    """
    if at in odd:
        return odd[at]
    origin, hints = get_origin(kind), get_type_hints(kind) if is_dataclass(kind) else {}
    inner = get_args(kind)[-1] if origin is dict else get_args(kind)[0] if origin is tuple else None
    try:
        if hints:
            found = {key: decode(hints[key], value[key], (*at, key), odd) for key in value}
            return kind(**found)
        if isinstance(value, dict):
            return {key: decode(inner, item, (*at, key), odd) for key, item in value.items()}
        if isinstance(value, list):
            items = [decode(inner, item, (*at, place), odd) for place, item in enumerate(value)]
            return tuple(items) if origin is tuple else items
    except (KeyError, TypeError) as error:
        where, fix = ".".join(map(str, at)) or "the report", "use a file that plprune wrote"
        given, allowed = str(value)[:200], ", ".join(hints)
        raise ExportError(f"cannot read {where}", given=given, allowed=allowed, fix=fix) from error
    return value
