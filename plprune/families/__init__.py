"""Known decoder families; one data file each."""

from __future__ import annotations

from typing import Any

from plprune.errors import FamilyError
from plprune.families.base import Family, Projection, Sublayer
from plprune.families.gemma3 import GEMMA3
from plprune.families.gpt_neox import GPT_NEOX
from plprune.families.llama import LLAMA
from plprune.families.mistral import MISTRAL
from plprune.families.opt import OPT
from plprune.families.phi3 import PHI3
from plprune.families.qwen2 import QWEN2
from plprune.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "Projection", "Sublayer", "of"]

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, PHI3, OPT, GPT_NEOX)


def of(config: Any) -> Family:
    """Family of a Hugging Face config.

    Args:
        config: an object with `model_type`.

    Returns:
        The family whose `model_types` hold it.

    Raises:
        FamilyError: for an architecture nobody described yet.
    """
    # A per-layer export records the architecture it came from beside its own model_type.
    wanted = getattr(config, "plprune_base_model_type", None) or getattr(config, "model_type", None)
    for family in FAMILIES:
        if wanted in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise FamilyError(
        "unknown architecture",
        given=f"model_type {wanted!r}",
        allowed=known,
        fix="describe it in one data file, see docs/add_a_family.md",
    )
