"""Gemma-3 text models: Llama's paths, q/k norms, four norms a block, sliding and full attention."""

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, Family

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    head_rule="divides_hidden",
)
