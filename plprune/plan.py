"""What a method decides: edits as values, with a hash every rank can compare.

Legend: R rows, C columns of a linear, K kept units of an axis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plprune.budget import Budget


@dataclass(frozen=True, kw_only=True, eq=False)
class Keep:
    """Keep some units of an axis, drop the rest."""

    axis: str
    """Axis name in the spec."""
    kept: Tensor
    """[K] int64, ascending unit numbers in the coordinates of the spec."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Set single weights of a linear to zero."""

    module: str
    """Module path."""
    keep: Tensor
    """[R, C] bool, True means keep."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Write:
    """Replace the weight or the bias a linear computes with.

    Under LoRA the base weight is set so that base and adapters together give it.
    """

    module: str
    """Module path."""
    weight: Tensor | None = None
    """[R, C] in rows-by-columns order whatever the storage, or None to leave it."""
    bias: Tensor | None = None
    """[R], or None to leave it; a linear without bias gets one."""


Edit = Keep | Mask | Write


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything one cut will do to one model."""

    edits: tuple[Edit, ...]
    """In any order; surgery applies Write, then Mask, then Keep."""
    fingerprint: str
    """Fingerprint of the spec the plan was made for."""
    method: str
    """Class name of the method."""
    hyper: Mapping[str, Any] = field(default_factory=dict)
    """The method's hyper-parameters, plain values."""
    asked: Budget | None = None
    """The budget the plan answers."""
    got: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Units per block after the cut, by axis kind."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """[U] float32 by axis name, for the report; not part of the hash."""
    calibration: str = ""
    """sha256 of the calibration tokens, empty when none were used."""

    @property
    def hash(self) -> str:
        """16 hex digits over the spec it fits, the method and every edit."""
        digest = hashlib.sha256()
        head = [self.fingerprint, self.method, dict(self.hyper), self.calibration]
        digest.update(json.dumps(head, sort_keys=True, default=str).encode())
        for edit in sorted(
            self.edits,
            key=lambda e: (type(e).__name__, e.axis if isinstance(e, Keep) else e.module),
        ):
            digest.update(repr((type(edit).__name__, *_names(edit))).encode())
            for name, tensor in _tensors(edit):
                digest.update(repr((name, tuple(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def empty(self) -> bool:
        """True when the plan changes nothing."""
        return not self.edits


def _names(edit: Edit) -> tuple[str, ...]:
    return (edit.axis,) if isinstance(edit, Keep) else (edit.module,)


def _tensors(edit: Edit) -> tuple[tuple[str, Tensor], ...]:
    if isinstance(edit, Keep):
        return (("kept", edit.kept),)
    if isinstance(edit, Mask):
        return (("keep", edit.keep),)
    # bfloat16 has no numpy twin; float32 holds every value of it exactly.
    return tuple(
        (n, t.float()) for n, t in (("weight", edit.weight), ("bias", edit.bias)) if t is not None
    )
