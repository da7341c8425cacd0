"""Gemma-3 text models: Llama's paths, q/k norms, four norms a block, sliding and full attention."""

from types import MappingProxyType

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, Family, Sublayer

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    sublayers=MappingProxyType(
        {
            "attention": Sublayer(
                before="input_layernorm",
                modules=("self_attn",),
                after="post_attention_layernorm",
            ),
            "mlp": Sublayer(
                before="pre_feedforward_layernorm",
                modules=("mlp",),
                after="post_feedforward_layernorm",
            ),
        }
    ),
    head_rule="divides_hidden",
)
