"""Qwen2 and Qwen2.5: Llama's blocks with biases on q, k and v."""

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, LLAMA_SUBLAYERS, Family

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    sublayers=LLAMA_SUBLAYERS,
    # Qwen2Config has no head_dim field, but carries the attribute when it is given.
)
