"""Mistral: Llama's blocks with an optional sliding window."""

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, LLAMA_SUBLAYERS, Family

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    sublayers=LLAMA_SUBLAYERS,
)
