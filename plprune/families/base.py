"""What a model family is: names and layouts, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

HeadRule = Literal["any", "divides_hidden", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Where the rows of one role live inside a (possibly fused) linear."""

    path: str
    """Module path relative to the decoder block, e.g. `self_attn.q_proj`."""
    parts: tuple[str, ...] = ()
    """Roles sharing this linear, in row order; empty when it holds one role only."""
    interleaved: bool = False
    """True when the parts repeat head by head (GPT-NeoX) instead of lying one after the other."""


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """Attention or MLP of a block, with its norms: what can leave the residual stream alone."""

    before: str
    """Norm whose input is the residual stream."""
    modules: tuple[str, ...]
    """Modules that go with it, in a block."""
    after: str = ""
    """Norm of what is added to the residual stream; empty: none."""

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms that go with it."""
        return (self.before, self.after) if self.after else (self.before,)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder architecture as data: every path is relative to its owner.

    Adding a family is one file holding one instance; see `docs/add_a_family.md`.
    """

    name: str
    """Short name used in messages and structure files."""
    model_types: tuple[str, ...]
    """Values of `config.model_type` this family covers."""
    blocks: str
    """Path of the `ModuleList` of decoder blocks in the causal language model."""
    attention: str
    """Path of the attention module in a block."""
    roles: Mapping[str, Projection]
    """Roles `q k v o up down` and, for gated MLPs, `gate`."""
    embed: str
    """Path of the token embedding."""
    head: str = "lm_head"
    """Path of the output head; its weight may be tied to the embedding."""
    head_dim: str = "head_dim"
    """Attribute of the attention module that holds the width of one head."""
    dims: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType(
            {
                "heads": "num_attention_heads",
                "kv_heads": "num_key_value_heads",
                "ffn": "intermediate_size",
            }
        )
    )
    """Config attributes that hold the number of query heads, KV heads and MLP channels."""
    counters: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    """Module path in a block -> {attribute: heads | kv_heads | rep | ffn} to refresh after a
    cut."""
    config_readers: tuple[str, ...] = ()
    """Modules in a block whose forward reads head counts from `self.config`."""
    head_rule: HeadRule = "any"
    """Which head counts the stock class can load: any, only divisors of the hidden size, or none
    but its own."""
    sublayers: Mapping[str, Sublayer] = field(default_factory=lambda: MappingProxyType({}))
    """`attention` and `mlp`; empty for blocks of which neither can be removed."""
    pre_norm: str = ""
    """Config attribute that is true when norms stand before the sublayers; empty: they do. A norm
    on the residual stream itself cannot go with a sublayer."""
    export_as: tuple[str, str] | None = None
    """(model_type, class name) of a stock class with the same arithmetic that accepts any head
    count."""

    @property
    def gated(self) -> bool:
        """True when the MLP multiplies a gate with an up projection."""
        return "gate" in self.roles


LLAMA_ROLES: Mapping[str, Projection] = MappingProxyType(
    {
        "q": Projection(path="self_attn.q_proj"),
        "k": Projection(path="self_attn.k_proj"),
        "v": Projection(path="self_attn.v_proj"),
        "o": Projection(path="self_attn.o_proj"),
        "gate": Projection(path="mlp.gate_proj"),
        "up": Projection(path="mlp.up_proj"),
        "down": Projection(path="mlp.down_proj"),
    }
)
"""Paths that Llama, Mistral, Qwen2, Qwen3 and Gemma-3 share."""

LLAMA_SUBLAYERS: Mapping[str, Sublayer] = MappingProxyType(
    {
        "attention": Sublayer(before="input_layernorm", modules=("self_attn",)),
        "mlp": Sublayer(before="post_attention_layernorm", modules=("mlp",)),
    }
)
"""Of Llama, Mistral, Qwen2, Qwen3 and Phi-3."""

LLAMA_COUNTERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "self_attn": MappingProxyType({"num_key_value_groups": "rep"}),
        "mlp": MappingProxyType({"intermediate_size": "ffn"}),
    }
)
"""Counters that Llama-like modules keep beside their weights."""
