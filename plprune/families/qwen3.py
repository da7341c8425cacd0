"""Qwen3: Llama's blocks with a norm over each head of q and k, of width head_dim, never cut."""

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, LLAMA_SUBLAYERS, Family

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    sublayers=LLAMA_SUBLAYERS,
)
