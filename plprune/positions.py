"""How many tokens of a sequence a model knows."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from plprune.errors import DataError
from plprune.unwrap import unwrap

log = logging.getLogger(__name__)


def require_positions(model: Any, length: int, name: str) -> None:
    """Refuse sequences beyond a table of learned positions; warn where positions are computed.

    Args:
        model: plain or wrapped Hugging Face model.
        length: tokens of a sequence.
        name: of the setting that says so.

    Raises:
        DataError: if the model has no position for the last tokens.
    """
    plain: Any = unwrap(model)
    most = getattr(getattr(plain, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int) or length <= most:
        return
    if any(isinstance(m, nn.Embedding) and "position" in n for n, m in plain.named_modules()):
        raise DataError(
            "the sequences are longer than the model knows positions",
            given=f"{name}: {length}",
            allowed=f"1..{most}",
            fix=f"lower {name}",
        )
    log.warning("%s is %d, the model was trained on %d tokens at most", name, length, most)
