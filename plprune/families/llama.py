"""Llama 1 to 3 and everything that ships as `LlamaForCausalLM` (SmolLM2, TinyLlama, ...)."""

from plprune.families.base import LLAMA_COUNTERS, LLAMA_ROLES, LLAMA_SUBLAYERS, Family

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    blocks="model.layers",
    attention="self_attn",
    roles=LLAMA_ROLES,
    embed="model.embed_tokens",
    counters=LLAMA_COUNTERS,
    sublayers=LLAMA_SUBLAYERS,
    head_rule="divides_hidden",
    # Same arithmetic without attention/MLP bias and window; its config takes any head count.
    export_as=("mistral", "MistralForCausalLM"),
)
